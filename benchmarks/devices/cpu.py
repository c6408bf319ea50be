"""The CPU as a device of the benchmark, with a flush of its caches."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._machine import cpu_name, n_cores
from srigl_core.benchmarks.arrays import Arrays
from srigl_core.benchmarks.devices.pools import at_once, relevant_environment, rest, thread_limit
from srigl_core.benchmarks.roofline import CpuPeaks
from srigl_core.benchmarks.timing import (
    Call,
    Context,
    HostRun,
    TimeBudget,
    Timing,
    interleaved,
)

__all__ = ["CpuDevice", "Flush", "cache_sizes"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_LAST_LEVEL = 64 << 20


def cache_sizes(folder: Path = _CACHES) -> dict[str, int]:
    """Return the bytes of each data cache that a core sees, such as ``{"L1": 32768}``.

    Empty where the system does not say.
    """
    sizes = {}
    for index in sorted(folder.glob("index*")):
        level, contents, size = (
            (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
        )
        if contents != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


class Flush:
    """Replaces the contents of the caches: `threads` cores read a larger buffer at the same time.

    The additional threads end with each flush, so that they disturb no call.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads

    @cached_property
    def buffer(self) -> NDArray[Any]:
        """What is read: twice the size of the largest cache."""
        return np.ones(2 * max(cache_sizes().values(), default=_UNKNOWN_LAST_LEVEL) // 8)

    def __call__(self) -> None:
        """Read the buffer; NumPy's sum releases the interpreter lock meanwhile."""
        at_once([self.buffer.sum] * self._threads)


class CpuDevice:
    """The cores of this process; each case is measured for about `seconds`."""

    name = "cpu"
    arrays = Arrays()
    copies = 1
    packages = (
        *("torch", "onnxruntime", "openvino", "mkl", "sparselab"),
        *("jax", "brainevent", "threadpoolctl"),
    )

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
        facts = {
            "cpu": cpu_name(),
            "cores": n_cores(),
            "system": f"{platform.system()} {platform.machine()}",
            "caches": cache_sizes(),
        }
        if hasattr(os, "getloadavg"):  # not under Windows
            facts["load"] = round(os.getloadavg()[0], 2)
        return facts

    def software(self) -> dict[str, Any]:
        """Return the environment variables, and the libraries with threads."""
        from threadpoolctl import threadpool_info

        libraries = [
            {name: value for name, value in pool.items() if name != "filepath"}
            for pool in threadpool_info()
        ]
        return {"environment": relevant_environment(), "libraries": libraries}
