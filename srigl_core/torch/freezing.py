"""Condensed layers for inference, whose numbers are not compared at each call."""

from __future__ import annotations

from typing import Any

from srigl_core.torch.packing import freeze_packing, unfreeze_packing
from srigl_core.torch.replacement import condensed_modules, linear_of
from srigl_core.torch.sharded_tensors import check_not_sharded

__all__ = ["freeze", "unfreeze"]


def freeze(model: Any) -> Any:
    """Pack the condensed layers of a model for inference, and trust that nothing writes to them.

    Otherwise each call of a layer compares all its numbers with those that were packed, so that a
    write is found however it was made. A frozen layer leaves that out.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        `model` itself. The `values` of its condensed layers no longer require gradients.

    Raises
    ------
    ValueTypeError
        If `model` is not a module.
    SriglError
        If a layer's tensors are not a valid weight. Later, by a call of the model, if PyTorch has
        counted a write to a frozen layer.

    Notes
    -----
    PyTorch does not count writes through ``.data`` or views of other libraries, by collectives or
    by other processes: a frozen layer does not see them. Copies of a frozen layer, and layers whose
    tensors are replaced (by ``model.to(dtype)``, for example), are not frozen.

    Examples
    --------
    >>> import torch
    >>> from srigl_core.torch import CondensedLinear
    >>> layer = freeze(CondensedLinear(16, 4, fan_in=3, rng=0))
    >>> layer(torch.ones(2, 16)).shape
    torch.Size([2, 4])
    """
    check_not_sharded(model)
    for module in condensed_modules(model).values():
        layer = linear_of(module)
        layer.values.requires_grad_(False)
        freeze_packing(layer.values, layer.indices, layer.active, layer.counts, layer.in_features)
    return model


def unfreeze(model: Any) -> Any:
    """Compare the numbers of a model's condensed layers at each call again, and return the model.

    To train the layers set ``requires_grad`` of their `values`.
    """
    for module in condensed_modules(model).values():
        layer = linear_of(module)
        unfreeze_packing(layer.values, layer.indices)
    return model
