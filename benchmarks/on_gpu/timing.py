"""Calls timed on the device's own clock, contenders in turns.

A part of a contender is a few calls. First the device is given work that does nothing, a spin, so
long that the host has submitted all calls of the part before the first one runs: else a call's time
would be what Python takes to submit it. Each call lies between two marks, and the time between
these is the device's alone. A mark behind the spin tells whether the host was quick enough; where
it was not, the part is done again with a longer spin. A call for which no spin is long enough waits
for the device itself: such a one is timed on the host's clock, from an idle device to an idle one.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from srigl_core.benchmarks.on_gpu.device import Device
from srigl_core.benchmarks.timing import Clock, Timing, no_garbage_collection, quartiles, turn

__all__ = ["RUNS", "DeviceRun", "DeviceTiming", "interleaved_on_device"]

RUNS = 200
"""Timed calls of a contender, unless one takes long."""

LONG_SECONDS = 0.02
"""A call that takes longer is not called so often,"""

MOST_SECONDS = 1.0
"""but for so long,"""

FEWEST_RUNS = 5
"""and so often at least,"""

VERY_LONG_SECONDS, FEWEST_VERY_LONG_RUNS = 0.5, 3
"""or so often, where a single one takes that long."""

PART = 10
_WARM_SECONDS = 0.002
_FIRST_SPIN_SECONDS, _LONGEST_SPIN_SECONDS = 0.005, 0.1
_SPARE = 1.5
_FORGOTTEN = 0.9
"""What is left of a long time to submit, from part to part."""

_MOST_TRIES = 5


@dataclass(frozen=True)
class DeviceTiming:
    """What was measured of one contender.

    Parameters
    ----------
    timing : Timing
        Median and quartiles of all runs.
    runs : int
    host : float
        Median of the seconds in which the host submits a call, or those of the whole call where
        `clock` is "host".
    clock : {"device", "host"}
    dry : int
        Parts in which the device may have waited for the host, however often they were tried.
    """

    timing: Timing
    runs: int
    host: float
    clock: str
    dry: int


@dataclass(frozen=True)
class _Sample:
    """Seconds of one call."""

    call: float
    host: float


@dataclass
class DeviceRun:
    """A contender's calls, one for each copy of the inputs, taken in turns.

    Parameters
    ----------
    calls : sequence of callable
    device : Device
    cold : bool
        Whether to empty the second-level cache before each call.
    around : callable
        Returns a context to call them in.
    clock : callable
        The host's, in seconds from any point in time.
    """

    calls: Sequence[Callable[[], object]]
    device: Device
    cold: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    clock: Clock = time.perf_counter
    timed_by: str = field(default="device", init=False)
    dry: int = field(default=0, init=False)
    _submitting: float = field(default=0.0, init=False)
    _warm: int = field(default=0, init=False)
    _is_decided: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._next = itertools.cycle(self.calls)

    def expected(self) -> float:
        """Return about how long a call takes; chooses the clock, the spin and the warming."""
        (first,) = self.samples(1)
        self._is_decided = True  # by which clock: never by both
        if first.call > LONG_SECONDS:
            return first.call
        self._warm = 1
        found = self.samples(3)
        expected = min(sample.call for sample in found)
        copies = len(self.calls)
        self._warm = copies if expected * copies < _WARM_SECONDS and not self.cold else 1
        return expected

    def samples(self, calls: int) -> list[_Sample]:
        """Return the seconds of each of so many calls; a few come before, untimed."""
        with self.around():
            if self.timed_by == "host":
                return self._by_host(calls)
            for _ in range(_MOST_TRIES):
                found, submitting, is_dry = self._by_device(calls)
                if not is_dry:
                    self._submitting = max(submitting, _FORGOTTEN * self._submitting)
                    return found
                self._submitting = max(submitting, 2 * self._submitting)
            if not self._is_decided and self._is_waiting():
                self.timed_by = "host"
                return self._by_host(calls)
            self.dry += 1
            return found

    def _by_device(self, calls: int) -> tuple[list[_Sample], float, bool]:
        """Return the samples, how long submitting one took, and whether the spin was too short."""
        device, clock = self.device, self.clock
        all_calls = self._warm + calls
        spin = _SPARE * self._submitting * all_calls or _FIRST_SPIN_SECONDS
        device.spin(min(_LONGEST_SPIN_SECONDS, spin))
        spun = device.mark()
        started = clock()
        for _ in range(self._warm):
            next(self._next)()
        marks, host = [], []
        for _ in range(calls):
            if self.cold:
                device.flush()
            call = next(self._next)
            begin = device.mark()
            before = clock()
            call()
            host.append(clock() - before)
            marks.append((begin, device.mark()))
        is_dry = device.has_passed(spun)
        submitting = (clock() - started) / all_calls
        device.wait()
        seconds = [device.seconds(*pair) for pair in marks]
        return [_Sample(*pair) for pair in zip(seconds, host, strict=True)], submitting, is_dry

    def _is_waiting(self) -> bool:
        """Whether a call alone outlasts the longest spin: it waits for what was submitted."""
        self.device.spin(_LONGEST_SPIN_SECONDS)
        spun = self.device.mark()
        next(self._next)()
        waited = self.device.has_passed(spun)
        self.device.wait()
        return waited

    def _by_host(self, calls: int) -> list[_Sample]:
        found = []
        for _ in range(self._warm):
            next(self._next)()
        for _ in range(calls):
            if self.cold:
                self.device.flush()
            self.device.wait()
            before = self.clock()
            next(self._next)()
            self.device.wait()
            seconds = self.clock() - before
            found.append(_Sample(seconds, seconds))
        return found


def interleaved_on_device(
    runs: Mapping[str, DeviceRun],
) -> tuple[dict[str, DeviceTiming], dict[str, Exception]]:
    """Time every contender a few calls a round, until each has been called often enough.

    Parameters
    ----------
    runs : mapping of str to DeviceRun
        Already called, so that nothing is compiled or allocated any more.

    Returns
    -------
    dict of str to DeviceTiming, and dict of str to Exception
        The times, and what those raised that have none.

    Notes
    -----
    Each round begins with another contender. `RUNS` calls, fewer where one takes longer than
    `LONG_SECONDS`.
    """
    wanted: dict[str, int] = {}
    found: dict[str, list[_Sample]] = {}
    rounds = dict.fromkeys(runs, 0)
    failed: dict[str, Exception] = {}
    with no_garbage_collection():
        for name, run in runs.items():
            try:
                wanted[name] = _runs(run.expected())
            except Exception as error:
                failed[name] = error.with_traceback(None)
            else:
                found[name] = []
        for number in itertools.count():
            left = [name for name in found if len(found[name]) < wanted[name]]
            if not left:
                break
            for name in turn(list(runs), number):
                if name not in left:
                    continue
                part = min(_part(wanted[name]), wanted[name] - len(found[name]))
                try:
                    found[name] += runs[name].samples(part)
                    rounds[name] += 1
                except Exception as error:
                    failed[name] = error.with_traceback(None)
                    del found[name]
    times = {
        name: _timing(runs[name], samples, rounds[name], _part(wanted[name]))
        for name, samples in found.items()
    }
    return times, failed


def _runs(expected: float) -> int:
    if expected <= LONG_SECONDS:
        return RUNS
    fewest = FEWEST_VERY_LONG_RUNS if expected > VERY_LONG_SECONDS else FEWEST_RUNS
    return max(fewest, int(MOST_SECONDS / expected))


def _part(wanted: int) -> int:
    """Return the calls of a part: about as many rounds for all, so that they stay in turns."""
    return -(-wanted * PART // RUNS)


def _timing(run: DeviceRun, samples: Sequence[_Sample], rounds: int, part: int) -> DeviceTiming:
    lower, median, upper = quartiles([sample.call for sample in samples])
    return DeviceTiming(
        Timing(median, lower, upper, rounds, part),
        len(samples),
        statistics.median(sample.host for sample in samples),
        run.timed_by,
        run.dry,
    )
