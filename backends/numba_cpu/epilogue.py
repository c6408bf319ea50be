"""The activation functions inside a kernel, one scalar at a time (SPEC 2)."""

from __future__ import annotations

import math

from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.contract import ACTIVATIONS

__all__ = ["activate", "activation_code"]

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def activation_code(activation: str) -> int:
    """Return the number by which a kernel knows `activation`."""
    return ACTIVATIONS.index(activation)


@kernel()
def activate(z: float, code: int) -> float:
    """Return the activation of `z`, computed in float64."""
    if code == 0:
        return z
    if code == 1:
        return 0.0 if z <= 0 else z
    if code == 2:
        return 0.5 * z * (1.0 + math.erf(z * _SQRT_HALF))
    if code == 3:
        return 0.5 * z * (1.0 + math.tanh(_SQRT_2_OVER_PI * (z + 0.044715 * z * z * z)))
    return z / (1.0 + math.exp(-z))
