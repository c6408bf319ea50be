"""Real CuPy arrays without a device: their memory is the host's, and kernels run on the CPU.

What CuPy itself would do on a device is not to be had: copies are made here, and nothing that
CuPy would launch a kernel for works.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cupy
import numpy as np
from cupy.cuda import memory
from simulated import SimulatedDevice

from srigl_core._arrays.operations import HOST_ARRAYS
from srigl_core.backends.cupy_gpu.cuda_arrays import CudaArrays
from srigl_core.backends.cupy_gpu.cupy_device import CupyDevice
from srigl_core.backends.cupy_gpu.device import DeviceProperties
from srigl_core.backends.cupy_gpu.gpu_backend import CAPABILITIES, GpuBackend

__all__ = ["HostedDevice", "as_cupy", "hosted_backend", "seen"]

ALIGNMENT = 256


def seen(array: Any) -> Any:
    """Return a NumPy array of a CuPy array's memory, which is the host's."""
    dtype = np.dtype(array.dtype)
    if not array.size:
        return np.empty(array.shape, dtype)
    interface = {
        "shape": array.shape,
        "strides": array.strides,
        "typestr": np.dtype(f"u{dtype.itemsize}").str,
        "data": (array.data.ptr, False),
        "version": 3,
    }
    owner = SimpleNamespace(__array_interface__=interface, array=array)  # keeps the memory alive
    return np.asarray(owner).view(dtype)


class HostedDevice(CupyDevice):
    """A device whose CuPy arrays lie in the host's memory, which a simulated one computes on."""

    properties = DeviceProperties("hosted", 3, 48 << 10, 192 << 10, 2048)

    def __init__(self) -> None:
        self._simulated = SimulatedDevice(self.properties)
        self.copies: list[tuple[str, int]] = []
        """Each copy between host and device: its direction and its bytes."""
        self.waits = 0
        """How often the host waited for the device."""
        self.n_launches = 0

    def number(self) -> int:
        """Return the only device's."""
        return 0

    def launch(self, variant: Any, grid: Any, block: Any, arguments: Any, shared: int = 0) -> None:
        """Run a kernel on the CPU."""
        hosted = tuple(seen(a) if isinstance(a, cupy.ndarray) else a for a in arguments)
        self._simulated.launch(variant, grid, block, hosted, shared)
        self.n_launches += 1

    def load(self, variant: Any) -> None:
        """Note that a kernel will be launched."""
        self._simulated.load(variant)

    def fitting_blocks(self, variant: Any, threads: int, shared_bytes: int) -> int:
        """Return how many blocks run at once."""
        return self._simulated.fitting_blocks(variant, threads, shared_bytes)

    captures = False

    def is_capturing(self) -> bool:
        """Return whether a graph is captured, which `captures` says."""
        return self.captures

    @property
    def launched(self) -> set[Any]:
        """The kernels launched so far."""
        return self._simulated.launched

    @property
    def loaded(self) -> set[Any]:
        """The kernels loaded so far."""
        return self._simulated.loaded

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """Return an array of zeros."""
        made = self.empty(shape, dtype)
        seen(made)[...] = 0
        return made

    def upload(self, array: Any) -> Any:
        """Return a CuPy array of the same numbers."""
        self.copies.append(("to the device", array.nbytes))
        return self._copy(array)

    def download(self, array: Any) -> Any:
        """Return a NumPy array of the same numbers."""
        self.waits += 1
        self.copies.append(("to the host", array.nbytes))
        return seen(array).copy()

    def contiguous(self, array: Any) -> Any:
        """Return the array in C order, itself if it is."""
        return array if array.flags.c_contiguous else self._copy(seen(array))

    def _copy(self, array: Any) -> Any:
        made = self.empty(array.shape, array.dtype)
        seen(made)[...] = array
        return made

    def finish(self) -> None:
        """Count: a kernel has run when its launch returns."""
        self.waits += 1


class HostedArrays(CudaArrays):
    """The array operations, with NumPy in place of CuPy's elementwise kernels."""

    def accumulate(self, total: Any | None, array: Any) -> Any:
        total = None if total is None else seen(total)
        return self._made(HOST_ARRAYS.accumulate(total, seen(array)))

    def divide(self, array: Any, divisor: int) -> Any:
        return self._made(HOST_ARRAYS.divide(seen(array), divisor))

    def union(self, one: Any, other: Any) -> Any:
        return self._made(seen(one) | seen(other))

    def row_counts(self, mask: Any) -> Any:
        counts = self._made(HOST_ARRAYS.row_counts(seen(mask)))
        return self._device.download(counts)

    def _made(self, array: Any) -> Any:
        return self._device._copy(array)


def as_cupy(array: Any) -> Any:
    """Return a CuPy array of a NumPy array's memory, which counts as a device's."""
    pointer = memory.MemoryPointer(
        memory.UnownedMemory(array.ctypes.data, max(1, array.nbytes), array, 0), 0
    )
    return cupy.ndarray(array.shape, array.dtype, pointer, strides=array.strides)


@contextmanager
def hosted_backend() -> Iterator[GpuBackend]:
    """Give the CuPy backend on such a device, as far as it is not the device's own."""
    device = HostedDevice()
    backend = GpuBackend(device, "cupy", replace(CAPABILITIES, device="cuda"))
    backend.arrays = HostedArrays(device)
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(_hosted)
    with mock.patch.object(cupy.cuda.runtime, "getDevice", return_value=0):
        try:
            yield backend
        finally:
            cupy.cuda.set_allocator(before)


def _hosted(size: int) -> Any:
    block = np.empty(size + ALIGNMENT, np.uint8)
    start = math.ceil(block.ctypes.data / ALIGNMENT) * ALIGNMENT
    return memory.MemoryPointer(memory.UnownedMemory(start, size, block, 0), 0)
