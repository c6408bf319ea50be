"""The activation functions of the epilogue, by their formulas (SPEC 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["activate"]

Float64 = NDArray[np.float64]

_erf: Callable[[Float64], Float64] = np.vectorize(math.erf, otypes=[np.float64])


def activate(z: Float64, activation: str) -> Float64:
    """Return ``activation(z)`` elementwise.

    Parameters
    ----------
    z : ndarray, float64
    activation : str
        One of `srigl_core.contract.ACTIVATIONS`.

    Returns
    -------
    ndarray, float64, same shape

    Notes
    -----
    relu(NaN) is NaN; the smooth ones follow their formula at infinity, so that gelu, gelu_tanh
    and silu of -inf are NaN (inf * 0).
    """
    return _FORMULAS[activation](z)


def _relu(z: Float64) -> Float64:
    return np.where(z <= 0, 0.0, z)


def _gelu(z: Float64) -> Float64:
    y: Float64 = 0.5 * z * (1 + _erf(z / math.sqrt(2)))
    return y


def _gelu_tanh(z: Float64) -> Float64:
    y: Float64 = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return y


def _silu(z: Float64) -> Float64:
    y: Float64 = z / (1 + np.exp(-z))
    return y


_FORMULAS: dict[str, Callable[[Float64], Float64]] = {
    "none": lambda z: z,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}
