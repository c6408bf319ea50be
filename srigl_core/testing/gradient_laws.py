"""The laws of the gradients (SPEC 2, Backward)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._plan import Plan, prepare
from srigl_core.contract import Backend, MatmulGradients
from srigl_core.testing.bounds import Outcome
from srigl_core.testing.comparisons import (
    assert_near,
    assert_neighbours_untouched,
    assert_same_bits,
    assert_unwritten,
    assert_within,
    out_array,
)
from srigl_core.testing.flush_mode import flushing_subnormals
from srigl_core.testing.kernel_capabilities import capabilities_of
from srigl_core.testing.law import Law, LawViolation, NotApplicable, law_decorator
from srigl_core.testing.oracles import expected_gradients, expected_product
from srigl_core.testing.problem_arrays import combinable_dtypes
from srigl_core.testing.product_problems import MatmulProblem, matmul_problem, subnormal_problem
from srigl_core.testing.thread_calls import THREADS, assert_repeatable, assert_same_in_threads

__all__ = ["GRADIENT_LAWS"]

GRADIENT_LAWS: list[Law] = []
_law = law_decorator(GRADIENT_LAWS, "condensed_matmul_backward", matmul_problem)


def _backward(plan: Plan, problem: MatmulProblem, **options: Any) -> MatmulGradients:
    return plan.backward(problem.grad, problem.x, **options)


def _expected(problem: MatmulProblem) -> dict[str, Outcome]:
    return expected_gradients(problem.weight, problem.grad, problem.x)


def _by_name(gradients: MatmulGradients) -> dict[str, NDArray[Any]]:
    """Return the gradients that are not None."""
    return {name: array for name, array in vars(gradients).items() if array is not None}


def _assert_gradients(
    gradients: MatmulGradients, expected: Mapping[str, Outcome], what: str = ""
) -> None:
    for name, gradient in _by_name(gradients).items():
        assert_within(gradient, expected[name], f"{what}the gradient of {name}")


def _assert_same_gradients(
    gradients: MatmulGradients, expected: MatmulGradients, what: str
) -> None:
    for name, gradient in _by_name(gradients).items():
        assert_same_bits(gradient, getattr(expected, name), f"{what}the gradient of {name}")


@_law("extended precision", "within the error bound of SPEC 2")
def gradients_are_within_the_error_bound(backend: Backend, problem: MatmulProblem) -> None:
    """dx, dvalues and dbias obey the bound of SPEC 2; those of 16-bit values are float32."""
    plan = prepare(problem.weight, backend=backend)
    gradients = _backward(plan, problem)
    for name in ("values", "bias"):
        dtype = getattr(gradients, name).dtype
        if dtype.name in ("float16", "bfloat16"):
            raise LawViolation(f"the gradient of {name} has dtype {dtype}, expected float32")
    _assert_gradients(gradients, _expected(problem))
    x, grad = (each.reshape(-1, each.shape[-1]) for each in (problem.x, problem.grad))
    if len(x) > _FEW_ROWS:  # which other kernels may compute
        few = replace(problem, x=x[:_FEW_ROWS].copy(), grad=grad[:_FEW_ROWS].copy())
        _assert_gradients(_backward(plan, few), _expected(few), "of the first two rows, ")


_FEW_ROWS = 2


@_law("the reference and SciPy CSR", "within twice the bound")
def gradients_agree_with_other_oracles(backend: Backend, problem: MatmulProblem) -> None:
    """The reference and SciPy CSR give the same gradients, within twice the bound."""
    expected = _expected(problem)
    gradients = _backward(prepare(problem.weight, backend=backend), problem)
    for oracle in sorted({"reference", "scipy"} - {backend.name}):
        others = _by_name(_backward(prepare(problem.weight, backend=oracle), problem))
        for name, gradient in _by_name(gradients).items():
            bound = 2 * expected[name].bound(gradient.dtype)
            what = f"the gradient of {name}, compared with that of {oracle},"
            assert_near(gradient, others[name], bound, what)


@_law("extended precision", "within the error bound of SPEC 2")
def unconnected_places_do_not_reach_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """NaN in grad at ablated rows or in x at unconnected columns reaches neither dx nor dvalues."""
    ablated = problem.weight.ablated
    unconnected = ~problem.weight.to_mask().any(axis=0)
    if not ablated.size and not unconnected.any():
        raise NotApplicable("nothing is ablated or unconnected")
    grad, x = problem.grad.copy(), problem.x.copy()
    grad[..., ablated] = problem.special_numbers(grad[..., ablated].shape, 1)
    x[..., unconnected] = problem.special_numbers(x[..., unconnected].shape, 2)
    gradients = prepare(problem.weight, backend=backend).backward(grad, x, wrt=("x", "values"))
    _assert_gradients(gradients, _expected(problem), "with NaN elsewhere, ")


@_law("extended precision", "within the error bound of SPEC 2")
def non_finite_gradients_propagate(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity in connected places spread by IEEE rules, and no further."""
    grad, x, values = problem.grad.copy(), problem.x.copy(), problem.weight.values.copy()
    grad[..., -1] = problem.special_numbers(grad[..., -1].shape, 3)
    x[..., 0] = problem.special_numbers(x[..., 0].shape, 4)
    values[:, -1] = problem.special_numbers(values[:, -1].shape, 5)
    without_grad = replace(problem, grad=np.zeros_like(problem.grad))
    cases = {
        "grad and x": replace(problem, grad=grad, x=x),
        # 0 times infinity is NaN: a zero gradient is no reason to skip a term.
        "x, and grad 0": replace(without_grad, x=x),
        "the values, and grad 0": replace(without_grad, weight=problem.weight.with_values(values)),
    }
    for what, case in cases.items():
        plan, expected = prepare(case.weight, backend=backend), _expected(case)
        _assert_gradients(_backward(plan, case), expected, f"with NaN and inf in {what}, ")
        if capabilities_of(backend).out:
            out = {name: np.zeros(each.z.shape, case.out_dtype) for name, each in expected.items()}
            _backward(plan, case, out=MatmulGradients(**out))
            what = f"with NaN and inf in {what}, out of {case.out_dtype}, "
            _assert_gradients(MatmulGradients(**out), expected, what)


@_law("itself", "bit for bit")
def same_inputs_give_the_same_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """Repeated gradients have the same bits, on any number of threads and in a flushing thread."""
    plan = prepare(problem.weight, backend=backend)
    assert_same = partial(_assert_same_gradients, what="again, ")
    assert_repeatable(partial(_backward, plan, problem), assert_same, problem.rng())


@_law("fresh plans", "bit for bit")
def a_used_plan_has_the_gradients_of_a_fresh_one(backend: Backend, problem: MatmulProblem) -> None:
    """Gradients of other batches and types, and products, do not change later gradients."""
    used, rng = prepare(problem.weight, backend=backend), problem.rng()
    x, grad = (each.reshape(-1, each.shape[-1]) for each in (problem.x, problem.grad))
    taken = capabilities_of(backend)
    for size in rng.permutation([len(x), min(len(x), 1), int(rng.integers(0, len(x) + 1)), len(x)]):
        dtypes = [problem.x.dtype, problem.grad.dtype]
        for which in (0, 1):
            if rng.random() < 0.4:
                options = combinable_dtypes(taken, problem.weight.dtype, dtypes[1 - which])
                dtypes[which] = options[rng.integers(len(options))]
        rows = slice(len(x) - size, None)
        case = replace(problem, x=x[rows].astype(dtypes[0]), grad=grad[rows].astype(dtypes[1]))
        call: dict[str, Any] = {"threads": int(rng.choice(THREADS))}
        if rng.random() < 0.5:
            call["wrt"] = [("x",), ("values",), ("bias",), ("x", "values")][rng.integers(4)]
        again = _backward(used, case, **call)
        fresh = _backward(prepare(problem.weight, backend=backend), case, **call)
        _assert_same_gradients(again, fresh, f"of a batch of {size} by a used plan, ")
        if "condensed_matmul" in backend.capabilities.operations:
            used(case.x)


@_law("extended precision", "within the error bound of SPEC 2", build=subnormal_problem)
def subnormal_gradients_are_honoured(backend: Backend, problem: MatmulProblem) -> None:
    """Subnormal gradients reach dx and dbias, also in a thread that flushes such numbers."""
    plan = prepare(problem.weight, backend=backend)
    with flushing_subnormals():
        flushed = _backward(plan, problem, wrt=("x", "bias"))
    for gradients in (_backward(plan, problem, wrt=("x", "bias")), flushed):
        _assert_gradients(gradients, _expected(problem), "of subnormal numbers, ")


@_law("extended precision", "within the error bound of SPEC 2")
def gradients_are_written_to_out(backend: Backend, problem: MatmulProblem) -> None:
    """With out= each element of a gradient is written there, in its type, and nothing else is."""
    if not capabilities_of(backend).out:
        raise NotApplicable("it returns its results")
    expected = _expected(problem)
    arrays = {name: out_array(outcome.z.shape, problem) for name, outcome in expected.items()}
    plan = prepare(problem.weight, backend=backend)
    gradients = _backward(plan, problem, out=MatmulGradients(**arrays))
    for name, array in arrays.items():
        if getattr(gradients, name) is not array:
            raise LawViolation(f"the gradient of {name} is not the array passed as out")
    _assert_gradients(gradients, expected, f"out of {problem.out_dtype}, ")
    for array in arrays.values():
        assert_neighbours_untouched(array, problem)


@_law("extended precision", "within the error bound of SPEC 2")
def each_gradient_may_be_asked_for_alone(backend: Backend, problem: MatmulProblem) -> None:
    """Whichever gradients are asked for are right, and the others are None."""
    expected = _expected(problem)
    plan = prepare(problem.weight, backend=backend)
    for wrt in [*combinations(expected, 1), *combinations(expected, 2)]:
        gradients = _backward(plan, problem, wrt=wrt)
        returned = tuple(_by_name(gradients))
        if returned != wrt:
            raise LawViolation(f"asked for {wrt}, got the gradients of {returned}")
        _assert_gradients(gradients, expected, f"of {wrt}, ")


@_law("itself", "bit for bit")
def with_values_has_its_own_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """Gradients of plan.with_values(v) are those of a new plan; older plans' do not change."""
    plan = prepare(problem.weight, backend=backend)
    first = _backward(plan, problem)
    other = problem.weight.with_values(problem.weight.values[::-1, ::-1])
    made = plan.with_values(other.values)
    plan.with_values(-other.values)  # must not change the one made before
    fresh = _backward(prepare(other, backend=backend), problem)
    _assert_same_gradients(_backward(made, problem), fresh, "of with_values, ")
    _assert_same_gradients(_backward(plan, problem), first, "of the old plan, ")


@_law("extended precision, and itself", "within the error bound of SPEC 2, and bit for bit")
def earlier_calls_leave_gradients_alone(backend: Backend, problem: MatmulProblem) -> None:
    """Gradients are those of what grad and x hold now, and later calls do not change them."""
    plan = prepare(problem.weight, backend=backend)
    problem = replace(problem, grad=np.array(problem.grad), x=np.array(problem.x))
    if "condensed_matmul" in backend.capabilities.operations:
        plan(-problem.x)
    first = _backward(plan, problem)
    kept = MatmulGradients(**{name: array.copy() for name, array in _by_name(first).items()})
    _assert_gradients(first, _expected(problem), "after another product, ")
    for array in (problem.grad, problem.x):
        array *= array.dtype.type(-0.5)
    _assert_gradients(_backward(plan, problem), _expected(problem), "with other numbers, ")
    _assert_same_gradients(first, kept, "of an earlier call, ")


@_law("itself", "bit for bit")
def threads_may_share_a_plan_for_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """Called from several threads at once, a plan gives each the bits of its own gradients."""
    plan = prepare(problem.weight, backend=backend)
    grads = (problem.grad, -problem.grad, np.zeros_like(problem.grad))
    calls = [partial(plan.backward, grad, problem.x) for grad in grads]
    assert_same_in_threads(calls, partial(_assert_same_gradients, what="beside other threads, "))


@_law("itself", "bit for bit")
def gradients_do_not_write_their_inputs(backend: Backend, problem: MatmulProblem) -> None:
    """Neither grad nor x nor the weight changes."""
    arrays = (problem.grad, problem.x, problem.weight.values, problem.weight.indices)
    assert_unwritten(arrays, lambda: _backward(prepare(problem.weight, backend=backend), problem))


# The definition of a gradient: by how much a linear function of the product changes.


@_law("the reference's product", "within the error bounds of both")
def gradient_of_x_is_the_adjoint(backend: Backend, problem: MatmulProblem) -> None:
    """<grad, A x> is <dx, x>: dx is the adjoint of the product."""
    dx = _backward(prepare(problem.weight, backend=backend), problem, wrt=("x",)).x
    assert dx is not None
    product = expected_product(problem.weight, problem.x, None, "none")
    _assert_equal_sums(
        (problem.grad, product.z, np.zeros_like(product.z)),
        (problem.x, dx, _expected(problem)["x"].bound(dx.dtype)),
        "<grad, A x> and <dx, x>",
    )


@_law("the reference's product", "within the error bounds of both")
def gradient_of_values_is_that_of_differences(backend: Backend, problem: MatmulProblem) -> None:
    """If one value changes, <grad, A x> changes by that change times the value's gradient."""
    weight = problem.weight
    dvalues = _backward(prepare(weight, backend=backend), problem, wrt=("values",)).values
    assert dvalues is not None
    bound = _expected(problem)["values"].bound(dvalues.dtype)
    for i, j in {(0, 0), (weight.n_active - 1, weight.fan_in - 1)}:
        values = np.zeros_like(weight.values)
        values[i, j] = 1
        # The product is linear in the values, so this is the difference quotient itself.
        product = expected_product(weight.with_values(values), problem.x, None, "none")
        _assert_equal_sums(
            (problem.grad, product.z, np.zeros_like(product.z)),
            (np.ones(1), dvalues[i, j].reshape(1), bound[i, j].reshape(1)),
            f"the change of <grad, A x> by values[{i}, {j}] and its gradient",
        )


def _assert_equal_sums(one: Any, other: Any, what: str) -> None:
    """Compare two sums of products, each passed as factors, results, and the results' bounds."""
    sums, allowed = [], np.longdouble(0)
    with np.errstate(all="ignore"):
        for factors, results, bound in (one, other):
            terms = factors.astype(np.longdouble) * results.astype(np.longdouble)
            sums.append(terms.sum())
            allowed += (np.abs(factors.astype(np.longdouble)) * bound).sum()
            # The rounding error of this sum.
            allowed += terms.size * np.finfo(np.longdouble).eps * np.abs(terms).sum()
        if not np.isfinite([*sums, allowed]).all():
            raise NotApplicable("a sum is not finite")
        if abs(sums[0] - sums[1]) > allowed:
            raise LawViolation(
                f"{what} should be equal: expected {float(sums[0])!r}, got {float(sums[1])!r}, "
                f"where {float(allowed):.3g} is allowed"
            )
