"""Runs as `joblib` tasks, on this machine or on a cluster; those with a result are left out."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import joblib
from joblib.externals.loky.backend import resource_tracker as loky_tracker
from threadpoolctl import threadpool_limits

from srigl_core._workers import end_with_parent
from srigl_core.benchmarks.reproduce.results import appended, read_results
from srigl_core.benchmarks.reproduce.settings import RunSpec
from srigl_core.benchmarks.reproduce.training import Kept, RunResult, train
from srigl_core.errors import BackendUnavailableError

__all__ = ["dask_workers", "local_workers", "run_all", "run_missing"]


@contextmanager
def local_workers(processes: int | None = None) -> Iterator[None]:
    """Return the context in which runs are spread over processes of this machine.

    The processes end with this one, and Ctrl-C ends all of them.

    Parameters
    ----------
    processes : int or None
        None is one for each core.
    """
    end = partial(end_with_parent, os.getpid())
    with joblib.parallel_config(
        backend="loky", n_jobs=processes or -1, inner_max_num_threads=1, initializer=end
    ):
        with _interrupts_held():  # processes inherit that, so that only this one answers Ctrl-C
            joblib.Parallel()(joblib.delayed(abs)(0) for _ in range(2))
        yield


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends; not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # These two processes would end the waiting when they are started.
    loky_tracker.ensure_running()
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
