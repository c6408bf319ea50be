"""Other number types on the device, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np

from srigl_core.backends.cupy_gpu.device import Device
from srigl_core.backends.cupy_gpu.variants import CUDA_TYPES, Variant

__all__ = ["THREADS", "converted", "launch_over", "output_type"]

THREADS = 256
BLOCKS_A_PROCESSOR = 8


def output_type(dtype: np.dtype[Any]) -> np.int32:
    """Return the `OutputType` of numbers.cuh."""
    return np.int32(list(CUDA_TYPES).index(dtype.name))


def launch_over(device: Device, variant: Variant, size: int, arguments: tuple[Any, ...]) -> None:
    """Launch a kernel that strides over `size` elements, with blocks of `THREADS`."""
    blocks = min(-(-size // THREADS), BLOCKS_A_PROCESSOR * device.properties.processors)
    device.launch(variant, (max(1, blocks),), (THREADS,), arguments)


def converted(device: Device, array: Any, dtype: np.dtype[Any]) -> Any:
    """Return a contiguous array of `dtype`; `array` itself if it is one."""
    array = device.contiguous(array)
    if array.dtype == dtype:
        return array
    result = device.empty(array.shape, dtype)
    variant = Variant("arrays.cu", f"convert<{CUDA_TYPES[array.dtype.name]}>")
    arguments = (array, result, np.int64(array.size), output_type(dtype))
    launch_over(device, variant, array.size, arguments)
    return result
