"""Condensed layers in the place of a model's dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from srigl_core._format.weight import CondensedWeight
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch.conv import CondensedConv2d
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.targets import Target

__all__ = [
    "check_can_be_condensed",
    "condensed_layer",
    "condensed_modules",
    "has_hooks",
    "linear_of",
    "replace_modules",
]


def check_can_be_condensed(target: Target) -> None:
    """Check that a layer is a linear one or a convolution of the plain kind, within a model.

    Raises
    ------
    SriglError
        If it is something else, or has hooks; names the layer.
    """
    module, name = target.module, target.name
    is_within = bool(target.owner) and target.attribute == "weight"
    if type(module) not in (nn.Linear, nn.Conv2d) or not is_within:
        raise SriglError(
            f"layer {name!r} ({type(module).__name__}, {target.attribute}) cannot be condensed, "
            f"only nn.Linear and nn.Conv2d within a model can; exclude it, keep it masked, or wrap "
            f"the model in nn.Sequential"
        )
    if type(module) is nn.Conv2d and module.groups != 1:
        raise SriglError(
            f"layer {name!r} has groups={module.groups}, and only groups=1 can be condensed; "
            f"exclude it, or keep it masked"
        )
    _check_hooks(name, module)


def condensed_layer(target: Target, weight: CondensedWeight, nnz_budget: int | None = None) -> Any:
    """Return the layer that takes a dense one's place.

    Parameters
    ----------
    target : Target
        Of a layer that can be condensed.
    weight : CondensedWeight, (n_out, n_in)
    nnz_budget : int or None
        Weights to make room for; None is as many as there are.

    Returns
    -------
    CondensedLinear or CondensedConv2d
        With the dense layer's own bias, its device and mode, and what requires a gradient.
    """
    module, dense = target.module, target.parameter
    linear = CondensedLinear.from_condensed(weight, nnz_budget=nnz_budget, device=dense.device)
    linear.bias = module.bias
    linear.values.requires_grad_(dense.requires_grad)
    made = linear if type(module) is nn.Linear else CondensedConv2d.like(module, linear)
    return made.train(module.training)


def condensed_modules(model: Any) -> dict[str, Any]:
    """Return a model's condensed layers by name; one used in two places is there twice.

    Raises
    ------
    ValueTypeError
        If `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[str, Any] = {}
    convolutions: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CondensedConv2d):
            convolutions.add(id(module.linear))
            found[name] = module
        elif isinstance(module, CondensedLinear) and id(module) not in convolutions:
            found[name] = module
    return found


def linear_of(layer: CondensedLinear | CondensedConv2d) -> CondensedLinear:
    """Return the product that a condensed layer is."""
    return layer.linear if isinstance(layer, CondensedConv2d) else layer


def replace_modules(model: Any, made: Mapping[str, Any]) -> None:
    """Set submodules by name, all of them or none.

    Raises
    ------
    SriglError
        If one is the model itself, or has hooks, which would be lost.
    """
    owners = dict(model.named_modules(remove_duplicate=False))
    for name in made:
        if not name:
            raise SriglError(
                f"the model itself is a {type(model).__name__}, which has no place in a model to "
                f"be replaced in; wrap it, as in nn.Sequential(model)"
            )
        _check_hooks(name, owners[name])
    for name, module in made.items():
        owner, _, attribute = name.rpartition(".")
        setattr(owners[owner], attribute, module)


def has_hooks(module: Any) -> bool:
    """Whether a module or a parameter of its own has hooks, which others in place would not."""
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
