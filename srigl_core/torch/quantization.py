"""Conversion of a trained model's condensed layers into quantised ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from srigl_core._arrays.checks import check_choice
from srigl_core._product_spec import QUANTIZED_INPUTS
from srigl_core.errors import SriglError
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.quantized_linear import QuantizedLinear
from srigl_core.torch.replacement import added_parts, replace_modules
from srigl_core.torch.selection import Entry
from srigl_core.torch.sharded_tensors import check_not_sharded
from srigl_core.torch.targets import Target, condensed_targets

__all__ = ["quantize"]


def quantize(model: Any, *, inputs: str = "float", exclude: Iterable[Entry] | Entry = ()) -> Any:
    """Replace the condensed layers of a trained model by quantised ones, in place.

    Values become 8-bit integers with a scale for each neuron. Dense layers are left to PyTorch's
    own quantisation.

    Parameters
    ----------
    model : torch.nn.Module
        A model with condensed layers, as `condense` returns it.
    inputs : {"float", "int8"}
        With "float" the inputs of a layer stay as they are. With "int8" each row of them is
        quantised too, at each call; in a convolution, a row is a window.
    exclude : iterable of str or type
        Layers to leave as they are: names, patterns and types, as in `condense`.

    Returns
    -------
    torch.nn.Module
        `model` itself, with a `QuantizedLinear` in place of each `CondensedLinear`, also in
        convolutions and attention. Device, type of the results and mode are kept.

    Raises
    ------
    SriglError
        If there is nothing to quantise, an entry of `exclude` matches nothing, a weight is not
        finite, or a layer has hooks or is of a derived type. The message names the layer, and the
        model is not changed.
    ValueTypeError
        If `model` is not a module.

    Notes
    -----
    SPEC 6. Nothing can be trained in a quantised layer. A layer that the model has in several
    places stays one. `report` lists quantised layers, with their bytes.

    Examples
    --------
    >>> import torch
    >>> from srigl_core.torch import CondensedLinear
    >>> model = torch.nn.Sequential(CondensedLinear(16, 4, fan_in=3, rng=0), torch.nn.ReLU())
    >>> quantize(model)[0]
    QuantizedLinear(in_features=16, out_features=4, fan_in=3, n_active=4, bias=True, inputs=float)
    """
    check_not_sharded(model)
    check_choice(inputs, "inputs", QUANTIZED_INPUTS)
    targets = condensed_targets(model, exclude)
    if not targets:
        raise SriglError(
            "the model has no condensed layer that is not excluded, so there is nothing to "
            "quantise; make its layers condensed with condense(model, masks), or leave dense ones "
            "to PyTorch's own quantisation"
        )
    replace_modules(model, {target.owner: _quantized(target, inputs) for target in targets})
    return model


def _quantized(target: Target, inputs: str) -> QuantizedLinear:
    """Return the quantised layer that replaces a condensed one."""
    layer, name = target.module, target.name
    if type(layer) is not CondensedLinear or "forward" in vars(layer):
        raise SriglError(
            f"layer {name!r} is of type {type(layer).__name__}, or has a forward of its own, and "
            f"what that adds to a condensed layer would be lost; exclude it"
        )
    if added := added_parts(layer):
        raise SriglError(
            f"layer {name!r} has {', '.join(added)}, which would be lost; remove these parts, or "
            f"exclude the layer"
        )
    options = {"activation": layer.activation, "dtype": layer.dtype, "device": layer.values.device}
    try:
        weight = layer.to_condensed().quantize()
        made = QuantizedLinear(weight, layer.bias, inputs=inputs, **options)
    except SriglError as error:
        raise type(error)(f"layer {name!r}: {error}; or exclude the layer") from error
    made.train(layer.training)
    return made
