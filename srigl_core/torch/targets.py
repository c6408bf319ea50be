"""The weights of a model that are made sparse, and why others are left dense."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch.attention import WEIGHT_NAMES, CondensedMultiheadAttention
from srigl_core.torch.conv import CondensedConv
from srigl_core.torch.layer_types import (
    ROWS,
    WeightLayout,
    is_lazy,
    layout_of,
    weight_names,
    why_no_neurons,
)
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.selection import Entry, entries_of, matches
from srigl_core.torch.sharded_tensors import is_sharded
from srigl_core.torch.tensors import numpy_dtype

__all__ = [
    "PRUNED",
    "Selection",
    "Target",
    "check_module",
    "condensed_targets",
    "dense_matrices",
    "find_targets",
    "submodule",
]

PRUNED = "computes its weight at each call, since it was pruned by "
"""Begins the reason why a layer is left whose pruning is not permanent yet."""

_EXCLUDED = "is excluded"
_NOT_INCLUDED = "is not included"


@dataclass(frozen=True, eq=False)
class Target:
    """One weight of a model.

    Parameters
    ----------
    name : str
        Name of the layer: of the module if the parameter is called ``weight``, else of the
        parameter. A condensed layer has the name of the dense one.
    owner : str
        Name of the module.
    module : torch.nn.Module
    attribute : str
        Name of the parameter in the module.
    parameter : torch.nn.Parameter
    layout : WeightLayout
        Where the weight has its neurons.
    parent : torch.nn.Module or None
        The module that has `module` as a part.
    """

    name: str
    owner: str
    module: Any
    attribute: str
    parameter: Any
    layout: WeightLayout = ROWS
    parent: Any | None = None

    @property
    def is_condensed(self) -> bool:
        """Whether the layer is condensed already."""
        return isinstance(self.module, CondensedLinear)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight with the neurons on the first axis."""
        if self.is_condensed:
            layer = self.parent if isinstance(self.parent, CondensedConv) else self.module
            return tuple(layer.weight.shape)
        shape = tuple(self.parameter.shape)
        return tuple(self.layout.to_rows(torch.empty(shape, device="meta")).shape)

    def check_in_place(self, model: Any) -> None:
        """Raise SriglError if the weight has been replaced in the model."""
        if getattr(submodule(model, self.owner), self.attribute, None) is not self.parameter:
            raise SriglError(
                f"layer {self.name!r} has another weight than when SRigL was attached; change "
                f"the model first, then attach SRigL"
            )


@dataclass(frozen=True)
class Selection:
    """The result of `find_targets`.

    Parameters
    ----------
    targets : dict of str to Target
        The weights to make sparse, in the model's order.
    left : dict of str to str
        Why the model's other matrices are left dense, by layer name. A reason continues a sentence
        that begins with the layer.
    """

    targets: dict[str, Target]
    left: dict[str, str]


@dataclass(eq=False)
class _Weight:
    """A weight of the model, which may become a target."""

    target: Target
    is_usual: bool  # of a known type
    reason: str | None  # why it cannot be made sparse

    @property
    def is_matrix(self) -> bool:
        parameter = self.target.parameter
        if self.is_usual or parameter is None:
            return True
        return not is_lazy(parameter) and bool(parameter.ndim > 1)

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def owner(self) -> str:
        return self.target.owner

    @property
    def module(self) -> Any:
        return self.target.module

    @property
    def attribute(self) -> str:
        return self.target.attribute


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
    model: Any,
    include: Iterable[Entry] | Entry | None,
    exclude: Iterable[Entry] | Entry,
    *,
    unsupported: Callable[[Target], str | None] | None = None,
    named: Collection[str] = (),
    kept: Collection[str] = (),
) -> Selection:
    """Return the weights to make sparse, and why the others are not.

    Parameters
    ----------
    model : torch.nn.Module
    include, exclude : iterable of str or type
        Names of modules or parameters, patterns, and types of modules. ``include=None`` means every
        layer of a known type.
    unsupported : callable or None
        Takes a target and returns why it cannot be used, or None.
    named : collection of str
        Layers that have options or masks of their own: they must be selected.
    kept : collection of str
        Layers that stay dense, for which `unsupported` is not asked.

    Raises
    ------
    SriglError
        If an entry matches nothing, a layer that is named cannot be made sparse, or no layer is
        left.
    ValueTypeError
        If `model` is not a module, or an entry is neither a string nor a type.
    """
    check_module(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    weights = list(_weights(model))
    for weight in weights:
        is_asked = (weight.is_usual or include is not None) and weight.name not in kept
        if weight.reason is None and unsupported is not None and is_asked:
            weight.reason = unsupported(weight.target)
    excluded = _excluded(exclude, weights, modules)
    chosen = {weight for weight in weights if weight.is_usual}
    if include is not None:
        chosen.clear()
        for entry in entries_of(include, "include"):
            chosen.update(_included(entry, weights, modules, excluded))
    targets = {}
    left = {}
    for weight in weights:
        if weight in excluded:
            left[weight.name] = _EXCLUDED
        elif not weight.is_matrix:
            continue
        elif weight.reason is not None:
            left[weight.name] = weight.reason
        elif weight not in chosen:
            left[weight.name] = _why_not_chosen(weight, include)
        else:
            targets[weight.name] = weight.target
    for name in named:
        if name in left:
            raise SriglError(f"layer {name!r} {left[name]} (it has options or a mask)")
    if not targets:
        reasons = [f"layer {w.name!r} {left[w.name]}" for w in weights if w.is_usual]
        raise SriglError(
            f"no dense layer is left to make sparse (condensed layers are sparse already)"
            f"{': ' if reasons else ''}{'; '.join(reasons)}; name modules or parameters with "
            f"include=[...]"
        )
    by_name = {weight.name: weight for weight in weights}
    return Selection(targets, {n: why for n, why in left.items() if by_name[n].is_matrix})


def condensed_targets(model: Any, exclude: Iterable[Entry] | Entry) -> list[Target]:
    """Return a model's condensed layers that are not excluded.

    Raises
    ------
    SriglError
        If an entry matches nothing.
    ValueTypeError
        If `model` is not a module, or an entry is neither a string nor a type.
    """
    check_module(model)
    weights = list(_weights(model))
    excluded = _excluded(exclude, weights, dict(model.named_modules(remove_duplicate=False)))
    chosen = (weight.target for weight in weights if weight not in excluded)
    return [target for target in chosen if target.is_condensed]


def dense_matrices(model: Any, unsupported: Callable[[Target], str | None]) -> dict[str, str]:
    """Return the dense matrices of a model by layer name, and why they are not sparse.

    Parameters
    ----------
    model : torch.nn.Module
    unsupported : callable
        As in `find_targets`.
    """
    reasons = {}
    for weight in _weights(model):
        if weight.is_matrix and not weight.target.is_condensed:
            reason = weight.reason
            if reason is None and weight.is_usual:
                reason = unsupported(weight.target) or "is dense"
            reasons[weight.name] = reason or _why_not_chosen(weight, None)
    return reasons


# ---------------------------------------------------------------- the weights of a model


def _weights(model: Any) -> Iterator[_Weight]:
    """Yield the model's parameters, and the weights that layers compute."""
    modules = dict(model.named_modules())
    names: dict[int, list[str]] = {}
    for owner, module in modules.items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(_name(owner, attribute))
    for owner, module in modules.items():
        parent = modules.get(owner.rpartition(".")[0]) if owner else None
        if isinstance(module, CondensedLinear):
            name = _condensed_name(owner, parent)
            target = Target(name, owner, module, "values", module.values, ROWS, parent)
            yield _Weight(target, True, None)
            continue
        usual = weight_names(module)
        computed = [name for name in usual if _is_computed(module, name)]
        for attribute in computed:
            target = Target(_name(owner, attribute), owner, module, attribute, None)
            yield _Weight(target, True, _why_computed(module, attribute))
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name, layout = _name(owner, attribute), layout_of(module, attribute)
            target = Target(name, owner, module, attribute, parameter, layout, parent)
            others = [other for other in names[id(parameter)] if other != name]
            reason = _obstacle(target, others)
            if attribute in usual or not (computed or _is_part_of_computed(owner)):
                yield _Weight(target, attribute in usual, reason)


def _condensed_name(owner: str, parent: Any) -> str:
    """Return the name that the dense layer has in place of a condensed one."""
    outer, _, attribute = owner.rpartition(".")
    if isinstance(parent, CondensedConv):
        return outer
    if isinstance(parent, CondensedMultiheadAttention):
        return _name(outer, WEIGHT_NAMES.get(attribute, attribute))
    return owner


def _name(owner: str, attribute: str) -> str:
    if attribute == "weight":
        return owner
    return f"{owner}.{attribute}" if owner else attribute


def _is_computed(module: Any, attribute: str) -> bool:
    """Return whether a layer has a weight that is no parameter: parametrised, or quantised."""
    if module._parameters.get(attribute) is not None:
        return False
    parametrizations = getattr(module, "parametrizations", {})
    return attribute in parametrizations or (attribute == "weight" and hasattr(module, attribute))


def _why_computed(module: Any, attribute: str) -> str:
    if "quantized" in type(module).__module__:
        return "is quantised; exclude it"
    if f"{attribute}_mask" in module._buffers and f"{attribute}_orig" in module._parameters:
        call = f"torch.nn.utils.prune.remove(layer, {attribute!r})"
        return f"{PRUNED}torch.nn.utils.prune; make that permanent with {call}"
    parametrizations = getattr(module, "parametrizations", {})
    steps = [step for name, part in parametrizations.items() if name == attribute for step in part]
    if any(type(step).__module__.startswith("torch.ao.pruning") for step in steps):
        return f"{PRUNED}torch.ao.pruning; make that permanent with sparsifier.squash_mask()"
    return "computes its weight (a parametrization?); remove that, or exclude it"


def _is_part_of_computed(owner: str) -> bool:
    return ".parametrizations." in f".{owner}."


def _obstacle(target: Target, other_names: list[str]) -> str | None:
    """Return why a parameter cannot be made sparse, or None."""
    parameter = target.parameter
    if is_lazy(parameter):
        return "has no weight yet; pass a batch through the model first"
    if other_names:
        others = ", ".join(map(repr, other_names))
        return f"shares its weight with {others}; exclude it, or give each layer its own weight"
    if parameter.layout is not torch.strided:
        return f"has a weight of layout {parameter.layout}; exclude it, or make it dense"
    if is_traceable_wrapper_subclass(parameter) and not is_sharded(parameter):
        what = type(parameter).__name__
        return f"has a weight that is a {what}, which hides its numbers (quantised?); exclude it"
    try:
        numpy_dtype(parameter.dtype)
    except ValueTypeError:
        return (
            f"has a weight of dtype {parameter.dtype}, which no sparse layer can have; exclude it"
        )
    return why_no_neurons(target.module, target.attribute, tuple(parameter.shape))


# ---------------------------------------------------------------- include and exclude


def _excluded(
    exclude: Iterable[Entry] | Entry, weights: list[_Weight], modules: dict[str, Any]
) -> set[_Weight]:
    excluded: set[_Weight] = set()
    for entry in entries_of(exclude, "exclude"):
        found = matches(entry, weights, modules)
        excluded.update(found.by_name, found.within)
    return excluded


def _included(
    entry: Entry, weights: list[_Weight], modules: dict[str, Any], excluded: set[_Weight]
) -> list[_Weight]:
    """Return the weights of an entry of `include`. Those of unknown types must be named.

    Raises
    ------
    SriglError
        If the entry names a layer that cannot be made sparse, or none of those that it matches can.
    """
    found = matches(entry, weights, modules)
    meant = found.by_name if found.is_name else [*found.by_name, *found.within]
    if not found.is_name and any(weight.is_usual for weight in meant):
        meant = [weight for weight in meant if weight.is_usual]
    usable = [weight for weight in meant if weight.reason is None]
    if usable or (meant and excluded.issuperset(meant)):
        return usable
    if not meant:
        raise SriglError(f"include: {entry!r} has no weight that could be made sparse")
    raise SriglError("; ".join(f"layer {w.name!r} {w.reason}" for w in meant))


def _why_not_chosen(weight: _Weight, include: Any) -> str:
    if weight.is_usual or include is not None:
        return _NOT_INCLUDED
    return (
        f"is no layer of a known type ({type(weight.module).__name__}); name it in include to make "
        f"it sparse, if its rows are its neurons"
    )
