"""The weights of a model that are to be sparse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["Target", "check_optimizer", "find_targets"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Target:
    """One weight.

    Parameters
    ----------
    name : str
        The module's, or the parameter's where that is not called ``weight``.
    owner : str
        Name of the module whose it is.
    module : torch.nn.Module
    attribute : str
        What it is called there.
    parameter : torch.nn.Parameter
    """

    name: str
    owner: str
    module: Any
    attribute: str
    parameter: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return tuple(self.parameter.shape)

    def check_in_place(self, model: Any) -> None:
        """Raise SriglError if the model has another weight there by now."""
        found: Any = model
        for part in self.owner.split(".") if self.owner else ():
            found = getattr(found, part, None)
        if getattr(found, self.attribute, None) is not self.parameter:
            raise SriglError(
                f"layer {self.name!r} has another weight than when SRigL was attached; change "
                f"the model first and attach then"
            )


def find_targets(
    model: Any, include: Iterable[str] | None, exclude: Iterable[str]
) -> dict[str, Target]:
    """Return the weights to be made sparse, in the model's order.

    Parameters
    ----------
    model : torch.nn.Module
    include : iterable of str, or None
        Names of modules or of parameters; None is every linear and convolutional layer.
    exclude : iterable of str
        Names that are left out.

    Raises
    ------
    SriglError
        If a name is unknown, a weight is shared, is computed or not yet known, or none is left.
    ValueTypeError
        If `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    if include is None:
        names = [name for name, module in modules.items() if isinstance(module, _KINDS)]
    else:
        names = [include] if isinstance(include, str) else list(include)
    left_out = {exclude} if isinstance(exclude, str) else set(exclude)
    found = {}
    for name in [*names, *left_out]:
        target = _target(model, modules, name)
        if name not in left_out:
            found[target.name] = target
    if not found:
        raise SriglError(
            "no dense layer is left to be made sparse (a condensed one is already); name modules "
            "or parameters with include=[...]"
        )
    order = {id(p): i for i, p in enumerate(model.parameters())}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for target in found.values():
        if uses[id(target.parameter)] > 1:
            raise SriglError(
                f"layer {target.name!r} shares its weight with another one; exclude it, or give "
                f"each its own"
            )
    return dict(sorted(found.items(), key=lambda item: order[id(item[1].parameter)]))


def check_optimizer(targets: dict[str, Target], optimizer: Any) -> None:
    """Check that the optimiser moves every weight.

    Raises
    ------
    SriglError
        If it holds other parameters; names the layer.
    ValueTypeError
        If it is no optimiser.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueTypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for target in targets.values():
        if id(target.parameter) not in held:
            raise SriglError(
                f"layer {target.name!r}: the optimizer does not hold its weight; make it of "
                f"model.parameters() after the model is on its device, or exclude the layer"
            )


def _target(model: Any, modules: dict[str, Any], name: str) -> Target:
    module, owner, attribute, shown = modules.get(name), name, "weight", name
    if module is None or not hasattr(module, "weight"):
        owner, _, attribute = name.rpartition(".")
        module = modules.get(owner)
        shown = owner if attribute == "weight" and owner else name
    if module is None or not hasattr(module, attribute):
        weights = ", ".join(n for n, m in modules.items() if isinstance(m, _KINDS))
        raise SriglError(f"the model has no layer or parameter {name!r}; it has {weights}")
    parameter = module._parameters.get(attribute)
    if parameter is None:
        raise SriglError(
            f"layer {name!r} computes its weight (a parametrization?); remove that, or exclude it"
        )
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise SriglError(f"layer {name!r} has no weight yet; pass a batch through the model first")
    if parameter.ndim not in (2, 3, 4, 5):
        raise SriglError(
            f"layer {name!r} has a weight of shape {tuple(parameter.shape)}; a sparse one has two "
            f"axes, or a convolution's"
        )
    return Target(shown, owner, module, attribute, parameter)
