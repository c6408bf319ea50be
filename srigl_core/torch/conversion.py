"""Condensed layers in place of a trained model's masked ones, and the other way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from srigl_core._format.weight import CondensedWeight
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch.conv import CondensedConv2d
from srigl_core.torch.replacement import (
    check_can_be_condensed,
    condensed_layer,
    condensed_modules,
    linear_of,
    replace_modules,
)
from srigl_core.torch.targets import Target, find_targets
from srigl_core.torch.tensors import as_numpy
from srigl_core.torch.training import SRigL

if TYPE_CHECKING:
    import scipy.sparse

__all__ = ["condense", "dense_layer", "to_csr", "to_masked_dense"]


def condense(
    model: Any, masks: Mapping[str, Any] | SRigL | str, *, exclude: Iterable[str] = ()
) -> Any:
    """Put condensed layers in place of a trained model's masked ones, in place.

    Parameters
    ----------
    model : torch.nn.Module
        With dense weights in ``nn.Linear`` and ``nn.Conv2d`` layers.
    masks : mapping of str to tensor or ndarray of bool, SRigL, or "nonzero"
        By the layer's name, of the weight's shape; constant fan-in. Of a layer whose mask is all
        True nothing can be left out: it stays dense. "nonzero" takes every weight that is not 0.0.
    exclude : iterable of str
        Names of layers to leave dense.

    Returns
    -------
    torch.nn.Module
        `model` itself. Bias, device, dtype, mode and what requires a gradient are kept.

    Raises
    ------
    SriglError
        If a mask is not constant fan-in, is of another shape or of no layer, or a layer cannot be
        condensed, or none is left to be. Names the layer; the model is left as it was.
    ValueTypeError
        If `masks` is something else, or a mask not of bool.

    Warnings
    --------
    "nonzero" is for weights that carry no mask at all. Weights just grown are 0.0 and active, so
    that zeros alone do not give the mask of a model in training: rows with one fewer are refused,
    and a layer where every row has the same number of them would lose these connections.

    Notes
    -----
    The weights are new parameters, which an optimiser made before does not know.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
    >>> mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    >>> condense(model, {"0": mask})[0].fan_in
    2
    """
    left_out = {exclude} if isinstance(exclude, str) else set(exclude)
    if isinstance(masks, str):
        if masks != "nonzero":
            raise SriglError(f"masks={masks!r} is unknown; give masks by name, or 'nonzero'")
        targets = find_targets(model, None, left_out)
        found = {name: as_numpy(target.parameter) != 0 for name, target in targets.items()}
        hint = "; weights just grown are 0.0 and active: give the masks instead of 'nonzero'"
    else:
        given = {name.removesuffix(".weight"): mask for name, mask in _by_name(masks).items()}
        found = {name: mask for name, mask in given.items() if name not in left_out}
        for name in found.keys() & condensed_modules(model).keys():
            raise SriglError(f"layer {name!r} is condensed already")
        targets = find_targets(model, list(found), left_out)
        hint = ""
    made = {}
    for name, target in targets.items():
        mask = _checked_mask(target, found[name])
        if not mask.all():
            made[name] = _condensed(target, mask, hint)
    if not made:
        raise SriglError("no layer has a mask with anything to leave out; nothing to condense")
    replace_modules(model, made)
    return model


def to_masked_dense(model: Any) -> Any:
    """Put dense layers with zeros in place of a model's condensed ones, in place.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        `model` itself, with ``nn.Linear`` and ``nn.Conv2d``. Bias, device, dtype, mode and what
        requires a gradient are kept; the masks are not.

    Raises
    ------
    SriglError
        If a layer has an activation of its own, or is the model itself. Names the layer; the model
        is left as it was.
    """
    layers = condensed_modules(model)
    for name, layer in layers.items():
        activation = linear_of(layer).activation
        if activation not in (None, "none"):
            raise SriglError(
                f"layer {name!r} has activation={activation!r}, which a dense layer has not; put "
                f"the activation into the model as a module of its own, and set the layer's to None"
            )
    made = {layer: dense_layer(layer) for layer in set(layers.values())}
    replace_modules(model, {name: made[layer] for name, layer in layers.items()})
    return model


def to_csr(model: Any) -> dict[str, scipy.sparse.csr_array]:
    """Return the weights of a model's condensed layers as SciPy CSR arrays, by name.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict of str to scipy.sparse.csr_array
        New arrays, (n_out, n_in), with active zeros stored; a convolution's as its flattened
        weight. 16-bit values become float32.
    """
    layers = condensed_modules(model)
    return {name: linear_of(layer).to_condensed().to_csr() for name, layer in layers.items()}


def _by_name(masks: Mapping[str, Any] | SRigL) -> dict[str, Any]:
    if isinstance(masks, SRigL):
        return {name: masks.mask(name) for name in masks.trainer.budgets}
    if not isinstance(masks, Mapping):
        raise ValueTypeError(
            f"masks must be a mapping of layer names to masks, an SRigL or 'nonzero', got "
            f"{type(masks).__name__}"
        )
    return dict(masks)


def _checked_mask(target: Target, mask: Any) -> NDArray[np.bool_]:
    array = as_numpy(mask) if isinstance(mask, torch.Tensor) else mask
    if not isinstance(array, np.ndarray) or array.dtype != np.bool_:
        came = getattr(array, "dtype", type(mask).__name__)
        raise ValueTypeError(
            f"the mask of layer {target.name!r} must be a tensor or array of bool, got {came}; "
            f"convert with .bool()"
        )
    if array.shape != target.shape:
        raise SriglError(
            f"the mask of layer {target.name!r} has shape {array.shape}, but its weight "
            f"{target.shape}; give the mask of that layer"
        )
    return array


def _condensed(target: Target, mask: NDArray[np.bool_], hint: str) -> Any:
    """Return the condensed layer for a dense one."""
    check_can_be_condensed(target)
    try:
        weight = CondensedWeight.from_dense(as_numpy(target.parameter), mask)
    except SriglError as error:
        raise type(error)(f"layer {target.name!r}: {error}{hint}; or exclude the layer") from error
    return condensed_layer(target, weight)


def dense_layer(layer: Any) -> Any:
    """Return a condensed layer as a dense one with zeros; without its activation.

    Parameters
    ----------
    layer : CondensedLinear or CondensedConv2d

    Returns
    -------
    torch.nn.Linear or torch.nn.Conv2d
        Bias, device, dtype, mode and what requires a gradient are kept.
    """
    dense = linear_of(layer).to_linear()
    if not isinstance(layer, CondensedConv2d):
        return dense
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        bias=dense.bias is not None,
        device="meta",
    )
    weight = dense.weight.detach().reshape(conv.weight.shape)
    conv.weight = nn.Parameter(weight, requires_grad=dense.weight.requires_grad)
    conv.bias = dense.bias
    return conv.train(layer.training)
