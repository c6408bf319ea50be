"""Timing of several contenders in turns, so that a disturbance affects all of them equally."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from srigl_core.benchmarks.results import rounded

__all__ = [
    "Call",
    "Clock",
    "Context",
    "HostRun",
    "TimeBudget",
    "Timing",
    "interleaved",
    "median_times",
    "timing",
]

Call = Callable[[], object]
Clock = Callable[[], float]
Context = Callable[[], AbstractContextManager[Any]]

_SAMPLE_SECONDS = 0.004
"""About how long one contender's part of a round takes."""

_MOST_CALLS, _MOST_COLD_CALLS = 400, 5
_WARM_SECONDS = 0.0005
_LONG_SECONDS = 0.03
"""A call this long needs no warm-up."""

_VERY_LONG_SECONDS = 0.2
"""A call this long is not a short one that was disturbed."""

_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 15
_FEWEST_LONG_ROUNDS = 3
_LONG_ROUND_SECONDS = 1.0


Timing = dict[str, Any]
"""What the result file has of a contender's times; see `timing`."""


def timing(seconds: Sequence[float], rounds: int, calls: int) -> Timing:
    """Return median and quartiles in microseconds, the rounds, and the calls of each round."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median_us": rounded(1e6 * median),
        "lower_us": rounded(1e6 * lower),
        "upper_us": rounded(1e6 * upper),
        "rounds": rounds,
        "calls": calls,
    }


class _Run(Protocol):
    @property
    def rounds(self) -> int: ...
    @property
    def most_rounds(self) -> int: ...
    def estimate(self) -> None: ...
    def measure_round(self) -> None: ...
    def timing(self) -> Timing: ...


def interleaved(
    runs: Mapping[str, _Run],
    *,
    is_enough: Callable[[int], bool] = lambda rounds: False,
    rest: Call = lambda: None,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time every contender for a few calls each round; each round begins with another one.

    Their calls have been made once, so that nothing is left to be compiled. `is_enough` takes the
    number of rounds done, and returns whether to stop before a run's `most_rounds`. `rest` is
    called before each contender's part of a round.

    Returns
    -------
    dict of str to Timing, and dict of str to Exception
        The times, and for contenders that raised an exception, that exception.
    """
    failed: dict[str, Exception] = {}

    def attempt(name: str, step: Call) -> None:
        rest()
        try:
            step()
        except Exception as error:
            failed[name] = error.with_traceback(None)

    with _no_garbage_collection():
        for name, run in runs.items():
            attempt(name, run.estimate)
        turn = deque(runs)
        for number in itertools.count():
            left = {n for n in runs if n not in failed and runs[n].most_rounds > number}
            if not left or is_enough(number):
                break
            for name in turn:
                if name in left and runs[name].rounds <= number:
                    attempt(name, runs[name].measure_round)
            turn.rotate(-1)
    return {name: run.timing() for name, run in runs.items() if name not in failed}, failed


class TimeBudget:
    """Says after each round whether `seconds` were spent, from now on.

    At least five rounds are done, or three where one takes over a second.
    """

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._round_started = clock()
        self._ends = self._round_started + seconds

    def __call__(self, rounds: int) -> bool:
        """Return whether another round would exceed the budget."""
        now = self._clock()
        took, self._round_started = now - self._round_started, now
        fewest = _FEWEST_LONG_ROUNDS if took > _LONG_ROUND_SECONDS else _FEWEST_ROUNDS
        return rounds >= fewest and now + took > self._ends


@dataclass
class HostRun:
    """Calls timed with the host's clock, one after the other.

    A time is the median over the rounds of the median of each round. What is in `before` is called
    before each timed call, such as a flush of the caches. Without any, the caches are hot: they
    hold what the last call left.
    """

    call: Call
    before: Sequence[Call] = ()
    around: Context = nullcontext
    clock: Clock = time.perf_counter
    most_rounds = _MOST_ROUNDS

    def __post_init__(self) -> None:
        self._medians: list[float] = []
        self._calls, self._is_long = 1, False

    @property
    def rounds(self) -> int:
        """Rounds that have been measured."""
        return len(self._medians)

    def estimate(self) -> None:
        """Choose the calls of a round; a long call is its contender's part of the first round."""
        with self.around():
            expected = self._seconds()
            if expected <= _VERY_LONG_SECONDS:
                expected = min(expected, self._seconds(), self._seconds())
        most = _MOST_COLD_CALLS if self.before else _MOST_CALLS
        self._calls = max(1, min(most, round(_SAMPLE_SECONDS / max(expected, 1e-9))))
        self._is_long = expected >= _LONG_SECONDS
        if self._is_long:
            self._medians.append(expected)

    def measure_round(self) -> None:
        """Time the calls of one round, after a warm-up where the caches are hot."""
        with self.around():
            if not self.before and not self._is_long:
                ends = self.clock() + _WARM_SECONDS
                while self.clock() < ends:
                    self.call()
            self._medians.append(statistics.median(self._seconds() for _ in range(self._calls)))

    def timing(self) -> Timing:
        """Return the times over the rounds' medians."""
        return timing(self._medians, self.rounds, self._calls)

    def _seconds(self) -> float:
        for call in self.before:
            call()
        call, clock = self.call, self.clock
        started = clock()
        call()
        return clock() - started


def median_times(calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
    """Return the microseconds of calls that are timed in turns, after one call of each."""
    for call in calls.values():
        call()
    runs = {name: HostRun(call) for name, call in calls.items()}
    timings, errors = interleaved(runs, is_enough=TimeBudget(seconds))
    for error in errors.values():
        raise error
    return {name: timing["median_us"] for name, timing in timings.items()}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch Python's garbage collector off: it would run within somebody's call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
