"""The weights of a model that training makes sparse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["Target", "check_module", "find_targets", "submodule"]

_LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Target:
    """One weight of a model.

    Parameters
    ----------
    name : str
        Name of the layer: of the module if the parameter is called ``weight``, else of the
        parameter.
    owner : str
        Name of the module.
    module : torch.nn.Module
    attribute : str
        Name of the parameter in the module.
    parameter : torch.nn.Parameter
    """

    name: str
    owner: str
    module: Any
    attribute: str
    parameter: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.parameter.shape)

    def check_in_place(self, model: Any) -> None:
        """Raise SriglError if the weight has been replaced in the model."""
        if getattr(submodule(model, self.owner), self.attribute, None) is not self.parameter:
            raise SriglError(
                f"layer {self.name!r} has another weight than when SRigL was attached; change "
                f"the model first, then attach SRigL"
            )


def submodule(model: Any, name: str) -> Any:
    """Return a module of a model by name, or None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def check_module(model: Any) -> None:
    """Raise ValueTypeError if `model` is not a module."""
    if not isinstance(model, nn.Module):
        raise ValueTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def find_targets(
    model: Any, include: Iterable[str] | None, exclude: Iterable[str]
) -> dict[str, Target]:
    """Return the weights to make sparse, in the model's order.

    Parameters
    ----------
    model : torch.nn.Module
    include : iterable of str, or None
        Names of modules or of parameters; None means every linear and convolutional layer.
    exclude : iterable of str
        Names to leave out.

    Raises
    ------
    SriglError
        If a name is unknown, no weight is left, or a weight is shared, computed or uninitialised.
    ValueTypeError
        If `model` is not a module.
    """
    check_module(model)
    modules = dict(model.named_modules())
    if include is None:
        names = [name for name, module in modules.items() if isinstance(module, _LAYER_TYPES)]
    else:
        names = [include] if isinstance(include, str) else list(include)
    excluded = {exclude} if isinstance(exclude, str) else set(exclude)
    targets = {}
    for name in [*names, *excluded]:
        target = _target(modules, name)
        if name not in excluded:
            targets[target.name] = target
    if not targets:
        raise SriglError(
            "no dense layer is left to make sparse (condensed layers are sparse already); name "
            "modules or parameters with include=[...]"
        )
    order = {id(p): i for i, p in enumerate(model.parameters())}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for target in targets.values():
        if uses[id(target.parameter)] > 1:
            raise SriglError(
                f"layer {target.name!r} shares its weight with another layer; exclude it, or give "
                f"each layer its own weight"
            )
    return dict(sorted(targets.items(), key=lambda item: order[id(item[1].parameter)]))


def _target(modules: dict[str, Any], name: str) -> Target:
    module, owner, attribute, shown = modules.get(name), name, "weight", name
    if module is None or not hasattr(module, "weight"):
        owner, _, attribute = name.rpartition(".")
        module = modules.get(owner)
        shown = owner if attribute == "weight" and owner else name
    if module is None or not hasattr(module, attribute):
        weights = ", ".join(n for n, m in modules.items() if isinstance(m, _LAYER_TYPES))
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
            f"layer {name!r} has a weight of shape {tuple(parameter.shape)}; a sparse weight is a "
            f"matrix or a convolution's kernel"
        )
    return Target(shown, owner, module, attribute, parameter)
