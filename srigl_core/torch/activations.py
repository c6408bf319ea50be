"""The activations in PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from srigl_core.contract import ACTIVATIONS

__all__ = ["ACTIVATION_FUNCTIONS"]

_FUSED = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
    "silu": nn.functional.silu,
}
ACTIVATION_FUNCTIONS = {
    name: _FUSED.get(name, partial(activation.formula, xp=torch))
    for name, activation in ACTIVATIONS.items()
}
"""PyTorch's own functions where it has them, otherwise the formulas of the table."""
