"""The grid of training runs, spread over worker processes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from itertools import product

from training import Recipe, RunResult, RunSpec, train

from srigl_core._workers import worker_pool


@dataclass(frozen=True)
class Experiment:
    """Methods, keys of `training.METHODS`; sparsities of all but dense; at least two seeds."""

    methods: tuple[str, ...] = ("dense", "static", "rigl", "srigl-no-ablation", "srigl")
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.99)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    recipe: Recipe = field(default_factory=Recipe)
    workers: int = 2

    @classmethod
    def of_size(cls, seed: int, *, full: bool) -> Experiment:
        """Return the experiment with five seeds from `seed` on; if full, also SET and ten seeds."""
        if not full:
            return cls(seeds=tuple(range(seed, seed + 5)))
        methods = ("dense", "static", "set", "rigl", "srigl-no-ablation", "srigl")
        return cls(methods, seeds=tuple(range(seed, seed + 10)))

    def cells(self) -> list[tuple[str, float]]:
        """Return the method and sparsity of each cell of the grid; dense has one cell."""
        sparse = [method for method in self.methods if method != "dense"]
        dense = [("dense", 0.0)] * ("dense" in self.methods)
        return dense + [(method, s) for s, method in product(self.sparsities, sparse)]

    def runs(self) -> list[RunSpec]:
        """Return every run; the first seed of SRigL keeps its network, for deployment."""
        deployed = ("srigl", self.seeds[0])
        return [
            RunSpec(method, sparsity, seed, self.recipe, keep_network=(method, seed) == deployed)
            for method, sparsity in self.cells()
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one sparsity, in the order of their seeds."""

    method: str
    sparsity: float
    runs: list[RunResult]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of each run, in [0, 1]."""
        return [run.accuracy for run in self.runs]

    @property
    def accuracy(self) -> float:
        """Mean test accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean accuracy."""
        return statistics.stdev(self.accuracies) / math.sqrt(len(self.runs))


def run_experiment(experiment: Experiment) -> Iterator[RunResult]:
    """Yield each run as it ends; the numbers do not depend on the number of workers."""
    with worker_pool(experiment.workers) as pool:
        pending = [pool.submit(train, spec) for spec in experiment.runs()]
        for future in as_completed(pending):
            yield future.result()
