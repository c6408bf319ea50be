"""Replacing the dense layers of a model by condensed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from srigl_core._format.weight import CondensedWeight
from srigl_core.errors import SriglError
from srigl_core.torch.conv import CondensedConv2d
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.targets import Target, check_module

__all__ = [
    "check_can_be_condensed",
    "condensed_layer",
    "condensed_modules",
    "has_hooks",
    "linear_of",
    "replace_modules",
]


def check_can_be_condensed(target: Target) -> None:
    """Check that a layer is an ``nn.Linear`` or an ungrouped ``nn.Conv2d`` within a model.

    Raises
    ------
    SriglError
        If it is not, or has hooks. The message names the layer.
    """
    module, name = target.module, target.name
    is_within = bool(target.owner) and target.attribute == "weight"
    if type(module) not in (nn.Linear, nn.Conv2d) or not is_within:
        raise SriglError(
            f"layer {name!r} ({type(module).__name__}, {target.attribute}) cannot be condensed; "
            f"only nn.Linear and nn.Conv2d within a model can. Exclude it, keep it masked, or wrap "
            f"the model in nn.Sequential"
        )
    if type(module) is nn.Conv2d and module.groups != 1:
        raise SriglError(
            f"layer {name!r} has groups={module.groups}, and only groups=1 can be condensed; "
            f"exclude it, or keep it masked"
        )
    _check_hooks(name, module)


def condensed_layer(target: Target, weight: CondensedWeight, nnz_budget: int | None = None) -> Any:
    """Return the condensed layer that replaces a dense one.

    Parameters
    ----------
    target : Target
        A layer that `check_can_be_condensed` accepts.
    weight : CondensedWeight, (n_out, n_in)
    nnz_budget : int or None
        Length of the layer's values; None is the weight's number of values.

    Returns
    -------
    CondensedLinear or CondensedConv2d
        It has the dense layer's bias parameter, device, mode and `requires_grad`.
    """
    module, dense = target.module, target.parameter
    linear = CondensedLinear.from_condensed(weight, nnz_budget=nnz_budget, device=dense.device)
    linear.bias = module.bias
    linear.values.requires_grad_(dense.requires_grad)
    layer = linear if type(module) is nn.Linear else CondensedConv2d.like(module, linear)
    return layer.train(module.training)


def condensed_modules(model: Any) -> dict[str, Any]:
    """Return a model's condensed layers by name; a layer used in two places appears twice.

    Raises
    ------
    ValueTypeError
        If `model` is not a module.
    """
    check_module(model)
    layers: dict[str, Any] = {}
    parts: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CondensedConv2d):
            parts.add(id(module.linear))
            layers[name] = module
        elif isinstance(module, CondensedLinear) and id(module) not in parts:
            layers[name] = module
    return layers


def linear_of(layer: CondensedLinear | CondensedConv2d) -> CondensedLinear:
    """Return the linear layer of a convolution; a linear layer is returned unchanged."""
    return layer.linear if isinstance(layer, CondensedConv2d) else layer


def replace_modules(model: Any, replacements: Mapping[str, Any]) -> None:
    """Replace submodules by name, all of them or none.

    Raises
    ------
    SriglError
        If one is the model itself, or has hooks.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in replacements:
        if not name:
            raise SriglError(
                f"the model itself is a {type(model).__name__} and cannot be replaced within a "
                f"model; wrap it, as in nn.Sequential(model)"
            )
        _check_hooks(name, modules[name])
    for name, module in replacements.items():
        owner, _, attribute = name.rpartition(".")
        setattr(modules[owner], attribute, module)


def has_hooks(module: Any) -> bool:
    """Return whether a module or one of its own parameters has hooks."""
    hooks = [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]
    for parameter in module._parameters.values():
        if parameter is not None:
            hooks += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
    return any(hooks)


def _check_hooks(name: str, module: Any) -> None:
    if has_hooks(module):
        raise SriglError(f"layer {name!r} has hooks, which would be lost; remove or exclude them")
