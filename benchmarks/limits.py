"""What this machine's processor can do at most, measured, and how near to it a time comes.

Three resources are measured with vectors of the full width, on as many threads as the case may use:
multiply-adds in registers, loads of vectors that lie in the first-level cache, and bytes read a
second from working sets of every size. What a case needs at least of each is counted by `needs`,
whatever the layout; the largest of the three quotients is the time that no kernel can beat.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.processor import has_avx512

__all__ = ["Limits", "Needs", "least_seconds", "measure_limits", "needs"]

VECTOR_BYTES = 64 if has_avx512() else 32
WORKING_SETS = tuple(1 << power for power in range(14, 29))
"""Bytes, from 16 KiB to 256 MiB."""

_ACCUMULATORS = 12
"""Enough to hide the latency of a multiply-add on two units."""

_LOADS_A_STEP = 8
_SAMPLE_SECONDS = 0.01
_SAMPLES = 7


@dataclass(frozen=True)
class Limits:
    """What was measured on `threads` threads together.

    Parameters
    ----------
    threads : int
    vector_bytes : int
    multiply_adds : float
        Of float32, a second.
    loads : float
        Of whole vectors in the first-level cache, a second.
    bandwidth : tuple of (int, float)
        Bytes of the working set, ascending, and bytes a second read from it.
    """

    threads: int
    vector_bytes: int
    multiply_adds: float
    loads: float
    bandwidth: tuple[tuple[int, float], ...]

    def bandwidth_at(self, working_set: float) -> float:
        """Return the bytes a second read from a working set of so many bytes.

        Between the sizes measured, linear in the logarithm of the size.
        """
        sizes, rates = zip(*self.bandwidth, strict=True)
        return float(np.interp(math.log(max(working_set, 1.0)), np.log(sizes), rates))


@dataclass(frozen=True)
class Needs:
    """What an operation needs at least.

    Parameters
    ----------
    read : float
        Bytes that have to be read or written once.
    multiply_adds : float
        Of float32; one of float64 counts as two.
    """

    read: float
    multiply_adds: float


def needs(
    operation: str, *, n_in: int, n_out: int, n_active: int, fan_in: int, batch: int, itemsize: int
) -> Needs:
    """Return what an operation needs at least, whatever the kernel and its layout.

    A mask of constant fan-in is one of ``binomial(n_in, fan_in)`` choices for each active neuron,
    so it takes the logarithm of that to say which; no packing of indices can do with less.
    """
    nnz = n_active * fan_in
    if operation == "update":
        return Needs(float(n_in * n_out * (3 * itemsize + 2)), 0.0)
    mask_bits = n_active * _log2_binomial(n_in, fan_in)
    weight = nnz * itemsize + mask_bits / 8
    arrays = batch * (n_in + n_out) * itemsize
    products = float(nnz) * batch * itemsize / 4
    if operation == "backward":
        return Needs(weight + nnz * itemsize + arrays + batch * n_in * itemsize, 2 * products)
    return Needs(weight + arrays + n_out * itemsize, products)


def least_seconds(need: Needs, limits: Limits, *, cold: bool) -> tuple[float, str]:
    """Return the time that `need` takes at least, and what sets it.

    Returns
    -------
    tuple of float and str
        Seconds, and "bandwidth", "loads" or "multiply-adds".

    Notes
    -----
    Sparse rows share no inputs, so each vector of multiply-adds needs a vector of inputs loaded.
    With `cold`, everything comes from the largest working set, that is from memory.
    """
    working_set = limits.bandwidth[-1][0] if cold else need.read
    lanes = limits.vector_bytes / 4
    bounds = {
        "bandwidth": need.read / limits.bandwidth_at(working_set),
        "loads": need.multiply_adds / lanes / limits.loads,
        "multiply-adds": need.multiply_adds / limits.multiply_adds,
    }
    resource = max(bounds, key=lambda name: bounds[name])
    return bounds[resource], resource


def measure_limits(threads: int) -> Limits:
    """Measure the limits of `threads` threads at once; takes about a second each."""
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
    return Limits(
        threads, VECTOR_BYTES, multiply_adds * _ACCUMULATORS * lanes, loads, tuple(bandwidth)
    )


def _log2_binomial(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def _aligned(buffer: NDArray[np.float64]) -> NDArray[np.float64]:
    return buffer[-(buffer.ctypes.data // 8) % 8 :]


def _reader(part: NDArray[np.float64]) -> Callable[[int], object]:
    return lambda repeats: _read(part, repeats)


def _rate(threads: int, *runs: Callable[[int], object]) -> float:
    """Return repeats a second, of all threads together; the best of a few samples.

    One of `runs` is for each thread; a single one is for all.
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
    """Run all at the same time; return the sum of their rates."""
    rates = [0.0] * len(runs)
    start = threading.Barrier(len(runs))

    def work(index: int) -> None:
        start.wait()
        started = time.perf_counter()
        runs[index](repeats)
        rates[index] = repeats / (time.perf_counter() - started)

    helpers = [threading.Thread(target=work, args=(i,)) for i in range(1, len(runs))]
    for helper in helpers:
        helper.start()
    work(0)
    for helper in helpers:
        helper.join()
    return sum(rates)


# The loops are written in LLVM's language: there a vector is a type, and its width is not up to
# the vectoriser.


@intrinsic
def _multiply_add_loop(typing_context: Any, repeats: Any, factor: Any, term: Any) -> Any:
    """Do `repeats` times one multiply-add on each accumulator; return what they hold."""
    kind = ir.VectorType(ir.FloatType(), VECTOR_BYTES // 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        multiply_add = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(kind, [kind] * 3),
            f"llvm.fma.v{kind.count}f32",
        )
        factor, term = (_repeated(builder, kind, number) for number in args[1:])
        slots = [cgutils.alloca_once_value(builder, term) for _ in range(_ACCUMULATORS)]
        with cgutils.for_range(builder, args[0]):
            for slot in slots:
                held = builder.call(multiply_add, [builder.load(slot), factor, term])
                builder.store(held, slot)
        return _first_lane(builder, slots, builder.fadd)

    return types.float32(types.intp, types.float32, types.float32), generate


@intrinsic
def _read_loop(typing_context: Any, address: Any, vectors: Any) -> Any:
    """Load so many vectors, one after the other; return their bits, or-ed."""
    kind = ir.VectorType(ir.IntType(32), VECTOR_BYTES // 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.inttoptr(args[0], kind.as_pointer())
        zero = ir.Constant(kind, None)
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


def _repeated(builder: Any, kind: Any, number: Any) -> Any:
    vector = ir.Constant(kind, ir.Undefined)
    for lane in range(kind.count):
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
