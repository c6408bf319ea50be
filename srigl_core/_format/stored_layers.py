"""The layers of a file, with what follows their products: bias, activation, quantised inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from srigl_core._activations import activation_named
from srigl_core._arrays.checks import as_float_array, check_choice
from srigl_core._format.file import MODULES_KEY, read_modules, read_tensors
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._product_spec import QUANTIZED_INPUTS
from srigl_core.errors import FileFormatError, SriglError

__all__ = ["StoredLayer", "load_layers"]


class StoredLayer(NamedTuple):
    """A layer of a file, in the order in which `chain` takes it.

    Attributes
    ----------
    weight : CondensedWeight or QuantizedWeight
        That of a convolution is flattened, (out, in * kernel height * kernel width).
    bias : ndarray, (n_out,), or None
    activation : str
        The name of an activation.
    inputs : {"float", "int8"}
    """

    weight: CondensedWeight | QuantizedWeight
    bias: NDArray[Any] | None = None
    activation: str = "none"
    inputs: str = "float"


def load_layers(path: str | os.PathLike[str]) -> dict[str, StoredLayer]:
    """Read the layers of a file that `save_condensed` or `srigl_core.torch.save_model` wrote.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    dict of str to StoredLayer
        The bias of a layer ``fc1`` is the array ``fc1.bias`` of the file. Activations and quantised
        inputs are those of the modules that `save_model` describes; `save_condensed` stores none.
        Other arrays are left out.

    Raises
    ------
    FileFormatError
        As in `load_condensed`; or if a bias or the description of a module is not valid.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import numpy as np, srigl_core, tempfile
    >>> weight = srigl_core.CondensedWeight.random((8, 32), fan_in=4, rng=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/layers.safetensors"
    ...     srigl_core.save_condensed(path, {"fc1": weight, "fc1.bias": np.zeros(8)})
    ...     layers = load_layers(path)
    >>> model = srigl_core.chain(layers.values(), backend="reference")
    """
    weights, arrays, metadata = read_tensors(path)
    try:
        modules = read_modules(metadata, weights) if MODULES_KEY in metadata else {}
        return {
            name: _layer(name, weight, arrays.get(f"{name}.bias"), modules.get(name, {}))
            for name, weight in weights.items()
        }
    except SriglError as error:
        raise FileFormatError(f"{os.fspath(path)!r}: {error}") from error


def _layer(
    name: str,
    weight: CondensedWeight | QuantizedWeight,
    bias: NDArray[Any] | None,
    module: Mapping[str, Any],
) -> StoredLayer:
    try:
        if bias is not None and as_float_array(bias, "bias").shape != weight.shape[:1]:
            raise SriglError(f"bias has shape {bias.shape}, but must have {weight.shape[:1]}")
        inputs = "float"
        if isinstance(weight, QuantizedWeight):
            inputs = check_choice(module.get("inputs", "float"), "inputs", QUANTIZED_INPUTS)
        activation = activation_named(module.get("activation")).name
    except SriglError as error:
        raise FileFormatError(f"layer {name!r}: {error}") from error
    return StoredLayer(weight, bias, activation, inputs)
