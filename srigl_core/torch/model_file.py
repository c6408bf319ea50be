"""A model with condensed layers in one safetensors file.

Condensed layers are stored as `srigl_core.save_condensed` stores them, each under its module's
name, and everything else as the model's ``state_dict`` names it; `srigl_core.load_condensed` reads
the file too. What the layers' modules are is in the metadata besides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from srigl_core._arrays.dtypes import VALUE_TYPES
from srigl_core._format.file import FORMAT_VERSION, read_whole, write_whole
from srigl_core._format.weight import CondensedWeight
from srigl_core.contract import ACTIVATIONS
from srigl_core.errors import FileFormatError, SriglError, ValueTypeError
from srigl_core.torch.conv import CondensedConv2d
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.replacement import condensed_modules, linear_of, replace_modules
from srigl_core.torch.tensors import as_numpy, from_numpy

__all__ = ["load_model", "save_model"]

_VERSION_KEY = "srigl_core.format_version"
_LAYERS_KEY = "srigl_core.layers"
_MODULES_KEY = "srigl_core.modules"
_PARTS = ("values", "indices", "active")
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


def save_model(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a model's state, condensed layers and all else, to one safetensors file.

    Parameters
    ----------
    model : torch.nn.Module
    path : path-like
        Replaced as a whole: a reader sees the old file or the new one.

    Raises
    ------
    ValueTypeError
        If `model` is no module, or its state holds something that is no tensor.
    SriglError
        If a condensed layer's tensors are no valid weight.
    """
    from safetensors.torch import save

    layers = condensed_modules(model)
    tensors = _plain_state(model, layers)
    shapes, modules = {}, {}
    for name, module in layers.items():
        linear = linear_of(module)
        weight = linear.to_condensed()
        kind = weight.dtype.name
        shapes[name] = {"shape": list(weight.shape), "dtype": kind}
        modules[name] = _description(module)
        values = from_numpy(weight.values)
        arrays = (
            values.view(torch.uint16) if kind == "bfloat16" else values,
            from_numpy(weight.indices),
            from_numpy(weight.active),
        )
        tensors |= {f"{name}.{p}": a for p, a in zip(_PARTS, arrays, strict=True)}
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias.detach()
    # safetensors refuses tensors that share memory; tied ones are stored under each name.
    stored = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        _VERSION_KEY: FORMAT_VERSION,
        _LAYERS_KEY: json.dumps(shapes),
        _MODULES_KEY: json.dumps(modules),
    }
    write_whole(Path(path), save(stored, metadata=metadata))


def load_model(path: str | os.PathLike[str], model: Any) -> Any:
    """Read a file of `save_model` into a model of the same architecture, in place.

    Parameters
    ----------
    path : path-like
    model : torch.nn.Module
        Where the file has a condensed layer it may have that, or the dense ``nn.Linear`` or
        ``nn.Conv2d`` of its shape, as a model made anew has.

    Returns
    -------
    torch.nn.Module
        `model` itself. Devices, dtypes, modes and what requires a gradient are the model's.

    Raises
    ------
    FileFormatError
        If the file is truncated, of another format or version, or holds no valid layer.
    SriglError
        If the model has other layers than the file. Names them; the model is left as it was.
    OSError
        If the file cannot be read.

    Notes
    -----
    Condensed layers are new ones, with new parameters, which an optimiser made before does not
    know.
    """
    tensors, shapes, modules = _read(path)
    found = condensed_modules(model)
    made: dict[str, Any] = {}
    of_present: dict[int, str] = {}
    for name, description in modules.items():
        try:
            weight = _weight(name, tensors, shapes[name])
            bias = tensors.pop(f"{name}.bias", None)
            layer = _module(description, weight, bias)
        except (SriglError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileFormatError(f"{os.fspath(path)!r}: layer {name!r}: {error}") from error
        layer = _in_place_of(name, model, layer)
        # What is one module of the model in two places stays one.
        twin = of_present.setdefault(id(model.get_submodule(name)), name)
        made[name] = made.get(twin, layer)
        if not _equal(made[name], layer):
            raise SriglError(
                f"layers {twin!r} and {name!r} are one in the model, but differ in the file; make "
                f"the model as the one that was saved"
            )
    rest = _plain_state(model, {**found, **made})
    _check_names(tensors, rest)
    for name, tensor in rest.items():
        if tensor.shape != tensors[name].shape:
            raise SriglError(
                f"{name!r} of the file has shape {tuple(tensors[name].shape)}, but the model's has "
                f"{tuple(tensor.shape)}; make the model as the one that was saved"
            )
    replace_modules(model, made)
    with torch.no_grad():
        for name, tensor in rest.items():
            tensor.copy_(tensors[name])
    return model


# ---------------------------------------------------------------- what a layer is


def _description(module: Any) -> dict[str, Any]:
    linear = linear_of(module)
    facts: dict[str, Any] = {"nnz_budget": linear.nnz_budget, "activation": linear.activation}
    if isinstance(module, CondensedConv2d):
        facts["convolution"] = {name: getattr(module, name) for name in _GEOMETRY}
    return facts


def _module(description: Mapping[str, Any], weight: CondensedWeight, bias: Any | None) -> Any:
    activation = description["activation"]
    if activation is not None and activation not in ACTIVATIONS:
        raise FileFormatError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    linear = CondensedLinear.from_condensed(
        weight, bias, nnz_budget=description["nnz_budget"], activation=activation
    )
    if "convolution" not in description:
        return linear
    geometry = {name: _as_tuple(description["convolution"][name]) for name in _GEOMETRY}
    return CondensedConv2d(linear, geometry.pop("kernel_size"), **geometry)


def _as_tuple(setting: Any) -> Any:
    return tuple(setting) if isinstance(setting, list) else setting


def _in_place_of(name: str, model: Any, layer: Any) -> Any:
    """Return `layer` with what it takes over of the model's layer of that name.

    Raises
    ------
    SriglError
        If the model has none, or of another shape or kind.
    """
    try:
        present = model.get_submodule(name)
    except AttributeError:
        raise SriglError(
            f"the file has a condensed layer {name!r}, but the model has none; make the model as "
            f"the one that was saved"
        ) from None
    linear = linear_of(layer)
    if _shape(present) != _shape(layer):
        raise SriglError(
            f"layer {name!r} of the file is {_shape(layer)}, but the model's is {_shape(present)}; "
            f"make the model as the one that was saved"
        )
    old = linear_of(present)
    like = old.values if isinstance(old, CondensedLinear) else old.weight
    layer.to(device=like.device, dtype=like.dtype)
    linear.values.requires_grad_(like.requires_grad)
    if linear.bias is not None:
        linear.bias.requires_grad_(
            like.requires_grad if old.bias is None else old.bias.requires_grad
        )
    return layer.train(present.training)


def _equal(one: Any, other: Any) -> bool:
    ours, theirs = (linear_of(layer) for layer in (one, other))
    return one is other or (
        ours.to_condensed() == theirs.to_condensed()
        and (ours.bias is None or torch.equal(ours.bias, theirs.bias))
        and _description(one) == _description(other)
    )


def _shape(module: Any) -> str:
    """Return what must be the same of a layer in the file and of the model's, for a message."""
    sizes: tuple[Any, ...]
    if isinstance(module, CondensedLinear | nn.Linear):
        kind, sizes = "linear", (module.out_features, module.in_features)
    elif isinstance(module, CondensedConv2d | nn.Conv2d) and getattr(module, "groups", 1) == 1:
        kind, sizes = "convolution", tuple(getattr(module, name) for name in _GEOMETRY)
        sizes = (module.out_channels, module.in_channels, *sizes)
    else:
        return f"a {type(module).__name__}"
    has_bias = linear_of(module).bias is not None
    return f"a {kind} of {sizes} {'with' if has_bias else 'without'} a bias"


def _plain_state(model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a model's state that are of no condensed layer."""
    prefixes = tuple(f"{name}." if name else "" for name in layers)
    state = {}
    for name, tensor in model.state_dict().items():
        if prefixes and name.startswith(prefixes):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueTypeError(
                f"{name!r} of the model's state is a {type(tensor).__name__}; safetensors files "
                f"hold tensors alone"
            )
        state[name] = tensor.detach()
    return state


# ---------------------------------------------------------------- the file


def _read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a file's tensors, and what its metadata says of layers and of modules."""
    tensors, metadata = read_whole(path, "pt")
    if _MODULES_KEY not in metadata or metadata.get(_VERSION_KEY) != FORMAT_VERSION:
        raise FileFormatError(
            f"{os.fspath(path)!r} has format version {metadata.get(_VERSION_KEY)!r} and "
            f"{'a' if _MODULES_KEY in metadata else 'no'} description of modules; it must be of "
            f"version {FORMAT_VERSION!r} and written by save_model"
        )
    try:
        shapes, modules = (json.loads(metadata[key]) for key in (_LAYERS_KEY, _MODULES_KEY))
        if shapes.keys() != modules.keys():
            raise KeyError(*(shapes.keys() ^ modules.keys()))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{os.fspath(path)!r}: the metadata does not describe layers ({error!r}); save it again"
        ) from error
    return tensors, shapes, modules


def _weight(name: str, tensors: dict[str, Any], layer: Mapping[str, Any]) -> CondensedWeight:
    """Take the three arrays of a layer from `tensors`."""
    missing = [f"{name}.{part}" for part in _PARTS if f"{name}.{part}" not in tensors]
    if missing:
        raise FileFormatError(f"lacks {', '.join(map(repr, missing))}")
    values, indices, active = (tensors.pop(f"{name}.{part}") for part in _PARTS)
    dtype = layer["dtype"]
    if dtype not in VALUE_TYPES:
        raise FileFormatError(f"dtype {dtype!r} is none of {', '.join(VALUE_TYPES)}")
    if dtype == "bfloat16" and values.dtype is torch.uint16:
        values = values.view(torch.bfloat16)
    if values.dtype is not getattr(torch, dtype):
        raise FileFormatError(f"values are {values.dtype}, but must be {dtype}")
    n_out, n_in = layer["shape"]
    arrays = (as_numpy(values), indices.numpy(), active.numpy().astype(np.int64, casting="safe"))
    return CondensedWeight(*arrays, (n_out, n_in))


def _check_names(tensors: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
    missing, unknown = sorted(rest.keys() - tensors.keys()), sorted(tensors.keys() - rest.keys())
    if missing or unknown:
        facts = [f"lacks {', '.join(map(repr, missing))}"] if missing else []
        facts += [f"has {', '.join(unknown)}, which the model has not"] if unknown else []
        raise SriglError(
            f"the file {' and '.join(facts)}; make the model as the one that was saved"
        )
