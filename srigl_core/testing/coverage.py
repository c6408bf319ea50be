"""Which sizes, residues, types, layouts and special numbers the problems of a run have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from srigl_core.contract import ACTIVATIONS
from srigl_core.testing.kernel_capabilities import LAYOUTS, KernelCapabilities
from srigl_core.testing.problem_arrays import ORDERED_DTYPES
from srigl_core.testing.problem_sizes import ProductSizes, UpdateSizes
from srigl_core.testing.product_problems import (
    DTYPE_PAIRS,
    NOT_OF_A_BIAS,
    SPECIAL_NUMBERS,
    MatmulProblem,
)
from srigl_core.testing.update_problems import CondensedUpdateProblem, UpdateProblem

__all__ = ["Coverage", "Trait", "traits_of"]

Trait = tuple[str, str]
"""A group, such as "layout of x", and one of its members, such as "F"."""

_RESIDUES = 32


def _exceeds(size: str, limit: int, sizes: Any) -> bool:
    return bool(getattr(sizes, size) > limit)


def _beyond(size: str, *limits: int) -> dict[str, Callable[[Any], bool]]:
    """Return a class for each limit that a size exceeds."""
    return {f"{size} > {limit:,}": partial(_exceeds, size, limit) for limit in limits}


_PRODUCT_SIZES: dict[str, Callable[[ProductSizes], bool]] = {
    "one row": lambda s: s.batch == 1,
    "no row": lambda s: s.batch == 0,
    "a batch of a layer of n_active > 130": lambda s: s.n_active > 130 and s.batch > 8,
    "n_active > 130, n_in > 300 and a batch > 64": lambda s: (
        s.n_active >= 130 and s.n_in >= 300 and s.batch > 64
    ),
    "n_in / 2 < fan_in < n_in": lambda s: s.n_in / 2 < s.fan_in < s.n_in,
    "fan_in = n_in": lambda s: s.fan_in == s.n_in,
    "a batch > 64 of n_in > 2,100": lambda s: s.batch > 64 and s.n_in > 2_100,
    "fan_in = n_in = n_out": lambda s: s.fan_in == s.n_in == s.n_active == s.n_out > 1,
    "n_out = n_in": lambda s: s.n_out == s.n_in > 1,
    "ablated neurons": lambda s: s.n_active < s.n_out,
    "work for several threads": lambda s: s.batch * s.nnz > 1_000_000,
    **_beyond("nnz", 65_536, 131_072, 262_144),
    **_beyond("n_active", 2_048, 65_536),
    "n_out > 65,536": lambda s: s.n_out > 65_536,
    **_beyond("batch", 1_100, 2_048, 65_535),
    **_beyond("fan_in", 1_024, 2_048, 4_096),
    "32,768 < n_in < 65,536": lambda s: 32_768 < s.n_in < 65_536,
    "n_in = 65,536": lambda s: s.n_in == 65_536,
    "n_in = 65,537": lambda s: s.n_in == 65_537,
    "n_in > 131,072": lambda s: s.n_in > 131_072,
    "x of more than 2^20 numbers": lambda s: s.batch * s.n_in > 2**20,
    "y of more than 2^20 numbers": lambda s: s.batch * s.n_out > 2**20,
}
_UPDATE_SIZES: dict[str, Callable[[UpdateSizes], bool]] = {
    "n_out and n_in > 128": lambda s: min(s.n_out, s.n_in) > 128,
    **_beyond("n_out", 1_024, 65_536),
    **_beyond("n_in", 1_024, 65_536, 131_072),
    "more than 2^18 weights": lambda s: s.n_out * s.n_in > 2**18,
    "more than 2^20 weights": lambda s: s.n_out * s.n_in > 2**20,
}


def traits_of(problem: Any) -> Iterator[Trait]:
    """Yield what a problem has, of what `Coverage` looks for."""
    if isinstance(problem, MatmulProblem):
        yield from _product_traits(problem)
    elif type(problem) in (UpdateProblem, CondensedUpdateProblem):
        sizes = UpdateSizes(*problem.grad.shape)
        yield from _size_traits("an update", sizes, _UPDATE_SIZES)
        yield ("weight of an update", problem.weight.dtype.name)
        yield ("grad of an update", problem.grad.dtype.name)
        if isinstance(problem, CondensedUpdateProblem):
            yield ("steps of a condensed update", _STEPS[not _keeps_shapes(problem)])


_STEPS = ("connections move, and n_active and fan_in stay", "n_active or fan_in may change")


def _keeps_shapes(problem: CondensedUpdateProblem) -> bool:
    weight, settings = problem.weight, problem.settings
    return (
        settings.gamma_sal is None
        and settings.min_salient is None
        and settings.drop_fraction > 0
        and weight.n_active == weight.shape[0]
        and settings.nnz_budget // weight.n_active == weight.fan_in < weight.shape[1]
    )


def _product_traits(problem: MatmulProblem) -> Iterator[Trait]:
    weight, lead = problem.weight, problem.x.shape[:-1]
    shape = (weight.shape[0], weight.n_active, weight.shape[1], weight.fan_in)
    yield from _size_traits("a product", ProductSizes(1, math.prod(lead), *shape), _PRODUCT_SIZES)
    yield ("leading axes", str(len(lead)))
    yield ("types of x and values", f"{problem.x.dtype.name}, {weight.dtype.name}")
    yield ("type of grad", problem.grad.dtype.name)
    yield ("type of out", problem.out_dtype.name)
    yield ("bias", "none" if problem.bias is None else problem.bias.dtype.name)
    yield ("activation", problem.activation)
    yield ("special numbers", problem.special)
    layouts = (problem.layout, problem.grad_layout, problem.out_layout)
    for name, layout in zip(("x", "grad", "out"), layouts, strict=True):
        yield (f"layout of {name}", layout)
    if problem.bias is not None:
        yield ("layout of bias", problem.bias_layout)


def _size_traits(
    what: str, sizes: Any, classes: Mapping[str, Callable[[Any], bool]]
) -> Iterator[Trait]:
    for name, has in classes.items():
        if has(sizes):
            yield (f"sizes of {what}", name)
    for name in ("batch", "n_active", "n_out", "n_in", "fan_in"):
        if hasattr(sizes, name):
            yield (f"{name} of {what}, modulo {_RESIDUES}", str(getattr(sizes, name) % _RESIDUES))


@dataclass(frozen=True)
class Coverage:
    """How many problems have which trait, and which no problem has.

    Parameters
    ----------
    counts : mapping
        For each group of traits, the number of problems with each of its members.
    not_drawn : mapping
        For each group, the members that no problem has.
    """

    counts: Mapping[str, Mapping[str, int]]
    not_drawn: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, traits: Counter[Trait], capabilities: KernelCapabilities) -> Coverage:
        """Return the coverage of problems for a kernel, from the counts of their traits."""
        counts: dict[str, dict[str, int]] = {}
        not_drawn = {}
        for group, members in _possible(capabilities).items():
            if not any(kind == group for kind, _ in traits):
                continue  # no law of the run is about it
            counts[group] = {each: traits[group, each] for each in members if traits[group, each]}
            not_drawn[group] = tuple(each for each in members if not traits[group, each])
        return cls(counts, not_drawn)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for group, counts in self.counts.items():
            missing = self.not_drawn[group]
            n = len(counts) + len(missing)
            if group.endswith(f"modulo {_RESIDUES}"):
                drawn = f"{min(counts.values())} to {max(counts.values())} problems each"
            else:
                drawn = ", ".join(f"{member} ({count:,})" for member, count in counts.items())
            yield f"{group}: {len(counts)} of {n}: {drawn}"
            if missing:
                yield f"    not drawn: {', '.join(missing)}"


def _possible(capabilities: KernelCapabilities) -> dict[str, Iterable[str]]:
    """Return the members of each group that problems within `capabilities` may have."""
    taken = [name for name in ORDERED_DTYPES if name in capabilities.value_dtypes]
    layouts = [name for name in LAYOUTS if name in capabilities.layouts]
    apart = [name for name in layouts if not name.startswith("shared")]
    residues = [str(residue) for residue in range(_RESIDUES)]
    groups: dict[str, Iterable[str]] = {"sizes of a product": _PRODUCT_SIZES}
    for name in ("batch", "n_active", "n_out", "n_in", "fan_in"):
        groups[f"{name} of a product, modulo {_RESIDUES}"] = residues
    pairs = [", ".join(pair) for pair in DTYPE_PAIRS if set(pair) <= set(taken)]
    return groups | {
        "leading axes": ("0", "1", "2"),
        "types of x and values": pairs,
        "type of grad": taken,
        "type of out": ORDERED_DTYPES if capabilities.out else taken,
        "bias": ("none", *dict.fromkeys((*taken, "float32", "float64"))),
        "activation": [name for name in ACTIVATIONS if name in capabilities.activations],
        "special numbers": list(SPECIAL_NUMBERS),
        "layout of x": layouts,
        "layout of grad": layouts,
        "layout of out": [name for name in apart if name != "offset by a byte"],
        "layout of bias": [name for name in layouts if name not in NOT_OF_A_BIAS],
        "sizes of an update": _UPDATE_SIZES,
        f"n_out of an update, modulo {_RESIDUES}": residues,
        f"n_in of an update, modulo {_RESIDUES}": residues,
        "weight of an update": taken,
        "grad of an update": taken,
        "steps of a condensed update": _STEPS,
    }
