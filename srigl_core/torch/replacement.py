"""Replacing the dense layers of a model by condensed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core.errors import SriglError
from srigl_core.torch.attention import PROJECTION_LAYERS, CondensedMultiheadAttention
from srigl_core.torch.conv import CondensedConv, CondensedConv1d, CondensedConv2d
from srigl_core.torch.layer_types import is_gpt_conv1d, is_transposed
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.quantized_linear import QuantizedLinear
from srigl_core.torch.sequential import use_chains
from srigl_core.torch.state_markers import mark_states
from srigl_core.torch.targets import Target, check_module, submodule

__all__ = [
    "CONVOLUTIONS",
    "PACKED",
    "added_parts",
    "condensed_layer",
    "condensed_modules",
    "condensed_name",
    "has_hooks",
    "linear_of",
    "packed_weight",
    "present_layer",
    "replace_modules",
    "why_not_condensed",
]

PACKED = (CondensedLinear, QuantizedLinear)
"""The types of linear layers without a dense weight."""

CONVOLUTIONS = {nn.Conv1d: CondensedConv1d, nn.Conv2d: CondensedConv2d}
"""The condensed convolution in place of each dense one."""

_PARTS = {
    *("weight", "bias", "values", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *(f"{part}_proj_weight" for part in "qkv"),
    *(f"{part}_proj" for part in ("q", "k", "v", "out")),
}
"""The parameters and modules of layers that can be condensed or are."""

_TYPES = (nn.Linear, NonDynamicallyQuantizableLinear, *CONVOLUTIONS, nn.MultiheadAttention)


def why_not_condensed(target: Target) -> str | None:
    """Return why a layer cannot be condensed, or None.

    The reason continues a sentence that begins with the layer.
    """
    module, parent = target.module, target.parent
    if target.is_condensed:
        return "is condensed already"
    is_projection = type(module) is nn.MultiheadAttention and target.attribute in PROJECTION_LAYERS
    is_weight = target.attribute == "weight" and not isinstance(module, nn.MultiheadAttention)
    is_type = type(module) in _TYPES or (is_gpt_conv1d(module) and hasattr(module, "nf"))
    what = f"({type(module).__name__}, {target.attribute}) cannot be condensed; "
    if not is_type or not (is_weight or is_projection):
        if is_transposed(module):
            return what + "a transposed convolution has no condensed form. Keep it masked or dense"
        return what + "exclude it, or keep it masked"
    groups = getattr(module, "groups", 1)
    if groups != 1:
        return (
            f"has groups={groups}, and only groups=1 can be condensed; exclude it, or keep it "
            f"masked"
        )
    # Attention computes with the weight of its output layer, not with the layer.
    of_attention = type(module) is NonDynamicallyQuantizableLinear
    if of_attention and type(parent) not in (nn.MultiheadAttention, CondensedMultiheadAttention):
        return what + f"it is a part of a {type(parent).__name__}. Exclude it, or keep it masked"
    replaced = [module, parent] if type(parent) is nn.MultiheadAttention else [module]
    is_root = not target.owner or (len(replaced) == 2 and "." not in target.owner)
    if is_root:
        return what + "it is the model itself. Keep it masked, or wrap the model in nn.Sequential"
    if any("forward" in vars(part) for part in replaced):
        return what + "its forward has been replaced. Exclude it, or keep it masked"
    if any(map(has_hooks, replaced)):
        return "has hooks, which would be lost; remove or exclude them"
    if added := [name for part in replaced for name in added_parts(part)]:
        return f"has {', '.join(added)}, which would be lost; remove these parts, or exclude it"
    return None


def condensed_name(target: Target) -> str:
    """Return the name of the condensed layer that replaces a dense one, or is there already."""
    if target.is_condensed:
        is_conv = isinstance(target.parent, CondensedConv)
        return target.owner.removesuffix(".linear") if is_conv else target.owner
    layer = PROJECTION_LAYERS.get(target.attribute)
    return target.owner if layer is None else f"{target.owner}.{layer}"


def condensed_layer(target: Target, weight: CondensedWeight, nnz_budget: int | None = None) -> Any:
    """Return the condensed layer that replaces a dense one.

    Parameters
    ----------
    target : Target
        A layer that can be condensed.
    weight : CondensedWeight, (n_out, n_in)
    nnz_budget : int or None
        Length of the layer's values; None is the weight's number of values.

    Returns
    -------
    CondensedLinear, CondensedConv1d or CondensedConv2d
        It has the dense layer's bias parameter, device, mode and `requires_grad`.
    """
    module, dense = target.module, target.parameter
    linear = CondensedLinear.from_condensed(weight, nnz_budget=nnz_budget, device=dense.device)
    if target.attribute == "weight":  # attention keeps the bias of its projections
        linear.bias = getattr(module, "bias", None)
    linear.values.requires_grad_(dense.requires_grad)
    convolution = CONVOLUTIONS.get(type(module))
    layer = linear if convolution is None else convolution.like(module, linear)
    return layer.train(module.training)


def condensed_modules(
    model: Any, types: type | tuple[type, ...] = CondensedLinear
) -> dict[str, Any]:
    """Return a model's condensed layers by name; a layer used in two places appears twice.

    Parameters
    ----------
    model : torch.nn.Module
    types : type or tuple of type
        Of the linear layers, also of those in convolutions: `PACKED` or one of them.

    Raises
    ------
    ValueTypeError
        If `model` is not a module.
    """
    check_module(model)
    layers: dict[str, Any] = {}
    parts: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CondensedConv):
            parts.add(id(module.linear))
            if isinstance(module.linear, types):
                layers[name] = module
        elif isinstance(module, types) and id(module) not in parts:
            layers[name] = module
    return layers


def linear_of(layer: Any) -> Any:
    """Return the linear layer of a convolution; a linear layer is returned unchanged."""
    return layer.linear if isinstance(layer, CondensedConv) else layer


def packed_weight(layer: Any) -> CondensedWeight | QuantizedWeight:
    """Return a copy of the weight of a condensed or quantised layer, in the host's memory."""
    linear = linear_of(layer)
    is_quantized = isinstance(linear, QuantizedLinear)
    weight: CondensedWeight | QuantizedWeight
    weight = linear.to_quantized() if is_quantized else linear.to_condensed()
    return weight


def present_layer(model: Any, name: str) -> Any:
    """Return the layer of a name that a condensed layer has, or None.

    A projection of an ``nn.MultiheadAttention`` is returned as an ``nn.Linear`` of its weight.
    """
    present = submodule(model, name)
    owner, _, attribute = name.rpartition(".")
    attention = submodule(model, owner)
    if present is None and isinstance(
        attention, nn.MultiheadAttention | CondensedMultiheadAttention
    ):
        weight = attention._parameters.get(f"{attribute}_weight")
        if weight is not None:
            present = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            present.weight = weight
            present.training = attention.training
    return present


def replace_modules(model: Any, replacements: Mapping[str, Any]) -> None:
    """Replace submodules by name, all of them or none.

    A module that the model has in several places is replaced in all of them. Where a part of an
    ``nn.MultiheadAttention`` is replaced, that becomes a `CondensedMultiheadAttention`.

    Raises
    ------
    SriglError
        If one is the model itself, or has hooks.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    attentions: dict[int, tuple[Any, Any]] = {}
    new: dict[int, Any] = {}
    projections = []
    for name, module in replacements.items():
        owner, _, attribute = name.rpartition(".")
        old, attention = modules.get(name), modules.get(owner)
        if not name or (not owner and type(attention) is nn.MultiheadAttention):
            raise SriglError(
                f"the model itself is a {type(model).__name__} and cannot be replaced within a "
                f"model; wrap it, as in nn.Sequential(model)"
            )
        if old is not None:
            _check_hooks(name, old)
        if type(attention) is nn.MultiheadAttention:
            _check_hooks(owner, attention)
            attentions.setdefault(
                id(attention), (attention, CondensedMultiheadAttention(attention))
            )
            projections.append((attentions[id(attention)][1], attribute, module))
        elif isinstance(attention, CondensedMultiheadAttention):
            projections.append((attention, attribute, module))
        else:
            new[id(old)] = module
    for attention, attribute, module in projections:
        attention.set_layer(attribute, module)
    new |= {key: made for key, (_, made) in attentions.items()}
    _swap(model, new)
    _leave_fast_paths(model)
    use_chains(model)
    mark_states(model)


def _swap(model: Any, new: Mapping[int, Any]) -> None:
    """Replace modules of a model, by their ``id``."""
    for owner in list(model.modules()):
        for attribute, module in list(owner._modules.items()):
            if id(module) in new:
                setattr(owner, attribute, new[id(module)])


def _leave_fast_paths(model: Any) -> None:
    """Switch off the fast paths of stock encoders, which compute with their layers' weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _is_condensed(module):
            module.activation_relu_or_gelu = 0  # what the fast path asks for, and nothing else
        elif isinstance(module, nn.TransformerEncoder) and _is_condensed(module):
            module.use_nested_tensor = False


def _is_condensed(module: Any) -> bool:
    kinds = *PACKED, CondensedMultiheadAttention
    return any(isinstance(part, kinds) for part in module.modules())


def added_parts(module: Any) -> list[str]:
    """Return the names of parameters and modules that were added to a layer.

    A buffer alone, such as a mask, takes no part in what the layer computes.
    """
    return [name for name in {**module._parameters, **module._modules} if name not in _PARTS]


def has_hooks(module: Any) -> bool:
    """Return whether a module or one of its own parameters has hooks."""
    hooks = [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        module._state_dict_hooks,
        module._state_dict_pre_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    ]
    for parameter in module._parameters.values():
        if parameter is not None:
            hooks += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
    return any(hooks)


def _check_hooks(name: str, module: Any) -> None:
    if has_hooks(module):
        raise SriglError(f"layer {name!r} has hooks, which would be lost; remove or exclude them")
