"""The peak rates of this machine's processor, measured.

All are measured with vectors of the full width, on as many threads as the cases use: multiply-adds
in registers, loads of vectors from the first-level cache, and bytes read a second from working sets
of every size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.processor import has_avx512
from srigl_core.benchmarks.roofline import CpuPeaks

__all__ = ["measure_cpu_peaks"]

VECTOR_BYTES = 64 if has_avx512() else 32
WORKING_SETS = tuple(1 << power for power in range(14, 29))
"""Bytes, from 16 KiB to 256 MiB."""

_ACCUMULATORS = 12
"""Enough to hide the latency of a multiply-add on two units."""

_LOADS_A_STEP = 8
_SAMPLE_SECONDS = 0.01
_SAMPLES = 7


def measure_cpu_peaks(threads: int) -> CpuPeaks:
    """Measure the peak rates of `threads` threads together, which takes about a second."""
    lanes = VECTOR_BYTES // 4
    multiply_adds = _rate(threads, lambda repeats: _multiply_adds(repeats, 0.999, 0.001))
    buffers = [np.ones(WORKING_SETS[-1] // 8 // threads + 64) for _ in range(threads)]
    bandwidth = []
    for size in WORKING_SETS:
        vectors = size // threads // VECTOR_BYTES // _LOADS_A_STEP * _LOADS_A_STEP
        parts = [_aligned(buffer)[: vectors * VECTOR_BYTES // 8] for buffer in buffers]
        rate = _rate(threads, *(_reader(part) for part in parts))
        bandwidth.append((size, rate * vectors * VECTOR_BYTES))
    loads = max(rate for _, rate in bandwidth[:2]) / VECTOR_BYTES
    return CpuPeaks(
        threads, VECTOR_BYTES, multiply_adds * _ACCUMULATORS * lanes, loads, tuple(bandwidth)
    )


def _aligned(buffer: NDArray[np.float64]) -> NDArray[np.float64]:
    return buffer[-(buffer.ctypes.data // 8) % 8 :]


def _reader(part: NDArray[np.float64]) -> Callable[[int], object]:
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

    others = [threading.Thread(target=work, args=(i,)) for i in range(1, len(runs))]
    for thread in others:
        thread.start()
    work(0)
    for thread in others:
        thread.join()
    return sum(rates)


# The loops are written in LLVM's intermediate language, where a vector is a type, so that its width
# does not depend on the vectoriser.


@intrinsic
def _multiply_add_loop(typing_context: Any, repeats: Any, factor: Any, term: Any) -> Any:
    """Do one multiply-add on each accumulator, `repeats` times, and return their sum."""
    vector_type = ir.VectorType(ir.FloatType(), VECTOR_BYTES // 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        multiply_add = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector_type, [vector_type] * 3),
            f"llvm.fma.v{vector_type.count}f32",
        )
        factor, term = (_repeated(builder, vector_type, number) for number in args[1:])
        slots = [cgutils.alloca_once_value(builder, term) for _ in range(_ACCUMULATORS)]
        with cgutils.for_range(builder, args[0]):
            for slot in slots:
                sums = builder.call(multiply_add, [builder.load(slot), factor, term])
                builder.store(sums, slot)
        return _first_lane(builder, slots, builder.fadd)

    return types.float32(types.intp, types.float32, types.float32), generate


@intrinsic
def _read_loop(typing_context: Any, address: Any, vectors: Any) -> Any:
    """Load this many vectors in order and return the bitwise or of all."""
    vector_type = ir.VectorType(ir.IntType(32), VECTOR_BYTES // 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.inttoptr(args[0], vector_type.as_pointer())
        zero = ir.Constant(vector_type, None)
        slots = [cgutils.alloca_once_value(builder, zero) for _ in range(_LOADS_A_STEP)]
        steps = builder.udiv(args[1], ir.Constant(args[1].type, _LOADS_A_STEP))
        with cgutils.for_range(builder, steps) as loop:
            first = builder.mul(loop.index, ir.Constant(loop.index.type, _LOADS_A_STEP))
            for number, slot in enumerate(slots):
                offset = builder.add(first, ir.Constant(first.type, number))
                loaded = builder.load(builder.gep(start, [offset]))
                loaded.align = VECTOR_BYTES
                builder.store(builder.or_(builder.load(slot), loaded), slot)
        return _first_lane(builder, slots, builder.or_)

    return types.int32(types.uintp, types.intp), generate


def _repeated(builder: Any, vector_type: Any, number: Any) -> Any:
    vector = ir.Constant(vector_type, ir.Undefined)
    for lane in range(vector_type.count):
        vector = builder.insert_element(vector, number, ir.Constant(ir.IntType(32), lane))
    return vector


def _first_lane(builder: Any, slots: list[Any], combine: Any) -> Any:
    total = builder.load(slots[0])
    for slot in slots[1:]:
        total = combine(total, builder.load(slot))
    return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))


@njit(nogil=True)
def _multiply_adds(repeats, factor, term):
    return _multiply_add_loop(repeats, np.float32(factor), np.float32(term))


@njit(nogil=True)
def _read(part, repeats):
    bits = 0
    for _ in range(repeats):
        bits |= _read_loop(np.uintp(part.ctypes.data), part.nbytes // VECTOR_BYTES)
    return bits
