"""The GPU backend on a simulated device: its host code as it is, its kernels on the CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from host_device import (
    Counts,
    HostKernel,
    HostModule,
    Order,
    is_sanitized,
    run_in_order,
    tight,
    tight_empty,
)

from srigl_core._arrays.operations import HostArrays
from srigl_core.backends import cupy_gpu
from srigl_core.backends.cupy_gpu import launch_model, tiles
from srigl_core.backends.cupy_gpu.device import DeviceProperties
from srigl_core.backends.cupy_gpu.gpu_backend import CAPABILITIES, GpuBackend
from srigl_core.backends.cupy_gpu.variants import Variant, variants

MOST_COPIED_BYTES = 1 << 30

__all__ = ["KERNELS", "SETTINGS", "Setting", "SimulatedDevice", "simulated_backend"]

KERNELS = Path(str(cupy_gpu.__file__)).parent


@dataclass
class SimulatedDevice:
    """A device whose arrays are NumPy's, each in memory of just its size.

    Parameters
    ----------
    properties : DeviceProperties
    folder : Path
        Holds the ``.cu`` files.
    one_by_one : bool
        Whether to build a kernel when it is first launched, not all of its file.
    counts : bool
        Whether kernels count loads and multiply-adds.
    """

    properties: DeviceProperties
    folder: Path = KERNELS
    one_by_one: bool = False
    counts: bool = False
    launched: set[Variant] = field(default_factory=set)
    loaded: set[Variant] = field(default_factory=set)
    last: deque[tuple[Variant, tuple[int, ...], tuple[int, ...], Counts]] = field(
        default_factory=lambda: deque(maxlen=8)
    )
    captures: bool = False
    n_made: int = 0
    _kernels: dict[Variant, HostKernel] = field(default_factory=dict)

    def number(self) -> int:
        """Return the only device's."""
        return 0

    def launch(
        self,
        variant: Variant,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel."""
        if variant not in self._kernels:
            self._build(variant)
        kernel = self._kernels[variant]
        kernel.max_dynamic_shared_size_bytes = shared_bytes
        kernel(grid, block, arguments, shared_mem=shared_bytes)
        self.launched.add(variant)
        self.last.append((variant, grid, block, kernel.counts))

    def load(self, variant: Variant) -> None:
        """Note that a kernel will be launched."""
        self.loaded.add(variant)

    def fitting_blocks(self, variant: Variant, threads: int, shared_bytes: int) -> int:
        """Return how many blocks run at once."""
        resident = launch_model.resident_blocks(self.properties, threads, shared_bytes)
        return self.properties.processors * resident

    def is_capturing(self) -> bool:
        """Return whether a graph is captured, which `captures` says."""
        return self.captures

    def _build(self, wanted: Variant) -> None:
        whole = [variant for variant in variants() if variant.file == wanted.file]
        names = [wanted.name] if self.one_by_one else [variant.name for variant in whole]
        defines = {"CUDA_CPU_COUNTS": 1} if self.counts else {}
        module = HostModule(
            self.folder, wanted.file, names, sanitize=is_sanitized(), defines=defines
        )
        for name in names:
            self._kernels[Variant(wanted.file, name)] = module.kernel(name)

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return an array that holds what is no number."""
        self.n_made += 1
        return tight_empty(shape, dtype)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """Return an array of zeros."""
        self.n_made += 1
        return tight(np.zeros(shape, dtype))

    def upload(self, array: Any) -> Any:
        """Return a copy in memory of its own."""
        self.n_made += 1
        return tight(np.ascontiguousarray(array))

    def download(self, array: Any) -> Any:
        """Return a copy."""
        return np.array(array)

    def contiguous(self, array: Any) -> Any:
        """Return the array in C order."""
        return np.ascontiguousarray(array)

    def finish(self) -> None:
        """Do nothing: a kernel has run when its launch returns."""


class TightArrays(HostArrays):
    """NumPy's arrays, each in memory of its own: a kernel's input ends where it ends."""

    def as_float_array(self, array: object, what: str) -> Any:
        """Return a copy of an array in C order."""
        found = super().as_float_array(array, what)
        can_be_copied = found.flags.c_contiguous and found.nbytes <= MOST_COPIED_BYTES
        return tight(found) if can_be_copied else found


@dataclass(frozen=True)
class Setting:
    """A device, and what its plans may choose.

    Parameters
    ----------
    shared_bytes : int
        Few, so that small inputs are cut into segments.
    lanes : tuple of int
        To a neuron.
    stream_rows : int
        Rows up to which the weight is streamed.
    processors : int
    warps : tuple of int
        Of a block that stages a tile. Few, since a tile of few bytes takes many rounds of a block.
    processor_threads : int
        Few, so that a warp has several slices of neurons.
    narrow_positions : int
        Values up to which positions have 32 bits.
    order : Order
        Of threads and blocks.
    """

    shared_bytes: int
    lanes: tuple[int, ...] = (1, 2, 4, 8)
    stream_rows: int = 0
    processors: int = 3
    warps: tuple[int, ...] = (8,)
    processor_threads: int = 2048
    narrow_positions: int = 1 << 31
    order: Order = field(default_factory=Order)


LARGEST_PROBLEM = 200_000
"""A simulated thread takes a thousand times as long as one of a GPU."""

SETTINGS = {
    "one lane": Setting(288, (1,)),
    "two lanes": Setting(512, (2,), narrow_positions=0, order=Order("reverse", "reverse")),
    "four lanes": Setting(1024, (4,), processors=132, order=Order(1)),
    "eight lanes": Setting(2048, (8,), processors=1, order=Order(2, "reverse")),
    "whole inputs": Setting(48 << 10, warps=launch_model.WARPS, order=Order(3)),
    "several trips": Setting(48 << 10, (4,), warps=launch_model.WARPS, order=Order(6)),
    "streamed": Setting(48 << 10, stream_rows=8, order=Order(4)),
    "streamed in place": Setting(
        160, (1, 4), stream_rows=8, processors=1, processor_threads=256, order=Order("reverse")
    ),
    "streamed again": Setting(
        48 << 10, stream_rows=8, processors=1, processor_threads=256, order=Order(5)
    ),
}


@contextmanager
def simulated_backend(setting: Setting, **device: Any) -> Iterator[GpuBackend]:
    """Give the backend on a simulated device; `device` are options of `SimulatedDevice`."""
    properties = DeviceProperties(
        "simulated",
        setting.processors,
        setting.shared_bytes,
        4 * setting.shared_bytes,
        setting.processor_threads,
    )
    capabilities = replace(CAPABILITIES, largest_problem=LARGEST_PROBLEM)
    backend = GpuBackend(SimulatedDevice(properties, **device), "simulated", capabilities)
    backend.arrays = TightArrays()
    with (
        mock.patch.object(launch_model, "TILE_LANES", setting.lanes),
        mock.patch.object(launch_model, "MOST_STREAM_ROWS", setting.stream_rows),
        mock.patch.object(launch_model, "MOST_BATCH_SPLITS", 2),  # several tiles to a block
        mock.patch.object(launch_model, "WARPS", setting.warps),
        mock.patch.object(tiles, "MOST_NARROW_POSITIONS", setting.narrow_positions),
        run_in_order(setting.order),
    ):
        yield backend
