"""The laws of products with quantised weights (SPEC 6)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import round_to
from srigl_core._arrays.float_mode import subnormals_are_flushed
from srigl_core._format.connections import Connections
from srigl_core._format.weight import QuantizedWeight
from srigl_core._plan import QuantizedPlan, prepare
from srigl_core.contract import Backend
from srigl_core.testing.bounds import Outcome
from srigl_core.testing.comparisons import (
    assert_near,
    assert_neighbours_untouched,
    assert_same_bits,
    assert_same_numbers,
    assert_unwritten,
    assert_within,
    out_array,
)
from srigl_core.testing.flush_mode import can_flush_subnormals, flushing_subnormals
from srigl_core.testing.int8_oracle import exact_int8_product
from srigl_core.testing.kernel_capabilities import DISTINCT_LAYOUTS, capabilities_of
from srigl_core.testing.law import Law, LawViolation, NotApplicable, law_decorator
from srigl_core.testing.oracles import expected_product
from srigl_core.testing.problem_arrays import laid_out
from srigl_core.testing.quantized_problems import (
    FLOAT32,
    QuantizedProblem,
    int8_problem,
    quantized_problem,
    weight_only_problem,
)
from srigl_core.testing.thread_calls import assert_same_in_threads

__all__ = ["QUANTIZED_LAWS"]

QUANTIZED_LAWS: list[Law] = []
_law = law_decorator(QUANTIZED_LAWS, "quantized_matmul", quantized_problem)
_INT8 = {"build": int8_problem, "inputs": "int8"}
_AGAINST = "exact arithmetic"
_TOLERANCE = "bit for bit with int8 inputs and no activation, else within the bounds of SPEC 6"
_INT32_LIMIT = 133_144
"""The largest fan-in of SPEC 6."""


def _plan(backend: Backend, problem: QuantizedProblem) -> QuantizedPlan:
    return prepare(problem.quantized, inputs=problem.inputs, backend=backend)


def _call(plan: QuantizedPlan, problem: QuantizedProblem, **options: Any) -> NDArray[Any]:
    return plan(problem.x, problem.bias, activation=problem.activation, **options)


def _outcome(problem: QuantizedProblem, weight: QuantizedWeight | None = None) -> Outcome:
    """Return the product, exactly for int8 inputs; `weight` replaces the problem's own."""
    weight = problem.quantized if weight is None else weight
    bias = problem.bias
    if problem.inputs == "int8":
        z = exact_int8_product(weight, problem.x, bias).astype(np.longdouble)
        terms = np.zeros(z.shape, np.int64)
        return Outcome(z, np.zeros_like(z), terms, FLOAT32, problem.activation, is_rounded=True)
    bias = None if bias is None else round_to(bias, problem.result_dtype)
    return expected_product(weight, problem.x, bias, problem.activation)


def _assert_right(product: NDArray[Any], outcome: Outcome, what: str = "the product") -> None:
    """Check a product: bit for bit where SPEC 6 defines the bits, else by the bound."""
    if outcome.is_rounded and outcome.activation == "none":
        assert_same_numbers(product, round_to(outcome.z.astype(np.float64), product.dtype), what)
    else:
        assert_within(product, outcome, what)


def _assert_problem(backend: Backend, problem: QuantizedProblem, what: str) -> None:
    """Check a product and its compact form."""
    plan, expected = _plan(backend, problem), _outcome(problem)
    _assert_right(_call(plan, problem), expected, f"{what}, the product")
    compact = _call(plan, problem, compact=True)
    columns = expected.of_neurons(problem.weight.active)
    _assert_right(compact, columns, f"{what}, the compact product")


@_law(_AGAINST, _TOLERANCE)
def quantized_product_is_its_definition(backend: Backend, problem: QuantizedProblem) -> None:
    """The product has dtype result_type(x, float32), and the numbers that SPEC 6 defines."""
    product = _call(_plan(backend, problem), problem)
    if product.dtype != problem.result_dtype:
        raise LawViolation(
            f"the product has dtype {product.dtype}, expected {problem.result_dtype}"
        )
    _assert_right(product, _outcome(problem))


@_law(_AGAINST, "bit for bit", **_INT8)
def int8_product_has_the_defined_bits(backend: Backend, problem: QuantizedProblem) -> None:
    """Without an activation, int8 inputs give the same bits on every backend, NaNs apart."""
    _needs_no_activation(backend)
    bare = replace(problem, activation="none")
    for case in (bare, replace(bare, bias=None)):
        _assert_problem(backend, case, f"{'without' if case.bias is None else 'with'} a bias")


@_law(_AGAINST, _TOLERANCE)
def quantized_compact_output_is_the_active_columns(
    backend: Backend, problem: QuantizedProblem
) -> None:
    """With compact=True the result has the active neurons' columns and no others."""
    product = _call(_plan(backend, problem), problem, compact=True)
    _assert_right(product, _outcome(problem).of_neurons(problem.weight.active))


@_law(_AGAINST, _TOLERANCE)
def quantized_ablated_neurons_output_the_activated_bias(
    backend: Backend, problem: QuantizedProblem
) -> None:
    """An ablated neuron outputs act(bias), 0 without a bias, whatever the input."""
    ablated = problem.weight.ablated
    if not ablated.size:
        raise NotApplicable("no neuron is ablated")
    poisoned = replace(problem, x=np.full_like(problem.x, np.nan))
    product = _call(_plan(backend, poisoned), poisoned)[..., ablated]
    outcome = _outcome(problem).of_neurons(ablated)
    _assert_right(product, outcome, "the output of ablated neurons")


@_law("extended precision", "within the bound of SPEC 6", build=weight_only_problem, inputs="float")
def padding_of_a_quantized_weight_is_never_read(
    backend: Backend, problem: QuantizedProblem
) -> None:
    """With float inputs, NaN and infinity in unconnected columns do not reach the product."""
    unconnected = ~problem.weight.to_mask().any(axis=0)
    if not unconnected.any():
        raise NotApplicable("every column is connected")
    x = problem.x.copy()
    x[..., unconnected] = problem.special_numbers(x[..., unconnected].shape)
    _assert_problem(backend, replace(problem, x=x), "with NaN and inf at unconnected inputs")


@_law("extended precision", "within the bound of SPEC 6", build=weight_only_problem, inputs="float")
def non_finite_inputs_of_a_quantized_weight_spread_by_ieee_rules(
    backend: Backend, problem: QuantizedProblem
) -> None:
    """With float inputs, NaN and infinity reach the neurons connected to them, and no others."""
    for column in {0, problem.x.shape[-1] - 1, problem.x.shape[-1] // 2}:
        x = problem.x.copy()
        x[..., column] = problem.special_numbers(x[..., column].shape, column)
        _assert_problem(backend, replace(problem, x=x), f"with NaN or inf in column {column}")


@_law(_AGAINST, _TOLERANCE, **_INT8)
def a_row_that_is_not_finite_gives_nan_alone(backend: Backend, problem: QuantizedProblem) -> None:
    """With int8 inputs, NaN or infinity anywhere in a row gives NaN at its active neurons only."""
    rows = problem.x.reshape(-1, problem.x.shape[-1])
    for number, column in ((np.nan, 0), (np.inf, -1), (-np.inf, rows.shape[1] // 2)):
        x = np.array(rows)
        x[::2, column] = number
        _assert_problem(backend, replace(problem, x=x), f"with {number} in column {column}")


@_law(_AGAINST, _TOLERANCE, **_INT8)
def every_column_counts_for_the_scale(backend: Backend, problem: QuantizedProblem) -> None:
    """The largest magnitude of a row decides its scale, whether or not a neuron is connected."""
    unconnected = np.flatnonzero(~problem.weight.to_mask().any(axis=0))
    if not unconnected.size:
        raise NotApplicable("every column is connected")
    for column, factor in ((unconnected[0], 2.0), (unconnected[-1], -3.0)):
        x = np.array(problem.x)
        x[..., column] = factor * np.abs(x).max(axis=-1)
        _assert_problem(backend, replace(problem, x=x), f"with the largest input in {column}")


@_law(_AGAINST, _TOLERANCE, **_INT8)
def inputs_halfway_round_to_even(backend: Backend, problem: QuantizedProblem) -> None:
    """An input halfway between two integers becomes the even one, after x * r is rounded."""
    rng = np.random.default_rng(0)
    halves = rng.integers(-126, 126, problem.x.shape) + 0.5
    halves[..., rng.integers(halves.shape[-1])] = 127
    # Halfway itself; and near it, where one rounding more or less decides.
    for size in (1.0, *rng.uniform(0.5, 1, 2)):
        case = replace(problem, x=(halves * size).astype(problem.x.dtype))
        _assert_problem(backend, case, f"with inputs halfway between multiples of {size:g}")


@_law("itself", "bit for bit", **_INT8)
def powers_of_two_scale_an_int8_product(backend: Backend, problem: QuantizedProblem) -> None:
    """Where no number is subnormal or large, 2^e x has the product of x, times 2^e."""
    _needs_no_activation(backend)
    x = problem.x.astype(np.float64)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    # Rows of ordinary size, whose numbers are exact in any value type after scaling, too.
    x = np.rint(np.divide(x, largest, where=largest > 0, out=np.zeros_like(x)) * 100)
    dtype = problem.x.dtype
    plan = _plan(backend, problem)
    scale = problem.quantized.scale
    bare = replace(problem, x=x.astype(dtype), bias=None, activation="none")
    product = _call(plan, bare, compact=True)
    is_ordinary = (scale > 2.0**-60) & (scale < 2.0**60)
    for power in (2.0**-4, 2.0**7):
        scaled = _call(plan, replace(bare, x=(x * power).astype(dtype)), compact=True)
        expected = (product * product.dtype.type(power))[..., is_ordinary]
        what = f"the product of {power:g} x"
        assert_same_numbers(scaled[..., is_ordinary], expected, what)


@_law(_AGAINST, _TOLERANCE, **_INT8)
def largest_values_do_not_saturate(backend: Backend, problem: QuantizedProblem) -> None:
    """Values and inputs of 127 and -127 add up, whatever their signs."""
    rng = np.random.default_rng(0)
    weight = problem.weight
    signs = rng.choice([-1.0, 1.0], weight.values.shape)
    signs[0] = 1
    x = rng.choice([-1.0, 1.0], problem.x.shape)
    x[:1] = 1
    for sign in (1, -1):
        weight = weight.with_values((sign * signs).astype(weight.dtype))
        case = replace(problem, weight=weight, x=x.astype(problem.x.dtype))
        _assert_problem(backend, case, "with values and inputs of 127 and -127")


def _longest_problem(source: Any, capabilities: Any) -> QuantizedProblem:
    """Build a product whose sums come near the ends of int32, or well beyond 2^24."""
    problem = int8_problem(source, capabilities)
    if "uint32" not in capabilities.index_dtypes:
        return problem
    fan_in = source.sampled_from((_INT32_LIMIT, 70_000))
    rng = source.rng()
    connections = Connections.random((2, _INT32_LIMIT), fan_in=fan_in, rng=rng)
    sign = source.sampled_from((1, -1))
    # The largest sum of all, and sums of many bits, which float32 does not hold.
    values = np.stack([np.ones(fan_in), rng.uniform(0.5, 1, fan_in)]).astype(problem.weight.dtype)
    weight = type(problem.weight).from_connections(values, connections)
    x = sign * np.stack([np.ones(_INT32_LIMIT), rng.uniform(0.5, 1, _INT32_LIMIT)])
    x = x.astype(problem.x.dtype)
    grad = np.zeros((2, 2), problem.x.dtype)
    return replace(problem, weight=weight, x=x, grad=grad, bias=None, layout="C", grad_layout="C")


@_law(_AGAINST, _TOLERANCE, build=_longest_problem, inputs="int8")
def sums_may_be_as_large_as_int32_holds(backend: Backend, problem: QuantizedProblem) -> None:
    """Up to a fan-in of 133,144 sums are exact, and are rounded once, to float32."""
    _assert_right(_call(_plan(backend, problem), problem), _outcome(problem))


@_law(_AGAINST, _TOLERANCE, **_INT8)
def rows_of_zeros_give_the_bias(backend: Backend, problem: QuantizedProblem) -> None:
    """Rows of zeros, and of numbers for which 127/a overflows, add +0 to the bias."""
    x = np.zeros_like(problem.x)
    cases = {"zeros": x, "negative zeros": -x}
    if problem.x.dtype.name != "float16":
        cases["1e-38"] = np.full_like(x, 1e-38)
    for what, rows in cases.items():
        for bias in (problem.bias, None):
            _assert_problem(backend, replace(problem, x=rows, bias=bias), f"with rows of {what}")


_EXTREME = {
    "int8": ((3e38, 3e38), (2e-38, 1e-36), (1e-45, 1.0), (3e38, 2e-36), (2e-38, 1.0)),
    "float": ((3e38, 1e-36), (2e-38, 1.0), (1e-45, 1e30)),
}
"""Scales of a weight, with sizes of inputs, for which some product with a scale is extreme."""


@_law(_AGAINST, _TOLERANCE)
def extreme_scales_follow_the_definition(backend: Backend, problem: QuantizedProblem) -> None:
    """Scales near the ends of float32 give what SPEC 6 defines: v is +0 where acc is 0."""
    weight = problem.quantized
    x = problem.x.astype(np.float32)
    if not {"float32"} <= capabilities_of(backend).value_dtypes:
        raise NotApplicable("it does not take float32")
    with np.errstate(all="ignore"):
        largest = np.abs(x).max(axis=-1, keepdims=True)
        x = np.where((largest > 0) & np.isfinite(largest), x / largest, 0).astype(np.float32)
    x[..., weight.indices[0]] *= 0 if weight.n_active > 1 else 1
    for scale, size in _EXTREME[problem.inputs]:
        scales = np.full(weight.n_active, scale, np.float32)
        other = QuantizedWeight.from_connections(weight.values, scales, weight.connections)
        case = replace(problem, x=x * np.float32(size))
        plan = prepare(other, inputs=problem.inputs, backend=backend)
        what = f"with scales of {scale:g} and inputs of {size:g}, the product"
        _assert_right(_call(plan, case), _outcome(case, other), what)


@_law(_AGAINST, _TOLERANCE, **_INT8)
def bias_is_cast_to_float32_once(backend: Backend, problem: QuantizedProblem) -> None:
    """With int8 inputs the bias is cast to float32, whatever the type of the product or of out."""
    capabilities = capabilities_of(backend)
    if not capabilities.bias:
        raise NotApplicable("it adds no bias")
    bias = np.random.default_rng(0).standard_normal(problem.weight.shape[0])
    case = replace(problem, bias=bias)
    plan, outcome = _plan(backend, case), _outcome(case)
    _assert_right(_call(plan, case), outcome, "with a bias of float64, the product")
    if capabilities.out:
        out = out_array(outcome.z.shape, case)
        _assert_right(
            _call(plan, case, out=out), outcome, f"with a bias of float64, out of {out.dtype}"
        )


@_law(_AGAINST, _TOLERANCE)
def quantized_out_is_filled_whatever_it_held(backend: Backend, problem: QuantizedProblem) -> None:
    """With out= every element is written, in any value type, rounded once, and nothing else is."""
    if not capabilities_of(backend).out:
        raise NotApplicable("it returns its results")
    plan, whole = _plan(backend, problem), _outcome(problem)
    for compact in (False, True):
        outcome = whole.of_neurons(problem.weight.active) if compact else whole
        out = out_array(outcome.z.shape, problem)
        if _call(plan, problem, out=out, compact=compact) is not out:
            raise LawViolation("the call did not return the array passed as out")
        what = f"out of {problem.out_dtype}, laid out {problem.out_layout!r}, compact={compact},"
        _assert_right(out, outcome, what)
        assert_neighbours_untouched(out, problem)


@_law(_AGAINST, _TOLERANCE)
def memory_layout_does_not_matter_to_a_quantized_product(
    backend: Backend, problem: QuantizedProblem
) -> None:
    """Any strides and alignment of x give the product of the same numbers."""
    layouts = [each for each in DISTINCT_LAYOUTS if each in capabilities_of(backend).layouts]
    if len(layouts) == 1:
        raise NotApplicable("it takes arrays in C order only")
    plan, outcome = _plan(backend, problem), _outcome(problem)
    for layout in layouts:
        elsewhere = replace(problem, x=laid_out(problem.x, layout))
        _assert_right(_call(plan, elsewhere), outcome, f"the product of x laid out {layout!r}")


@_law("itself", "bit for bit")
def same_inputs_give_the_same_quantized_bits(backend: Backend, problem: QuantizedProblem) -> None:
    """A repeated product has the same bits, on any number of threads, and after other work."""
    plan, n_in = _plan(backend, problem), problem.x.shape[-1]
    first = _call(plan, problem)
    for threads in (1, 2, 3, 8, None):
        again = _call(plan, problem, threads=threads)
        assert_same_bits(again, first, f"the product on threads={threads}")
        _call(plan, replace(problem, x=-problem.x))
    for activation in capabilities_of(backend).activations:
        _call(plan, replace(problem, activation=activation, bias=None), compact=True)
        _call(plan, replace(problem, activation=activation, x=problem.x.reshape(-1, n_in)[:1]))
    assert_same_bits(_call(plan, problem), first, "the product after others by the same plan")


@_law(_AGAINST, _TOLERANCE)
def subnormals_of_a_quantized_product_are_honoured(
    backend: Backend, problem: QuantizedProblem
) -> None:
    """Subnormal inputs and scales count, also in a thread that flushes such numbers."""
    if not {"float32"} <= capabilities_of(backend).value_dtypes:
        raise NotApplicable("it does not take float32")
    rng = np.random.default_rng(0)
    # Where a is 1e-36 its scale a/127 is subnormal; with float inputs the numbers themselves are.
    size = 1e-36 if problem.inputs == "int8" else 2.0**-140
    x = (rng.integers(-9, 10, problem.x.shape) * size / 9).astype(np.float32)
    case = replace(problem, x=x, bias=None)
    plan, outcome = _plan(backend, case), _outcome(case)
    first = _call(plan, case)
    _assert_right(first, outcome, "the product of small numbers")
    if can_flush_subnormals():
        with flushing_subnormals():
            before = subnormals_are_flushed()
            again = _call(plan, case)
            if subnormals_are_flushed() != before:
                raise LawViolation("the thread was left in another floating-point mode")
        assert_same_bits(again, first, "the product in a flushing thread")


@_law("itself", "bit for bit")
def quantized_inputs_are_not_written(backend: Backend, problem: QuantizedProblem) -> None:
    """Neither x nor the bias nor the weight changes."""
    plan = _plan(backend, problem)
    arrays = (problem.x, *plan.weight.value_arrays.values(), plan.weight.indices, problem.bias)
    assert_unwritten(arrays, lambda: _call(plan, problem))


@_law(f"{_AGAINST}, and itself", f"{_TOLERANCE}; and bit for bit")
def earlier_quantized_calls_leave_no_trace(backend: Backend, problem: QuantizedProblem) -> None:
    """A product is that of what x and the bias hold now, and later calls do not change it."""
    plan = _plan(backend, problem)
    x, bias = np.array(problem.x), None if problem.bias is None else np.array(problem.bias)
    reused = replace(problem, x=x, bias=bias)
    first = _call(plan, reused)
    kept = first.copy()
    for array in (x, bias):
        if array is not None:
            np.multiply(array, -0.5, out=array)
    _assert_right(_call(plan, reused), _outcome(reused), "with other numbers, the product")
    assert_same_bits(first, kept, "an earlier product")


@_law("itself", "bit for bit")
def threads_may_share_a_quantized_plan(backend: Backend, problem: QuantizedProblem) -> None:
    """Called from several threads at once, a plan gives each the bits of its own product."""
    plan = _plan(backend, problem)
    cases = [replace(problem, x=x) for x in (problem.x, -problem.x, np.zeros_like(problem.x))]
    calls = [partial(_call, plan, case) for case in cases]
    assert_same_in_threads(calls, partial(assert_same_bits, what="a product beside other threads"))


@_law("itself", "bit for bit with int8 inputs, else within twice the bound")
def permuted_neurons_permute_the_quantized_product(
    backend: Backend, problem: QuantizedProblem
) -> None:
    """Neurons in another order have their outputs in that order."""
    weight = problem.weight
    place = np.random.default_rng(0).permutation(weight.shape[0])
    order = np.argsort(place[weight.active])
    moved = type(weight)(
        weight.values[order], weight.indices[order], place[weight.active][order], weight.shape
    )
    bias = None
    if problem.bias is not None:
        bias = np.empty_like(problem.bias)
        bias[place] = problem.bias
    elsewhere = replace(problem, weight=moved, bias=bias)
    product, other = (_call(_plan(backend, each), each) for each in (problem, elsewhere))
    what = "the product of neurons in another order"
    _assert_alike(other[..., place], product, _outcome(problem), what)


@_law("itself", "bit for bit with int8 inputs, else within twice the bound")
def permuted_inputs_do_not_matter_to_a_quantized_weight(
    backend: Backend, problem: QuantizedProblem
) -> None:
    """Inputs in another order, with connections in that order, give the same product."""
    weight = problem.weight
    place = np.random.default_rng(0).permutation(weight.shape[1])
    columns = place[weight.indices]
    order = np.argsort(columns, axis=1)
    values, columns = (np.take_along_axis(part, order, axis=1) for part in (weight.values, columns))
    x = np.empty_like(problem.x, order="C")
    x[..., place] = problem.x
    elsewhere = replace(
        problem, weight=type(weight)(values, columns, weight.active, weight.shape), x=x
    )
    product, other = (_call(_plan(backend, each), each) for each in (problem, elsewhere))
    _assert_alike(other, product, _outcome(problem), "the product of inputs in another order")


@_law("itself", "bit for bit with int8 inputs, else within twice the bound")
def rows_of_a_quantized_product_do_not_interact(
    backend: Backend, problem: QuantizedProblem
) -> None:
    """A row of a batch has the same product alone, whatever the other rows hold."""
    x = problem.x.reshape(-1, problem.x.shape[-1])
    if len(x) < 2:
        raise NotApplicable("there are no two rows")
    plan = _plan(backend, problem)
    for row in {0, len(x) // 2, len(x) - 1}:
        alone = replace(problem, x=x[row])
        poisoned = np.full_like(x, np.nan)
        poisoned[row] = x[row]
        outcome, expected = _outcome(alone), _call(plan, alone)
        for rows, what in ((x, "a row of a batch"), (poisoned, "a row among rows of NaN")):
            beside = _call(plan, replace(problem, x=rows))[row]
            _assert_alike(beside, expected, outcome, what)
            if (np.isnan(beside) & ~np.isnan(expected) & ~outcome.unchecked).any():
                raise LawViolation(f"NaN in other rows of the batch reached row {row}")


def _assert_alike(product: NDArray[Any], other: NDArray[Any], outcome: Outcome, what: str) -> None:
    """Check that two products have the same bits, or without those are within twice the bound."""
    if outcome.is_rounded and outcome.activation == "none":
        assert_same_numbers(product, other, what)
    else:
        assert_near(product, other, 2 * outcome.bound(product.dtype), what)


def _needs_no_activation(backend: Backend) -> None:
    if "none" not in capabilities_of(backend).activations:
        raise NotApplicable("it always applies an activation")
