"""Runs as `joblib` tasks, on this machine or on a cluster; those with a result are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import joblib
from threadpoolctl import threadpool_limits

from srigl_core._workers import end_with_parent
from srigl_core.benchmarks.reproduce.results import appended, read_results
from srigl_core.benchmarks.reproduce.settings import RunSpec
from srigl_core.benchmarks.reproduce.training import Kept, RunResult, train
from srigl_core.errors import BackendUnavailableError

__all__ = ["dask_workers", "local_workers", "run_all", "run_missing"]


def local_workers(processes: int | None = None) -> joblib.parallel_config:
    """Return the context in which runs are spread over processes of this machine.

    Parameters
    ----------
    processes : int or None
        None is one for each core. They end with this process.
    """
    return joblib.parallel_config(
        backend="loky",
        n_jobs=processes or -1,
        inner_max_num_threads=1,
        initializer=end_with_parent,
    )


@contextmanager
def dask_workers(address: str) -> Iterator[None]:
    """Return the context in which runs are spread over the workers of a Dask cluster.

    Every worker needs this package and the data's. If one is lost, the runs that it had begun start
    again on another.

    Parameters
    ----------
    address : str
        Of the scheduler, such as ``tcp://127.0.0.1:8786``.

    Raises
    ------
    BackendUnavailableError
        If the package distributed is not installed.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise BackendUnavailableError(
            "a Dask cluster needs the package distributed: pip install distributed"
        ) from error
    with Client(address) as client, joblib.parallel_config(backend="dask", client=client):
        yield


def run_all(
    runs: Sequence[RunSpec], kept: Sequence[RunSpec] = ()
) -> Iterator[tuple[RunResult, Kept | None]]:
    """Yield each run as it ends, computed by the joblib backend of the context.

    The results do not depend on the backend, nor on the number of processes.

    Parameters
    ----------
    runs : sequence of RunSpec
    kept : sequence of RunSpec
        Those of which the network is returned, too.
    """
    # One run a task: a task that is lost with its worker is one run.
    parallel = joblib.Parallel(batch_size=1, return_as="generator_unordered")
    yield from parallel(joblib.delayed(_run)(run, run in kept) for run in runs)


def _run(run: RunSpec, keep: bool) -> tuple[RunResult, Kept | None]:
    with threadpool_limits(1):
        return train(run, keep=keep)


def run_missing(runs: Sequence[RunSpec], path: Path) -> Iterator[RunResult]:
    """Yield the runs whose results are not in a file of results, and append each as it ends.

    Parameters
    ----------
    runs : sequence of RunSpec
    path : Path
        A line that a killed process has not written to its end is removed.
    """
    done = {result.spec.key for result in read_results(path)}
    missing = [run for run in runs if run.key not in done]
    with appended(path) as append:
        for result, _ in run_all(missing):
            append(result)
            yield result
