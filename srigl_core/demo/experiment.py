"""The grid of runs, trained side by side in worker processes, and its cells' statistics."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field

from srigl_core.demo.dataset import Digits
from srigl_core.demo.training import METHODS, Recipe, RunResult, RunSpec, train
from srigl_core.errors import SriglError

__all__ = ["Cell", "Experiment", "run_experiment"]

_ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)


@dataclass(frozen=True)
class Experiment:
    """What is compared.

    Parameters
    ----------
    methods : tuple of str
        Keys of `srigl_core.demo.training.METHODS`, "srigl" among them.
    sparsities : tuple of float
        For all methods but dense.
    seeds : tuple of int
        Two at least, for a standard error.
    recipe : Recipe
    workers : int
        Processes that train side by side, each with one thread.

    Raises
    ------
    SriglError
        If there are too few seeds, or a method is unknown or missing.
    """

    methods: tuple[str, ...] = ("dense", "static", "rigl", "srigl-no-ablation", "srigl")
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.99)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    recipe: Recipe = field(default_factory=Recipe)
    workers: int = 2

    def __post_init__(self) -> None:
        if len(self.seeds) < 2:
            raise SriglError(f"seeds={self.seeds!r} has no standard error; give two at least")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or "srigl" not in self.methods:
            raise SriglError(
                f"methods={self.methods!r} must be of {', '.join(METHODS)}, and 'srigl' among "
                f"them: its networks are the ones to be saved and timed"
            )

    @classmethod
    def short(cls, seed: int = 0) -> Experiment:
        """Return the comparison of ``srigl demo``, with five seeds from `seed` on."""
        return cls(seeds=tuple(range(seed, seed + 5)))

    @classmethod
    def full(cls, seed: int = 0) -> Experiment:
        """Return the comparison of ``srigl demo --full``: SET too, and ten seeds."""
        methods = ("dense", "static", "set", "rigl", "srigl-no-ablation", "srigl")
        return cls(methods=methods, seeds=tuple(range(seed, seed + 10)))

    def cells(self) -> list[tuple[str, float]]:
        """Return method and sparsity of each cell; dense comes once."""
        dense = [("dense", 0.0)] if "dense" in self.methods else []
        sparse = [method for method in self.methods if method != "dense"]
        return dense + [(method, s) for s in self.sparsities for method in sparse]

    def runs(self) -> list[RunSpec]:
        """Return every run; the first seed of SRigL keeps its network, to be deployed."""
        return [
            RunSpec(
                method,
                sparsity,
                seed,
                self.recipe,
                keep_network=method == "srigl" and seed == self.seeds[0],
            )
            for method, sparsity in self.cells()
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one sparsity, ordered by seed."""

    method: str
    sparsity: float
    runs: tuple[RunResult, ...]

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


def run_experiment(
    experiment: Experiment,
    data: Digits,
    *,
    on_run: Callable[[RunResult], None] = lambda run: None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Train every run of an experiment.

    Parameters
    ----------
    experiment : Experiment
    data : Digits
    on_run : callable
        Called with each run as it ends, in any order.
    on_cell : callable
        Called with each cell as its last run ends.

    Returns
    -------
    list of Cell
        In the experiment's order. The numbers do not depend on the number of workers.

    Raises
    ------
    SriglError
        If a run fails, or a worker process is killed.
    """
    left = {cell: len(experiment.seeds) for cell in experiment.cells()}
    done: dict[tuple[str, float], list[RunResult]] = {cell: [] for cell in left}
    for run in _results(experiment, data):
        key = run.spec.method, run.spec.sparsity
        done[key].append(run)
        on_run(run)
        if len(done[key]) == left[key]:
            on_cell(_cell(key, done[key]))
    return [_cell(key, runs) for key, runs in done.items()]


def _cell(key: tuple[str, float], runs: Sequence[RunResult]) -> Cell:
    return Cell(*key, tuple(sorted(runs, key=lambda run: run.spec.seed)))


def _results(experiment: Experiment, data: Digits) -> Iterator[RunResult]:
    # Fresh processes, not forked ones: this process may have started threads, of BLAS or Numba,
    # that would not exist in a fork. They read the numbers of threads as they start.
    with (
        _environment(dict.fromkeys(_ONE_THREAD, "1")),
        ProcessPoolExecutor(
            experiment.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(data,),
        ) as pool,
    ):
        pending: list[Future[RunResult]] = [pool.submit(_work, spec) for spec in experiment.runs()]
        try:
            for future in as_completed(pending):
                yield future.result()
        except BrokenProcessPool as error:
            raise SriglError(
                "a worker process ended before its run did, perhaps for want of memory; "
                "try again with more"
            ) from error
        finally:
            for future in pending:
                future.cancel()


_worker_data: list[Digits] = []


def _start_worker(data: Digits) -> None:
    _worker_data[:] = [data]


def _work(spec: RunSpec) -> RunResult:
    return train(spec, _worker_data[0])


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
