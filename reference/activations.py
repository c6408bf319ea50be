"""The activation functions of the epilogue, by their formulas (SPEC 2)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from srigl_core._activations import activation_named

__all__ = ["activate"]

_FUNCTIONS = SimpleNamespace(
    exp=np.exp,
    tanh=np.tanh,
    where=np.where,
    erf=np.vectorize(math.erf, otypes=[np.float64]),
)


def activate(z: NDArray[np.float64], activation: str) -> NDArray[np.float64]:
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
    relu(NaN) is NaN. The smooth activations follow their formula at infinity, so that gelu,
    gelu_tanh and silu of -inf are NaN (inf * 0).
    """
    y: NDArray[np.float64] = activation_named(activation).formula(z, _FUNCTIONS)
    return y
