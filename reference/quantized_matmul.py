"""Quantized weights and their two products (SPEC 6).

A float32 operation is one NumPy operation on float32 arrays, which rounds once, to nearest even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import accumulator_dtype, round_to
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core.errors import SriglError
from srigl_core.reference.activations import activate

__all__ = ["int8_product", "quantize_inputs", "quantize_weight", "weight_only_product"]

Array = NDArray[Any]

LARGEST = np.float32(127)
_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal


def quantize_weight(weight: CondensedWeight) -> QuantizedWeight:
    """Return a weight with int8 values and a scale for each neuron.

    Parameters
    ----------
    weight : CondensedWeight

    Returns
    -------
    QuantizedWeight
        On the same connections.

    Raises
    ------
    SriglError
        If a value is not finite, or is too large for float32.

    Notes
    -----
    SPEC 6. A scale is the neuron's largest magnitude over 127, in float32, or 1 where that is 0
    or subnormal. Values are rounded to nearest even; the clip only guards.
    """
    with honour_subnormals(), np.errstate(all="ignore"):
        magnitudes = np.abs(weight.values.astype(np.float32))
        n_wrong = np.count_nonzero(~np.isfinite(magnitudes))
        if n_wrong:
            raise SriglError(
                f"values are not finite in float32 in {n_wrong} of {weight.nnz} places, so they "
                f"cannot be quantized"
            )
        scale = magnitudes.max(axis=1) / LARGEST
        scale[scale < _SMALLEST_NORMAL] = 1
        q = np.rint(weight.values.astype(np.float64) / scale.astype(np.float64)[:, None])
        q = np.clip(q, -LARGEST, LARGEST).astype(np.int8)
    return QuantizedWeight.from_connections(q, scale, weight.connections)


def quantize_inputs(x: Array) -> tuple[Array, Array]:
    """Return the rows of `x` as integers, and a scale for each row.

    Parameters
    ----------
    x : ndarray, (batch, n_in)
        Cast to float32.

    Returns
    -------
    p : ndarray of int32, (batch, n_in)
        Within -127..127.
    s : ndarray of float32, (batch,)
        Finite, and NaN for a row that holds a NaN or an infinity, whose `p` is 0.

    Notes
    -----
    SPEC 6. All columns count, also those that no neuron is connected to. A row of zeros, or of
    numbers so small that 127 / a overflows, has p = 0 and s = 0.
    """
    x = x.astype(np.float32)
    a = np.abs(x).max(axis=1)
    r = LARGEST / a
    s = a / LARGEST
    p = np.rint(x * r[:, None])
    p[np.isinf(r)] = 0
    s[np.isinf(r)] = 0
    p[~np.isfinite(a)] = 0
    s[~np.isfinite(a)] = np.nan
    return p.astype(np.int32), s


def weight_only_product(
    x: Array,
    weight: QuantizedWeight,
    bias: Array | None,
    *,
    activation: str,
    compact: bool,
    dtype: np.dtype[Any],
) -> Array:
    """Return ``act(b + scale * sum of q * x)``, computed from the connected inputs only.

    Parameters
    ----------
    x : ndarray, (batch, n_in)
    weight : QuantizedWeight, (n_out, n_in)
    bias : ndarray, (n_out,), or None
    activation : str
        One of `srigl_core.contract.ACTIVATIONS`.
    compact : bool
        Return the columns of active neurons only.
    dtype : numpy.dtype
        Dtype of the result.

    Returns
    -------
    ndarray, (batch, n_out), or (batch, n_active) if `compact`

    Notes
    -----
    SPEC 6 and 2. Accumulates in float32, or in float64 where `x` is float64. The scale is applied
    to the sum.
    """
    sum_dtype = accumulator_dtype(x.dtype, weight.float_dtype)
    with np.errstate(all="ignore"):
        inputs, q = x.astype(sum_dtype), weight.values.astype(sum_dtype)
        summed = np.zeros((x.shape[0], weight.n_active), sum_dtype)
        for j in range(weight.fan_in):
            summed += q[:, j] * inputs[:, weight.indices[:, j]]
        v = weight.scale.astype(sum_dtype) * summed
        z = _with_bias(v, weight, bias, compact=compact)
        return round_to(activate(z.astype(np.float64), activation), dtype)


def int8_product(
    x: Array,
    weight: QuantizedWeight,
    bias: Array | None,
    *,
    activation: str,
    compact: bool,
    dtype: np.dtype[Any],
) -> Array:
    """Return the product of int8 weights and int8 inputs.

    Parameters
    ----------
    x, weight, activation, compact, dtype
        As in `weight_only_product`.
    bias : ndarray of float32, (n_out,), or None

    Returns
    -------
    ndarray, (batch, n_out), or (batch, n_active) if `compact`

    Notes
    -----
    SPEC 6. The integer sums are exact. Without an activation every backend gives these bits.
    """
    with np.errstate(all="ignore"):
        p, s = quantize_inputs(x)
        q = weight.values.astype(np.int32)
        acc = np.empty((x.shape[0], weight.n_active), np.int32)
        for row in range(x.shape[0]):
            acc[row] = np.sum(q * p[row, weight.indices], axis=1, dtype=np.int32)
        u = weight.scale * s[:, None]
        v = acc.astype(np.float32) * u
        v[(acc == 0) & ~np.isnan(u)] = 0
        z = _with_bias(v, weight, bias, compact=compact)
        return round_to(activate(z.astype(np.float64), activation), dtype)


def _with_bias(v: Array, weight: QuantizedWeight, bias: Array | None, *, compact: bool) -> Array:
    """Return z: `v` and the bias at active neurons, the bias alone, or 0, at ablated ones."""
    offset = np.zeros(weight.shape[0], v.dtype) if bias is None else bias.astype(v.dtype)
    summed = v if bias is None else v + offset[weight.active]
    if compact:
        return summed
    z = np.broadcast_to(offset, (v.shape[0], weight.shape[0])).copy()
    z[:, weight.active] = summed
    return z
