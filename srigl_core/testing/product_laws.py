"""The laws of the product (SPEC 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import round_to, value_dtype
from srigl_core._arrays.float_mode import subnormals_are_flushed
from srigl_core._format.weight import CondensedWeight
from srigl_core._plan import Plan, prepare
from srigl_core.contract import Backend
from srigl_core.testing.bounds import Outcome
from srigl_core.testing.comparisons import (
    assert_near,
    assert_neighbours_untouched,
    assert_same_bits,
    assert_unwritten,
    assert_within,
    out_array,
)
from srigl_core.testing.flush_mode import can_flush_subnormals, flushing_subnormals
from srigl_core.testing.kernel_capabilities import DISTINCT_LAYOUTS, capabilities_of
from srigl_core.testing.law import Law, LawViolation, NotApplicable, law_decorator
from srigl_core.testing.oracles import expected_product
from srigl_core.testing.problem_arrays import ORDERED_DTYPES, combinable_dtypes, laid_out
from srigl_core.testing.product_problems import MatmulProblem, matmul_problem, subnormal_problem
from srigl_core.testing.thread_calls import (
    THREADS,
    assert_same_in_threads,
    same_threads_afterwards,
)

__all__ = ["PRODUCT_LAWS"]

PRODUCT_LAWS: list[Law] = []
_law = law_decorator(PRODUCT_LAWS, "condensed_matmul", matmul_problem)


def _expected(problem: MatmulProblem) -> Outcome:
    bias = None if problem.bias is None else round_to(problem.bias, problem.result_dtype)
    return expected_product(problem.weight, problem.x, bias, problem.activation)


def _call(plan: Plan, problem: MatmulProblem, **options: Any) -> NDArray[Any]:
    return plan(problem.x, problem.bias, activation=problem.activation, **options)


def _product(backend: str | Backend, problem: MatmulProblem, **options: Any) -> NDArray[Any]:
    return _call(prepare(problem.weight, backend=backend), problem, **options)


def _assert_product(backend: Backend, problem: MatmulProblem, what: str) -> None:
    """Check a product, its compact form, and both in an `out` of any type."""
    plan, expected = prepare(problem.weight, backend=backend), _expected(problem)
    columns = expected.of_neurons(problem.weight.active)
    assert_within(_call(plan, problem), expected, f"{what}, the product")
    assert_within(_call(plan, problem, compact=True), columns, f"{what}, the compact product")
    if not capabilities_of(backend).out:
        return
    is_small = problem.weight.nnz * max(1, problem.x.size) < _SMALL_WORK
    for name in ORDERED_DTYPES if is_small else (problem.out_dtype.name,):
        for compact, outcome in ((False, expected), (True, columns)):
            out = np.zeros(outcome.z.shape, value_dtype(name))
            _call(plan, problem, out=out, compact=compact)
            assert_within(out, outcome, f"{what}, out of {out.dtype}, compact={compact},")


_SMALL_WORK = 10**6
"""A problem is tried in every output type if it has fewer connections times inputs."""


def _any_activation(backend: Backend, problem: MatmulProblem, salt: int) -> MatmulProblem:
    """Return the problem with an activation drawn anew."""
    activations = sorted(capabilities_of(backend).activations)
    return replace(problem, activation=str(problem.rng(salt).choice(activations)))


@_law("extended precision", "within the error bound of SPEC 2")
def product_is_within_the_error_bound(backend: Backend, problem: MatmulProblem) -> None:
    """The product has dtype result_type(x, values), and each element obeys the bound of SPEC 2."""
    for case in (problem, *_of_other_sizes(backend, problem)):
        product, what = _product(backend, case), f"the product of {case.x.shape}"
        if product.dtype != case.result_dtype:
            raise LawViolation(f"{what} has dtype {product.dtype}, expected {case.result_dtype}")
        assert_within(product, _expected(case), what)


def _of_other_sizes(backend: Backend, problem: MatmulProblem) -> Iterator[MatmulProblem]:
    """Yield the problem with few rows and wide inputs, and with many rows if it has few.

    Kernels for few rows and for many are often different ones, and stage wide inputs in parts. With
    wide inputs all ablated neurons are side by side: kernels often have a fast path for groups of
    neurons with no ablated one between them.
    """
    weight, rng = problem.weight, problem.rng(1)
    (n_out, n_in), nnz = weight.shape, weight.nnz
    rows = problem.x.reshape(-1, n_in)
    few, many = int(rng.integers(1, _FEW_ROWS + 1)), int(rng.integers(_FEW_ROWS + 1, 41))
    factor = 1 + int(rng.integers(_WIDE // 4, _WIDE)) // n_in
    most = min(_SMALL_WORK, capabilities_of(backend).largest_problem)

    def is_small(n_rows: int, n_columns: int) -> bool:
        return n_rows * nnz < _SMALL_WORK and n_rows * (n_out + n_columns) + nnz < most

    if len(rows) and is_small(few, n_in * factor):
        x = rng.choice(rows.ravel(), (few, n_in * factor))
        x[:, ::factor] = np.resize(rows, (few, n_in))
        active = np.arange(weight.n_active)
        active[int(rng.integers(active.size + 1)) :] += n_out - active.size
        parts = weight.values, weight.indices.astype(np.int64) * factor, active
        wide = CondensedWeight(*parts, (n_out, n_in * factor))
        yield replace(problem, weight=wide, x=laid_out(x, problem.layout))
    if 0 < len(rows) <= _FEW_ROWS and is_small(many, n_in):
        yield replace(problem, x=laid_out(np.resize(rows, (many, n_in)), problem.layout))


_WIDE = 1200
_FEW_ROWS = 8


@_law("the reference and SciPy CSR", "within twice the bound")
def product_agrees_with_other_oracles(backend: Backend, problem: MatmulProblem) -> None:
    """The reference and SciPy CSR give the same product, within twice the bound."""
    product = _product(backend, problem)
    outcome = _expected(problem)
    for oracle in sorted({"reference", "scipy"} - {backend.name}):
        other = _product(oracle, problem)
        bound = 2 * outcome.bound(product.dtype)
        assert_near(product, other, bound, f"the product, compared with that of {oracle},")


@_law("extended precision", "within the error bound of SPEC 2")
def compact_output_is_the_active_columns(backend: Backend, problem: MatmulProblem) -> None:
    """With compact=True the result has the active neurons' columns and no others."""
    expected = _expected(problem).of_neurons(problem.weight.active)
    product = _product(backend, problem, compact=True)
    assert_within(product, expected, "the compact product")


@_law("extended precision", "within the error bound of SPEC 2")
def ablated_neurons_output_the_activated_bias(backend: Backend, problem: MatmulProblem) -> None:
    """An ablated neuron outputs act(bias), 0 without a bias, whatever the input."""
    ablated = problem.weight.ablated
    if not ablated.size:
        raise NotApplicable("no neuron is ablated")
    poisoned = replace(problem, x=np.full_like(problem.x, np.nan))
    product = _product(backend, poisoned)[..., ablated]
    assert_within(product, _expected(problem).of_neurons(ablated), "the output of ablated neurons")


@_law("extended precision", "within the error bound of SPEC 2")
def unconnected_inputs_do_not_contribute(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity in columns that no neuron is connected to do not reach the product."""
    unconnected = ~problem.weight.to_mask().any(axis=0)
    if not unconnected.any():
        raise NotApplicable("every column is connected")
    x = problem.x.copy()
    x[..., unconnected] = problem.special_numbers(x[..., unconnected].shape)
    _assert_product(backend, replace(problem, x=x), "with NaN and inf at unconnected inputs")


@_law("extended precision", "within the error bound of SPEC 2")
def non_finite_inputs_reach_their_neurons_only(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity spread by IEEE rules to the neurons connected to them, and to no others."""
    for column in {0, problem.x.shape[-1] - 1, problem.x.shape[-1] // 2}:
        x = problem.x.copy()
        x[..., column] = problem.special_numbers(x[..., column].shape, column)
        poisoned = _any_activation(backend, replace(problem, x=x), column)
        _assert_product(backend, poisoned, f"with NaN or inf in column {column}")
    neuron = int(problem.rng().integers(problem.weight.n_active))
    others = np.ones(problem.x.shape[-1], bool)
    others[problem.weight.indices[neuron]] = False
    x = problem.x.copy()
    x[..., others] = problem.special_numbers(x[..., others].shape, 1)
    what = f"with NaN or inf at all inputs but those of active neuron {neuron}"
    _assert_product(backend, replace(problem, x=x), what)


@_law("extended precision", "within the error bound of SPEC 2")
def non_finite_weights_and_biases_propagate(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity in values or bias reach their own neuron's output, and no other's."""
    values = problem.weight.values.copy()
    values[0, 0], values[0, -1], values[-1, 0] = problem.special_numbers((3,))
    bias = np.zeros(problem.weight.shape[0], problem.result_dtype)
    bias[-1], bias[0] = problem.special_numbers((2,), 1)
    weight = problem.weight.with_values(values)
    cases = {"the weight": replace(problem, weight=weight)}
    if capabilities_of(backend).bias:
        cases["the bias"] = replace(problem, bias=bias)
        both = bias.copy()
        both[weight.active[[0, -1]]] = problem.special_numbers((2,), 2)
        cases["the weight and the bias"] = replace(problem, weight=weight, bias=both)
    for salt, (what, case) in enumerate(cases.items()):
        poisoned = _any_activation(backend, case, salt)
        _assert_product(backend, poisoned, f"with NaN and inf in {what}")


@_law("itself", "bit for bit")
def same_inputs_give_the_same_bits(backend: Backend, problem: MatmulProblem) -> None:
    """A repeated product has the same bits, on any number of threads, and after other work."""
    plan = prepare(problem.weight, backend=backend)
    firsts: dict[str, Any] = {}
    for salt, threads in enumerate((*problem.rng().permutation(THREADS).tolist(), None)):
        case = _any_activation(backend, problem, salt)
        if case.activation not in firsts:
            firsts[case.activation] = _call(plan, case, threads=1)
            _call(plan, replace(problem, x=-problem.x))
        with same_threads_afterwards():
            again = _call(plan, case, threads=threads)
        assert_same_bits(again, firsts[case.activation], f"the product on threads={threads}")


@_law("fresh plans", "bit for bit")
def a_used_plan_is_as_a_fresh_one(backend: Backend, problem: MatmulProblem) -> None:
    """Products of other batches, types and options before it do not change a product."""
    weight, types = problem.weight, problem.rng(1)
    used = prepare(weight, backend=backend)
    names = ("of the result", *(ORDERED_DTYPES if capabilities_of(backend).out else ()))
    for case, options in _other_products(backend, problem, problem.rng()):
        shape = len(case.x), weight.n_active if options["compact"] else weight.shape[0]
        for name in types.permutation(names)[:2]:
            again, fresh = (
                _call(plan, case, **options, out=_zeros_of(shape, str(name)))
                for plan in (used, prepare(weight, backend=backend))
            )
            what = f"the product of a batch of {len(case.x)} of {case.x.dtype} by a used plan"
            assert_same_bits(again, fresh, what)


def _zeros_of(shape: tuple[int, ...], name: str) -> NDArray[Any] | None:
    return np.zeros(shape, value_dtype(name)) if name in ORDERED_DTYPES else None


def _other_products(
    backend: Backend, problem: MatmulProblem, rng: np.random.Generator
) -> Iterator[tuple[MatmulProblem, dict[str, Any]]]:
    """Yield products of one weight in any order: their problems, and options of the calls."""
    capabilities = capabilities_of(backend)
    dtypes = combinable_dtypes(capabilities, problem.weight.dtype)
    activations = sorted(capabilities.activations)
    x = problem.x.reshape(-1, problem.x.shape[-1])
    sizes = [len(x), min(len(x), 1), int(rng.integers(0, len(x) + 1)), len(x) // 2, len(x)]
    for size in rng.permutation(sizes):
        dtype = problem.x.dtype if rng.random() < 0.6 else dtypes[rng.integers(len(dtypes))]
        yield (
            replace(
                problem,
                x=x[len(x) - size :].astype(dtype),
                bias=problem.bias if rng.random() < 0.7 else None,
                activation=str(rng.choice(activations)),
            ),
            {"compact": bool(rng.random() < 0.3), "threads": int(rng.choice(THREADS))},
        )


@_law("itself", "bit for bit")
def inputs_are_not_written(backend: Backend, problem: MatmulProblem) -> None:
    """Neither x nor the bias nor the weight changes, not even the sign of a zero of x."""
    x = np.where(problem.rng().random(problem.x.shape) < 0.1, problem.x.dtype.type(-0.0), problem.x)
    problem = replace(problem, x=laid_out(x, problem.layout))
    arrays = (problem.x, problem.weight.values, problem.weight.indices, problem.bias)
    assert_unwritten(arrays, lambda: _product(backend, problem))


@_law("extended precision", "within the error bound of SPEC 2")
def out_is_filled_whatever_it_held(backend: Backend, problem: MatmulProblem) -> None:
    """With out= every element is written, in any value type, rounded once, and nothing else is."""
    if not capabilities_of(backend).out:
        raise NotApplicable("it returns its results")
    plan, whole = prepare(problem.weight, backend=backend), _expected(problem)
    for compact in (False, True):
        outcome = whole.of_neurons(problem.weight.active) if compact else whole
        out = out_array(outcome.z.shape, problem)
        if _call(plan, problem, out=out, compact=compact) is not out:
            raise LawViolation("the call did not return the array passed as out")
        what = f"out of {problem.out_dtype}, laid out {problem.out_layout!r}, compact={compact},"
        assert_within(out, outcome, what)
        assert_neighbours_untouched(out, problem)


@_law("extended precision", "within the error bound of SPEC 2")
def memory_layout_does_not_matter(backend: Backend, problem: MatmulProblem) -> None:
    """Any strides and alignment of x give a product within the bound of the same numbers."""
    layouts = [each for each in DISTINCT_LAYOUTS if each in capabilities_of(backend).layouts]
    if len(layouts) == 1:
        raise NotApplicable("it takes arrays in C order only")
    plan, expected = prepare(problem.weight, backend=backend), _expected(problem)
    for layout in layouts:
        product = _call(plan, replace(problem, x=laid_out(problem.x, layout)))
        assert_within(product, expected, f"the product of x laid out {layout!r}")


@_law(
    "itself, and extended precision",
    "bit for bit, and within the error bound of SPEC 2",
    build=subnormal_problem,
)
def subnormals_are_honoured_in_any_thread_mode(backend: Backend, problem: MatmulProblem) -> None:
    """A thread that flushes subnormals gets the same bits, and is left in its mode."""
    if not can_flush_subnormals():
        raise NotApplicable("the mode of a thread cannot be set on this platform")
    plan = prepare(problem.weight, backend=backend)
    for activation in sorted({problem.activation, "none"} & capabilities_of(backend).activations):
        case = replace(problem, activation=activation)
        first = _call(plan, case)
        assert_within(first, _expected(case), "the product")
        with flushing_subnormals():
            before = subnormals_are_flushed()
            again = _call(plan, case)
            if subnormals_are_flushed() != before:
                raise LawViolation("the thread was left in another floating-point mode")
        assert_same_bits(again, first, "the product in a flushing thread")


@_law("itself", "bit for bit")
def with_values_is_a_fresh_plan(backend: Backend, problem: MatmulProblem) -> None:
    """plan.with_values(v) has the bits of a new plan for v; older plans do not change."""
    plan = prepare(problem.weight, backend=backend)
    first = _call(plan, problem)
    values = problem.weight.values[::-1, ::-1]
    one, another = plan.with_values(values), plan.with_values(-values)
    third = one.with_values(-problem.weight.values)
    for made, numbers in ((third, -problem.weight.values), (another, -values), (one, values)):
        fresh = _product(backend, replace(problem, weight=problem.weight.with_values(numbers)))
        assert_same_bits(_call(made, problem), fresh, "the product of with_values")
    assert_same_bits(_call(plan, problem), first, "the old plan's product")


@_law("extended precision, and itself", "within the error bound of SPEC 2, and bit for bit")
def earlier_calls_leave_no_trace(backend: Backend, problem: MatmulProblem) -> None:
    """A product is that of what x and the bias hold now, and later calls do not change it."""
    plan = prepare(problem.weight, backend=backend)
    x, bias = np.array(problem.x), None if problem.bias is None else np.array(problem.bias)
    reused = replace(problem, x=x, bias=bias)
    first = _call(plan, reused)
    kept = first.copy()
    for array in (x, bias):
        if array is not None:
            np.negative(array, out=array)
    assert_within(_call(plan, reused), _expected(reused), "with other numbers, the product")
    assert_same_bits(first, kept, "an earlier product")


@_law("itself", "bit for bit")
def threads_may_share_a_plan(backend: Backend, problem: MatmulProblem) -> None:
    """Called from several threads at once, a plan gives each the bits of its own product."""
    plan = prepare(problem.weight, backend=backend)
    cases = [replace(problem, x=x) for x in (problem.x, -problem.x, np.zeros_like(problem.x))]
    calls = [partial(_call, plan, case) for case in cases]
    assert_same_in_threads(calls, partial(assert_same_bits, what="a product beside other threads"))


# Metamorphic laws compare a kernel with itself, on a problem with the same or a related result.


@_law("itself", "within twice the bound")
def permuted_neurons_permute_the_product(backend: Backend, problem: MatmulProblem) -> None:
    """Neurons in another order have their outputs in that order."""
    weight = problem.weight
    place = np.random.default_rng(0).permutation(weight.shape[0])
    order = np.argsort(place[weight.active])
    moved = CondensedWeight(
        weight.values[order], weight.indices[order], place[weight.active][order], weight.shape
    )
    bias = None
    if problem.bias is not None:
        bias = np.empty_like(problem.bias)
        bias[place] = problem.bias
    product = _product(backend, problem)
    elsewhere = _product(backend, replace(problem, weight=moved, bias=bias))
    bound = 2 * _expected(problem).bound(product.dtype)
    assert_near(elsewhere[..., place], product, bound, "the product of neurons in another order")


@_law("itself", "within twice the bound")
def permuted_inputs_do_not_matter(backend: Backend, problem: MatmulProblem) -> None:
    """Inputs in another order, with connections in that order, give the same product."""
    weight = problem.weight
    place = np.random.default_rng(0).permutation(weight.shape[1])
    columns = place[weight.indices]
    order = np.argsort(columns, axis=1)
    moved = CondensedWeight(
        np.take_along_axis(weight.values, order, axis=1),
        np.take_along_axis(columns, order, axis=1),
        weight.active,
        weight.shape,
    )
    x = np.empty_like(problem.x, order="C")
    x[..., place] = problem.x
    product = _product(backend, problem)
    same = _product(backend, replace(problem, weight=moved, x=x))
    bound = 2 * _expected(problem).bound(product.dtype)
    assert_near(same, product, bound, "the product of inputs in another order")


@_law("itself", "within three times the bound")
def product_is_linear_in_the_input(backend: Backend, problem: MatmulProblem) -> None:
    """The product of a sum is the sum of the products; that of -x is minus that of x."""
    if "none" not in capabilities_of(backend).activations:
        raise NotApplicable("it always applies an activation")
    plan = prepare(problem.weight, backend=backend)
    even = np.arange(problem.x.shape[-1]) % 2 == 0
    halves = [np.where(part, problem.x, 0).astype(problem.x.dtype) for part in (even, ~even)]
    bare = [replace(problem, x=x, bias=None, activation="none") for x in (problem.x, *halves)]
    whole, first, second = (_call(plan, part).astype(np.float64) for part in bare)
    bounds = [_expected(part).bound(problem.result_dtype) for part in bare]
    with np.errstate(all="ignore"):
        assert_near(first + second, whole, np.sum(bounds, axis=0), "the product of a sum")
    negative = _call(plan, replace(bare[0], x=-problem.x)).astype(np.float64)
    assert_near(-negative, whole, 2 * bounds[0], "minus the product of -x")


@_law("itself", "within twice the bound")
def batch_rows_do_not_interact(backend: Backend, problem: MatmulProblem) -> None:
    """A row of a batch has the same product alone, whatever the other rows hold."""
    x = problem.x.reshape(-1, problem.x.shape[-1])
    if len(x) < 2:
        raise NotApplicable("there are no two rows")
    plan = prepare(problem.weight, backend=backend)
    whole = _call(plan, replace(problem, x=x))
    bound = 2 * _expected(replace(problem, x=x)).bound(whole.dtype)
    for row in {0, len(x) // 2, len(x) - 1}:
        alone = _call(plan, replace(problem, x=x[row]))
        assert_near(whole[row], alone, bound[row], f"row {row} of a batch")
        poisoned = np.full_like(x, np.nan)
        poisoned[row] = x[row]
        beside = _call(plan, replace(problem, x=poisoned))[row]
        if (np.isnan(beside) & ~np.isnan(alone) & np.isfinite(bound[row])).any():
            raise LawViolation(f"NaN in other rows of the batch reached row {row}")
