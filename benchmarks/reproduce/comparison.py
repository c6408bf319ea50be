"""Methods compared run by run, and what that says of the paper's claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats

from srigl_core.benchmarks.reproduce.training import RunResult

__all__ = ["CLAIMS", "Cell", "Claim", "Difference", "Verdict", "cells_of", "difference", "verdict"]


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one sparsity, in the order of their folds and seeds."""

    runs: Sequence[RunResult]

    @property
    def method(self) -> str:
        """The method of all runs."""
        return self.runs[0].spec.method

    @property
    def sparsity(self) -> float:
        """The sparsity of all runs."""
        return self.runs[0].spec.sparsity

    @property
    def accuracy(self) -> float:
        """Mean test accuracy, in percent."""
        return 100 * statistics.fmean(run.accuracy for run in self.runs)

    @property
    def error(self) -> float:
        """Standard error of the mean accuracy, in percentage points."""
        return _error([100 * run.accuracy for run in self.runs])


class Difference(NamedTuple):
    """The mean difference of paired runs, in percentage points.

    `error` is the standard error of the mean, and `least` to `most` its 95% confidence interval.
    """

    mean: float
    error: float
    least: float
    most: float
    n_pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.error:.1f}"


class Claim(NamedTuple):
    """What the paper says of two methods: `better` is the better one, or as good within `margin`.

    `margin` is in percentage points.
    """

    text: str
    better: str
    worse: str
    margin: float = 0.0


CLAIMS = (
    Claim("SRigL is as accurate as RigL", "srigl", "rigl", margin=0.5),
    Claim("ablation helps", "srigl", "srigl-no-ablation"),
    Claim("without ablation, SRigL is behind RigL", "rigl", "srigl-no-ablation"),
    Claim("moving the connections helps", "srigl", "static"),
)
"""The claims of the paper, sec. 4.

In the paper, SRigL is up to 0.4 points behind RigL; hence the margin.
"""


class Verdict(NamedTuple):
    """A claim, the difference that decides it, and "holds", "does not hold" or "undecided"."""

    claim: Claim
    sparsity: float
    difference: Difference
    outcome: str

    def __str__(self) -> str:
        return f"{self.claim.text} at {self.sparsity:.0%}: {self.difference} points, {self.outcome}"


def cells_of(results: Iterable[RunResult]) -> dict[tuple[str, float], Cell]:
    """Group results of one dataset, network and recipe by method and sparsity."""
    groups: dict[tuple[str, float], list[RunResult]] = {}
    for result in sorted(results, key=lambda result: (result.spec.fold, result.spec.seed)):
        groups.setdefault((result.spec.method, result.spec.sparsity), []).append(result)
    return {key: Cell(runs) for key, runs in groups.items()}


def difference(first: Cell, second: Cell) -> Difference | None:
    """Compare runs of equal fold and seed, first minus second; None if there are fewer than two."""
    others = {(run.spec.fold, run.spec.seed): run.accuracy for run in second.runs}
    pairs = [
        100 * (run.accuracy - others[place])
        for run in first.runs
        if (place := (run.spec.fold, run.spec.seed)) in others
    ]
    if len(pairs) < 2:
        return None
    mean, error = statistics.fmean(pairs), _error(pairs)
    reach = float(stats.t.ppf(0.975, len(pairs) - 1)) * error
    return Difference(mean, error, mean - reach, mean + reach, len(pairs))


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def verdict(
    claim: Claim, sparsity: float, cells: Mapping[tuple[str, float], Cell]
) -> Verdict | None:
    """Decide a claim by the confidence interval of the difference.

    It holds if the whole interval is above ``-claim.margin``, does not hold if the whole interval
    is below, and is undecided otherwise. None if runs are missing.
    """
    keys = [(method, sparsity) for method in (claim.better, claim.worse)]
    if not all(key in cells for key in keys):
        return None
    found = difference(*(cells[key] for key in keys))
    if found is None:
        return None
    if found.least > -claim.margin:
        outcome = "holds"
    else:
        outcome = "does not hold" if found.most < -claim.margin else "undecided"
    return Verdict(claim, sparsity, found, outcome)
