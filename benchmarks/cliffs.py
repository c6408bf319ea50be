"""Our time at every batch size, one by one, and where it jumps."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from srigl_core.benchmarks.cases import HEADLINE, Layer
from srigl_core.benchmarks.contenders.ours import product
from srigl_core.benchmarks.pools import thread_limit
from srigl_core.benchmarks.problems import Problem
from srigl_core.benchmarks.timing import Hot, interleaved

__all__ = ["BATCHES", "Cliff", "confirmed_times", "find_cliffs", "measure_cliffs"]

BATCHES = range(1, 161)
SPARSITY = 0.9

REACH = 16
"""Batches this near are compared."""

MOST_ABOVE_LARGER = 1.1
MOST_A_ROW = 1.3
LEAST_BATCH_OF_ROWS = 64

MOST_REPEATS = 3
"""Noise seldom slows the same batch so often; a cliff is there each time."""


@dataclass(frozen=True)
class Cliff:
    """Two batches whose times break a rule; printing it says so in words.

    Parameters
    ----------
    batch : int
    further : int
        The larger batch that it is compared with.
    ratio : float
        How many times as long the first takes.
    by_row : bool
        Whether the times are those of a row, not of the whole batch.
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
    """Return where the times break the two rules.

    Parameters
    ----------
    times : mapping of int to float
        Time by batch.

    Notes
    -----
    No batch takes over 1.1 times as long as one that is larger by 16 or less; and from batch 64 on
    the time for each row is within 1.3 times that of 16 further on, and the reverse.
    """
    found = []
    for batch, time in sorted(times.items()):
        for larger in range(batch + 1, batch + REACH + 1):
            if larger in times and time > MOST_ABOVE_LARGER * times[larger]:
                found.append(Cliff(batch, larger, time / times[larger]))
                break
        further = batch + REACH
        if batch >= LEAST_BATCH_OF_ROWS and further in times:
            ratio = (time / batch) / (times[further] / further)
            if not 1 / MOST_A_ROW <= ratio <= MOST_A_ROW:
                found.append(Cliff(batch, further, ratio, by_row=True))
    return found


def confirmed_times(
    measure: Callable[[Collection[int]], Mapping[int, float]],
) -> tuple[dict[int, float], int]:
    """Return the time of each batch, and how many times suspects were measured again.

    Parameters
    ----------
    measure : callable
        Takes batches and returns the time of each.

    Notes
    -----
    Other work on the machine can only make a batch slower, so the least of its times counts.
    """
    times = dict(measure(BATCHES))
    for repeats in range(MOST_REPEATS):
        suspects = {batch for cliff in find_cliffs(times) for batch in (cliff.batch, cliff.further)}
        if not suspects:
            return times, repeats
        for batch, time in measure(suspects).items():
            times[batch] = min(times[batch], time)
    return times, MOST_REPEATS


def measure_cliffs(threads: int, *, seconds: float = 6.0) -> dict[str, Any]:
    """Measure the headline layer at 90% at every batch, in turns.

    Returns
    -------
    dict
        The layer, the threads, the microseconds of each batch, how many times suspects were
        measured again, and the cliffs that are left, in words.
    """
    layer = Layer.random(*HEADLINE, SPARSITY)
    problem = Problem(layer, max(BATCHES), "float32")
    bind = product("numba")(problem)
    calls: dict[int, Callable[[], object]] = {
        size: bind(problem.batch(size, threads)) for size in BATCHES
    }

    def microseconds(sizes: Collection[int]) -> dict[int, float]:
        order = random.Random(0).sample(sorted(sizes), len(sizes))
        timings = interleaved({str(size): Hot(calls[size]) for size in order}, seconds=seconds)
        return {size: float(f"{1e6 * timings[str(size)].median:.4g}") for size in sizes}

    with thread_limit(threads):
        for call in calls.values():
            call()
        times, repeats = confirmed_times(microseconds)
    return {
        "n_in": layer.n_in,
        "n_out": layer.n_out,
        "sparsity": SPARSITY,
        "threads": threads,
        "batches": list(BATCHES),
        "median_us": list(times.values()),
        "repeats": repeats,
        "found": [str(cliff) for cliff in find_cliffs(times)],
    }
