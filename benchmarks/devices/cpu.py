"""The CPU as a device of the benchmark."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from srigl_core._machine import cpu_name, n_cores
from srigl_core.benchmarks.arrays import NumpyArrays
from srigl_core.benchmarks.devices.caches import Flush, cache_sizes
from srigl_core.benchmarks.devices.pools import relevant_environment, rest, thread_limit
from srigl_core.benchmarks.roofline import CpuPeaks
from srigl_core.benchmarks.timing import (
    Call,
    Context,
    HostRun,
    TimeBudget,
    Timing,
    interleaved,
)

__all__ = ["CpuDevice"]


class CpuDevice:
    """The cores of this process; each case is measured for about `seconds`."""

    name = "cpu"
    arrays = NumpyArrays()
    copies = 1
    packages = ("torch", "jax", "brainevent", "threadpoolctl")

    def __init__(self, seconds: float) -> None:
        self._seconds, self._flush = seconds, Flush(1)

    def peaks(self, threads: int) -> CpuPeaks:
        """Measure the peak rates of this many threads."""
        from srigl_core.benchmarks.devices.cpu_peaks import measure_cpu_peaks

        return measure_cpu_peaks(threads)

    @contextmanager
    def limit(self, threads: int) -> Iterator[None]:
        """Hold BLAS and PyTorch to this many threads, and flush caches with as many."""
        rest()
        self._flush = Flush(threads)
        with thread_limit(threads):
            yield

    def run(
        self, calls: Sequence[Call], *, cold: bool, around: Context, other: Callable[[], Call]
    ) -> HostRun:
        """Return calls with hot caches, or with only the weight cold.

        Before each cold call the caches are flushed, and the same operation is called with another
        weight: code, inputs and threads are then as in a pass through a network.
        """
        (call,) = calls
        if not cold:
            return HostRun(call, (), around)
        with around():
            other_call = other()
            other_call()
        return HostRun(call, (self._flush, other_call), around)

    def time(
        self, runs: Mapping[str, HostRun], threads: int
    ) -> tuple[dict[str, Timing], dict[str, Exception]]:
        """Time contenders in turns; with several threads, wait for spinning threads in between."""
        return interleaved(
            runs,
            is_enough=TimeBudget(self._seconds),
            rest=rest if threads > 1 else lambda: None,
        )

    def release(self) -> None:
        """Do nothing: memory of the CPU is freed as it falls out of use."""

    def facts(self) -> dict[str, Any]:
        """Return the description of the machine in the result file."""
        return {
            "cpu": cpu_name(),
            "cores": n_cores(),
            "system": f"{platform.system()} {platform.machine()}",
            "caches": cache_sizes(),
            "load": round(os.getloadavg()[0], 2),
        }

    def software(self) -> dict[str, Any]:
        """Return the environment variables, and the libraries with threads."""
        from threadpoolctl import threadpool_info

        libraries = [
            {name: value for name, value in pool.items() if name != "filepath"}
            for pool in threadpool_info()
        ]
        return {"environment": relevant_environment(), "libraries": libraries}
