"""The product of int8 weights and int8 inputs, by exact arithmetic (SPEC 6).

Each float32 operation is computed in float64 and rounded once. Float64 holds a product of two
float32 numbers exactly, and its rounding of a sum or a quotient cannot change the rounding to
float32 (53 >= 2 * 24 + 2 bits).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.weight import QuantizedWeight
from srigl_core.testing.oracles import chunks_of_neurons

__all__ = ["exact_int8_product"]


def exact_int8_product(
    weight: QuantizedWeight, x: NDArray[Any], bias: NDArray[Any] | None
) -> NDArray[np.float32]:
    """Return the product before the activation, float32, (..., n_out); cast `bias` to float32."""
    with np.errstate(all="ignore"):
        rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
        z = np.zeros((len(rows), weight.shape[0]), np.float32)
        offset = np.zeros(weight.shape[0]) if bias is None else bias.astype(np.float32)
        z[:] = offset
        summed = _products(weight, rows)
        if bias is not None:
            summed = _rounded(summed.astype(np.float64) + offset[weight.active].astype(np.float64))
        z[:, weight.active] = summed
        return z.reshape(*x.shape[:-1], weight.shape[0])


def _products(weight: QuantizedWeight, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return v, (batch, n_active)."""
    largest = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64)
    r = _rounded(127 / largest)
    is_scaled = np.isfinite(largest) & np.isfinite(r)
    s = np.where(is_scaled, _rounded(largest / 127), 0)
    p = np.where(is_scaled, np.rint(_rounded(rows.astype(np.float64) * r)), 0).astype(np.int64)
    q, sums = weight.values.astype(np.int64), np.empty((len(rows), weight.n_active), np.int64)
    for neurons in chunks_of_neurons(weight, len(rows)):
        sums[:, neurons] = (p[:, weight.indices[neurons]] * q[neurons]).sum(axis=-1)
    u = _rounded(weight.scale.astype(np.float64) * s).astype(np.float64)
    v = _rounded(_rounded(sums.astype(np.float64)).astype(np.float64) * u)
    v[sums == 0] = 0
    v[~np.isfinite(largest[:, 0])] = np.nan
    return v


def _rounded(exact: NDArray[np.float64]) -> NDArray[np.float32]:
    return exact.astype(np.float32)
