"""``srigl bench compare``: what got slower or faster between two result files."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from srigl_core.benchmarks.results import Results, Row
from srigl_core.benchmarks.tables import time_cell
from srigl_core.errors import SriglError

__all__ = ["Change", "Comparison", "compare"]

_KERNELS = ("ours", "external")
"""Families that are compared; the other contenders show how much the machine changed."""


@dataclass(frozen=True)
class Change:
    """A contender's times in a case that both files have; printing it gives a line."""

    old: Row
    new: Row
    contender: str

    @property
    def ratio(self) -> float:
        """The new median divided by the old one."""
        medians = (row.contenders[self.contender]["median_us"] for row in (self.new, self.old))
        return float(next(medians) / next(medians))

    @property
    def is_slower(self) -> bool:
        """Whether the new lower quartile is above the old upper one."""
        return self.new.spread(self.contender)[0] > self.old.spread(self.contender)[1]

    @property
    def is_faster(self) -> bool:
        """Whether the new upper quartile is below the old lower one."""
        return self.new.spread(self.contender)[1] < self.old.spread(self.contender)[0]

    def __str__(self) -> str:
        before, after = (time_cell(row, self.contender) for row in (self.old, self.new))
        return f"{self.ratio:.2f}x {self.new.label}, {self.contender}: {before} -> {after} us"


@dataclass(frozen=True)
class Comparison:
    """The differences between two runs.

    Parameters
    ----------
    slower, faster : list of Change
        Changes of our kernels, and of an external one, beyond the spread; the largest first.
    n_times : int
        Times of these kernels that both files have.
    others : float or None
        Median ratio of the other contenders, or None if there are none.
    warnings : list of str
        Why the times may not be comparable.
    """

    slower: list[Change]
    faster: list[Change]
    n_times: int
    others: float | None
    warnings: list[str]


def compare(old: Results, new: Results) -> Comparison:
    """Compare the times that two runs have in common.

    A time changed beyond the spread if the quartiles of the two runs do not overlap.

    Raises
    ------
    SriglError
        If one run is on a CPU and the other on a GPU, or no time of our kernels is in both.
    """
    if old.benchmark != new.benchmark:
        raise SriglError(
            f"one file was measured on a {old.benchmark} and the other on a {new.benchmark}; "
            f"compare two files of one device"
        )
    before = {row.key: row for row in old.rows}
    common = [
        (Change(before[row.key], row, name), entry["family"] in _KERNELS)
        for row in new.rows
        for name, entry in row.contenders.items()
        if row.key in before and name in before[row.key].contenders
    ]
    kernels = sorted((each for each, is_kernel in common if is_kernel), key=lambda c: c.ratio)
    others = [each.ratio for each, is_kernel in common if not is_kernel]
    if not kernels:
        raise SriglError(
            "the files have no time of our kernels in common; measure both with the same --only "
            "and --threads"
        )
    return Comparison(
        [each for each in reversed(kernels) if each.is_slower],
        [each for each in kernels if each.is_faster],
        len(kernels),
        statistics.median(others) if others else None,
        _warnings(old, new),
    )


def _warnings(old: Results, new: Results) -> list[str]:
    each = [_conditions(results) for results in (old, new)]
    return [
        f"{name} is {before!r} in the old file and {each[1][name]!r} in the new one"
        for name, before in each[0].items()
        if before != each[1][name]
    ]


def _conditions(results: Results) -> dict[str, Any]:
    """Return what should be the same in both runs."""
    machine = results.content["machine"]
    return {
        **{name: machine.get(name) for name in ("cpu", "gpu", "cores", "system")},
        "threads": sorted({row.threads for row in results.rows}),
        "incomplete": bool(results.content.get("incomplete")),
    }
