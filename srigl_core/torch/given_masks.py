"""The masks that a user gives for the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch.sharded_tensors import whole
from srigl_core.torch.targets import Target
from srigl_core.torch.tensors import as_numpy, from_numpy

__all__ = ["NONZERO", "ZEROS", "check_not_sparse", "given_masks", "masks_by_layer"]

NONZERO = "nonzero"
"""The word for masks that are True where a weight is not zero."""

ZEROS = "; newly grown weights are active although they are 0.0: give masks, not 'nonzero'"


def masks_by_layer(masks: Any) -> dict[str, Any]:
    """Return masks by the names of layers, without the suffix ``.weight``.

    Raises
    ------
    SriglError
        If a layer has two masks.
    ValueTypeError
        If it is not a mapping.
    """
    if not isinstance(masks, Mapping) or not all(isinstance(name, str) for name in masks):
        raise ValueTypeError(
            f"masks must be a mapping of layer names to masks, an SRigL or 'nonzero', got "
            f"{type(masks).__name__}"
        )
    by_layer: dict[str, Any] = {}
    for name, mask in masks.items():
        layer = "" if name == "weight" else name.removesuffix(".weight")
        if layer in by_layer:
            raise SriglError(f"masks has two masks of layer {layer!r}, one with .weight; give one")
        by_layer[layer] = mask
    return by_layer


def given_masks(targets: Mapping[str, Target], masks: Any) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of layers as NumPy arrays, with the neurons on the first axis.

    Parameters
    ----------
    targets : mapping of str to Target
    masks : mapping of str to tensor or ndarray of bool, or "nonzero"
        Masks of some of the layers, or the word for all layers.

    Raises
    ------
    SriglError
        If a mask does not fit its layer, or names none. The message names the layer.
    ValueTypeError
        If `masks` has the wrong type, or a mask is not bool.
    """
    if isinstance(masks, str):
        if masks != NONZERO:
            raise SriglError(f"masks={masks!r} is unknown; give masks by name, or 'nonzero'")
        with honour_subnormals():
            return {
                name: as_numpy(target.layout.to_rows(whole(target.parameter.detach()))) != 0
                for name, target in targets.items()
                if not target.is_condensed
            }
    by_layer = masks_by_layer(masks)
    for name in by_layer:
        if name not in targets:
            raise SriglError(
                f"masks names {name!r}, but the sparse layers are {', '.join(targets)}"
            )
    return {name: _checked_mask(targets[name], mask) for name, mask in by_layer.items()}


def check_not_sparse(targets: Mapping[str, Target]) -> None:
    """Raise SriglError for a layer with more zeros than other weights, unless all are zero."""
    for name, target in targets.items():
        if target.is_condensed:
            continue
        n_weights = target.parameter.numel()
        n_nonzero = int(torch.count_nonzero(whole(target.parameter)))
        if 0 < 2 * n_nonzero < n_weights:
            raise SriglError(
                f"layer {name!r} is sparse already: {n_weights - n_nonzero} of its {n_weights} "
                f"weights are zero, and a new mask would set most others to zero too; pass masks= "
                f"(masks='nonzero' keeps the weights that are not zero), or draw new weights with "
                f"init=. To resume, attach SRigL to a new model, and then load all states"
            )


def _checked_mask(target: Target, mask: Any) -> NDArray[np.bool_]:
    if target.is_condensed:
        raise SriglError(
            f"layer {target.name!r} is condensed, and keeps its connections; leave out its mask"
        )
    array = as_numpy(mask) if isinstance(mask, torch.Tensor) else mask
    if not isinstance(array, np.ndarray) or array.dtype != np.bool_:
        dtype = getattr(array, "dtype", type(mask).__name__)
        raise ValueTypeError(
            f"the mask of layer {target.name!r} must be a tensor or array of bool, got {dtype}; "
            f"convert with .bool()"
        )
    shape = tuple(target.parameter.shape)
    if array.shape != shape:
        raise SriglError(
            f"the mask of layer {target.name!r} has shape {array.shape}, but its weight has "
            f"{shape}; give the mask of that layer"
        )
    return as_numpy(target.layout.to_rows(from_numpy(array)))
