"""The CuPy backend: GPU kernels on the current CUDA device."""

from __future__ import annotations

from dataclasses import replace

from srigl_core.backends.cupy_gpu.cuda_arrays import CudaArrays
from srigl_core.backends.cupy_gpu.cupy_device import CupyDevice, check_device, runtime_info
from srigl_core.backends.cupy_gpu.gpu_backend import CAPABILITIES, GpuBackend

__all__ = ["CupyBackend"]


class CupyBackend(GpuBackend):
    """CUDA kernels through CuPy, on the current device and stream."""

    def __init__(self) -> None:
        check_device()
        device = CupyDevice()
        super().__init__(device, "cupy", replace(CAPABILITIES, device="cuda", priority=30))
        self.arrays = CudaArrays(device)

    def runtime_info(self) -> dict[str, object]:
        """Return CuPy's version, the device and the driver, for ``srigl info``."""
        return runtime_info()
