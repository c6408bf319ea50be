"""Quantized weights: their numbers, their files' arrays, and what products take them (SPEC 6)."""

import copy
import pickle
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from srigl_core import (
    BackendUnavailableError,
    CondensedWeight,
    QuantizedPlan,
    QuantizedWeight,
    SriglError,
    ValueTypeError,
    condensed_matmul,
    condensed_matmul_backward,
    get_backend,
    prepare,
    update_condensed,
    warmup,
)
from srigl_core._plan import plan_of
from srigl_core.testing import (
    FunctionBackend,
    KernelCapabilities,
    LawViolation,
    check_kernel,
    verify,
)
from srigl_core.testing.flush_mode import flushing_subnormals
from srigl_core.testing.verification import law_named

bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float16), bfloat16, np.dtype(np.float32), np.dtype(np.float64))
LARGEST_FAN_IN = 133_144
INDICES = [[0, 3], [1, 2]]
SMALLEST_NORMAL = 2.0**-126


def small(values=((3, -127), (0, 127)), scale=(0.5, 0.25)):
    """Row 1 of 3 is ablated."""
    scales = np.array(scale, np.float32)
    return QuantizedWeight(np.array(values, np.int8), scales, INDICES, [0, 2], (3, 4))


def neuron(values, dtype=np.float32):
    """A weight of one neuron."""
    values = np.array([values], dtype)
    return CondensedWeight(values, [np.arange(values.size)], [0], (1, values.size))


# ---------------------------------------------------------------- quantising


def nearest_float32(number):
    """Return the float32 number nearest to a fraction of at least 0, ties to even."""
    if number >= Fraction(2**128 - 2**103):
        return np.float32(np.inf)
    near = np.float32(min(float(number), float(np.finfo(np.float32).max)))
    with np.errstate(all="ignore"):
        neighbours = [np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf)]
    return min(
        (candidate for candidate in (near, *neighbours) if np.isfinite(candidate)),
        key=lambda found: (abs(Fraction(float(found)) - number), int(found.view(np.uint32)) & 1),
    )


def by_fractions(values):
    """Return scale and integers of a neuron, by the page's words and exact arithmetic."""
    magnitudes = [Fraction(float(nearest_float32(abs(Fraction(w))))) for w in values]
    scale = Fraction(float(nearest_float32(max(magnitudes) / 127)))
    if scale < Fraction(SMALLEST_NORMAL):
        scale = Fraction(1)
    quotients = [float(Fraction(w) / scale) for w in values]  # rounded once, to float64
    return float(scale), [max(-127, min(127, round(quotient))) for quotient in quotients]


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
HALVES = st.integers(-254, 254).map(lambda n: n / 2)


@given(
    values=st.lists(NUMBERS | HALVES | st.sampled_from([0.0, -0.0, 127.0]), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
)
@example(values=[127.0, 0.5, 1.5, -2.5], dtype=DTYPES[2])
@example(values=[3.4028234663852886e38, -1.0], dtype=DTYPES[3])
@example(values=[1.5e-36, 1.4e-36, 1.2e-38], dtype=DTYPES[2])
@example(values=[127 * SMALLEST_NORMAL, SMALLEST_NORMAL / 2], dtype=DTYPES[2])
@example(values=[127 * SMALLEST_NORMAL * (1 - 2**-24), 1.0e-38], dtype=DTYPES[2])
@example(values=[1e-300, 5e-324], dtype=DTYPES[3])
@example(values=[127.0, 0.5 + 2**-40, 2.5 - 2**-40], dtype=DTYPES[3])
@example(values=[0.8184808492660522, 0.06122494488954544], dtype=DTYPES[2])
@example(values=[0.9376141268509859], dtype=DTYPES[3])
def test_a_neuron_is_quantized_as_the_page_says(values, dtype):
    with np.errstate(over="ignore"):
        numbers = np.array(values).astype(dtype)
    if not np.isfinite(numbers.astype(np.float32)).all():
        return
    quantized = neuron(numbers, dtype).quantize()
    scale, integers = by_fractions([float(number) for number in numbers])
    assert (float(quantized.scale[0]), quantized.values[0].tolist()) == (scale, integers)


@given(number=st.floats(0, 3.5e38) | st.floats(0, 1e-37) | st.floats(0, 1e-43))
@example(number=3.4028235677973366e38)  # halfway to 2^128
@example(number=2.0**-150)
@example(number=3 * 2.0**-150)
def test_fractions_are_rounded_as_numpy_rounds_float64(number):
    with np.errstate(over="ignore"):
        assert nearest_float32(Fraction(number)) == np.float32(number)


@given(number=st.floats(2.0**-149, 2.0**127, width=32) | st.floats(2.0**-149, 2.0**-119, width=32))
@example(number=127 * 2.0**-149)
@example(number=63.5 * 2.0**-148)
def test_quotients_of_float32_may_be_rounded_to_float64_first(number):
    with np.errstate(over="ignore"):
        for quotient, exact in (
            (number / 127, Fraction(number) / 127),
            (127 / number, 127 / Fraction(number)),
        ):
            assert np.float32(quotient) == nearest_float32(exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_neuron_has_a_scale_of_its_own_and_an_error_of_half_of_it(dtype):
    weight = CondensedWeight.random((30, 50), fan_in=12, n_active=20, dtype=dtype, rng=0)
    quantized = weight.quantize()
    assert quantized.connections is weight.connections
    assert (np.abs(quantized.values).max(axis=1) == 127).all()
    assert np.unique(quantized.scale).size > 10
    error = quantized.dequantize(np.float64).values - weight.values.astype(np.float64)
    assert (np.abs(error) <= quantized.scale[:, None] * (0.5 + 1e-6)).all()
    assert np.abs(error).max() > 0


def test_neurons_of_zeros_have_scale_one():
    for values in ([0.0, -0.0], [1e-40, -1e-39]):
        quantized = neuron(values).quantize()
        assert (quantized.scale.tolist(), quantized.values.tolist()) == ([1.0], [[0, 0]])
        assert quantized.fan_in == 2


def test_a_thread_that_flushes_subnormals_quantizes_alike():
    weight = neuron([127 * SMALLEST_NORMAL, 0.9 * SMALLEST_NORMAL])
    assert weight.quantize().values.tolist() == [[127, 1]]
    with flushing_subnormals():
        flushed = weight.quantize()
    assert flushed == weight.quantize()
    tiny = small(scale=(1e-40, 1e-45))
    with flushing_subnormals():
        values = QuantizedWeight.from_connections(*tiny.value_arrays.values(), tiny.connections)
        dense = tiny.to_dense()
    assert values == tiny
    assert dense.tobytes() == tiny.to_dense().tobytes()


@pytest.mark.parametrize(
    ("values", "dtype", "count"),
    [
        ([1.0, np.nan, np.inf], np.float32, 2),
        ([1.0, -np.inf, 1.0], np.float16, 1),
        ([1e39, 1.0, 1e300], np.float64, 2),
        ([3.4028235677973366e38, 1.0, 1.0], np.float64, 1),
    ],
)
def test_values_that_float32_does_not_hold_are_an_error_with_their_count(values, dtype, count):
    message = f"values are not finite in float32 in {count} of 3 places"
    with pytest.raises(SriglError, match=message):
        neuron(values, dtype).quantize()


# ---------------------------------------------------------------- the weight


def test_numbers_are_scale_times_value():
    weight = small()
    dense = [[1.5, 0, 0, -63.5], [0, 0, 0, 0], [0, 0.0, 31.75, 0]]
    assert weight.to_dense().tolist() == dense
    assert weight.to_dense().dtype == np.float32
    for dtype in DTYPES:
        floats = weight.dequantize(dtype)
        assert floats.dtype == dtype
        assert floats.to_dense().tolist() == dense
        assert floats.connections is weight.connections
    third = np.float32(1 / 3)
    exact = small(scale=(third, 1)).dequantize("float64").values[0, 1]
    assert exact == -127 * float(third)
    assert small(scale=(third, 1)).dequantize().values[0, 1] == np.float32(exact) != exact


def test_it_says_of_itself_what_a_condensed_weight_does():
    weight = small()
    assert (weight.shape, weight.n_active, weight.fan_in, weight.nnz) == ((3, 4), 2, 2, 4)
    assert (weight.dtype, weight.float_dtype) == (np.int8, np.float32)
    assert (weight.active.tolist(), weight.ablated.tolist()) == ([0, 2], [1])
    assert weight.to_mask().tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]
    assert repr(weight) == (
        "QuantizedWeight((3, 4), n_active=2, fan_in=2, dtype=int8, 66.7% sparse, 36 bytes)"
    )
    assert list(weight.value_arrays) == ["values", "scale"]


@pytest.mark.parametrize("fan_in", [64, 307])
def test_values_take_a_quarter_of_the_bytes_and_the_whole_form_about_half(fan_in):
    weight = CondensedWeight.random((768, 3072), fan_in=fan_in, rng=0)
    ours, floats = weight.quantize().memory_report(), weight.memory_report()
    assert ours.values == weight.nnz + 4 * weight.n_active <= 0.27 * floats.values
    assert (ours.indices, ours.active) == (floats.indices, floats.active)
    assert ours.condensed - ours.active <= 0.52 * (floats.condensed - floats.active)
    assert "condensed" in str(ours)


def test_equal_weights_have_the_same_bits_and_kind():
    assert small() == small()
    assert small() != small(scale=(0.5, 0.5))
    assert small() != small(values=((3, -127), (0, 126)))
    assert small() != small().dequantize()
    assert small() != "a weight"
    with pytest.raises(TypeError, match="unhashable"):
        hash(small())


def test_pickle_and_copies_make_the_quantized_weight_again():
    weight = small()
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(weight, protocol)) == weight
    for made in (copy.copy(weight), copy.deepcopy(weight)):
        assert made == weight
        assert not made.scale.flags.writeable


def test_a_quantized_weight_cannot_be_changed():
    values, scale = np.array([[3, -127], [0, 127]], np.int8), np.array([0.5, 0.25], np.float32)
    weight = QuantizedWeight(values, scale, INDICES, [0, 2], (3, 4))
    values[:], scale[:] = 1, 1
    assert weight == small()
    for array in (weight.values, weight.scale, weight.indices, weight.active):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)
    with pytest.raises(AttributeError, match="cannot assign"):
        weight.scale = scale
    fresh = weight.to_dense()
    fresh[...] = 1
    assert weight == small()


VALUES = np.array([[3, -127], [0, 127]], np.int8)
SCALE = np.array([0.5, 0.25], np.float32)


@pytest.mark.parametrize(
    ("values", "scale", "error", "message"),
    [
        (VALUES.astype(np.int16), SCALE, ValueTypeError, "values must be an array of int8, .* i"),
        (VALUES.astype(np.float32), SCALE, ValueTypeError, "array of int8, got dtype float32"),
        (VALUES.view(np.uint8), SCALE, ValueTypeError, "array of int8, got dtype uint8"),
        (VALUES.tolist(), SCALE, ValueTypeError, "array of int8, got list"),
        (np.ma.masked_array(VALUES), SCALE, ValueTypeError, "array of int8"),
        (np.array([[1, -128], [0, 0]], np.int8), SCALE, SriglError, r"-128, but .* -127\.\.127"),
        (VALUES[0], SCALE, SriglError, r"values has shape \(2,\)"),
        (VALUES, SCALE[:1], SriglError, r"scale has shape \(1,\), but .* \(2,\)"),
        (VALUES, SCALE[:, None], SriglError, r"scale has shape \(2, 1\)"),
        (VALUES, SCALE.astype(np.float64), ValueTypeError, "scale has dtype float64, but must be"),
        (VALUES, SCALE.astype(np.float16), ValueTypeError, "scale has dtype float16, but must be"),
        (VALUES, np.array([1, 2]), ValueTypeError, "scale of dtype 'int64' is not supported"),
        (VALUES, None, ValueTypeError, "scale must be an array"),
        (VALUES, np.array([1, 0], np.float32), SriglError, r"scale holds 0\.0, but"),
        (VALUES, np.array([-1, 1], np.float32), SriglError, r"scale holds -1\.0, but"),
        (VALUES, np.array([1, np.nan], np.float32), SriglError, "scale holds nan, but"),
        (VALUES, np.array([np.inf, 1], np.float32), SriglError, "scale holds inf, but"),
    ],
)
def test_what_is_no_quantized_weight_is_an_error(values, scale, error, message):
    with pytest.raises(error, match=message):
        QuantizedWeight(values, scale, INDICES, [0, 2], (3, 4))


def test_only_connections_are_taken_for_connections():
    with pytest.raises(ValueTypeError, match="connections must be Connections, got list"):
        QuantizedWeight.from_connections(VALUES, SCALE, INDICES)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("inputs", ["float", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_have_float32_unless_x_is_wider(inputs, dtype):
    x = np.array([[1, 2, 4, 127], [0, 0, 0, 0]], dtype)
    plan = prepare(small(), inputs=inputs, backend="reference")
    y = plan(x, np.array([1.0, 2.0, -3.0], dtype))
    assert y.dtype == (np.float64 if dtype == np.float64 else np.float32)
    expected = [[1.5 - 63.5 * 127 + 1, 2, 31.75 * 4 - 3], [1, 2, -3]]
    assert y.tolist() == expected
    for out_dtype in DTYPES:
        out = np.empty((2, 3), out_dtype)
        assert plan(x, np.array([1.0, 2.0, -3.0], dtype), out=out) is out
        assert out.tolist() == np.array(expected).astype(out_dtype).tolist()


@pytest.mark.parametrize("inputs", ["float", "int8"])
@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 0, 4), (2, 3, 4), (1, 4)])
def test_leading_axes_are_kept_and_an_empty_batch_is_empty(quantized_backend, inputs, shape):
    if inputs not in get_backend(quantized_backend).capabilities.quantized_inputs:
        pytest.skip(f"it does not take {inputs} inputs")
    plan = prepare(small(), inputs=inputs, backend=quantized_backend)
    y = plan(np.ones(shape, np.float32))
    assert (y.shape, y.dtype) == ((*shape[:-1], 3), np.float32)
    assert plan(np.ones(shape, np.float32), compact=True).shape == (*shape[:-1], 2)


def test_the_public_function_takes_inputs_as_they_are_by_default():
    weight, x = small(), np.array([[1.0, 0.3, 0.7, 0.2]], np.float32)
    weight_only = condensed_matmul(x, weight)
    np.testing.assert_allclose(weight_only, x @ weight.to_dense().T, rtol=1e-6)
    both = condensed_matmul(x, weight, inputs="int8")
    assert both.tolist() == prepare(weight, inputs="int8")(x).tolist() != weight_only.tolist()
    assert (weight @ x[0]).tolist() == weight_only[0].tolist()


def test_each_product_has_its_plan_kept_with_the_weight():
    weight = small()
    plan, other = plan_of(weight, "reference"), plan_of(weight, "reference", "int8")
    assert isinstance(plan, QuantizedPlan)
    assert (plan.inputs, other.inputs) == ("float", "int8")
    assert plan_of(weight, "reference") is plan
    assert plan_of(weight, "reference", "int8") is other
    for fact in ("QuantizedPlan(QuantizedWeight((3, 4)", "backend=reference", "inputs=int8"):
        assert fact in repr(other)
    with pytest.raises(ValueTypeError, match="a plan belongs to its process"):
        pickle.dumps(plan)


@pytest.mark.parametrize(
    ("x", "arguments", "error", "message"),
    [
        (np.ones((1, 4), np.int8), {}, ValueTypeError, "x of dtype 'int8' is not supported"),
        (np.ones((1, 3), np.float32), {}, SriglError, "its last axis must be the weight's n_in=4"),
        (np.ones((1, 4)), {"bias": np.ones(2)}, SriglError, r"bias has shape \(2,\)"),
        (np.ones((1, 4)), {"activation": "tanh"}, SriglError, "activation='tanh' is unknown"),
        (np.ones((1, 4)), {"threads": 0}, SriglError, "threads=0"),
        (np.ones((1, 4)), {"out": np.ones((1, 4))}, SriglError, "out has shape"),
    ],
)
def test_arguments_of_a_quantized_product_are_checked(x, arguments, error, message):
    for inputs in ("float", "int8"):
        with pytest.raises(error, match=message):
            prepare(small(), inputs=inputs)(x, **arguments)


@pytest.mark.parametrize("inputs", ["int4", "", None, ["int8"]])
def test_inputs_that_are_neither_float_nor_int8_are_an_error(inputs):
    for call in (
        lambda: prepare(small(), inputs=inputs),
        lambda: prepare(small().dequantize(), inputs=inputs),
        lambda: condensed_matmul(np.ones(4), small(), inputs=inputs),
    ):
        with pytest.raises(SriglError, match=r"inputs=.* is unknown; use one of float, int8"):
            call()


def test_int8_inputs_need_a_quantized_weight():
    floats = small().dequantize()
    for call in (
        lambda: prepare(floats, inputs="int8"),
        lambda: condensed_matmul(np.ones(4), floats, inputs="int8"),
    ):
        with pytest.raises(SriglError, match=r"needs a quantised weight; pass weight.quantize\(\)"):
            call()


def test_there_are_no_gradients():
    weight, x, grad = small(), np.ones((1, 4), np.float32), np.ones((1, 3), np.float32)
    for call in (
        lambda: prepare(weight).backward(grad, x),
        lambda: prepare(weight, inputs="int8").backward(grad, x, wrt=("x",)),
        lambda: condensed_matmul_backward(grad, x, weight),
        lambda: update_condensed(weight, None, None),
        lambda: warmup(weight=weight, backward=True),
        lambda: warmup(weight=weight, update=True),
    ):
        with pytest.raises(SriglError, match="is for inference and has no gradients"):
            call()


def test_sums_of_int8_products_must_fit_int32():
    def ones(fan_in):
        values = np.full((1, fan_in), 127, np.int8)
        return QuantizedWeight(
            values, np.ones(1, np.float32), [np.arange(fan_in)], [0], (1, fan_in)
        )

    x = np.ones(LARGEST_FAN_IN + 1, np.float32)
    largest, beyond = ones(LARGEST_FAN_IN), ones(LARGEST_FAN_IN + 1)
    product = condensed_matmul(x[1:], largest, inputs="int8")
    acc, u = np.float32(127 * 127 * LARGEST_FAN_IN), np.float32(1) / np.float32(127)
    assert product.tolist() == [acc * u]
    with pytest.raises(SriglError, match=r"fan_in=133,145 exceeds 133,144, .* use inputs='float'"):
        prepare(beyond, inputs="int8")
    x[1:-1] = 0
    assert condensed_matmul(x, beyond).tolist() == [254.0]


# ---------------------------------------------------------------- backends


class WeightOnly:
    """A backend that takes inputs as they are."""

    name = "mine"

    def __init__(self, **capabilities):
        operations = {"quantized_matmul"}
        options = {"quantized_inputs": {"float"}, "index_dtypes": {"uint16"}, **capabilities}
        self.capabilities = KernelCapabilities(operations=operations, **options)
        self.calls = []

    def prepare_quantized(self, weight, inputs):
        self.calls.append(inputs)
        return get_backend("reference").prepare_quantized(weight, inputs)


def test_a_backend_that_lacks_the_product_is_an_error_that_names_those_that_have_it():
    floats_only = FunctionBackend(lambda x, values, indices: x, "condensed_matmul")
    floats_only.name = "mine"
    with pytest.raises(SriglError, match=r"'mine' does not offer quantized_matmul; .*reference"):
        prepare(small(), backend=floats_only)
    message = r"'scipy' does not offer quantized_matmul with inputs='int8'; .*reference"
    for call in (
        lambda: prepare(small(), inputs="int8", backend="scipy"),
        lambda: condensed_matmul(np.ones(4), small(), inputs="int8", backend="scipy"),
    ):
        with pytest.raises(SriglError, match=message):
            call()


def test_where_no_backend_of_a_device_has_the_product_the_error_names_it():
    message = "on a cuda device and offers quantized_matmul with inputs='int8'; copy the arrays"
    with pytest.raises(BackendUnavailableError, match=message):
        get_backend(operation="quantized_matmul", device="cuda", inputs="int8")


def test_where_none_is_named_one_that_has_the_product_is_used():
    for inputs in ("float", "int8"):
        capabilities = prepare(small(), inputs=inputs).backend.capabilities
        assert "quantized_matmul" in capabilities.operations
        assert inputs in capabilities.quantized_inputs


def test_a_backend_is_asked_for_the_products_that_it_declares():
    backend = WeightOnly()
    x = np.ones((1, 4), np.float32)
    assert prepare(small(), backend=backend)(x).shape == (1, 3)
    assert condensed_matmul(x, small(), backend=backend).shape == (1, 3)
    assert backend.calls == ["float", "float"]
    with pytest.raises(SriglError, match="'mine' does not offer quantized_matmul with inputs"):
        prepare(small(), inputs="int8", backend=backend)
    with pytest.raises(SriglError, match="'mine' does not offer condensed_matmul"):
        condensed_matmul(x, small().dequantize(), backend=backend)
    values = np.ones((1, 1), np.int8)
    wide = QuantizedWeight(values, np.ones(1, np.float32), [[9]], [0], (1, 70_000))
    with pytest.raises(ValueTypeError, match="does not take indices of dtype uint32"):
        prepare(wide, backend=backend)


def test_a_backend_that_declares_it_must_have_the_method():
    backend = WeightOnly()
    backend.prepare_quantized = None
    with pytest.raises(ValueTypeError, match="an object with the methods of"):
        prepare(small(), backend=backend)


# ---------------------------------------------------------------- the kit


def weight_only(x, values, scale, indices, active, n_out):
    y = np.zeros((len(x), n_out), np.result_type(x, scale))
    for row, value, factor, columns in zip(active, values, scale, indices, strict=True):
        y[:, row] = factor * (x[:, columns] @ value.astype(y.dtype))
    return y


WEIGHT_ONLY = KernelCapabilities(
    value_dtypes={"float32", "float64"}, quantized_inputs={"float"}, largest_problem=50_000
)


def test_a_function_for_one_product_is_checked_by_the_laws_of_that():
    report = check_kernel(weight_only, "quantized_matmul", capabilities=WEIGHT_ONLY, max_examples=5)
    statuses = {result.law.name: result.status for result in report.results}
    assert statuses["quantized_product_is_its_definition"] == "passed"
    assert statuses["int8_product_has_the_defined_bits"] == "not applicable"
    assert "int8 inputs of a quantised weight" in report.left_out


def test_a_function_may_compute_both_products():
    seen = set()

    def both(x, weight, inputs, bias, activation, compact, out, threads):
        seen.add(inputs)
        prepared = get_backend("reference").prepare_quantized(weight, inputs)
        prepared.matmul(x, bias, activation=activation, compact=compact, out=out, threads=threads)

    small = KernelCapabilities(largest_problem=50_000)
    report = check_kernel(both, "quantized_matmul", capabilities=small, max_examples=3)
    assert report.counts["passed"] >= 20
    assert seen == {"float", "int8"}


def test_a_wrong_function_is_shown_on_a_problem_as_python():
    def wrong(x, values, scale, indices, active, n_out):
        return weight_only(x, values, scale[::-1], indices, active, n_out)

    backend = FunctionBackend(wrong, "quantized_matmul", capabilities=WEIGHT_ONLY)
    law = law_named("quantized_product_is_its_definition")
    (result,) = verify(backend, laws=[law]).failures
    failure = result.failure
    assert "QuantizedProblem(" in failure.code
    code = failure.code.replace("kernel = ...  # put your function here", "")
    with pytest.raises(LawViolation):
        exec(code, {"kernel": wrong})


def test_a_function_without_inputs_must_declare_which_product_it_computes():
    with pytest.raises(SriglError, match="needs a parameter 'inputs', or capabilities"):
        FunctionBackend(weight_only, "quantized_matmul")
