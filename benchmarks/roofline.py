"""The roofline: bytes and multiply-adds of a case, and the time below which no kernel can go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from srigl_core._arrays.dtypes import value_dtype
from srigl_core.benchmarks.cases import Case, Layer
from srigl_core.benchmarks.problems import FULL, Precision

__all__ = ["CpuPeaks", "GpuPeaks", "Peaks", "Work", "least_time", "work_of"]


class Work(NamedTuple):
    """The least work of an operation, whatever the kernel.

    Sparse rows share no inputs, so that each multiply-add reads one number from the nearest memory.
    """

    moved: float  # bytes of memory that are read or written, each once
    gathered: float  # bytes of inputs that the multiply-adds read from the nearest memory
    multiply_adds: float  # in float32; one in float64 counts as two, one in int8 as a quarter


@dataclass(frozen=True)
class CpuPeaks:
    """Peak rates of several threads together, a second."""

    threads: int
    vector_bytes: int
    multiply_adds: float  # in float32
    loads: float  # of whole vectors from the first-level cache
    bandwidth: tuple[tuple[int, float], ...]  # bytes of a working set, ascending, and bytes read

    def bandwidth_at(self, working_set: float) -> float:
        """Return the bytes a second read from a working set of this size.

        Between two measured sizes it is linear in the logarithm of the size.
        """
        sizes, rates = zip(*self.bandwidth, strict=True)
        return float(np.interp(math.log(max(working_set, 1.0)), np.log(sizes), rates))

    def mask_bytes(self, layer: Layer) -> float:
        """Return the information in a mask of constant fan-in; no packing of indices is smaller.

        Each active neuron has one of ``binomial(n_in, fan_in)`` sets of inputs.
        """
        n, k = layer.n_in, layer.fan_in
        nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return layer.n_active * nats / math.log(2) / 8

    def seconds(self, work: Work, *, cold: bool) -> dict[str, float]:
        """Return the times of memory, first-level loads and multiply-adds.

        If `cold`, everything comes from the largest working set, that is from memory.
        """
        working_set = self.bandwidth[-1][0] if cold else work.moved
        return {
            "bandwidth": work.moved / self.bandwidth_at(working_set),
            "loads": work.gathered / self.vector_bytes / self.loads,
            "multiply-adds": work.multiply_adds / self.multiply_adds,
        }


@dataclass(frozen=True)
class GpuPeaks:
    """Peak rates of a GPU, a second."""

    copy_bandwidth: float  # bytes that a copy from memory to memory reads and writes together
    multiply_adds: float  # in float32
    shared_bandwidth: float  # bytes read from the shared memory of all multiprocessors
    between_marks: float  # seconds between two events with no work between them: the shortest time

    def mask_bytes(self, layer: Layer) -> float:
        """Return the bytes of the column numbers: of 16 bits, or 32 beyond 65,536 inputs."""
        return layer.nnz * (2 if layer.n_in <= 1 << 16 else 4)

    def seconds(self, work: Work, *, cold: bool) -> dict[str, float]:
        """Return the times of memory, shared memory and multiply-adds."""
        return {
            "memory": work.moved / self.copy_bandwidth,
            "shared memory": work.gathered / self.shared_bandwidth,
            "multiply-adds": work.multiply_adds / self.multiply_adds,
        }


Peaks = CpuPeaks | GpuPeaks


def work_of(case: Case, peaks: Peaks, precision: Precision = FULL) -> Work:
    """Return the least work of a case, with values and inputs in the types of `precision`.

    Inputs include bias and results. `peaks` says how many bytes the connections take. Weights and
    inputs that are rounded to int8 take a byte where the sums read them; the inputs come, and the
    results go, in the dtype of the case. An update reads weight, gradient and mask, and writes
    weight and mask. A backward pass makes the gradient of the values, in float32 at least, and that
    of the inputs.
    """
    layer, batch = case.layer, case.batch
    value, item = (
        value_dtype(dtype or case.dtype).itemsize for dtype in (precision.values, precision.inputs)
    )
    if case.operation == "update":
        return Work(layer.n_in * layer.n_out * (3 * item + 2), 0, 0)
    weight = layer.nnz * (1 if precision.of_weights else value) + peaks.mask_bytes(layer)
    arrays = batch * (layer.n_in + layer.n_out) * item
    products = layer.nnz * batch
    if precision.of_inputs:
        gathered, multiply_adds = products, products / 4
    else:
        gathered, multiply_adds = products * item, products * max(item, 4) / 4
    if case.operation == "backward":
        moved = weight + layer.nnz * max(item, 4) + arrays + batch * layer.n_in * item
        return Work(moved, 2 * gathered, 2 * multiply_adds)
    return Work(weight + arrays + layer.n_out * item, gathered, multiply_adds)


def least_time(work: Work, peaks: Peaks, *, cold: bool = False) -> tuple[float, str]:
    """Return the shortest time of `work`, in seconds, and the resource that bounds it."""
    times = peaks.seconds(work, cold=cold)
    resource = max(times, key=lambda name: times[name])
    return times[resource], resource
