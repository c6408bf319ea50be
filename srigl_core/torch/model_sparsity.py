"""The sparsity of a whole model, and its layers that are left dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srigl_core.torch.layer_types import is_lazy
from srigl_core.torch.replacement import PACKED, condensed_modules, linear_of

__all__ = ["dense_table", "sparsity_of_model"]


def sparsity_of_model(model: Any, nnz: Mapping[int, int]) -> float:
    """Return the sparsity of all matrices of a model: of its parameters with more than one axis.

    Parameters
    ----------
    model : torch.nn.Module
        The dense weights of its condensed layers count, too.
    nnz : mapping of int to int
        The number of active weights of masked parameters, by the parameter's ``id``.
    """
    total = active = 0
    for parameter in model.parameters():
        if not is_lazy(parameter) and parameter.ndim > 1:
            total += parameter.numel()
            active += nnz.get(id(parameter), parameter.numel())
    for linear in {linear_of(layer) for layer in condensed_modules(model, PACKED).values()}:
        total += linear.in_features * linear.out_features
        active += linear.n_active * linear.fan_in
    return 1 - active / total if total else 0.0


def dense_table(left: Mapping[str, str]) -> list[str]:
    """Return a line for each layer that was left dense, and a heading; nothing if there is none."""
    if not left:
        return []
    width = max(map(len, left))
    return ["left dense:", *(f"  {name:<{width}}  {reason}" for name, reason in left.items())]
