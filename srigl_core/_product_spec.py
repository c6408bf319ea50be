"""The checks of a product and of its gradients: shapes and dtypes in, shapes and dtypes out.

Nothing here looks at numbers, so that tracers and fake tensors are checked by the same rules.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from srigl_core._activations import Activation, activation_named
from srigl_core._arrays.checks import check_integer
from srigl_core._arrays.dtypes import result_dtype, value_dtype
from srigl_core.errors import SriglError

__all__ = [
    "INT8_FAN_IN",
    "QUANTIZED_INPUTS",
    "ArraySpec",
    "ProductSpec",
    "bias_dtype",
    "check_int8_fan_in",
    "checked_threads",
    "gradient_specs",
    "product_spec",
]

QUANTIZED_INPUTS = ("float", "int8")
"""What the inputs of a product with a quantised weight may be: as they are, or quantised too."""

INT8_FAN_IN = (2**31 - 1) // 127**2
"""The largest fan-in whose sums of int8 products fit int32: 133,144 (SPEC 6)."""


class ArraySpec(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class ProductSpec(NamedTuple):
    """What a product returns, its activation, and the dtype that its bias is cast to."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    activation: Activation
    bias_dtype: np.dtype[Any]


def product_spec(
    x: ArraySpec,
    weight_shape: tuple[int, int],
    values_dtype: np.dtype[Any],
    *,
    bias_shape: tuple[int, ...] | None = None,
    activation: str | None = None,
    n_columns: int | None = None,
    inputs: str = "float",
) -> ProductSpec:
    """Check the arguments of ``act(x @ (W*M).T + bias)`` and describe its result (SPEC 2).

    Parameters
    ----------
    x : ArraySpec
        Of shape (..., n_in).
    weight_shape : tuple of int
        Dense shape, (n_out, n_in).
    values_dtype : numpy.dtype
        Of a quantised weight, that of the scale.
    bias_shape : tuple of int, or None
        Must be (n_out,).
    activation : str or None
        One of `srigl_core.contract.ACTIVATIONS`.
    n_columns : int or None
        Columns of the result where it is compact; None is n_out.
    inputs : str
        One of `QUANTIZED_INPUTS`. With "int8" the bias is cast to float32 (SPEC 6).

    Returns
    -------
    ProductSpec

    Raises
    ------
    SriglError
        If a shape does not fit, or the activation is unknown.
    ValueTypeError
        If a dtype is not a value type, or float16 meets bfloat16.
    """
    n_out, n_in = weight_shape
    _check_last_axis("x", x, "n_in", n_in, weight_shape)
    dtype = _result_dtype("x", x.dtype, values_dtype)
    if bias_shape is not None and tuple(bias_shape) != (n_out,):
        raise SriglError(
            f"bias has shape {tuple(bias_shape)}, but needs one number for each of the n_out="
            f"{n_out} neurons, ablated ones included: ({n_out},)"
        )
    shape = (*x.shape[:-1], n_out if n_columns is None else n_columns)
    return ProductSpec(shape, dtype, activation_named(activation), bias_dtype(dtype, inputs))


def bias_dtype(product: np.dtype[Any], inputs: str) -> np.dtype[Any]:
    """Return the dtype that a bias is cast to (SPEC 2): the product's, or float32 with "int8"."""
    return np.dtype(np.float32) if inputs == "int8" else product


def gradient_specs(
    grad: ArraySpec,
    x: ArraySpec | None,
    weight_shape: tuple[int, int],
    values: ArraySpec,
) -> dict[str, ArraySpec]:
    """Check the arguments of the gradients and describe each gradient (SPEC 2, Backward).

    Parameters
    ----------
    grad : ArraySpec
        Of dL/dz, (..., n_out).
    x : ArraySpec or None
        Of the input, (..., n_in); None if the gradient of the values is not asked for.
    weight_shape : tuple of int
        Dense shape, (n_out, n_in).
    values : ArraySpec

    Returns
    -------
    dict of str to ArraySpec
        For "x", "values" and "bias".

    Raises
    ------
    SriglError
        If a shape does not fit.
    ValueTypeError
        If a dtype is not a value type, or float16 meets bfloat16.
    """
    n_out, n_in = weight_shape
    _check_last_axis("grad", grad, "n_out", n_out, weight_shape)
    product = _result_dtype("grad", grad.dtype, values.dtype)
    dtypes = [np.dtype(np.float32), grad.dtype, values.dtype]
    if x is not None:
        if tuple(x.shape) != (*grad.shape[:-1], n_in):
            raise SriglError(
                f"x has shape {tuple(x.shape)}, but grad of shape {tuple(grad.shape)} and a weight "
                f"{weight_shape} need {(*grad.shape[:-1], n_in)}"
            )
        _result_dtype("x", x.dtype, values.dtype)
        result_dtype(grad.dtype, x.dtype)
        dtypes.append(x.dtype)
    return {
        "x": ArraySpec((*grad.shape[:-1], n_in), product),
        "values": ArraySpec(values.shape, np.result_type(*dtypes)),
        "bias": ArraySpec((n_out,), np.result_type(*dtypes[:2])),
    }


def check_int8_fan_in(fan_in: int) -> None:
    """Check that sums of `fan_in` products of int8 numbers fit int32.

    Raises
    ------
    SriglError
        If `fan_in` exceeds `INT8_FAN_IN`.
    """
    if fan_in > INT8_FAN_IN:
        raise SriglError(
            f"fan_in={fan_in:,} exceeds {INT8_FAN_IN:,}, the most products of int8 numbers whose "
            f"sum fits int32; use inputs='float'"
        )


def checked_threads(threads: int | None) -> int | None:
    """Return `threads`, an integer of at least 1, or None for the backend's default.

    Raises
    ------
    SriglError
        If it is less than 1, or not an integer.
    """
    if threads is None or (type(threads) is int and threads > 0):  # the usual case, quickly
        return threads
    return check_integer(threads, "threads", least=1)


def _check_last_axis(
    what: str, array: ArraySpec, length_name: str, length: int, weight_shape: tuple[int, int]
) -> None:
    if not array.shape or array.shape[-1] != length:
        raise SriglError(
            f"{what} has shape {tuple(array.shape)}, but its last axis must be the weight's "
            f"{length_name}={length} (weight {weight_shape})"
            + ("; compact gradients are not taken" if what == "grad" else "")
        )


def _result_dtype(what: str, dtype: np.dtype[Any], values_dtype: np.dtype[Any]) -> np.dtype[Any]:
    return result_dtype(
        value_dtype(dtype, f"{what} of dtype"), value_dtype(values_dtype, "values of dtype")
    )
