"""Quantised weights in JAX: the bits of the plan, also under jit."""

import numpy as np
import pytest

from srigl_core import CondensedWeight, SriglError, ValueTypeError, prepare
from srigl_core._arrays.dtypes import VALUE_TYPES, value_dtype
from srigl_core.contract import ACTIVATIONS

jax = pytest.importorskip("jax")

from srigl_core.jax import quantized_linear  # noqa: E402

both = pytest.mark.parametrize("inputs", ["float", "int8"])


def weight_of(n_active=15, seed=0):
    return CondensedWeight.random((20, 12), fan_in=5, n_active=n_active, rng=seed).quantize()


def numbers(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(value_dtype(dtype))


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)], ids=str)
def test_jitted_and_eager_calls_give_the_bits_of_the_plan(shape, activation, inputs):
    weight, x, bias = weight_of(), numbers(*shape), numbers(20, seed=1)
    expected = prepare(weight, inputs=inputs)(x, bias, activation=activation)

    def layer(x, bias):
        return quantized_linear(x, weight, bias, inputs=inputs, activation=activation)

    for call in (layer, jax.jit(layer)):
        y = np.asarray(call(x, bias))
        assert y.dtype == expected.dtype
        assert np.array_equal(y, expected)


@both
@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_every_type_of_inputs_gives_the_bits_of_the_plan(dtype, inputs):
    weight, x = weight_of(), numbers(5, 12, dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        y = np.asarray(jax.jit(lambda x: quantized_linear(x, weight, inputs=inputs))(x))
    expected = prepare(weight, inputs=inputs)(x)
    assert y.dtype == expected.dtype
    assert np.array_equal(y, expected)


@both
def test_each_jitted_function_has_its_own_weight(inputs):
    x, results = numbers(5, 12), []
    for seed in range(3):
        weight = weight_of(seed=seed)
        layer = jax.jit(lambda x, weight=weight: quantized_linear(x, weight, inputs=inputs))
        results.append((layer, prepare(weight, inputs=inputs)(x)))
    for layer, expected in results:
        assert np.array_equal(layer(x), expected)


@both
def test_mapped_inputs_are_one_batch(inputs):
    weight, x, bias = weight_of(), numbers(4, 3, 12), numbers(20)
    expected = prepare(weight, inputs=inputs)(x, bias)

    def layer(x):
        return quantized_linear(x, weight, bias, inputs=inputs)

    assert np.array_equal(jax.vmap(layer)(x), expected)
    assert np.array_equal(jax.jit(jax.vmap(layer, 1, 1))(x), expected)
    assert np.array_equal(jax.vmap(jax.vmap(layer))(x), expected)
    with pytest.raises(SriglError, match="map over x alone"):
        jax.vmap(lambda x, bias: quantized_linear(x, weight, bias))(x, numbers(4, 20))


def test_gradients_are_errors():
    weight, x, bias = weight_of(), numbers(5, 12), numbers(20)

    def loss(x, bias):
        return quantized_linear(x, weight, bias).sum()

    for derivative in (jax.grad, jax.jacfwd, lambda *what: jax.jit(jax.grad(*what))):
        for argument in (0, 1):
            with pytest.raises(SriglError, match="for inference and has no gradients"):
                derivative(loss, argument)(x, bias)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": weight_of().dequantize()}, ValueTypeError, "QuantizedWeight, got Condensed"),
        ({"x": numbers(5, 11)}, SriglError, r"x has shape \(5, 11\)"),
        ({"x": np.ones((5, 12), np.int32)}, ValueTypeError, "int32"),
        ({"bias": numbers(19)}, SriglError, r"bias has shape \(19,\)"),
        ({"bias": np.ones(20, np.int32)}, ValueTypeError, "bias of dtype 'int32'"),
        ({"inputs": "int4"}, SriglError, "inputs='int4' is unknown"),
        ({"activation": "elu"}, SriglError, "activation='elu'"),
    ],
)
def test_what_does_not_fit_is_an_error(change, error, message):
    arguments = {"x": numbers(5, 12), "weight": weight_of(), **change}
    with pytest.raises(error, match=message):
        quantized_linear(**arguments)
