"""When a kernel may use Numba's thread pool, and how many of its threads.

One thread never starts the pool. A forked child never uses it: it would be killed by an OpenMP
pool, and hang on others. Numba's ``workqueue`` layer aborts the process when two threads use it at
once, so there the second one computes alone.
"""

from __future__ import annotations

import os
import threading

import numba
from numba.core.compiler_lock import global_compiler_lock

from srigl_core.errors import BackendUnavailableError

__all__ = ["SMALLEST_PARALLEL_WORK", "describe_threads", "is_small", "pool"]

SMALLEST_PARALLEL_WORK = 8_000
"""Nanoseconds of one thread below which waking the others costs more than they save."""

LAYERS = ("omp", "tbb", "workqueue")
"""Numba's threading layers, the best first."""


class _PoolState:
    """What is known of the process's pool."""

    def __init__(self) -> None:
        self.is_forked_child = False
        self.layer: str | None = None  # known once the pool has run
        self.in_use = threading.Lock()


_state = _PoolState()


def _after_fork_in_child() -> None:
    _state.is_forked_child = True
    _state.in_use = threading.Lock()
    global_compiler_lock.release()


# A child whose parent was compiling in another thread would wait for ever for Numba's lock.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=_after_fork_in_child,
    )


class pool:  # noqa: N801 - used as a function would be, in a with statement
    """Reserve the pool, and give how many threads to use; 1 means not to touch it.

    Parameters
    ----------
    threads : int or None
        Threads asked for; None is Numba's default.
    work : float
        What one thread would take, in nanoseconds.
    """

    __slots__ = ("_before", "_holds", "_threads", "_work")

    def __init__(self, threads: int | None, work: float) -> None:
        self._threads, self._work = threads, work
        self._before = 0
        self._holds = False

    def __enter__(self) -> int:
        if is_small(self._threads, self._work):
            return 1
        started = _started_threads()
        wanted: int = min(self._threads or started, numba.config.NUMBA_NUM_THREADS)
        if wanted == 1:
            return 1
        if _state.layer in (None, "workqueue"):
            if not _state.in_use.acquire(blocking=False):
                return 1
            self._holds = True
        if wanted != started:
            numba.set_num_threads(wanted)
            self._before = started
        return wanted

    def __exit__(self, *error: object) -> None:
        if self._before:
            numba.set_num_threads(self._before)
        if self._holds:
            _state.layer = _layer_of_started_pool()
            _state.in_use.release()


def is_small(threads: int | None, work: float) -> bool:
    """Whether one thread is all that can be used, or all that is worth it."""
    alone = _state.is_forked_child or numba.config.NUMBA_NUM_THREADS == 1
    return alone or threads == 1 or work < SMALLEST_PARALLEL_WORK


def _layer_of_started_pool() -> str | None:
    try:
        return str(numba.threading_layer())
    except ValueError:  # an error came before the kernel did
        return None


def _started_threads() -> int:
    """Return the size of the pool, started if need be: Numba cannot tell it otherwise."""
    if _state.layer is None:
        _prefer_openmp()
    try:
        return int(numba.get_num_threads())
    except ValueError as error:
        raise BackendUnavailableError(
            f"Numba cannot start its threads ({' '.join(str(error).split())}); unset "
            f"NUMBA_THREADING_LAYER or install the layer it names, or pass threads=1"
        ) from error


def _prefer_openmp() -> None:
    """Order the layers by how soon they start: OpenMP's at once, workqueue's long after.

    Numba takes TBB first, which is as quick only while its threads are still awake. What the user
    ordered by Numba's own variables is left alone, and so is a pool that runs already.
    """
    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        numba.config.THREADING_LAYER_PRIORITY = list(LAYERS)


def describe_threads() -> dict[str, object]:
    """Return the threads used by default and the pool's layer; starts the pool to learn it."""
    if _state.is_forked_child or numba.config.NUMBA_NUM_THREADS == 1:
        return {"threads": 1, "threading layer": "none: one thread starts no pool"}
    try:
        threads = _started_threads()
        layer = _layer_of_started_pool()
    except BackendUnavailableError as error:
        return {"threads": 1, "threading layer": f"none: {error}"}
    return {"threads": threads, "threading layer": f"{layer} ({_reason_for(layer)})"}


def _reason_for(layer: str | None) -> str:
    asked = numba.config.THREADING_LAYER
    if asked != "default":
        return f"NUMBA_THREADING_LAYER={asked}"
    if "NUMBA_THREADING_LAYER_PRIORITY" in os.environ:
        return "NUMBA_THREADING_LAYER_PRIORITY"
    if layer == LAYERS[0]:
        return "the quickest to start"
    if layer in LAYERS:
        missing = ", ".join(LAYERS[: LAYERS.index(layer)])
        return f"{missing} cannot be loaded, or another pool was running first"
    return "not Numba's own"
