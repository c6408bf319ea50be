"""Time to a first result in fresh processes, with an empty and with a warm kernel cache."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from rich.console import Console
from rich.table import Table

from srigl_core import SriglError, get_backend
from srigl_core._workers import END_WITH_STDIN, worker_stdin

__all__ = ["measure_first_use", "show_first_use"]

BATCHES = (1, 64)
"""One for each class of batch sizes with kernels of its own."""

REPEATS = 3
"""Processes for each median. The empty cache takes long, and is measured once."""

_PROCESS = """
import json, sys, time
times = [time.perf_counter()]
import numba
times.append(time.perf_counter())
import srigl_core
times.append(time.perf_counter())
import numpy as np
weight = srigl_core.CondensedWeight.random((512, 1024), fan_in=102, rng=0)
x = np.ones((int(sys.argv[1]), 1024), np.float32)
plan = srigl_core.prepare(weight, backend="numba", threads=1)
plan(x)
times.append(time.perf_counter())
plan(x)
times.append(time.perf_counter())
print(json.dumps(times))
"""


def show_first_use(console: Console) -> None:
    """Measure first results, and print a table.

    Raises
    ------
    SriglError
        If a process fails; `BackendUnavailableError` if the backend cannot run here.
    """
    get_backend("numba")
    with console.status("measuring first results in fresh processes"):
        columns = [measure_first_use(batch) for batch in BATCHES]
    table = Table("seconds on this machine", box=None)
    for batch in BATCHES:
        table.add_column(f"batch {batch}", justify="right")
    for step in columns[0]:
        table.add_row(step, *(_three_digits(column[step]) for column in columns))
    console.print(table)
    console.print(
        f"Backend numba, float32, one thread, 512 by 1024 at 90% sparsity. A first result is "
        f"timed from the end of import numba, and includes the import of srigl_core. Medians of "
        f"{REPEATS} processes; of one with an empty cache."
    )


def _three_digits(seconds: float) -> str:
    return np.format_float_positional(seconds, precision=3, fractional=False, trim="-")


def measure_first_use(batch: int) -> dict[str, float]:
    """Return the seconds of each step in fresh processes, which run in turn and share a cache.

    Parameters
    ----------
    batch : int
        Rows of x.

    Returns
    -------
    dict of str to float

    Raises
    ------
    SriglError
        If a process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        empty = _times(batch, folder)
        warm = [_times(batch, folder) for _ in range(REPEATS)]

    def median(start: int, end: int) -> float:
        return statistics.median(times[end] - times[start] for times in warm)

    return {
        "import numba": median(0, 1),
        "import srigl_core, after numba": median(1, 2),
        "first result, empty cache": empty[3] - empty[1],
        "first result, warm cache": median(1, 3),
        "second result": median(3, 4),
    }


def _times(batch: int, cache: str) -> list[float]:
    """Return clock times of a fresh process: at its start, after both imports and two products."""
    with worker_stdin() as stdin:
        process = subprocess.run(
            [sys.executable, "-P", "-c", END_WITH_STDIN + _PROCESS, str(batch)],
            stdin=stdin,
            env={**os.environ, "SRIGL_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if process.returncode:
        output = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise SriglError(f"a fresh process gave no first result: {output[-1]}")
    times: list[float] = json.loads(process.stdout)
    return times
