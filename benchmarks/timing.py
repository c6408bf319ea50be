"""Contenders timed in turns, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = [
    "Cold",
    "Hot",
    "Timing",
    "interleaved",
    "no_garbage_collection",
    "quartiles",
    "turn",
]

Call = Callable[[], object]
Clock = Callable[[], float]

_SAMPLE_SECONDS = 0.004
"""A contender's part of a round lasts about so long."""

_MOST_CALLS = 400
_WARM_SECONDS = 0.0005
_LONG_SECONDS = 0.03
"""A call this long warms itself."""

_VERY_LONG_SECONDS = 0.2
"""A call this long is not short with a disturbance."""

_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 15
_FEWEST_LONG_ROUNDS = 3
_LONG_ROUND_SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the rounds' medians, and the quartiles around it."""

    median: float
    lower: float
    upper: float
    rounds: int
    calls: int
    """In each round."""


@dataclass(frozen=True)
class Hot:
    """Calls one after the other: what fits into the caches is there."""

    call: Call

    def samples(self, calls: int, clock: Clock) -> list[float]:
        """Return the seconds of each of so many calls."""
        return [_seconds(self.call, clock) for _ in range(calls)]

    def warm(self, expected: float, clock: Clock) -> None:
        """Call for a while, unless a single call is long."""
        ends = clock() + (_WARM_SECONDS if expected < _LONG_SECONDS else 0.0)
        while clock() < ends:
            self.call()


@dataclass(frozen=True)
class Cold:
    """Calls with weights that are in no cache, as if many other layers had come before.

    Parameters
    ----------
    call : callable
    other : callable
        The same with other weights. It is called just before, so that the code, the inputs and the
        threads are as in a network's pass; only the weights are cold.
    flush : callable
        Replaces what is in the caches.
    """

    call: Call
    other: Call
    flush: Call

    def samples(self, calls: int, clock: Clock) -> list[float]:
        """Return the seconds of each of so many calls."""
        seconds = []
        for _ in range(calls):
            self.flush()
            self.other()
            seconds.append(_seconds(self.call, clock))
        return seconds

    def warm(self, expected: float, clock: Clock) -> None:
        """Do nothing: each call is prepared by itself."""


def interleaved(
    runs: Mapping[str, Hot | Cold],
    *,
    seconds: float,
    rest: Call = lambda: None,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time every contender a few calls a round, for some rounds.

    Parameters
    ----------
    runs : mapping of str to Hot or Cold
        Already called once, so that nothing is compiled any more.
    seconds : float
        To spend about; but five rounds are done in any case, or three where one takes over a
        second, and fifteen at most.
    rest : callable
        Called before each contender's part.
    clock : callable
        Seconds from any point in time.

    Returns
    -------
    dict of str to Timing

    Notes
    -----
    Each round begins with another contender. The call that tells how long a contender takes is
    its part of the first round if it is long.
    """
    names = list(runs)
    started = clock()
    expected = {name: _expected(run, rest, clock) for name, run in runs.items()}
    calls = {name: _calls(run, expected[name]) for name, run in runs.items()}
    medians: dict[str, list[float]] = {name: [] for name in names}
    with no_garbage_collection():
        for first in range(_MOST_ROUNDS):
            round_started = clock()
            for name in turn(names, first):
                if first == 0 and expected[name] > _LONG_SECONDS:
                    medians[name].append(expected[name])
                    continue
                rest()
                runs[name].warm(expected[name], clock)
                medians[name].append(statistics.median(runs[name].samples(calls[name], clock)))
            now = clock()
            took = now - round_started
            fewest = _FEWEST_LONG_ROUNDS if took > _LONG_ROUND_SECONDS else _FEWEST_ROUNDS
            if first + 1 >= fewest and now + took - started > seconds:
                break
    return {name: _timing(found, calls[name]) for name, found in medians.items()}


def _expected(run: Hot | Cold, rest: Call, clock: Clock) -> float:
    rest()
    first = run.samples(1, clock)[0]
    return first if first > _VERY_LONG_SECONDS else min(first, *run.samples(2, clock))


def _calls(run: Hot | Cold, expected: float) -> int:
    most = _MOST_CALLS if isinstance(run, Hot) else 5
    return max(1, min(most, round(_SAMPLE_SECONDS / max(expected, 1e-9))))


def _seconds(call: Call, clock: Clock) -> float:
    started = clock()
    call()
    return clock() - started


def _timing(medians: list[float], calls: int) -> Timing:
    lower, median, upper = quartiles(medians)
    return Timing(median, lower, upper, len(medians), calls)


def turn(names: Sequence[str], number: int) -> list[str]:
    """Return the order of a round; each begins with another name."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile of two numbers or more."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return lower, median, upper


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Hold Python's collector back: it would run inside somebody's call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
