"""Conversion of a trained model's layers from masked to condensed, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from srigl_core._format.weight import CondensedWeight
from srigl_core.errors import SriglError
from srigl_core.torch.attention import CondensedMultiheadAttention
from srigl_core.torch.conv import GEOMETRY, CondensedConv, CondensedConv1d
from srigl_core.torch.given_masks import NONZERO, ZEROS, given_masks, masks_by_layer
from srigl_core.torch.replacement import (
    PACKED,
    condensed_layer,
    condensed_modules,
    condensed_name,
    linear_of,
    replace_modules,
    why_not_condensed,
)
from srigl_core.torch.selection import Entry
from srigl_core.torch.sharded_tensors import check_not_sharded
from srigl_core.torch.targets import PRUNED, Target, find_targets
from srigl_core.torch.tensors import as_numpy
from srigl_core.torch.training import SRigL

if TYPE_CHECKING:
    import scipy.sparse

__all__ = ["condense", "dense_layer", "to_csr", "to_masked_dense"]


def condense(
    model: Any,
    masks: Mapping[str, Any] | SRigL | str,
    *,
    exclude: Iterable[Entry] | Entry = (),
    pad: bool = False,
) -> Any:
    """Replace the masked layers of a trained model by condensed ones, in place.

    Parameters
    ----------
    model : torch.nn.Module
        A model with dense weights. Linear layers, 1-D and 2-D convolutions, the projections of
        ``nn.MultiheadAttention`` and GPT-2's ``Conv1D`` can be condensed.
    masks : mapping of str to tensor or ndarray of bool, SRigL, or "nonzero"
        Constant fan-in masks by layer name, in the shapes of the weights. A layer whose mask is all
        True stays dense. With "nonzero" the active weights are those that are not 0.0. A layer that
        cannot be condensed is an error if a mapping names it; otherwise it is left, and
        ``report(model).left`` lists it.
    exclude : iterable of str or type
        Layers to leave dense: names, patterns and types, as in `SRigL`.
    pad : bool
        Take masks whose rows differ in length. A shorter row gets weights of 0.0, at the first
        columns that it does not use, until it is as long as the longest row of its layer; empty
        rows stay ablated. Results stay the same, and a layer's memory and time become those of the
        longest row.

    Returns
    -------
    torch.nn.Module
        `model` itself. Bias, device, dtype, mode and `requires_grad` are kept.

    Raises
    ------
    SriglError
        If a mask is not constant fan-in, does not fit its layer or names no layer, if a layer
        cannot be condensed, or if there is nothing to condense. With "nonzero", also if a layer was
        pruned by ``torch.nn.utils.prune`` or ``torch.ao.pruning`` and that is not permanent yet.
        The message names the layer, and the model is not changed.
    ValueTypeError
        If `masks` has the wrong type, or a mask is not bool.

    Warns
    -----
    UserWarning
        With `pad`, of the weights that were added to each layer.

    Warnings
    --------
    Use "nonzero" only if there are no masks. Newly grown weights are active although they are 0.0,
    so zeros do not give the mask of a model in training. Rows that have fewer nonzero weights than
    others are refused, but if all rows lack equally many, these connections are lost.

    Notes
    -----
    The weights are new parameters. An existing optimiser does not update them.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
    >>> mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    >>> condense(model, {"0": mask})[0].fan_in
    2
    """
    check_not_sharded(model)
    names = None
    if isinstance(masks, SRigL):
        # These were not named by the caller, so they need not all be condensed.
        given: Any = {name: masks.mask(name) for name in masks.trainer.budgets}
    elif isinstance(masks, str):
        given = masks
    else:
        given = masks_by_layer(masks)
        names = list(given)
        for name in given.keys() & condensed_modules(model, PACKED).keys():
            raise SriglError(f"layer {name!r} is condensed already")
    selection = find_targets(model, names, exclude, unsupported=why_not_condensed)
    targets = selection.targets
    if isinstance(given, str):
        for name, reason in selection.left.items():
            if reason.startswith(PRUNED):
                raise SriglError(f"layer {name!r} {reason}, or exclude it")
    else:
        given = {name: mask for name, mask in given.items() if name not in selection.left}
    layers, costs = {}, []
    for name, mask in given_masks(targets, given).items():
        if not mask.all():
            hint = ZEROS if given == NONZERO else ""
            padded = _padded(mask) if pad else mask
            layers[condensed_name(targets[name])] = _condensed(targets[name], mask, padded, hint)
            costs += _cost_of_padding(name, mask, padded)
    if not layers:
        raise SriglError("all masks are True everywhere; there is nothing to condense")
    replace_modules(model, layers)
    if costs:
        warnings.warn(
            f"rows were padded with zeros to the longest of their layer: {'; '.join(costs)}; "
            f"prune_to_constant_fan_in prunes to rows of one length",
            stacklevel=2,
        )
    return model


def to_masked_dense(model: Any) -> Any:
    """Replace the condensed layers of a model by dense ones with zeros, in place.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        `model` itself, with ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` and
        ``nn.MultiheadAttention``. Bias, device, dtype, mode and `requires_grad` are kept; the masks
        are not.

    Raises
    ------
    SriglError
        If a layer has an activation, or is the model itself. The message names the layer, and the
        model is not changed.
    """
    check_not_sharded(model)
    layers = condensed_modules(model, PACKED)
    for name, layer in layers.items():
        activation = linear_of(layer).activation
        if activation not in (None, "none"):
            raise SriglError(
                f"layer {name!r} has activation={activation!r}, but a dense layer has none; add "
                f"a module for the activation to the model, and set the layer's to None"
            )
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CondensedMultiheadAttention)
    }
    parts = {id(part) for attention in attentions.values() for part in attention.modules()}
    made = {layer: dense_layer(layer) for layer in layers.values() if id(layer) not in parts}
    replaced = {name: made[layer] for name, layer in layers.items() if layer in made}
    replaced |= {name: attention.to_dense() for name, attention in attentions.items()}
    replace_modules(model, replaced)
    return model


def to_csr(model: Any) -> dict[str, scipy.sparse.csr_array]:
    """Return the weights of a model's condensed layers as SciPy CSR arrays.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict of str to scipy.sparse.csr_array
        New arrays by layer name, (n_out, n_in); weights of convolutions are flattened. Active
        zeros are stored. 16-bit values become float32.
    """
    check_not_sharded(model)
    layers = condensed_modules(model, PACKED)
    return {name: linear_of(layer).to_condensed().to_csr() for name, layer in layers.items()}


def _condensed(
    target: Target, mask: NDArray[np.bool_], padded: NDArray[np.bool_], hint: str
) -> Any:
    """Return the condensed layer that replaces a dense one, with zeros where only `padded` is."""
    dense = as_numpy(target.layout.to_rows(target.parameter.detach()))
    try:
        weight = CondensedWeight.from_dense(np.where(mask, dense, dense.dtype.type(0)), padded)
    except SriglError as error:
        how = "; condense(..., pad=True) pads rows with zeros" if mask.any() else ""
        raise type(error)(
            f"layer {target.name!r}: {error}{hint}{how}; or exclude the layer"
        ) from error
    return condensed_layer(target, weight)


def _padded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask whose rows are as long as the longest one, except for empty ones."""
    rows = mask.reshape(len(mask), -1)
    counts = np.count_nonzero(rows, axis=1)
    missing = np.where(counts > 0, counts.max() - counts, 0)
    is_unused = ~rows
    padding = is_unused & (np.cumsum(is_unused, axis=1) <= missing[:, None])
    return (rows | padding).reshape(mask.shape)


def _cost_of_padding(name: str, mask: NDArray[np.bool_], padded: NDArray[np.bool_]) -> list[str]:
    """Return a description of what was added to a layer, or nothing if nothing was."""
    before, after = int(mask.sum()), int(padded.sum())
    if before == after:
        return []
    rows = padded.reshape(len(padded), -1)
    mean = before / np.count_nonzero(rows.any(axis=1))
    return [
        f"layer {name!r} has {after:,} weights in place of {before:,} ({after / before - 1:+.0%}), "
        f"{rows.sum(axis=1).max()} a row, where the mean was {mean:.1f}"
    ]


def dense_layer(layer: Any) -> Any:
    """Return a condensed layer as a dense one with zeros; without its activation.

    Parameters
    ----------
    layer : CondensedLinear, CondensedConv1d or CondensedConv2d

    Returns
    -------
    torch.nn.Linear, torch.nn.Conv1d or torch.nn.Conv2d
        Bias, device, dtype, mode and what requires a gradient are kept.
    """
    dense = linear_of(layer).to_linear()
    if not isinstance(layer, CondensedConv):
        return dense
    geometry = {name: getattr(layer, name) for name in GEOMETRY}
    sizes = layer.in_channels, layer.out_channels
    convolution = nn.Conv1d if isinstance(layer, CondensedConv1d) else nn.Conv2d
    conv = convolution(*sizes, **geometry, bias=dense.bias is not None, device="meta")
    weight = dense.weight.detach().reshape(conv.weight.shape)
    conv.weight = nn.Parameter(weight, requires_grad=dense.weight.requires_grad)
    conv.bias = dense.bias
    return conv.train(layer.training)
