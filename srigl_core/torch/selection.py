"""The meaning of `include` and `exclude`: names, patterns, subtrees and types of layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar

from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["Entry", "entries_of", "matches"]

_MOST_SHOWN = 8

Entry = str | type
"""A layer's or parameter's name, a module's name, a pattern such as "*.out_proj", or a type."""


class Named(Protocol):
    """A weight, as `matches` looks at it."""

    @property
    def name(self) -> str: ...
    @property
    def owner(self) -> str: ...
    @property
    def module(self) -> Any: ...
    @property
    def attribute(self) -> str: ...
    @property
    def is_usual(self) -> bool: ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Matches:
    """The weights that an entry means.

    Parameters
    ----------
    by_name : list
        Those whose own name is the entry, or fits its pattern.
    within : list
        Those of the modules that the entry means, and of the modules in them.
    is_name : bool
        Whether the entry is the name of one weight.
    """

    by_name: list[Any]
    within: list[Any]
    is_name: bool


def entries_of(entries: Iterable[Entry] | Entry | None, argument: str) -> list[Entry]:
    """Return the entries of an argument, which may be a single one.

    Raises
    ------
    ValueTypeError
        If one is neither a string nor a type.
    """
    if entries is None or isinstance(entries, str | type):
        entries = [] if entries is None else [entries]
    listed = list(entries)
    for entry in listed:
        if not isinstance(entry, str | type):
            raise ValueTypeError(
                f"{argument} must hold names, patterns or types of modules, got {entry!r}"
            )
    return listed


def matches(entry: Entry, weights: Sequence[T], modules: Mapping[str, Any]) -> Matches:
    """Return the weights that an entry means.

    Parameters
    ----------
    entry : str or type
    weights : sequence
        All weights of the model.
    modules : mapping of str to torch.nn.Module
        All modules of the model by name.

    Raises
    ------
    SriglError
        If the model has nothing of that name or type. The message shows similar names.
    """
    meant: list[Any]
    by_name: list[T]
    if isinstance(entry, type):
        meant = [module for module in modules.values() if isinstance(module, entry)]
        by_name = []
    elif any(mark in entry for mark in "*?["):
        meant = [module for name, module in modules.items() if fnmatchcase(name, entry)]
        by_name = [w for w in weights if any(fnmatchcase(name, entry) for name in _names(w))]
    else:
        meant = [modules[entry]] if entry in modules else []
        by_name = [w for w in weights if entry in _names(w)]
    if not meant and not by_name:
        raise SriglError(_unknown(entry, weights, modules))
    inside = {id(part) for module in meant for part in module.modules()}
    within = [weight for weight in weights if id(weight.module) in inside]
    is_name = isinstance(entry, str) and any(entry in _names(weight) for weight in by_name)
    return Matches(by_name, within, is_name)


def _names(weight: Named) -> tuple[str, str]:
    full = f"{weight.owner}.{weight.attribute}" if weight.owner else weight.attribute
    return weight.name, full


def _unknown(entry: Entry, weights: Sequence[T], modules: Mapping[str, Any]) -> str:
    if isinstance(entry, type):
        types = sorted({type(weight.module).__name__ for weight in weights if weight.is_usual})
        return f"the model has no module of type {entry.__name__}; its layers are {_some(types)}"
    layers = [weight.name for weight in weights]
    near = difflib.get_close_matches(entry, [*layers, *modules], n=_MOST_SHOWN, cutoff=0.5)
    usual = [weight.name for weight in weights if weight.is_usual]
    similar = list(dict.fromkeys(near))
    shown = f"it has {_some(similar)}" if similar else f"its layers are {_some(usual)}"
    return f"the model has no layer or parameter {entry!r}; {shown}"


def _some(names: list[str]) -> str:
    more = ["..."] if len(names) > _MOST_SHOWN else []
    return ", ".join([*names[:_MOST_SHOWN], *more])
