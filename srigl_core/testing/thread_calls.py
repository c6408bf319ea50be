"""Repeat calls, and call from several threads at once, to test that the results are the same."""

from __future__ import annotations

import contextvars
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Barrier
from typing import TypeVar

import numpy as np

from srigl_core.testing.flush_mode import flushing_subnormals
from srigl_core.testing.law import LawViolation

__all__ = ["THREADS", "assert_repeatable", "assert_same_in_threads", "same_threads_afterwards"]

Result = TypeVar("Result")

THREADS = (1, 2, 3, 4, 8, 16, 64)
"""Numbers of threads that a call is made with."""

_ROUNDS = 2
_SWITCH_SECONDS = 1e-5
"""How long a thread runs Python code: short enough to interrupt calls."""


def assert_repeatable(
    call: Callable[..., Result],
    assert_same: Callable[[Result, Result], None],
    rng: np.random.Generator,
) -> None:
    """Compare a result with repeats: on several numbers of threads, and in a flushing thread."""
    first = call()
    with same_threads_afterwards():
        repeats = [call(threads=threads) for threads in rng.permutation(THREADS).tolist()]
    with flushing_subnormals():
        repeats.append(call())
    for again in repeats:
        assert_same(again, first)


@contextmanager
def same_threads_afterwards() -> Iterator[None]:
    """Raise `LawViolation` if a call leaves Numba with another number of threads."""
    numba = sys.modules.get("numba")
    if numba is None:
        yield
        return
    usual = numba.get_num_threads()
    fewer = max(1, usual - 1)  # a call that gives back all threads must be noticed
    numba.set_num_threads(fewer)
    try:
        yield
        after = numba.get_num_threads()
    finally:
        numba.set_num_threads(usual)
    if after != fewer:
        raise LawViolation(f"Numba has {after} threads after a call, and had {fewer} before it")


def assert_same_in_threads(
    calls: Sequence[Callable[[], Result]], assert_same: Callable[[Result, Result], None]
) -> None:
    """Compare the results of calls made at once, each in its own thread, with those made alone."""
    alone = [copy.deepcopy(call()) for call in calls]
    together = Barrier(len(calls))

    def repeated(call: Callable[[], Result]) -> list[Result]:
        together.wait()
        return [call() for _ in range(_ROUNDS)]

    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            # A copy of this context has NumPy's error handling.
            runs = [partial(contextvars.copy_context().run, repeated, call) for call in calls]
            futures = [pool.submit(run) for run in runs]
    finally:
        sys.setswitchinterval(usual)
    for expected, future in zip(alone, futures, strict=True):
        for result in future.result():
            assert_same(result, expected)
