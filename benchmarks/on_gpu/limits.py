"""What the device can do at most, measured, and what a case needs of it at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srigl_core.benchmarks.cases import Layer
from srigl_core.benchmarks.on_gpu.device import CudaDevice, Device

__all__ = ["KERNELS", "GpuLimits", "Needs", "least_seconds", "measure_limits", "needs"]

KERNELS = Path(__file__).with_name("limits.cu")

THREADS = 256
MULTIPLY_ADDS = 16 * 8
"""Of a thread, for each repeat; and bytes of shared memory that it reads."""

READ_BYTES = 8 * 16

_BLOCKS_A_PROCESSOR = 8
_COPIED_BYTES = 1 << 30
_FIRST_REPEATS = 500
_SAMPLE_SECONDS = 0.003
_SAMPLES = 7


@dataclass(frozen=True)
class GpuLimits:
    """What was measured.

    Parameters
    ----------
    copy_bandwidth : float
        Bytes a second that a copy from memory to memory reads and writes together.
    multiply_adds : float
        Of float32, a second.
    shared_bandwidth : float
        Bytes a second read from the shared memory of all multiprocessors.
    between_marks : float
        Seconds between two marks with no work between: what no time can be below.
    """

    copy_bandwidth: float
    multiply_adds: float
    shared_bandwidth: float
    between_marks: float


@dataclass(frozen=True)
class Needs:
    """What an operation needs at least.

    Parameters
    ----------
    moved : float
        Bytes of memory that are read or written once.
    shared : float
        Bytes read from shared memory.
    multiply_adds : float
        Of float32.
    """

    moved: float
    shared: float
    multiply_adds: float


def needs(operation: str, layer: Layer, batch: int, itemsize: int) -> Needs:
    """Return what an operation on a condensed weight needs, whatever the kernel.

    Notes
    -----
    Each connection is a value and a column number of 16 bits (32 beyond 65,536 inputs); x, bias,
    and results are moved once. Sparse rows share no inputs, so each multiply-add reads one number
    of shared memory. Sums are kept in float32 for all types. The gradient of the values is as
    large as these, of float32; the mask update reads weight, gradient and mask, and writes weight
    and mask.
    """
    n_in, n_out, nnz = layer.n_in, layer.n_out, layer.n_active * layer.fan_in
    if operation == "update":
        return Needs(float(n_in * n_out * (3 * itemsize + 2)), 0.0, 0.0)
    connections = nnz * (itemsize + (2 if n_in <= 1 << 16 else 4))
    products = float(nnz) * batch
    if operation == "backward":
        moved = connections + 4 * nnz + batch * (2 * n_in + n_out) * itemsize
        return Needs(float(moved), 2 * products * itemsize, 2 * products)
    moved = connections + batch * (n_in + n_out) * itemsize + n_out * itemsize
    return Needs(float(moved), products * itemsize, products)


def least_seconds(need: Needs, limits: GpuLimits) -> tuple[float, str]:
    """Return the time that `need` takes at least, and what sets it.

    Returns
    -------
    tuple of float and str
        Seconds, and "memory", "shared memory" or "multiply-adds".
    """
    bounds = {
        "memory": need.moved / limits.copy_bandwidth,
        "shared memory": need.shared / limits.shared_bandwidth,
        "multiply-adds": need.multiply_adds / limits.multiply_adds,
    }
    resource = max(bounds, key=lambda name: bounds[name])
    return bounds[resource], resource


def measure_limits(device: CudaDevice) -> GpuLimits:
    """Measure what the device does at most; takes less than a second."""
    import cupy
    import torch

    module = cupy.RawModule(code=KERNELS.read_text(encoding="utf-8"), options=("--std=c++17",))
    blocks = _BLOCKS_A_PROCESSOR * int(device.properties.multi_processor_count)
    threads = blocks * THREADS
    out = cupy.empty(threads, cupy.float32)

    def rate(name: str, *arguments: Any) -> float:
        kernel = module.get_function(name)
        return _rate(
            device,
            lambda repeats: kernel((blocks,), (THREADS,), (out, np.int32(repeats), *arguments)),
        )

    source = torch.ones(_COPIED_BYTES // 4, dtype=torch.float32, device=device.name)
    target = torch.empty_like(source)
    copies = 2 * _COPIED_BYTES / min(_seconds(device, lambda: target.copy_(source)))
    multiply_adds = rate("multiply_adds", np.float32(0.999), np.float32(0.001))
    reads = rate("shared_reads")
    return GpuLimits(
        copy_bandwidth=copies,
        multiply_adds=multiply_adds * threads * MULTIPLY_ADDS,
        shared_bandwidth=reads * threads * READ_BYTES,
        between_marks=min(_seconds(device, lambda: None)),
    )


def _rate(device: Device, launch: Callable[[int], object]) -> float:
    """Return repeats a second, the best of a few samples of a few milliseconds."""
    launch(1)
    least = min(_seconds(device, lambda: launch(_FIRST_REPEATS)))
    repeats = max(1, round(_FIRST_REPEATS * _SAMPLE_SECONDS / least))
    return repeats / min(_seconds(device, lambda: launch(repeats)))


def _seconds(device: Device, call: Callable[[], object]) -> list[float]:
    """Return the time of each of a few calls, submitted while the device spins."""
    device.spin(_SAMPLE_SECONDS)
    marks = []
    for _ in range(_SAMPLES):
        first = device.mark()
        call()
        marks.append((first, device.mark()))
    device.wait()
    return [device.seconds(*pair) for pair in marks]
