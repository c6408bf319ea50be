"""Our time at every batch size, and the sizes where it jumps."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from srigl_core.benchmarks.arrays import Arrays
from srigl_core.benchmarks.cases import HEADLINE, Layer
from srigl_core.benchmarks.contenders.ours import product
from srigl_core.benchmarks.devices.pools import thread_limit
from srigl_core.benchmarks.problems import Problem
from srigl_core.benchmarks.timing import Call, median_times

__all__ = ["BATCHES", "Cliff", "confirmed_times", "find_cliffs", "measure_cliffs"]

BATCHES = range(1, 161)
SPARSITY = 0.9

REACH = 16
"""Batches that differ by at most this much are compared."""

MOST_ABOVE_LARGER = 1.1
MOST_A_ROW = 1.3
LEAST_BATCH_OF_ROWS = 64

MOST_REPEATS = 3
"""Noise seldom slows the same batch this often, but a cliff appears each time."""


@dataclass(frozen=True)
class Cliff:
    """A batch, a larger one, and the ratio of their times, or of their times per row.

    Printing it gives a sentence.
    """

    batch: int
    further: int
    ratio: float
    by_row: bool = False

    def __str__(self) -> str:
        takes = f"takes {self.ratio:.2f} times as long as"
        if self.by_row:
            return f"a row of batch {self.batch} {takes} one of {self.further}"
        return f"batch {self.batch} {takes} {self.further}"


def find_cliffs(times: Mapping[int, float]) -> list[Cliff]:
    """Return the batches whose times break one of two rules; the mapping is from batch to time.

    No batch takes more than 1.1 times as long as one that is larger by up to 16. From batch 64 on,
    the times per row of two batches that differ by 16 are within a factor of 1.3.
    """
    cliffs = []
    for batch, time in sorted(times.items()):
        for larger in range(batch + 1, batch + REACH + 1):
            if larger in times and time > MOST_ABOVE_LARGER * times[larger]:
                cliffs.append(Cliff(batch, larger, time / times[larger]))
                break
        further = batch + REACH
        if batch >= LEAST_BATCH_OF_ROWS and further in times:
            ratio = (time / batch) / (times[further] / further)
            if not 1 / MOST_A_ROW <= ratio <= MOST_A_ROW:
                cliffs.append(Cliff(batch, further, ratio, by_row=True))
    return cliffs


def confirmed_times(
    measure: Callable[[Collection[int]], Mapping[int, float]],
) -> dict[int, float]:
    """Return the time of each batch; suspicious batches are measured again.

    `measure` takes batches and returns their times. Other work on the machine can only make a
    batch slower, so its shortest time counts.
    """
    times = dict(measure(BATCHES))
    for _ in range(MOST_REPEATS):
        suspects = {batch for cliff in find_cliffs(times) for batch in (cliff.batch, cliff.further)}
        for batch, time in measure(suspects).items() if suspects else ():
            times[batch] = min(times[batch], time)
    return times


def measure_cliffs(threads: int, *, seconds: float = 6.0) -> dict[str, Any]:
    """Measure the headline layer at 90% with every batch size, and say in words where it jumps."""
    layer = Layer.random(*HEADLINE, SPARSITY)
    problem = Problem(layer, Arrays())
    bind = product("numba")(problem)
    calls: dict[int, Call] = {size: bind(problem.batch(size, threads=threads)) for size in BATCHES}

    def microseconds(sizes: Collection[int]) -> dict[int, float]:
        order = random.Random(0).sample(sorted(sizes), len(sizes))
        times = median_times({str(size): calls[size] for size in order}, seconds)
        return {size: times[str(size)] for size in sizes}

    with thread_limit(threads):
        times = confirmed_times(microseconds)
    return {
        "n_in": layer.n_in,
        "n_out": layer.n_out,
        "sparsity": SPARSITY,
        "threads": threads,
        "batches": list(BATCHES),
        "median_us": list(times.values()),
        "found": [str(cliff) for cliff in find_cliffs(times)],
    }
