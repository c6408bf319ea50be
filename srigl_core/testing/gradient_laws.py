"""The laws of the gradients (SPEC 2, Backward)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.contract import Backend, MatmulGradients
from srigl_core.registry import get_backend
from srigl_core.testing.comparisons import assert_near, assert_same_bits, assert_within
from srigl_core.testing.flush_mode import flushing_subnormals
from srigl_core.testing.kernel_capabilities import KernelCapabilities, capabilities_of
from srigl_core.testing.law import Law, LawViolation, NotApplicable, registering
from srigl_core.testing.oracles import expected_gradients, expected_product
from srigl_core.testing.out_arrays import assert_neighbours_untouched, out_array
from srigl_core.testing.problems import (
    Chooser,
    MatmulProblem,
    matmul_problem,
    special_numbers,
    with_subnormal_terms,
)

__all__ = ["GRADIENT_LAWS"]

GRADIENT_LAWS: list[Law] = []
_law = registering(GRADIENT_LAWS, "condensed_matmul_backward", matmul_problem)


@_law(against="extended precision", within="the error bound of SPEC 2")
def gradients_are_within_the_error_bound(backend: Backend, problem: MatmulProblem) -> None:
    """dx, dvalues and dbias obey the bound of SPEC 2; those of 16-bit values are float32."""
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    plan = problem.weight.plan(backend)
    got = plan.backward(problem.grad, problem.x)
    for name, gradient in _each(got):
        if name != "x" and gradient.dtype.itemsize == 2:
            raise LawViolation(f"the gradient of {name} has dtype {gradient.dtype}")
        assert_within(gradient, expected[name], f"the gradient of {name}")


@_law(against="the reference and SciPy CSR", within="two bounds")
def gradients_agree_with_other_oracles(backend: Backend, problem: MatmulProblem) -> None:
    """The reference and SciPy CSR give the same gradients, within twice the bound."""
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    got = problem.weight.plan(backend).backward(problem.grad, problem.x)
    for oracle in {"reference", "scipy"} - {backend.name}:
        other = problem.weight.plan(get_backend(oracle)).backward(problem.grad, problem.x)
        for (name, mine), (_, theirs) in zip(_each(got), _each(other), strict=True):
            bound = 2 * expected[name].bound(mine.dtype)
            assert_near(mine, theirs, bound, f"the gradient of {name}, beside that of {oracle},")


@_law(against="extended precision", within="the error bound of SPEC 2")
def unconnected_places_do_not_reach_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """NaN in grad at ablated rows or in x at unconnected columns reaches neither dx nor dvalues."""
    ablated = problem.weight.ablated
    unconnected = ~problem.weight.to_mask().any(axis=0)
    if not ablated.size and not unconnected.any():
        raise NotApplicable("nothing is ablated or unconnected")
    grad, x = problem.grad.copy(), problem.x.copy()
    grad[..., ablated] = special_numbers(grad[..., ablated].shape, 1)
    x[..., unconnected] = special_numbers(x[..., unconnected].shape, 2)
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    got = problem.weight.plan(backend).backward(grad, x, wrt=("x", "values"))
    for name, gradient in _each(got):
        assert_within(gradient, expected[name], f"with NaN elsewhere, the gradient of {name}")


@_law(against="extended precision", within="the error bound of SPEC 2")
def non_finite_gradients_propagate(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity in connected places spread by IEEE rules, and no further."""
    grad, x = problem.grad.copy(), problem.x.copy()
    grad[..., -1] = special_numbers(grad[..., -1].shape, 3)
    x[..., 0] = special_numbers(x[..., 0].shape, 4)
    expected = expected_gradients(problem.weight, grad, x)
    got = problem.weight.plan(backend).backward(grad, x)
    for name, gradient in _each(got):
        assert_within(gradient, expected[name], f"with NaN and inf, the gradient of {name}")


@_law(against="itself", within="no bit")
def same_inputs_give_the_same_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """Gradients have the same bits again, on any number of threads, also in a flushing thread."""
    plan = problem.weight.plan(backend)
    first = plan.backward(problem.grad, problem.x)
    repeats = [plan.backward(problem.grad, problem.x, threads=t) for t in (1, 2, 3)]
    with flushing_subnormals():
        repeats.append(plan.backward(problem.grad, problem.x))
    for again in repeats:
        for (name, mine), (_, before) in zip(_each(again), _each(first), strict=True):
            assert_same_bits(mine, before, f"the gradient of {name}")


def _subnormal_problem(choose: Chooser, able: KernelCapabilities) -> MatmulProblem:
    """Build gradients of which every term of dx is subnormal."""
    return with_subnormal_terms(matmul_problem(choose, able), values=choose.pick((False, True)))


@_law(
    against="extended precision",
    within="the error bound of SPEC 2",
    build=_subnormal_problem,
)
def subnormal_gradients_are_honoured(backend: Backend, problem: MatmulProblem) -> None:
    """Subnormal gradients reach dx and dbias, also in a thread that flushes such numbers."""
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    plan = problem.weight.plan(backend)
    with flushing_subnormals():
        flushed = plan.backward(problem.grad, problem.x, wrt=("x", "bias"))
    for got in (plan.backward(problem.grad, problem.x, wrt=("x", "bias")), flushed):
        for name, gradient in _each(got):
            assert_within(gradient, expected[name], f"the subnormal gradient of {name}")


@_law(against="extended precision", within="the error bound of SPEC 2")
def gradients_are_written_to_out(backend: Backend, problem: MatmulProblem) -> None:
    """With out= each gradient is written there whole, in its type; inputs are not written."""
    if not capabilities_of(backend).out:
        raise NotApplicable("it returns its results")
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    out = MatmulGradients(
        **{name: out_array(outcome.z.shape, problem) for name, outcome in expected.items()}
    )
    before = problem.grad.tobytes(), problem.x.tobytes()
    got = problem.weight.plan(backend).backward(problem.grad, problem.x, out=out)
    for (name, gradient), (_, given) in zip(_each(got), _each(out), strict=True):
        if gradient is not given:
            raise LawViolation(f"the gradient of {name} was not returned as given in out")
        assert_within(gradient, expected[name], f"out of {problem.out_dtype}, gradient of {name}")
        assert_neighbours_untouched(gradient, problem)
    if before != (problem.grad.tobytes(), problem.x.tobytes()):
        raise LawViolation("an input was written")


def _each(gradients: MatmulGradients) -> Iterator[tuple[str, NDArray[Any]]]:
    for part in fields(gradients):
        gradient = getattr(gradients, part.name)
        if gradient is not None:
            yield part.name, gradient


# By the definition of a gradient: it is what the product, by a linear function of it, changes by.


@_law(against="the reference's product", within="the error bounds of both")
def gradient_of_x_is_the_adjoint(backend: Backend, problem: MatmulProblem) -> None:
    """<grad, A x> is <dx, x>: dx is the adjoint of the product."""
    plan = problem.weight.plan(backend)
    dx = plan.backward(problem.grad, problem.x, wrt=("x",)).x
    assert dx is not None
    expected = expected_gradients(problem.weight, problem.grad, problem.x)["x"]
    product = expected_product(problem.weight, problem.x, None, "none")
    _assert_equal_sums(
        (problem.grad, product.z, np.zeros_like(product.z)),
        (problem.x, dx, expected.bound(dx.dtype)),
        "<grad, A x> and <dx, x>",
    )


@_law(against="the reference's product", within="the error bounds of both")
def gradient_of_values_is_that_of_differences(backend: Backend, problem: MatmulProblem) -> None:
    """Where one value changes, <grad, A x> changes by that times the value's gradient."""
    weight = problem.weight
    dvalues = weight.plan(backend).backward(problem.grad, problem.x, wrt=("values",)).values
    assert dvalues is not None
    expected = expected_gradients(weight, problem.grad, problem.x)["values"]
    bound = expected.bound(dvalues.dtype)
    for i, j in {(0, 0), (weight.n_active - 1, weight.fan_in - 1)}:
        values = np.zeros_like(weight.values)
        values[i, j] = 1
        # The product is linear in the values, so that this is the difference quotient itself.
        product = expected_product(weight.with_values(values), problem.x, None, "none")
        _assert_equal_sums(
            (problem.grad, product.z, np.zeros_like(product.z)),
            (np.ones(1), dvalues[i, j].reshape(1), bound[i, j].reshape(1)),
            f"the change of <grad, A x> by values[{i}, {j}] and its gradient",
        )


def _assert_equal_sums(one: Any, other: Any, what: str) -> None:
    """Compare sums of products; each is given as factors, results, and the bounds of these."""
    sums, allowed = [], np.longdouble(0)
    with np.errstate(all="ignore"):
        for factors, results, bound in (one, other):
            terms = factors.astype(np.longdouble) * results.astype(np.longdouble)
            sums.append(terms.sum())
            allowed += (np.abs(factors.astype(np.longdouble)) * bound).sum()
            # What summing up here rounds off.
            allowed += terms.size * np.finfo(np.longdouble).eps * np.abs(terms).sum()
        if not np.isfinite([*sums, allowed]).all():
            raise NotApplicable("a sum is not finite")
        if abs(sums[0] - sums[1]) > allowed:
            raise LawViolation(
                f"{what} should be equal: expected {float(sums[0])!r}, got {float(sums[1])!r}, "
                f"where {float(allowed):.3g} is allowed"
            )
