"""The activation functions that a product may end with: one row each (SPEC 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from srigl_core.errors import SriglError

__all__ = ["ACTIVATIONS", "Activation", "activation_named"]


@dataclass(frozen=True)
class Activation:
    """One activation function.

    Parameters
    ----------
    name : str
        The value of an `activation` argument.
    code : int
        The number that kernels know it by.
    formula : callable
        Called as ``formula(z, xp)``. It returns the activation of `z` elementwise, by the
        functions ``exp``, ``tanh``, ``erf`` and ``where`` of the namespace `xp`.
    lipschitz : float
        A bound on the slope; the error bound of SPEC 2 needs it.
    """

    name: str
    code: int
    formula: Callable[..., Any]
    lipschitz: float


def _relu(z: Any, xp: Any) -> Any:
    return xp.where(z <= 0, 0.0, z)


def _gelu(z: Any, xp: Any) -> Any:
    return 0.5 * z * (1 + xp.erf(z / math.sqrt(2)))


def _gelu_tanh(z: Any, xp: Any) -> Any:
    return 0.5 * z * (1 + xp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _silu(z: Any, xp: Any) -> Any:
    return z / (1 + xp.exp(-z))


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        row.name: row
        for row in (
            Activation("none", 0, lambda z, xp: z, 1.0),
            Activation("relu", 1, _relu, 1.0),
            Activation("gelu", 2, _gelu, 1.13),
            Activation("gelu_tanh", 3, _gelu_tanh, 1.13),
            Activation("silu", 4, _silu, 1.10),
        )
    }
)
"""The activations by name; an `activation` argument of None means "none"."""


def activation_named(activation: str | None) -> Activation:
    """Return the row of an `activation` argument.

    Raises
    ------
    SriglError
        If there is no activation of that name.
    """
    if activation is None:
        return ACTIVATIONS["none"]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise SriglError(f"activation={activation!r} is unknown; use {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]
