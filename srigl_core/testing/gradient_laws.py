"""The laws of the gradients (SPEC 2, Backward)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._plan import plan_of
from srigl_core._registry import get_backend
from srigl_core.contract import Backend, MatmulGradients
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
from srigl_core.testing.thread_calls import in_threads

__all__ = ["GRADIENT_LAWS"]

GRADIENT_LAWS: list[Law] = []
_law = registering(GRADIENT_LAWS, "condensed_matmul_backward", matmul_problem)


@_law(against="extended precision", within="the error bound of SPEC 2")
def gradients_are_within_the_error_bound(backend: Backend, problem: MatmulProblem) -> None:
    """dx, dvalues and dbias obey the bound of SPEC 2; those of 16-bit values are float32."""
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    plan = plan_of(problem.weight, backend)
    got = plan.backward(problem.grad, problem.x)
    for name, gradient in _each(got):
        if name != "x" and gradient.dtype.itemsize == 2:
            raise LawViolation(f"the gradient of {name} has dtype {gradient.dtype}")
        assert_within(gradient, expected[name], f"the gradient of {name}")


@_law(against="the reference and SciPy CSR", within="two bounds")
def gradients_agree_with_other_oracles(backend: Backend, problem: MatmulProblem) -> None:
    """The reference and SciPy CSR give the same gradients, within twice the bound."""
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    got = plan_of(problem.weight, backend).backward(problem.grad, problem.x)
    for oracle in sorted({"reference", "scipy"} - {backend.name}):
        other = plan_of(problem.weight, get_backend(oracle)).backward(problem.grad, problem.x)
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
    got = plan_of(problem.weight, backend).backward(grad, x, wrt=("x", "values"))
    for name, gradient in _each(got):
        assert_within(gradient, expected[name], f"with NaN elsewhere, the gradient of {name}")


@_law(against="extended precision", within="the error bound of SPEC 2")
def non_finite_gradients_propagate(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity in connected places spread by IEEE rules, and no further."""
    grad, x, values = problem.grad.copy(), problem.x.copy(), problem.weight.values.copy()
    grad[..., -1] = special_numbers(grad[..., -1].shape, 3)
    x[..., 0] = special_numbers(x[..., 0].shape, 4)
    values[:, -1] = special_numbers(values[:, -1].shape, 5)
    cases = {
        "grad and x": replace(problem, grad=grad, x=x),
        # 0 times infinity: a zero is no reason to skip a term.
        "x, and grad 0": replace(problem, grad=np.zeros_like(problem.grad), x=x),
        "the values, and grad 0": replace(
            problem, weight=problem.weight.with_values(values), grad=np.zeros_like(problem.grad)
        ),
    }
    for what, case in cases.items():
        expected = expected_gradients(case.weight, case.grad, case.x)
        got = plan_of(case.weight, backend).backward(case.grad, case.x)
        for name, gradient in _each(got):
            assert_within(gradient, expected[name], f"with NaN and inf in {what}, that of {name}")


@_law(against="itself", within="no bit")
def same_inputs_give_the_same_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """Gradients have the same bits again, on any number of threads, also in a flushing thread."""
    plan = plan_of(problem.weight, backend)
    first = plan.backward(problem.grad, problem.x)
    repeats = [plan.backward(problem.grad, problem.x, threads=t) for t in (1, 2, 3, 8)]
    with flushing_subnormals():
        repeats.append(plan.backward(problem.grad, problem.x))
    for again in repeats:
        _assert_same_gradients(again, first, "again,")


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
    plan = plan_of(problem.weight, backend)
    with flushing_subnormals():
        flushed = plan.backward(problem.grad, problem.x, wrt=("x", "bias"))
    for got in (plan.backward(problem.grad, problem.x, wrt=("x", "bias")), flushed):
        for name, gradient in _each(got):
            assert_within(gradient, expected[name], f"the subnormal gradient of {name}")


@_law(against="extended precision", within="the error bound of SPEC 2")
def gradients_are_written_to_out(backend: Backend, problem: MatmulProblem) -> None:
    """With out= each gradient is written there whole, in its type, and nothing else is."""
    if not capabilities_of(backend).out:
        raise NotApplicable("it returns its results")
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    out = MatmulGradients(
        **{name: out_array(outcome.z.shape, problem) for name, outcome in expected.items()}
    )
    got = plan_of(problem.weight, backend).backward(problem.grad, problem.x, out=out)
    for (name, gradient), (_, given) in zip(_each(got), _each(out), strict=True):
        if gradient is not given:
            raise LawViolation(f"the gradient of {name} was not returned as given in out")
        assert_within(gradient, expected[name], f"out of {problem.out_dtype}, gradient of {name}")
        assert_neighbours_untouched(gradient, problem)


@_law(against="extended precision", within="the error bound of SPEC 2")
def each_gradient_may_be_asked_for_alone(backend: Backend, problem: MatmulProblem) -> None:
    """Whichever gradients are asked for are right, and the others are None."""
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    plan = plan_of(problem.weight, backend)
    for wrt in [wrt for size in (1, 2) for wrt in combinations(expected, size)]:
        found = dict(_each(plan.backward(problem.grad, problem.x, wrt=wrt)))
        if set(found) != set(wrt):
            raise LawViolation(f"asked for {wrt}, got the gradients of {tuple(found)}")
        for name, gradient in found.items():
            assert_within(gradient, expected[name], f"of {wrt}, the gradient of {name}")


@_law(against="itself", within="no bit")
def with_values_has_its_own_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """Gradients of plan.with_values(v) are those of a plan made anew; the old plan's stay."""
    plan = plan_of(problem.weight, backend)
    first = plan.backward(problem.grad, problem.x)
    other = problem.weight.with_values(problem.weight.values[::-1, ::-1])
    changed = plan.with_values(other.values).backward(problem.grad, problem.x)
    fresh = plan_of(other, backend).backward(problem.grad, problem.x)
    _assert_same_gradients(changed, fresh, "of with_values,")
    _assert_same_gradients(plan.backward(problem.grad, problem.x), first, "of the old plan,")


@_law(against="extended precision, and itself", within="the error bound of SPEC 2, and no bit")
def earlier_calls_leave_gradients_alone(backend: Backend, problem: MatmulProblem) -> None:
    """What counts is what grad and x hold now; gradients stay as they are at later calls."""
    plan = plan_of(problem.weight, backend)
    grad, x = np.array(problem.grad), np.array(problem.x)
    if "condensed_matmul" in backend.capabilities.operations:
        plan(-x)
    first = plan.backward(grad, x)
    kept = MatmulGradients(**{name: gradient.copy() for name, gradient in _each(first)})
    expected = expected_gradients(problem.weight, grad, x)
    for name, gradient in _each(first):
        assert_within(gradient, expected[name], f"after another product, the gradient of {name}")
    for array in (grad, x):
        array *= array.dtype.type(-0.5)
    expected = expected_gradients(problem.weight, grad, x)
    for name, gradient in _each(plan.backward(grad, x)):
        assert_within(gradient, expected[name], f"with other numbers, the gradient of {name}")
    _assert_same_gradients(first, kept, "of an earlier call,")


@_law(against="itself", within="no bit")
def threads_may_share_a_plan_for_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """Called from several threads at once, a plan gives each the bits of its own gradients."""
    plan = plan_of(problem.weight, backend)
    grads = (problem.grad, -problem.grad, np.zeros_like(problem.grad))
    cases = [(grad, problem.x) for grad in grads]
    alone = [plan.backward(*case) for case in cases]
    together = in_threads([partial(plan.backward, *case) for case in cases])
    for expected, results in zip(alone, together, strict=True):
        for got in results:
            _assert_same_gradients(got, expected, "beside those of other threads,")


def _assert_same_gradients(got: MatmulGradients, expected: MatmulGradients, what: str) -> None:
    for (name, mine), (_, due) in zip(_each(got), _each(expected), strict=True):
        assert_same_bits(mine, due, f"{what} the gradient of {name}")


@_law(against="itself", within="no bit")
def gradients_do_not_write_their_inputs(backend: Backend, problem: MatmulProblem) -> None:
    """Neither grad nor x nor the weight changes."""
    weight = problem.weight
    inputs = (problem.grad, problem.x, weight.values, weight.indices)
    before = [array.tobytes() for array in inputs]
    plan_of(weight, backend).backward(problem.grad, problem.x)
    if before != [array.tobytes() for array in inputs]:
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
    plan = plan_of(problem.weight, backend)
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
    dvalues = plan_of(weight, backend).backward(problem.grad, problem.x, wrt=("values",)).values
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
