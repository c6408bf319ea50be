"""A file of condensed layers, written again with 8-bit values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from srigl_core._arrays.checks import check_choice
from srigl_core._format.file import (
    MODULES_KEY,
    layer_metadata,
    read_modules,
    read_tensors,
    weight_arrays,
    write_arrays,
)
from srigl_core._format.weight import CondensedWeight
from srigl_core._product_spec import QUANTIZED_INPUTS, check_int8_fan_in
from srigl_core.errors import FileFormatError, SriglError

__all__ = ["quantize_file"]


def quantize_file(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, inputs: str = "float"
) -> None:
    """Write a file of condensed layers again, with quantised weights.

    Parameters
    ----------
    source : path-like
        A file of `save_condensed` or `srigl_core.torch.save_model`. `load_condensed`, or
        `srigl_core.torch.load_model`, reads the new file as well.
    target : path-like
        Replaced as a whole; may be `source`.
    inputs : {"float", "int8"}
        What the quantised layers of a model do with their inputs, as in
        `srigl_core.torch.quantize`. A file of `save_condensed` does not store it.

    Raises
    ------
    FileFormatError
        As in `load_condensed`.
    SriglError
        If no layer has values in floating point, a weight is not finite, or `inputs` does not fit.
        The message names the layer. Nothing is written.
    OSError
        If a file cannot be read or written.

    Notes
    -----
    SPEC 6. Other arrays and metadata stay as they are, and so do layers that are quantised already.
    """
    check_choice(inputs, "inputs", QUANTIZED_INPUTS)
    weights, arrays, metadata = read_tensors(source)
    floats = {name: w for name, w in weights.items() if isinstance(w, CondensedWeight)}
    if not floats:
        raise SriglError(
            f"{os.fspath(source)!r} has no condensed layer in floating point, so there is nothing "
            f"to quantise"
        )
    described = dict(metadata)
    if MODULES_KEY in metadata:
        try:
            modules = read_modules(metadata, weights)
        except FileFormatError as error:
            raise FileFormatError(f"{os.fspath(source)!r}: {error}") from error
        modules |= {n: _quantized(modules[n], w, inputs) for n, w in floats.items()}
        described[MODULES_KEY] = json.dumps(modules)
    elif inputs != "float":
        raise SriglError(
            f"inputs={inputs!r} is for files of srigl_core.torch.save_model; for this one, choose "
            f"inputs where the product is made: srigl_core.prepare(weight, inputs={inputs!r}), or "
            f"srigl export --c --inputs {inputs}"
        )
    quantized = dict(weights)
    for name, weight in floats.items():
        try:
            if inputs == "int8":
                check_int8_fan_in(weight.fan_in)
            quantized[name] = weight.quantize()
        except SriglError as error:
            raise type(error)(f"layer {name!r}: {error}") from error
    for name, each in quantized.items():
        arrays |= weight_arrays(name, each)
    write_arrays(target, arrays, described | layer_metadata(quantized))


def _quantized(module: Mapping[str, Any], weight: CondensedWeight, inputs: str) -> dict[str, Any]:
    """Describe the module of a quantised layer, as `srigl_core.torch.save_model` does."""
    kept = {key: value for key, value in module.items() if key != "nnz_budget"}
    return {**kept, "inputs": inputs, "dtype": weight.dtype.name}
