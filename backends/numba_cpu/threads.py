"""Decide whether a kernel may use Numba's thread pool, and with how many threads.

A call with one thread does not start the pool. A forked child never uses it: an OpenMP pool would
kill the child, and other pools would hang. Numba's ``workqueue`` layer aborts the process if two
threads use it at once; there the second one computes without the pool.
"""

from __future__ import annotations

import os
import threading

import numba
from numba.core.compiler_lock import global_compiler_lock

from srigl_core.errors import BackendUnavailableError

__all__ = ["SMALLEST_PARALLEL_WORK", "describe_threads", "is_small", "pool"]

SMALLEST_PARALLEL_WORK = 50_000
"""Nanoseconds of work below which waking other threads costs more than they save."""

LAYERS = ("omp", "tbb", "workqueue")
"""Numba's threading layers, the best first."""


class _PoolState:
    """State of the process's thread pool."""

    def __init__(self) -> None:
        self.is_forked_child = False
        self.layer: str | None = None  # known once the pool has run
        self.in_use = threading.Lock()


_state = _PoolState()


def _after_fork_in_child() -> None:
    _state.is_forked_child = True
    _state.in_use = threading.Lock()
    global_compiler_lock.release()


# If another thread of the parent was compiling, the child would wait for Numba's lock for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=_after_fork_in_child,
    )


class pool:  # noqa: N801 - a context manager that reads like a function
    """Reserve the pool, and return the number of threads to use; 1 means not to use the pool.

    Parameters
    ----------
    threads : int or None
        Requested number of threads; None is Numba's default.
    work : float
        Estimated single-threaded time, in nanoseconds.
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
    """Whether only one thread can be used, or more are not worth it."""
    if threads == 1 or work < SMALLEST_PARALLEL_WORK:
        return True
    return _state.is_forked_child or bool(numba.config.NUMBA_NUM_THREADS == 1)


def _layer_of_started_pool() -> str | None:
    try:
        return str(numba.threading_layer())
    except ValueError:  # an error was raised before a kernel started the pool
        return None


def _started_threads() -> int:
    """Return the size of the pool; this starts it, since Numba needs that to know the size."""
    if _state.layer is None:
        _prefer_openmp()
    try:
        return int(numba.get_num_threads())
    except ValueError as error:
        raise BackendUnavailableError(
            f"Numba cannot start its threads ({' '.join(str(error).split())}); unset "
            f"NUMBA_THREADING_LAYER and NUMBA_THREADING_LAYER_PRIORITY, install the layer that "
            f"they name, or pass threads=1"
        ) from error


def _prefer_openmp() -> None:
    """Prefer the threading layers whose threads start fastest: OpenMP first, workqueue last.

    Numba prefers TBB, which is as fast only while its threads are awake. This changes neither an
    order that the user gave by Numba's own variables, nor a pool that is running.
    """
    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        numba.config.THREADING_LAYER_PRIORITY = list(LAYERS)


def describe_threads() -> dict[str, object]:
    """Return the default number of threads and the pool's layer; this starts the pool."""
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
