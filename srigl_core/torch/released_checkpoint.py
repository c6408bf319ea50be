"""Checkpoints of the SRigL authors' released code: dense weights, and masks beside them.

Their training script saves a mapping with the model's state as ``model`` and that of its sparsity
scheduler as ``pruner``. The latter holds ``backward_masks``: a list, in the order of the layers,
with a mask for each sparse layer and None for each dense one.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srigl_core.errors import FileFormatError, SriglError, ValueTypeError

__all__ = ["load_released_checkpoint"]

_NOT_LAYERS = (nn.BatchNorm2d, nn.LayerNorm, nn.SyncBatchNorm)
"""Modules with a weight that the released scheduler does not count."""

_WRAPPERS = ("module.", "_orig_mod.")
"""What data-parallel training and compilation put before names."""

_ROWS_NAMED = 5


def load_released_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Load a released checkpoint's weights into a dense model, in place, and return its masks.

    Parameters
    ----------
    source : path-like, or mapping
        A file, read with ``weights_only=True``, or what it holds: the model's state as ``model``
        (or ``state_dict``), the scheduler's as ``pruner`` (or ``backward_masks`` itself).
    model : torch.nn.Module
        Of the checkpoint's architecture, dense.

    Returns
    -------
    dict of str to torch.Tensor of bool
        The masks of the sparse layers by name, new tensors on the CPU: for `condense`.

    Raises
    ------
    FileFormatError
        If the file cannot be read without running code in it, or lacks the weights or masks.
    SriglError
        If masks and layers do not match, or a mask is not constant fan-in: names the layer and the
        rows. The model is left as it was.
    OSError
        If the file cannot be read.

    Notes
    -----
    The masks are matched to layers by order, as the released scheduler does: every module with a
    ``weight`` but for normalisations. Shapes are compared, and a weight that is not zero outside
    its mask is refused, as then the order is another one. Weights just grown are 0.0 and active.
    """
    if not isinstance(model, nn.Module):
        raise ValueTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checkpoint = source if isinstance(source, Mapping) else _read(source)
    weights = _unwrapped(_weights(checkpoint))
    masks = _matched(_masks(checkpoint), model)
    _check_state(weights, model)
    for name, mask in masks.items():
        _check_mask(name, mask, weights[f"{name}.weight" if name else "weight"])
    model.load_state_dict(dict(weights))
    return masks


def _read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {os.fspath(path)!r}")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} holds more than tensors and plain containers, as the released "
            f"code's own files do (its configuration): where you trust it, load it with "
            f"torch.load(path, weights_only=False) and give {{'model': held['model'], 'pruner': "
            f"held['pruner']}} of that ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} is no whole PyTorch checkpoint ({error})"
        ) from error
    if not isinstance(held, Mapping):
        raise FileFormatError(f"{os.fspath(path)!r} holds a {type(held).__name__}, not a mapping")
    return held


def _weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]  # type: ignore[no-any-return]
    raise FileFormatError(
        f"the checkpoint has {', '.join(map(str, checkpoint))}, but no model's state as 'model' or "
        f"'state_dict'"
    )


def _masks(checkpoint: Mapping[str, Any]) -> Sequence[Any]:
    pruner = checkpoint.get("pruner")
    holder = pruner if isinstance(pruner, Mapping) else checkpoint
    masks = holder.get("backward_masks")
    if not isinstance(masks, list | tuple):
        raise FileFormatError(
            f"the checkpoint has {', '.join(map(str, checkpoint))}, but no list 'backward_masks' "
            f"in 'pruner' or beside it; without masks, zeros alone do not tell which weights are "
            f"active"
        )
    return masks


def _unwrapped(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    for prefix in _WRAPPERS:
        if weights and all(str(name).startswith(prefix) for name in weights):
            return _unwrapped({name.removeprefix(prefix): t for name, t in weights.items()})
    return weights


def _layers(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the layers in the released scheduler's order: what has a weight is not looked into."""
    if isinstance(getattr(module, "weight", None), torch.Tensor):
        if type(module) not in _NOT_LAYERS:
            yield prefix, module
        return
    for name, part in module._modules.items():
        yield from _layers(part, f"{prefix}.{name}" if prefix else name)


def _matched(masks: Sequence[Any], model: Any) -> dict[str, Any]:
    """Return the masks that there are by the name of their layer, as tensors of bool."""
    layers = list(_layers(model))
    if len(masks) != len(layers):
        raise SriglError(
            f"the checkpoint has {len(masks)} masks, but the model {len(layers)} layers with a "
            f"weight ({', '.join(name for name, _ in layers)}); make the model as the one trained"
        )
    found = {}
    for (name, layer), mask in zip(layers, masks, strict=True):
        if mask is None:
            continue
        if not isinstance(mask, torch.Tensor):
            raise FileFormatError(
                f"the mask of layer {name!r} must be a tensor or None, got {type(mask).__name__}"
            )
        if mask.shape != layer.weight.shape:
            raise SriglError(
                f"the mask of layer {name!r} has shape {tuple(mask.shape)}, but its weight "
                f"{tuple(layer.weight.shape)}; make the model as the one trained"
            )
        active = mask.detach().cpu() != 0
        if not torch.equal(active.to(mask.dtype), mask.detach().cpu()):
            raise SriglError(f"the mask of layer {name!r} has other numbers than 0 and 1")
        found[name] = active
    return found


def _check_state(weights: Mapping[str, Any], model: Any) -> None:
    """Raise SriglError if loading the weights would not fill the model exactly."""
    own = model.state_dict()
    for what, names in (
        ("lacks", own.keys() - weights.keys()),
        ("has", weights.keys() - own.keys()),
    ):
        if names:
            rest = "" if what == "lacks" else ", which the model has not"
            raise SriglError(
                f"the checkpoint {what} {', '.join(sorted(names))}{rest}; make the model as the "
                f"one trained"
            )
    for name, tensor in own.items():
        if getattr(weights[name], "shape", None) != tensor.shape:
            raise SriglError(
                f"{name!r} of the checkpoint has shape "
                f"{tuple(getattr(weights[name], 'shape', ()))}, but the model's has "
                f"{tuple(tensor.shape)}; make the model as the one trained"
            )


def _check_mask(name: str, mask: Any, weight: Any) -> None:
    outside = int(torch.count_nonzero(weight.detach().cpu()[~mask]))
    if outside:
        raise SriglError(
            f"layer {name!r} has {outside} weights that are not zero outside its mask; the masks "
            f"are in another order than the model's layers, or of another step"
        )
    counts = mask.flatten(1).sum(1)
    if not counts.any():
        raise SriglError(f"the mask of layer {name!r} has no active weight")
    usual = int(counts[counts > 0].mode().values)
    odd = torch.nonzero((counts != usual) & (counts > 0)).flatten().tolist()
    if odd:
        shown = ", ".join(f"row {row} has {int(counts[row])}" for row in odd[:_ROWS_NAMED])
        more = f", and {len(odd) - _ROWS_NAMED} more rows" if len(odd) > _ROWS_NAMED else ""
        raise SriglError(
            f"layer {name!r}: the mask is not constant fan-in: most active rows have {usual} "
            f"weights, but {shown}{more}; a checkpoint of unstructured training (RigL, SET) "
            f"cannot be condensed: load it as the dense model that it is"
        )
