"""The product of int8 weights and int8 inputs, by exact arithmetic (SPEC 6).

Each float32 operation is computed exactly and rounded once: quotients as fractions; sums and
products in float64, which holds a product of two float32 numbers exactly, and whose rounding of a
sum cannot change its rounding to float32 (53 >= 2 * 24 + 2 bits).
"""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.weight import QuantizedWeight

__all__ = ["exact_int8_product", "nearest_float32"]

_OVERFLOW = Fraction(2**128 - 2**103)


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
    products = np.empty((len(rows), weight.n_active), np.float32)
    q, scale = weight.values.astype(np.int64), weight.scale.astype(np.float64)
    for number, row in enumerate(rows):
        largest = float(np.abs(row).max())
        if not np.isfinite(largest):
            products[number] = np.nan
            continue
        r, s = _row_scales(largest)
        p = np.zeros(row.size, np.int64)
        if np.isfinite(r):
            p = np.rint(_rounded(row.astype(np.float64) * r)).astype(np.int64)
        sums = (q * p[weight.indices]).sum(axis=1)
        u = _rounded(scale * s).astype(np.float64)
        v = _rounded(_rounded(sums.astype(np.float64)).astype(np.float64) * u)
        products[number] = np.where(sums == 0, np.float32(0), v)
    return products


@functools.lru_cache(maxsize=1024)
def _row_scales(largest: float) -> tuple[float, float]:
    """Return 127 / a and a / 127 in float32; infinity and 0 where the first overflows."""
    if not largest:
        return np.inf, 0.0
    r = float(nearest_float32(127 / Fraction(largest)))
    return (r, float(nearest_float32(Fraction(largest) / 127))) if np.isfinite(r) else (r, 0.0)


def _rounded(exact: NDArray[np.float64]) -> NDArray[np.float32]:
    return exact.astype(np.float32)


def nearest_float32(number: Fraction) -> np.float32:
    """Return the float32 number nearest to a fraction of at least 0, ties to even."""
    if number >= _OVERFLOW:
        return np.float32(np.inf)
    near = np.float32(min(float(number), float(np.finfo(np.float32).max)))
    with np.errstate(all="ignore"):
        neighbours = [np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf)]
    return min(
        (candidate for candidate in (near, *neighbours) if np.isfinite(candidate)),
        key=lambda candidate: (
            abs(Fraction(float(candidate)) - number),
            int(candidate.view(np.uint32)) & 1,
        ),
    )
