"""Checkpoints of the SRigL authors' released code: dense weights and masks.

Their training script saves a mapping. ``model`` is the state of the model and ``pruner`` that of
the sparsity scheduler. In it, ``backward_masks`` is a list in the order of the layers, with a mask
for each sparse layer and None for each dense one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from srigl_core.errors import FileFormatError, SriglError
from srigl_core.torch.checkpoint_file import check_dense, model_state, read_checkpoint
from srigl_core.torch.sharded_tensors import check_not_sharded
from srigl_core.torch.targets import check_module

__all__ = ["load_released_checkpoint"]

_NOT_LAYERS = (nn.BatchNorm2d, nn.LayerNorm, nn.SyncBatchNorm)
"""Modules with a weight that the released scheduler skips."""

_PLAIN_COPY = "pass {'model': checkpoint['model'], 'pruner': checkpoint['pruner']}"
_MOST_ROWS_SHOWN = 5
_SAME_MODEL = "make the model with the architecture of the trained one"


def load_released_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Load a released checkpoint's weights into a dense model, in place, and return its masks.

    Parameters
    ----------
    source : path-like, or mapping
        A checkpoint file, which is read with ``weights_only=True``, or the mapping in it. The
        mapping has the model's state as ``model`` or ``state_dict``, and the scheduler's state as
        ``pruner`` or its ``backward_masks``.
    model : torch.nn.Module
        A dense model of the checkpoint's architecture.

    Returns
    -------
    dict of str to torch.Tensor of bool
        The masks of the sparse layers by name, new tensors on the CPU. Pass them to `condense`.

    Raises
    ------
    FileFormatError
        If the file is damaged, cannot be read without running code in it, or lacks weights or
        masks; or a weight or mask is not a dense tensor of numbers.
    SriglError
        If masks and layers do not match, or a mask is not constant fan-in. The message names the
        layer and the rows. The model is not changed.
    OSError
        If the file cannot be read.

    Notes
    -----
    Masks and layers are matched by their order, as in the released scheduler: a layer is a module
    with a ``weight``, except normalisations. Shapes are compared. A weight that is not zero outside
    its mask is refused, since it shows that the order differs. Newly grown weights are active
    although they are 0.0.
    """
    check_not_sharded(model)
    check_module(model)
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source, _PLAIN_COPY)
    weights = model_state(checkpoint)
    masks = _matched(_masks(checkpoint), model)
    _check_state(weights, model)
    for name, mask in masks.items():
        _check_mask(name, mask, weights[f"{name}.weight" if name else "weight"])
    model.load_state_dict(dict(weights))
    return masks


def _masks(checkpoint: Mapping[str, Any]) -> Sequence[Any]:
    pruner = checkpoint.get("pruner")
    holder = pruner if isinstance(pruner, Mapping) else checkpoint
    masks = holder.get("backward_masks")
    if not isinstance(masks, list | tuple):
        raise FileFormatError(
            f"the checkpoint has {', '.join(map(str, checkpoint))}, but no list 'backward_masks', "
            f"in 'pruner' or outside of it; zeros alone do not show which weights are active"
        )
    return masks


def _layers(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the layers in the released scheduler's order. It does not search within a layer."""
    if isinstance(getattr(module, "weight", None), torch.Tensor):
        if type(module) not in _NOT_LAYERS:
            yield prefix, module
        return
    for name, part in module._modules.items():
        yield from _layers(part, f"{prefix}.{name}" if prefix else name)


def _matched(masks: Sequence[Any], model: Any) -> dict[str, Any]:
    """Return the masks of the sparse layers by name, as tensors of bool."""
    layers = list(_layers(model))
    if len(masks) != len(layers):
        raise SriglError(
            f"the checkpoint has {len(masks)} masks, but the model has {len(layers)} layers with a "
            f"weight ({', '.join(name for name, _ in layers)}); {_SAME_MODEL}"
        )
    matched = {}
    for (name, layer), mask in zip(layers, masks, strict=True):
        if mask is None:
            continue
        check_dense(f"the mask of layer {name!r}", mask, "a tensor or None")
        if mask.shape != layer.weight.shape:
            raise SriglError(
                f"the mask of layer {name!r} has shape {tuple(mask.shape)}, but its weight has "
                f"{tuple(layer.weight.shape)}; {_SAME_MODEL}"
            )
        active = mask.detach().cpu() != 0
        if not torch.equal(active.to(mask.dtype), mask.detach().cpu()):
            raise SriglError(f"the mask of layer {name!r} has other numbers than 0 and 1")
        matched[name] = active
    return matched


def _check_state(weights: Mapping[str, Any], model: Any) -> None:
    """Raise SriglError unless the weights are those of the model, by name and shape."""
    own = model.state_dict()
    for owner, names, others in (("checkpoint", weights, own), ("model", own, weights)):
        if missing := others.keys() - names.keys():
            raise SriglError(f"the {owner} lacks {', '.join(sorted(missing))}; {_SAME_MODEL}")
    for name, tensor in own.items():
        if not isinstance(tensor, torch.Tensor):  # a module's extra state, which it checks
            continue
        check_dense(f"{name!r} of the checkpoint", weights[name])
        if weights[name].shape != tensor.shape:
            raise SriglError(
                f"{name!r} of the checkpoint has shape {tuple(weights[name].shape)}, but the "
                f"model's has {tuple(tensor.shape)}; {_SAME_MODEL}"
            )


def _check_mask(name: str, mask: Any, weight: Any) -> None:
    outside = int(torch.count_nonzero(weight.detach().cpu()[~mask]))
    if outside:
        raise SriglError(
            f"layer {name!r} has {outside} weights that are not zero outside its mask; the masks "
            f"have another order than the model's layers, or are from another step"
        )
    counts = mask.flatten(1).sum(1)
    if not counts.any():
        raise SriglError(f"the mask of layer {name!r} has no active weight")
    usual = int(counts[counts > 0].mode().values)
    odd = torch.nonzero((counts != usual) & (counts > 0)).flatten().tolist()
    if odd:
        rows = [f"row {row} has {int(counts[row])}" for row in odd[:_MOST_ROWS_SHOWN]]
        rows += [f"and {len(odd) - len(rows)} more rows"] if len(odd) > len(rows) else []
        raise SriglError(
            f"layer {name!r}: the mask is not constant fan-in: most active rows have {usual} "
            f"weights, but {', '.join(rows)}; a checkpoint of unstructured training (RigL, SET) "
            f"cannot be condensed: load it as a dense model"
        )
