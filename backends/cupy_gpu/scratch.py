"""Temporary arrays of a call, in the device's memory or in the caller's workspace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from srigl_core.backends.cupy_gpu.conversions import convert
from srigl_core.backends.cupy_gpu.device import Device
from srigl_core.errors import SriglError

__all__ = ["Scratch"]

ALIGNMENT = 256


class Scratch:
    """The temporary arrays of one call, all allocated before the first kernel is launched.

    Parameters
    ----------
    device : Device
    workspace : device array of uint8, or None
        None allocates in the device's memory.

    Attributes
    ----------
    nbytes : int
        Bytes allocated so far, alignment included.
    """

    def __init__(self, device: Device, workspace: Any | None = None) -> None:
        self._device, self._workspace = device, workspace
        self._converted: dict[tuple[int, str], Any] = {}
        self._first: list[Callable[[], None]] = []
        self.nbytes = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return an uninitialised array, or None if the workspace is too small."""
        size, start = math.prod(shape) * dtype.itemsize, self.nbytes
        self.nbytes = start + -(-size // ALIGNMENT) * ALIGNMENT
        if self._workspace is None:
            return self._device.empty(shape, dtype)
        if start + size > self._workspace.nbytes:
            return None
        return self._workspace[start : start + size].view(dtype).reshape(shape)

    def converted(self, array: Any, dtype: np.dtype[Any]) -> Any:
        """Return `array` in C order and `dtype`: itself, or a copy that `fill` will make."""
        if not array.flags.c_contiguous:
            array = self._of(array, array.dtype)
        return array if array is None or array.dtype == dtype else self._of(array, dtype)

    def writable(self, out: Any) -> Any:
        """Return an array in C order for the result; `out` itself if it is in C order."""
        return out if out.flags.c_contiguous else self.empty(out.shape, out.dtype)

    def before_launch(self, fill: Callable[[], None]) -> None:
        """Have `fill` called before the first kernel, to write a temporary array."""
        self._first.append(fill)

    def fill(self) -> None:
        """Write the temporary arrays that kernels read.

        Raises
        ------
        SriglError
            If the workspace is too small. Nothing is launched then.
        """
        if self._workspace is not None and self.nbytes > self._workspace.nbytes:
            raise SriglError(
                f"workspace has {self._workspace.nbytes} bytes, but this call needs {self.nbytes}; "
                f"plan.workspace_bytes(batch) says how many suffice"
            )
        for fill in self._first:
            fill()

    def _of(self, array: Any, dtype: np.dtype[Any]) -> Any:
        key = (id(array), dtype.name)
        if key not in self._converted:
            target = self._converted[key] = self.empty(array.shape, dtype)
            self.before_launch(lambda: convert(self._device, array, target))
        return self._converted[key]
