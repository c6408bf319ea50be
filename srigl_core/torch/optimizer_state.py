"""The state of any PyTorch optimiser at a mask update (SPEC 4.8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["remap_state", "replace_parameter"]


def remap_state(optimizer: Any, parameter: Any, remap: Callable[[Any], Any]) -> None:
    """Change, in place, the tensors of a parameter's state that have its shape.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    parameter : torch.nn.Parameter
    remap : callable
        Takes the old tensor and returns the new one.
    """
    for tensor in _like(optimizer.state.get(parameter, {}), parameter).values():
        tensor.copy_(remap(tensor))


def replace_parameter(optimizer: Any, old: Any, new: Any, remap: Callable[[Any], Any]) -> None:
    """Replace a parameter of an optimiser, and convert its state.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    old, new : torch.nn.Parameter
    remap : callable
        Takes a tensor of the old parameter's shape and returns one of the new parameter's.
    """
    for group in optimizer.param_groups:
        # In place, because an optimiser may have other references to the list, as LBFGS has.
        group["params"][:] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        remapped = {name: remap(tensor) for name, tensor in _like(state, old).items()}
        optimizer.state[new] = {**state, **remapped}


def _like(state: dict[str, Any], parameter: Any) -> dict[str, Any]:
    return {
        name: part
        for name, part in state.items()
        if isinstance(part, torch.Tensor) and part.shape == parameter.shape and part.ndim > 0
    }
