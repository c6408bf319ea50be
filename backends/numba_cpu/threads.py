"""When a kernel may use Numba's thread pool, and how many of its threads.

One thread never starts the pool. A forked child never uses it: it would be killed by an OpenMP
pool, and hang on others. Numba's ``workqueue`` layer aborts the process when two threads use it at
once, so there the second one computes alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
from numba.core.compiler_lock import global_compiler_lock

from srigl_core.errors import BackendUnavailableError

__all__ = ["SMALLEST_PARALLEL_WORK", "describe_threads", "pool"]

SMALLEST_PARALLEL_WORK = 1 << 17
"""Multiplications below which starting the threads costs more than they save."""


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


@contextmanager
def pool(threads: int | None, work: int) -> Iterator[int]:
    """Reserve the pool, and yield how many threads to use; 1 means not to touch it.

    Parameters
    ----------
    threads : int or None
        Threads asked for; None is Numba's default.
    work : int
        Multiplications to do.
    """
    alone = _state.is_forked_child or numba.config.NUMBA_NUM_THREADS == 1
    if alone or threads == 1 or work < SMALLEST_PARALLEL_WORK:
        yield 1
        return
    wanted = min(threads or _started_threads(), numba.config.NUMBA_NUM_THREADS)
    if wanted == 1:
        yield 1
    elif _state.layer not in (None, "workqueue"):
        with _masked(wanted):
            yield wanted
    elif _state.in_use.acquire(blocking=False):
        try:
            with _masked(wanted):
                yield wanted
            _state.layer = numba.threading_layer()
        finally:
            _state.in_use.release()
    else:
        yield 1


def _started_threads() -> int:
    """Return the size of the pool, started if need be: Numba cannot tell it otherwise."""
    try:
        return int(numba.get_num_threads())
    except ValueError as error:
        raise BackendUnavailableError(
            f"Numba cannot start its threads ({' '.join(str(error).split())}); unset "
            f"NUMBA_THREADING_LAYER or install the layer it names, or pass threads=1"
        ) from error


@contextmanager
def _masked(threads: int) -> Iterator[None]:
    before = _started_threads()
    if before == threads:
        yield
        return
    numba.set_num_threads(threads)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def describe_threads() -> dict[str, object]:
    """Return the threads used by default and the pool's layer; starts the pool to learn it."""
    if _state.is_forked_child or numba.config.NUMBA_NUM_THREADS == 1:
        return {"threads": 1, "threading layer": "none: one thread starts no pool"}
    try:
        return {"threads": _started_threads(), "threading layer": numba.threading_layer()}
    except BackendUnavailableError as error:
        return {"threads": 1, "threading layer": f"none: {error}"}
