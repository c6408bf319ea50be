"""Repeat calls, and call from several threads at once, to test that the results are the same."""

from __future__ import annotations

import contextvars
import copy
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import TypeVar

from srigl_core.testing.flush_mode import flushing_subnormals

__all__ = ["assert_repeatable", "assert_same_in_threads"]

Result = TypeVar("Result")

_ROUNDS = 3
_SWITCH_SECONDS = 1e-5
"""How long a thread runs Python code: short enough to interrupt calls."""


def assert_repeatable(
    call: Callable[..., Result], assert_same: Callable[[Result, Result], None]
) -> None:
    """Compare a result with repeats: on any number of threads, and in a flushing thread."""
    first = call()
    repeats = [call(threads=threads) for threads in (1, 2, 3, 8)]
    with flushing_subnormals():
        repeats.append(call())
    for again in repeats:
        assert_same(again, first)


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
