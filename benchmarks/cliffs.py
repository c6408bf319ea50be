"""Our time at every batch size, one by one, and where it jumps."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from srigl_core.benchmarks.cases import HEADLINE, Layer
from srigl_core.benchmarks.contenders.ours import product
from srigl_core.benchmarks.pools import thread_limit
from srigl_core.benchmarks.problems import Problem
from srigl_core.benchmarks.timing import Hot, interleaved

__all__ = ["BATCHES", "find_cliffs", "measure_cliffs"]

BATCHES = range(1, 161)
SPARSITY = 0.9

REACH = 16
"""Batches this near are compared."""

MOST_ABOVE_LARGER = 1.1
MOST_A_ROW = 1.3
LEAST_BATCH_OF_ROWS = 64


def find_cliffs(times: Mapping[int, float]) -> list[str]:
    """Return where the times break the two rules, in words; none if nowhere.

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
                found.append(
                    f"batch {batch} takes {time / times[larger]:.2f} times as long as {larger}"
                )
                break
        further = batch + REACH
        if batch >= LEAST_BATCH_OF_ROWS and further in times:
            ratio = (time / batch) / (times[further] / further)
            if not 1 / MOST_A_ROW <= ratio <= MOST_A_ROW:
                found.append(
                    f"a row of batch {batch} takes {ratio:.2f} times as long as one of {further}"
                )
    return found


def measure_cliffs(threads: int, *, seconds: float = 6.0) -> dict[str, Any]:
    """Measure the headline layer at 90% at every batch, in turns.

    Returns
    -------
    dict
        The layer, the threads, the microseconds of each batch, and what `find_cliffs` says.
    """
    layer = Layer.random(*HEADLINE, SPARSITY)
    problem = Problem(layer, max(BATCHES), "float32")
    bind = product("numba")(problem)
    calls: dict[int, Callable[[], object]] = {
        size: bind(problem.batch(size, threads)) for size in BATCHES
    }
    with thread_limit(threads):
        for call in calls.values():
            call()
        sizes = random.Random(0).sample(list(BATCHES), len(BATCHES))
        timings = interleaved({str(size): Hot(calls[size]) for size in sizes}, seconds=seconds)
    times = {size: float(f"{1e6 * timings[str(size)].median:.4g}") for size in BATCHES}
    return {
        "n_in": layer.n_in,
        "n_out": layer.n_out,
        "sparsity": SPARSITY,
        "threads": threads,
        "batches": list(BATCHES),
        "median_us": list(times.values()),
        "found": find_cliffs(times),
    }
