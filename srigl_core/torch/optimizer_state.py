"""What a mask update does to an optimiser's state, of any optimiser (SPEC 4.8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["remap_state", "replace_parameter"]


def remap_state(optimizer: Any, parameter: Any, remap: Callable[[Any], Any]) -> None:
    """Replace, in place, each tensor of a parameter's state that has its shape.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    parameter : torch.nn.Parameter
    remap : callable
        Takes such a tensor and returns what it becomes.
    """
    for held in _like(optimizer.state.get(parameter, {}), parameter).values():
        held.copy_(remap(held))


def replace_parameter(optimizer: Any, old: Any, new: Any, remap: Callable[[Any], Any]) -> None:
    """Let the optimiser move another parameter in place of `old`, with its state.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    old, new : torch.nn.Parameter
    remap : callable
        Takes a tensor of the old one's shape and returns one of the new one's.
    """
    for group in optimizer.param_groups:
        # In place: an optimiser may have the list elsewhere too, as LBFGS has.
        group["params"][:] = [new if held is old else held for held in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        remapped = {name: remap(held) for name, held in _like(state, old).items()}
        optimizer.state[new] = {**state, **remapped}


def _like(state: dict[str, Any], parameter: Any) -> dict[str, Any]:
    return {
        name: held
        for name, held in state.items()
        if isinstance(held, torch.Tensor) and held.shape == parameter.shape and held.ndim > 0
    }
