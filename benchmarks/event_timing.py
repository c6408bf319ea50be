"""Calls timed with the events of a GPU.

Python takes longer to submit a call than many kernels take to run. Before each round, the device
therefore gets a spin, work that does nothing: it lasts until the host has submitted all calls of
the round. Each call lies between two events, so that the time between them is the device's alone.
An event after the spin shows whether the host was fast enough; if it was not, the round is repeated
with a longer spin. A call for which no spin is long enough waits for the device itself, and is
timed with the host's clock, from an idle device to an idle device.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from srigl_core.benchmarks.results import rounded
from srigl_core.benchmarks.timing import Call, Clock, Context, Timing, timing

__all__ = ["CALLS", "EventRun"]

CALLS = 200
"""Timed calls of a contender, unless one takes longer than `LONG_SECONDS`."""

LONG_SECONDS = 0.02
MOST_SECONDS = 1.0
"""Time to spend on calls that are longer."""

FEWEST_CALLS = 5
VERY_LONG_SECONDS, FEWEST_VERY_LONG_CALLS = 0.5, 3

_ROUND = 10
_WARM_SECONDS = 0.002
_FIRST_SPIN_SECONDS, _LONGEST_SPIN_SECONDS = 0.005, 0.1
_SPARE = 1.5
_DECAY = 0.9
"""What remains of a long time to submit, from round to round."""

_MOST_TRIES = 5


class _Sample(NamedTuple):
    """Seconds of one call: on the device, and for the host to submit it."""

    call: float
    host: float


@dataclass
class EventRun:
    """A contender's calls, one for each copy of the inputs, made in turns."""

    calls: Sequence[Call]
    device: Any  # a `GpuDevice`
    cold: bool = False  # flush the second-level cache before each call
    around: Context = nullcontext
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        self.rounds, self.timed_by = 0, "device"
        self.starved = 0  # rounds in which the device may have waited for the host
        self._next = itertools.cycle(self.calls)
        self._wanted, self._warm_calls, self._submitting = CALLS, 0, 0.0
        self._samples: list[_Sample] = []
        self._is_clock_chosen = False

    @property
    def most_rounds(self) -> int:
        """Rounds to measure."""
        return -(-self._wanted // self._calls)

    @property
    def _calls(self) -> int:
        """Calls of a round, chosen so that all contenders have about the same number of rounds."""
        return -(-self._wanted * _ROUND // CALLS)

    def estimate(self) -> None:
        """Choose the clock, the spin, the warm-up and the number of calls."""
        (first,) = self.samples(1)
        self._is_clock_chosen = True  # never time the same contender with both clocks
        expected = first.call
        if expected <= LONG_SECONDS:
            self._warm_calls = 1
            expected = min(sample.call for sample in self.samples(3))
            copies = len(self.calls)
            if expected * copies < _WARM_SECONDS and not self.cold:
                self._warm_calls = copies
        if expected > LONG_SECONDS:
            fewest = FEWEST_VERY_LONG_CALLS if expected > VERY_LONG_SECONDS else FEWEST_CALLS
            self._wanted = max(fewest, int(MOST_SECONDS / expected))

    def measure_round(self) -> None:
        """Time the calls of one round."""
        self._samples += self.samples(min(self._calls, self._wanted - len(self._samples)))
        self.rounds += 1

    def timing(self) -> Timing:
        """Return the times over all calls, with the host's median and the clock."""
        host = statistics.median(sample.host for sample in self._samples)
        return {
            **timing([sample.call for sample in self._samples], self.rounds, self._calls),
            "runs": len(self._samples),
            "host_us": rounded(1e6 * host),
            "clock": self.timed_by,
            **({"starved": self.starved} if self.starved else {}),
        }

    def samples(self, calls: int) -> list[_Sample]:
        """Time this many calls, after some that are not timed."""
        with self.around():
            if self.timed_by == "host":
                return self._by_host(calls)
            for _ in range(_MOST_TRIES):
                samples, submitting, is_starved = self._by_device(calls)
                if not is_starved:
                    self._submitting = max(submitting, _DECAY * self._submitting)
                    return samples
                self._submitting = max(submitting, 2 * self._submitting)
            if not self._is_clock_chosen and self._is_waiting():
                self.timed_by = "host"
                return self._by_host(calls)
            self.starved += 1
            return samples

    def _by_device(self, calls: int) -> tuple[list[_Sample], float, bool]:
        """Return the samples, the time to submit a call, and whether the spin was too short."""
        device, clock = self.device, self.clock
        all_calls = self._warm_calls + calls
        spin = _SPARE * self._submitting * all_calls or _FIRST_SPIN_SECONDS
        device.spin(min(_LONGEST_SPIN_SECONDS, spin))
        after_spin = device.mark()
        started = clock()
        for _ in range(self._warm_calls):
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
        is_starved = device.has_passed(after_spin)
        submitting = (clock() - started) / all_calls
        device.wait()
        seconds = [device.seconds(*pair) for pair in marks]
        samples = [_Sample(*pair) for pair in zip(seconds, host, strict=True)]
        return samples, submitting, is_starved

    def _is_waiting(self) -> bool:
        """Whether a single call outlasts the longest spin: it waits for what was submitted."""
        self.device.spin(_LONGEST_SPIN_SECONDS)
        after_spin = self.device.mark()
        next(self._next)()
        waited = bool(self.device.has_passed(after_spin))
        self.device.wait()
        return waited

    def _by_host(self, calls: int) -> list[_Sample]:
        samples = []
        for _ in range(self._warm_calls):
            next(self._next)()
        for _ in range(calls):
            if self.cold:
                self.device.flush()
            self.device.wait()
            before = self.clock()
            next(self._next)()
            self.device.wait()
            samples.append(_Sample(*[self.clock() - before] * 2))
        return samples
