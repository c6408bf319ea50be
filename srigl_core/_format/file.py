"""Condensed weights in safetensors files: plain arrays plus metadata.

A layer called ``fc1`` is stored as ``fc1.values``, ``fc1.indices`` and ``fc1.active``, and a
quantised one has ``fc1.scale`` too. Its dense shape and the name of its value type are in the
metadata. Other arrays are stored as they are. bfloat16 values are stored as uint16, since
safetensors' NumPy loader does not know the type. Everything read is validated before it is used.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import VALUE_TYPES, index_dtype, value_dtype
from srigl_core._files import file_errors, parse_json, regular_file, write_whole
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core.errors import FileFormatError, SriglError, ValueTypeError

__all__ = [
    "FORMAT_VERSION",
    "MODULES_KEY",
    "QUANTIZED_VERSION",
    "array_names",
    "layer_metadata",
    "load_condensed",
    "read_layers",
    "read_modules",
    "read_tensors",
    "read_whole",
    "save_condensed",
    "take_weight",
    "weight_arrays",
    "write_arrays",
]

FORMAT_VERSION = "1"

QUANTIZED_VERSION = "2"
"""The version of files that hold a quantised layer, so that older readers refuse them by version.

Files without one stay in version 1, which older readers know."""

_VALUE_TYPES = {FORMAT_VERSION: VALUE_TYPES, QUANTIZED_VERSION: (*VALUE_TYPES, "int8")}
"""The value types of the layers in files of each version."""

_PREFIX = "srigl_core."
_VERSION_KEY = f"{_PREFIX}format_version"
_LAYERS_KEY = f"{_PREFIX}layers"
MODULES_KEY = f"{_PREFIX}modules"
"""The metadata in which `srigl_core.torch.save_model` describes the modules of the layers."""

_RESERVED = "__metadata__"
_PARTS = ("values", "indices", "active")
_QUANTIZED_PARTS = ("values", "scale", "indices", "active")

Weight = CondensedWeight | QuantizedWeight


def save_condensed(
    path: str | os.PathLike[str],
    tensors: Weight | Mapping[str, Weight | NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write condensed weights, and other arrays such as biases, to one file.

    Parameters
    ----------
    path : path-like
        Replaced as a whole: a reader sees the old file or the new one.
    tensors : CondensedWeight or QuantizedWeight, or mapping of str to these or ndarray
        A single weight gets the name "weight".
    metadata : mapping of str to str, or None
        Entries to store in the file's metadata, such as the activations of the layers.
        ``safetensors.safe_open(path, "np").metadata()`` reads them.

    Raises
    ------
    ValueTypeError
        If an entry is neither, an array has a dtype that safetensors does not store, or a name or
        an entry of `metadata` is not a string.
    SriglError
        If two names collide, or a name or an entry of `metadata` cannot be stored.
    """
    if isinstance(tensors, Weight):
        tensors = {"weight": tensors}
    if not isinstance(tensors, Mapping):
        raise ValueTypeError(
            f"tensors must be a CondensedWeight or a mapping of names to weights and arrays, got "
            f"{type(tensors).__name__}"
        )
    arrays: dict[str, NDArray[Any]] = {}
    layers: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        _check_text(name, "tensor name")
        if isinstance(tensor, Weight):
            layers[name], parts = tensor, weight_arrays(name, tensor)
        else:
            parts = {name: _plain_array(name, tensor)}
        for key, array in parts.items():
            if key in arrays:
                raise SriglError(f"two tensors would be stored as {key!r}; rename one")
            if key == _RESERVED:
                raise SriglError(f"safetensors keeps the name {key!r} for itself; rename the array")
            arrays[key] = array
    own = layer_metadata(layers)
    if not isinstance(metadata, Mapping | None):
        raise ValueTypeError(
            f"metadata must be a mapping of names to strings, got {type(metadata).__name__}"
        )
    for key, text in (metadata or {}).items():
        _check_text(key, "metadata name")
        _check_text(text, f"metadata[{key!r}] =")
        if key.startswith(_PREFIX):
            raise SriglError(
                f"metadata name {key!r} begins with {_PREFIX!r}, as the format's own; rename it"
            )
        own[key] = text
    write_arrays(path, arrays, own)


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Write arrays in C order, bfloat16 too, and metadata to a safetensors file, as a whole."""
    from safetensors.numpy import save

    write_whole(path, save(dict(arrays), metadata=dict(metadata)))


def load_condensed(path: str | os.PathLike[str]) -> dict[str, Weight | NDArray[Any]]:
    """Read a file written by `save_condensed`.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    dict of str to CondensedWeight, QuantizedWeight or ndarray

    Raises
    ------
    FileFormatError
        If the file is truncated, has another format or version, or holds an invalid weight: a wrong
        dtype or shape, a number out of range, or indices out of order.
    OSError
        If the file cannot be read.
    """
    weights, arrays, _ = read_tensors(path)
    return weights | arrays


def read_tensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Weight], dict[str, NDArray[Any]], dict[str, str]]:
    """Return a file's weights, its other arrays and its metadata; errors as in `load_condensed`."""
    arrays, metadata = read_whole(path, "np")
    try:
        weights = {
            name: take_weight(arrays, name, layer) for name, layer in read_layers(metadata).items()
        }
        collisions = weights.keys() & arrays.keys()
        if collisions:
            raise FileFormatError(f"{sorted(collisions)} name both a layer and an array")
    except SriglError as error:
        raise FileFormatError(f"{os.fspath(path)!r}: {error}") from error
    return weights, arrays, metadata


def array_names(name: str, layer: Mapping[str, Any]) -> list[str]:
    """Return the names under which the arrays of a layer are stored, by its metadata."""
    parts = _QUANTIZED_PARTS if layer["dtype"] == "int8" else _PARTS
    return [f"{name}.{part}" for part in parts]


def weight_arrays(name: str, weight: Weight) -> dict[str, NDArray[Any]]:
    """Return the arrays of a layer as they are stored, by their names in the file."""
    arrays = {**weight.value_arrays, "indices": weight.indices, "active": weight.active}
    return {
        f"{name}.{part}": array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        for part, array in arrays.items()
    }


def layer_metadata(layers: Mapping[str, Weight]) -> dict[str, str]:
    """Return the metadata of a file that holds these layers."""
    described = {
        name: {"shape": list(weight.shape), "dtype": weight.dtype.name}
        for name, weight in layers.items()
    }
    is_quantized = any(isinstance(weight, QuantizedWeight) for weight in layers.values())
    version = QUANTIZED_VERSION if is_quantized else FORMAT_VERSION
    return {_VERSION_KEY: version, _LAYERS_KEY: json.dumps(described)}


def _check_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise ValueTypeError(f"{what} {text!r} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SriglError(f"{what} {text!r} is not valid Unicode; change it") from None


def _plain_array(name: str, array: object) -> NDArray[Any]:
    storable = isinstance(array, np.ndarray) and (
        array.dtype.kind in "fiub" or array.dtype.name == "bfloat16"
    )
    storable = storable and not isinstance(array, np.ma.MaskedArray)
    if not isinstance(array, np.ndarray) or not storable or array.dtype.itemsize > 8:
        came = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueTypeError(
            f"{name!r} is {came}; safetensors files hold condensed weights and NumPy arrays of "
            f"float, int or bool"
        )
    return np.asarray(array, order="C")


def read_whole(
    path: str | os.PathLike[str], framework: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a safetensors file's tensors, of the framework "np" or "pt", and its metadata.

    Raises
    ------
    FileFormatError
        If it is not a safetensors file, or a truncated one.
    OSError
        If it cannot be read.
    """
    from safetensors import safe_open

    path = regular_file(path)
    with (
        path.open("rb") as opened,
        file_errors(path, "not a whole safetensors file", "save it again"),
    ):
        header = _read_header(opened)
        start = opened.tell()
        with safe_open(os.fspath(path), framework=framework) as file:
            metadata = file.metadata() or {}
            tensors = {}
            for name in file.keys():  # noqa: SIM118
                if framework == "np" and header[name]["dtype"] == "BF16":
                    tensors[name] = _read_bfloat16(opened, start, **header[name])
                else:
                    tensors[name] = file.get_tensor(name)
            return tensors, metadata


def _read_header(file: BinaryIO) -> dict[str, Any]:
    """Return what a header says; it describes each tensor once, or safetensors takes the last."""
    first = file.read(8)
    if first.startswith(b"PK"):
        raise ValueError(
            "it is a zip archive, as torch.save writes; srigl_core.load_arrays reads such a file, "
            "and srigl condense condenses it"
        )
    (length,) = struct.unpack("<Q", first)
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError(f"its header claims {length:,} bytes")
    header: dict[str, Any] = parse_json(file.read(length))
    return header


def _read_bfloat16(
    file: BinaryIO, start: int, shape: list[int], data_offsets: list[int], dtype: str
) -> NDArray[Any]:
    """Return an array that safetensors has checked, but cannot give to NumPy."""
    begin, end = data_offsets
    file.seek(start + begin)
    bits = np.frombuffer(file.read(end - begin), "<u2").astype(np.uint16)
    return bits.reshape(shape).view(value_dtype("bfloat16"))


def read_layers(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return shape and dtype of each layer in a file, by its metadata.

    Raises
    ------
    FileFormatError
        If the file has another format or version.
    """
    version = metadata.get(_VERSION_KEY)
    if version is None:
        raise FileFormatError(
            "the file has no srigl_core.format_version; it was not written by save_condensed or "
            "save_model"
        )
    if version not in _VALUE_TYPES:
        raise FileFormatError(
            f"the file has format version {version!r}, but this srigl-core reads "
            f"{' and '.join(map(repr, _VALUE_TYPES))}; use the srigl-core that wrote it, or a "
            f"newer one"
        )
    try:
        described = parse_json(metadata[_LAYERS_KEY])
        layers = {
            str(name): {"shape": tuple(layer["shape"]), "dtype": layer["dtype"]}
            for name, layer in described.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"the metadata {_LAYERS_KEY!r} does not describe layers ({error!r}); save it again"
        ) from error
    for name, layer in layers.items():
        if layer["dtype"] not in _VALUE_TYPES[version]:
            raise FileFormatError(
                f"layer {name!r}: dtype {layer['dtype']!r} is none of "
                f"{', '.join(_VALUE_TYPES[version])}"
            )
    return layers


def read_modules(metadata: Mapping[str, str], layers: Iterable[str]) -> dict[str, Any]:
    """Return how `srigl_core.torch.save_model` describes the module of each layer in a file.

    Raises
    ------
    FileFormatError
        If the metadata does not describe these layers.
    """
    try:
        modules: dict[str, Any] = parse_json(metadata[MODULES_KEY])
        if set(layers) != modules.keys():
            raise KeyError(*(set(layers) ^ modules.keys()))
        for name, description in modules.items():
            if not isinstance(description, dict):
                raise ValueError(f"layer {name!r} has no description")
    except (KeyError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"the metadata {MODULES_KEY!r} does not describe layers ({error!r}); save it again"
        ) from error
    return modules


def take_weight(arrays: dict[str, NDArray[Any]], name: str, layer: Mapping[str, Any]) -> Weight:
    """Remove a layer's stored arrays from `arrays`, and return its weight.

    Raises
    ------
    FileFormatError
        If an array is missing, or the arrays are not a valid weight.
    """
    names = array_names(name, layer)
    missing = [key for key in names if key not in arrays]
    if missing:
        raise FileFormatError(f"layer {name!r} lacks {', '.join(map(repr, missing))}")
    try:
        return _weight(*(arrays.pop(key) for key in names), **layer)
    except SriglError as error:
        raise FileFormatError(f"layer {name!r}: {error}") from error


def _weight(
    values: NDArray[Any], *others: NDArray[Any], shape: tuple[int, int], dtype: str
) -> Weight:
    stored = np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(dtype)
    if values.dtype != stored:
        raise FileFormatError(f"values are {values.dtype}, but {dtype} is stored as {stored}")
    *scale, indices, active = others
    weight: Weight
    if scale:
        weight = QuantizedWeight(values, scale[0], indices, active, shape)
    else:
        weight = CondensedWeight(values.view(value_dtype(dtype)), indices, active, shape)
    for what, array, expected in (
        ("indices", indices, index_dtype(shape[1])),
        ("active", active, np.dtype(np.int64)),
    ):
        if array.dtype != expected:
            raise FileFormatError(f"{what} are {array.dtype}, but must be {expected}")
    return weight
