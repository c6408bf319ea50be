"""Conversions between dtypes on the device, rounded once."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from srigl_core.backends.cupy_gpu.device import Device
from srigl_core.backends.cupy_gpu.variants import CUDA_TYPES, VALUE_TYPES, Variant

__all__ = ["BLOCKS_A_PROCESSOR", "THREADS", "convert", "converted", "launch_over", "output_type"]

THREADS = 256
BLOCKS_A_PROCESSOR = 8


@functools.cache
def output_type(dtype: np.dtype[Any]) -> np.int32:
    """Return the `OutputType` of numbers.cuh for a dtype."""
    return np.int32(list(VALUE_TYPES).index(dtype.name))


def launch_over(device: Device, variant: Variant, size: int, arguments: tuple[Any, ...]) -> None:
    """Launch a kernel that strides over `size` elements, with blocks of `THREADS`."""
    blocks = min(-(-size // THREADS), BLOCKS_A_PROCESSOR * device.properties.processors)
    device.launch(variant, (max(1, blocks),), (THREADS,), arguments)


def convert(device: Device, source: Any, target: Any) -> None:
    """Write the numbers of `source` to `target`, which has the same shape and is in C order.

    `source` must be in C order too, unless the dtypes are equal.
    """
    if source.dtype == target.dtype:
        bits = f"u{target.dtype.itemsize}"
        target.view(bits)[...] = source.view(bits)
        return
    variant = Variant("arrays.cu", f"convert<{CUDA_TYPES[source.dtype.name]}>")
    arguments = (source, target, np.int64(source.size), output_type(target.dtype))
    launch_over(device, variant, source.size, arguments)


def converted(device: Device, array: Any, dtype: np.dtype[Any]) -> Any:
    """Return an array of `dtype` in C order; `array` itself if it is one."""
    array = device.contiguous(array)
    if array.dtype == dtype:
        return array
    result = device.empty(array.shape, dtype)
    convert(device, array, result)
    return result
