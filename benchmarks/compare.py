"""``srigl bench compare``: what got slower or faster between two versions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srigl_core.benchmarks.results import Results, Times, load_results
from srigl_core.errors import FileFormatError, SriglError

__all__ = ["Change", "Comparison", "compare", "load_runs"]

_KERNELS = ("ours", "external")
"""Families that are compared; the other contenders show how much the machine changed."""


@dataclass(frozen=True)
class Change:
    """A contender's times in a case that both versions have; printing it gives a line."""

    case: str
    contender: str
    old: Times
    new: Times

    @property
    def ratio(self) -> float:
        """The new median divided by the old one."""
        return self.new.median / self.old.median

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x {self.case}, {self.contender}: {self.old} -> {self.new} us"


@dataclass(frozen=True)
class Comparison:
    """The differences between two versions."""

    slower: list[Change]  # beyond the spread; of our kernels and an external one, largest first
    faster: list[Change]
    n_times: int  # times of these kernels that both versions have
    others: float | None  # median ratio of the other contenders, if there are any
    warnings: list[str]  # why the times may not be comparable


def load_runs(path: Path) -> list[Results]:
    """Read a result file, or all result files in a folder: several runs of one version."""
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileFormatError(f"{str(path)!r} has no .json files; run srigl bench cpu")
    return [load_results(file) for file in files]


def compare(old: Sequence[Results], new: Sequence[Results]) -> Comparison:
    """Compare the times that the runs of two versions have in common.

    A time changed beyond the spread if the quartiles of the two versions do not overlap, in any of
    their runs.
    """
    if len({results.benchmark for results in (*old, *new)}) > 1:
        raise SriglError(
            "some files were measured on a cpu and others on a gpu; compare one device"
        )
    before, after = _times(old), _times(new)
    rows = {row.key: row for results in new for row in results.rows}
    kernels: list[Change] = []
    others: list[Change] = []
    for key, name in (each for each in after if each in before):
        change = Change(rows[key].label, name, before[key, name], after[key, name])
        is_kernel = rows[key].contenders[name]["family"] in _KERNELS
        (kernels if is_kernel else others).append(change)
    if not kernels:
        raise SriglError(
            "the files have no time of our kernels in common; measure both with the same --only "
            "and --threads"
        )
    kernels.sort(key=lambda change: change.ratio)
    return Comparison(
        [each for each in reversed(kernels) if each.new.lower > each.old.upper],
        [each for each in kernels if each.new.upper < each.old.lower],
        len(kernels),
        statistics.median(each.ratio for each in others) if others else None,
        _warnings(old, new),
    )


def _times(runs: Sequence[Results]) -> dict[tuple[Any, str], Times]:
    """Return the times by case and contender: median of medians, and outer quartiles, of runs."""
    measured: dict[tuple[Any, str], list[Times]] = {}
    for row in (row for results in runs for row in results.rows):
        for name, times in row.times.items():
            measured.setdefault((row.key, name), []).append(times)
    return {
        key: Times(
            statistics.median(times.median for times in each),
            min(times.lower for times in each),
            max(times.upper for times in each),
        )
        for key, each in measured.items()
    }


def _warnings(old: Sequence[Results], new: Sequence[Results]) -> list[str]:
    before, after = _conditions(old), _conditions(new)
    return [
        f"{name} is {before[name]} in the old file and {after[name]} in the new one"
        for name in before
        if before[name] != after[name]
    ]


def _conditions(runs: Sequence[Results]) -> dict[str, str]:
    """Return what should be the same in all runs."""
    machines = [results.content["machine"] for results in runs]
    values = {
        **{n: {m.get(n) for m in machines} for n in ("cpu", "gpu", "cores", "system")},
        "threads": {row.threads for results in runs for row in results.rows},
        "incomplete": {bool(results.content.get("incomplete")) for results in runs},
    }
    return {name: ", ".join(sorted(map(str, each))) for name, each in values.items()}
