"""The peak rates of this machine's processor, measured.

All are measured with vectors of the full width, on as many threads as the cases use: multiply-adds
in registers, loads of vectors from the first-level cache, and bytes read a second from working sets
of every size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numba import njit
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.processor import vector_bytes
from srigl_core.backends.numba_cpu.simd import add, first_lane, fma, load, splat, zeros
from srigl_core.benchmarks.devices.pools import at_once
from srigl_core.benchmarks.roofline import CpuPeaks

__all__ = ["measure_cpu_peaks"]

VECTOR_BYTES = vector_bytes()
LANES = VECTOR_BYTES // 4
WORKING_SETS = tuple(1 << power for power in range(14, 29))
"""Bytes, from 16 KiB to 256 MiB."""

_ACCUMULATORS = 12
"""Enough to hide the latency of a multiply-add on two units."""

_LOADS_A_STEP = 8
_SAMPLE_SECONDS = 0.01
_SAMPLES = 7


def measure_cpu_peaks(threads: int) -> CpuPeaks:
    """Measure the peak rates of `threads` threads together, which takes about a second."""
    multiply_adds = _rate(threads, lambda repeats: _multiply_adds(repeats, 0.999, 0.001))
    numbers = WORKING_SETS[-1] // 4 // threads
    buffers = [np.ones(numbers + LANES, np.float32) for _ in range(threads)]
    bandwidth = []
    for size in WORKING_SETS:
        vectors = size // threads // VECTOR_BYTES // _LOADS_A_STEP * _LOADS_A_STEP
        parts = [_aligned(buffer)[: vectors * LANES] for buffer in buffers]
        rate = _rate(threads, *(_reader(part) for part in parts))
        bandwidth.append((size, rate * vectors * VECTOR_BYTES))
    loads = max(rate for _, rate in bandwidth[:2]) / VECTOR_BYTES
    return CpuPeaks(
        threads, VECTOR_BYTES, multiply_adds * _ACCUMULATORS * LANES, loads, tuple(bandwidth)
    )


def _aligned(buffer: NDArray[np.float32]) -> NDArray[np.float32]:
    return buffer[-(buffer.ctypes.data // 4) % LANES :]


def _reader(part: NDArray[np.float32]) -> Callable[[int], object]:
    return lambda repeats: _read(part, repeats)


def _rate(threads: int, *runs: Callable[[int], object]) -> float:
    """Return the repeats a second of all threads together, the best of a few samples.

    `runs` has a function for each thread, or one that all threads call.
    """
    each = runs if len(runs) == threads else runs * threads
    each[0](1)  # compiles
    repeats, seconds = 1, 0.0
    while seconds < _SAMPLE_SECONDS / 4:
        repeats *= 2
        started = time.perf_counter()
        each[0](repeats)
        seconds = time.perf_counter() - started
    repeats = max(1, round(repeats * _SAMPLE_SECONDS / seconds))
    return max(_sample(each, repeats) for _ in range(_SAMPLES))


def _sample(runs: tuple[Callable[[int], object], ...], repeats: int) -> float:
    """Run all functions at the same time and return the sum of their rates."""
    rates = [0.0] * len(runs)
    start = threading.Barrier(len(runs))

    def work(index: int) -> None:
        start.wait()
        started = time.perf_counter()
        runs[index](repeats)
        rates[index] = repeats / (time.perf_counter() - started)

    at_once([partial(work, index) for index in range(len(runs))])
    return sum(rates)


# The loops use the kernels' vectors, so that their width does not depend on the vectoriser.


@njit(nogil=True)
def _multiply_adds(repeats, factor, term):
    f, t = splat(np.float32(factor), LANES), splat(np.float32(term), LANES)
    a = b = c = d = e = g = t
    h = i = j = k = m = n = f
    for _ in range(repeats):
        a, b, c = fma(a, f, t), fma(b, f, t), fma(c, f, t)
        d, e, g = fma(d, f, t), fma(e, f, t), fma(g, f, t)
        h, i, j = fma(h, f, t), fma(i, f, t), fma(j, f, t)
        k, m, n = fma(k, f, t), fma(m, f, t), fma(n, f, t)
    sums = add(add(add(a, b), add(c, d)), add(add(e, g), add(h, i)))
    return first_lane(add(sums, add(add(j, k), add(m, n))))


@njit(nogil=True)
def _read(part, repeats):
    a = b = c = d = e = f = g = h = zeros(part, LANES)
    for _ in range(repeats):
        for at in range(0, part.size, _LOADS_A_STEP * LANES):
            a = add(a, load(part, at, LANES))
            b = add(b, load(part, at + LANES, LANES))
            c = add(c, load(part, at + 2 * LANES, LANES))
            d = add(d, load(part, at + 3 * LANES, LANES))
            e = add(e, load(part, at + 4 * LANES, LANES))
            f = add(f, load(part, at + 5 * LANES, LANES))
            g = add(g, load(part, at + 6 * LANES, LANES))
            h = add(h, load(part, at + 7 * LANES, LANES))
    return first_lane(add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h))))
