"""Call from several threads at once, to test that they do not share what they compute in."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

__all__ = ["in_threads"]

Result = TypeVar("Result")

_ROUNDS = 3
_SWITCH_SECONDS = 1e-5
"""Between two threads that run Python: often enough that one is stopped in the midst of a call."""


def in_threads(calls: Sequence[Callable[[], Result]]) -> list[list[Result]]:
    """Return what each call returns, some times over, made in a thread of its own.

    Parameters
    ----------
    calls : sequence of callable
        They begin together.

    Returns
    -------
    list of list
        The results of each.
    """
    together = Barrier(len(calls))

    def repeated(call: Callable[[], Result]) -> list[Result]:
        together.wait()
        return [call() for _ in range(_ROUNDS)]

    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            # In the caller's context, which has NumPy's handling of overflows.
            contexts = [contextvars.copy_context() for _ in calls]
            futures = [
                pool.submit(context.run, repeated, call)
                for context, call in zip(contexts, calls, strict=True)
            ]
            return [future.result() for future in futures]
    finally:
        sys.setswitchinterval(usual)
