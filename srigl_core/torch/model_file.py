"""A model with condensed layers in one safetensors file.

Condensed layers are stored as `srigl_core.save_condensed` stores them, each under its module's
name. Everything else has the name that it has in the model's ``state_dict``. The metadata also
describes the layers' modules. `srigl_core.load_condensed` can read the file too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._files import write_whole
from srigl_core._format.file import (
    MODULES_KEY,
    array_names,
    layer_metadata,
    read_layers,
    read_modules,
    read_whole,
    take_weight,
    weight_arrays,
)
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core.contract import ACTIVATIONS
from srigl_core.errors import FileFormatError, SriglError, ValueTypeError
from srigl_core.torch.attention import CondensedMultiheadAttention
from srigl_core.torch.conv import GEOMETRY, CondensedConv, CondensedConv1d, CondensedConv2d
from srigl_core.torch.layer_types import is_gpt_conv1d
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.quantized_linear import QuantizedLinear
from srigl_core.torch.replacement import (
    PACKED,
    condensed_modules,
    linear_of,
    packed_weight,
    present_layer,
    replace_modules,
)
from srigl_core.torch.sharded_tensors import check_not_sharded
from srigl_core.torch.targets import submodule
from srigl_core.torch.tensors import as_numpy, from_numpy, numpy_dtype, torch_dtype

__all__ = ["load_model", "model_as_bytes", "save_model"]

_LAYER_TENSORS = {
    CondensedLinear: ("weight", "bias", "values", "indices", "active", "counts"),
    QuantizedLinear: ("weight", "bias", "values", "scale", "indices", "active"),
}

_Weight = CondensedWeight | QuantizedWeight


def save_model(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a model's state, condensed layers included, to one safetensors file.

    Parameters
    ----------
    model : torch.nn.Module
    path : path-like
        Replaced as a whole: a reader sees the old file or the new one.

    Raises
    ------
    ValueTypeError
        If `model` is not a module, or its state holds something other than tensors.
    SriglError
        If a condensed layer's tensors are not a valid weight, or something else is registered in
        it, for which the file has no place.
    """
    write_whole(path, model_as_bytes(model))


def model_as_bytes(model: Any) -> bytes:
    """Return the content of a file of `save_model`."""
    from safetensors.torch import save

    check_not_sharded(model)
    layers = condensed_modules(model, PACKED)
    for name, module in layers.items():
        _check_nothing_else(name, module)
    tensors = _plain_state(model, layers)
    weights = {name: packed_weight(module) for name, module in layers.items()}
    for name, module in layers.items():
        arrays = weight_arrays(name, weights[name])
        tensors |= {key: from_numpy(array) for key, array in arrays.items()}
        if linear_of(module).bias is not None:
            tensors[f"{name}.bias"] = linear_of(module).bias.detach()
    # safetensors refuses tensors that share memory; tied ones are stored under each name.
    stored = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = layer_metadata(weights)
    metadata[MODULES_KEY] = json.dumps({name: _description(m) for name, m in layers.items()})
    return bytes(save(stored, metadata=metadata))


def load_model(path: str | os.PathLike[str], model: Any) -> Any:
    """Read a file of `save_model` into a model of the same architecture, in place.

    Parameters
    ----------
    path : path-like
    model : torch.nn.Module
        In place of a condensed or quantised layer it may have the dense ``nn.Linear`` or
        ``nn.Conv2d`` of the same shape, as a new model has.

    Returns
    -------
    torch.nn.Module
        `model` itself. Devices, dtypes, modes and ``requires_grad`` stay those of the model.

    Raises
    ------
    FileFormatError
        If the file is truncated, has another format or version, or holds an invalid layer.
    SriglError
        If the model has other layers than the file, or something else is registered in one of
        them. The message names them; the model does not change.
    OSError
        If the file cannot be read.

    Notes
    -----
    The condensed layers are new modules with new parameters. Make the optimiser after this call.
    """
    check_not_sharded(model)
    tensors, weights, modules = _read(path)
    made: dict[str, Any] = {}
    first_names: dict[tuple[int, str], str] = {}
    for name, description in modules.items():
        # Before the layer is made, whose size is what the file claims.
        _check_dense_shape(name, model, weights[name], "convolution" in description)
        try:
            layer = _module(description, weights[name], tensors.pop(f"{name}.bias", None))
        except (SriglError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileFormatError(f"{os.fspath(path)!r}: layer {name!r}: {error}") from error
        layer = _in_place_of(name, model, layer)
        # A module that the model has in two places stays one module.
        twin = first_names.setdefault(_place(model, name), name)
        made[name] = made.get(twin, layer)
        if not _equal(made[name], layer):
            raise SriglError(
                f"layers {twin!r} and {name!r} are one in the model, but differ in the file; make "
                f"the model as the one that was saved"
            )
    rest = _plain_state(model, {**condensed_modules(model, PACKED), **made})
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


# ---------------------------------------------------------------- layers


def _description(module: Any) -> dict[str, Any]:
    linear = linear_of(module)
    description: dict[str, Any]
    if isinstance(linear, QuantizedLinear):
        description = {"inputs": linear.inputs, "dtype": numpy_dtype(linear.dtype).name}
    else:
        description = {"nnz_budget": linear.nnz_budget}
    description["activation"] = linear.activation
    if isinstance(module, CondensedConv):
        description["convolution"] = {name: getattr(module, name) for name in GEOMETRY}
    return description


def _module(description: Mapping[str, Any], weight: _Weight, bias: Any | None) -> Any:
    activation = description["activation"]
    if activation is not None and activation not in ACTIVATIONS:
        raise FileFormatError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    linear: Any
    if isinstance(weight, QuantizedWeight):
        dtype = torch_dtype(value_dtype(description["dtype"]))
        options = {"inputs": description["inputs"], "activation": activation, "dtype": dtype}
        linear = QuantizedLinear(weight, bias, **options)
    else:
        linear = CondensedLinear.from_condensed(
            weight, bias, nnz_budget=description["nnz_budget"], activation=activation
        )
    if "convolution" not in description:
        return linear
    geometry = {name: _as_tuple(description["convolution"][name]) for name in GEOMETRY}
    convolution = CondensedConv1d if len(geometry["kernel_size"]) == 1 else CondensedConv2d
    return convolution(linear, geometry.pop("kernel_size"), **geometry)


def _as_tuple(setting: Any) -> Any:
    return tuple(setting) if isinstance(setting, list) else setting


def _check_dense_shape(name: str, model: Any, weight: _Weight, is_conv: bool) -> None:
    present = present_layer(model, name)
    if present is None:
        raise SriglError(
            f"the file has a condensed layer {name!r}, but the model has none; make the model as "
            f"the one that was saved"
        )
    shape: tuple[int, ...]
    if isinstance(present, (*PACKED, CondensedConv)):
        shape = (linear_of(present).out_features, linear_of(present).in_features)
    elif isinstance(present, nn.Linear | nn.Conv1d | nn.Conv2d):
        shape = tuple(present.weight.flatten(1).shape)
    elif is_gpt_conv1d(present):
        shape = tuple(reversed(present.weight.shape))
    else:
        shape = ()
    if shape != weight.shape:
        what = f"a {'convolution' if is_conv else 'linear'} of {weight.shape}"
        raise _differs(name, what, present)


def _differs(name: str, what: str, present: Any) -> SriglError:
    return SriglError(
        f"layer {name!r} of the file is {what}, but the model's is {_shape(present)}; make the "
        f"model as the one that was saved"
    )


def _in_place_of(name: str, model: Any, layer: Any) -> Any:
    """Return `layer` with the device, dtype and modes of the model's layer of that name.

    Raises
    ------
    SriglError
        If the model has one of another shape or type.
    """
    present = present_layer(model, name)
    linear = linear_of(layer)
    if _shape(present) != _shape(layer):
        raise _differs(name, _shape(layer), present)
    _check_nothing_else(name, present)
    old = linear_of(present)
    like = old.values if isinstance(old, CondensedLinear) else old.weight
    layer.to(device=like.device, dtype=like.dtype)
    if isinstance(linear, QuantizedLinear):
        return layer.train(present.training)
    linear.values.requires_grad_(like.requires_grad)
    if linear.bias is not None:
        linear.bias.requires_grad_(
            like.requires_grad if old.bias is None else old.bias.requires_grad
        )
    return layer.train(present.training)


def _check_nothing_else(name: str, module: Any) -> None:
    """Raise SriglError if a layer has tensors that are no part of a layer in a file."""
    known = {"weight", "bias"}
    linear = linear_of(module)
    for kind, parts in _LAYER_TENSORS.items():
        if isinstance(linear, kind):
            prefix = "" if linear is module else "linear."
            known |= {f"{prefix}{part}" for part in parts}
    if others := sorted(module.state_dict().keys() - known):
        raise SriglError(
            f"layer {name!r} also has {', '.join(map(repr, others))}, for which the file has no "
            f"place; remove it, or save and load model.state_dict()"
        )


def _place(model: Any, name: str) -> tuple[int, str]:
    """Return what is the same for all names of a layer."""
    owner, _, attribute = name.rpartition(".")
    present = submodule(model, name)
    return (id(submodule(model, owner)), attribute) if present is None else (id(present), "")


def _equal(one: Any, other: Any) -> bool:
    ours, theirs = (linear_of(layer) for layer in (one, other))
    return one is other or (
        packed_weight(one) == packed_weight(other)
        and (ours.bias is None or torch.equal(ours.bias, theirs.bias))
        and _description(one) == _description(other)
    )


def _shape(module: Any) -> str:
    """Describe the properties that a layer of the file and the model's layer must share."""
    sizes: tuple[Any, ...]
    if isinstance(module, (*PACKED, nn.Linear)):
        what, sizes = "linear", (module.out_features, module.in_features)
    elif is_gpt_conv1d(module):
        what, sizes = "linear", tuple(reversed(module.weight.shape))
    elif isinstance(module, CondensedConv | nn.Conv1d | nn.Conv2d) and module.groups == 1:
        what, sizes = "convolution", tuple(getattr(module, name) for name in GEOMETRY)
        sizes = (module.out_channels, module.in_channels, *sizes)
    else:
        return f"a {type(module).__name__}"
    has_bias = getattr(module, "bias", None) is not None
    return f"a {what} of {sizes} {'with' if has_bias else 'without'} a bias"


def _plain_state(model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a model's state that belong to no condensed layer."""
    prefixes = tuple(f"{name}." if name else "" for name in layers)
    # In a dense model a projection of attention is a parameter; in others there may be a marker.
    projections = {
        f"{name}_weight"
        for name in layers
        if submodule(model, name) is None or _is_projection(model, name)
    }
    state = {}
    for name, tensor in model.state_dict().items():
        if (prefixes and name.startswith(prefixes)) or name in projections:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueTypeError(
                f"{name!r} of the model's state is a {type(tensor).__name__}; safetensors files "
                f"hold only tensors"
            )
        state[name] = tensor.detach()
    return state


def _is_projection(model: Any, name: str) -> bool:
    return isinstance(submodule(model, name.rpartition(".")[0]), CondensedMultiheadAttention)


# ---------------------------------------------------------------- the file


def _read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, _Weight], dict[str, Any]]:
    """Return a file's other tensors, its condensed weights, and descriptions of their modules."""
    tensors, metadata = read_whole(path, "pt")
    weights: dict[str, _Weight] = {}
    try:
        layers = read_layers(metadata)
        if MODULES_KEY not in metadata:
            raise FileFormatError(
                "no description of modules; the file was not written by save_model"
            )
        modules = read_modules(metadata, layers)
        for name, layer in layers.items():
            keys = [key for key in array_names(name, layer) if key in tensors]
            arrays = {key: as_numpy(tensors.pop(key)) for key in keys}
            weights[name] = take_weight(arrays, name, layer)
    except (SriglError, TypeError) as error:  # NumPy does not have all dtypes of PyTorch
        raise FileFormatError(f"{os.fspath(path)!r}: {error}") from error
    return tensors, weights, modules


def _check_names(tensors: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
    missing, unknown = sorted(rest.keys() - tensors.keys()), sorted(tensors.keys() - rest.keys())
    if missing or unknown:
        differences = [f"lacks {', '.join(map(repr, missing))}"] if missing else []
        differences += [f"has {', '.join(unknown)}, which the model lacks"] if unknown else []
        raise SriglError(
            f"the file {' and '.join(differences)}; make the model as the one that was saved"
        )
