"""What a call needs memory for beside its results: taken from the device, or lent by the caller."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from srigl_core.backends.cupy_gpu.conversions import convert
from srigl_core.backends.cupy_gpu.device import Device
from srigl_core.errors import SriglError

__all__ = ["Scratch"]

ALIGNMENT = 256


class Scratch:
    """The temporaries of one call; all of them are had before anything is launched.

    Parameters
    ----------
    device : Device
    lent : device array of uint8, or None
        None is the device's own memory.

    Attributes
    ----------
    nbytes : int
        What was asked for so far, alignment included.
    """

    def __init__(self, device: Device, lent: Any | None = None) -> None:
        self._device, self._lent = device, lent
        self._converted: dict[tuple[int, str], Any] = {}
        self._conversions: list[tuple[Any, Any]] = []
        self.nbytes = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return an uninitialised array; None where what is lent does not suffice."""
        size, start = math.prod(shape) * dtype.itemsize, self.nbytes
        self.nbytes = start + -(-size // ALIGNMENT) * ALIGNMENT
        if self._lent is None:
            return self._device.empty(shape, dtype)
        if start + size > self._lent.nbytes:
            return None
        return self._lent[start : start + size].view(dtype).reshape(shape)

    def converted(self, array: Any, dtype: np.dtype[Any]) -> Any:
        """Return an array in C order that will have `dtype`; `array` itself if it is one."""
        if not array.flags.c_contiguous:
            array = self._of(array, array.dtype)
        return array if array is None or array.dtype == dtype else self._of(array, dtype)

    def writable(self, out: Any) -> Any:
        """Return an array in C order for what `out` will hold; `out` itself if it is one."""
        return out if out.flags.c_contiguous else self.empty(out.shape, out.dtype)

    def fill(self) -> None:
        """Begin to work: launch the conversions.

        Raises
        ------
        SriglError
            If what is lent does not suffice; nothing was launched.
        """
        if self._lent is not None and self.nbytes > self._lent.nbytes:
            raise SriglError(
                f"workspace has {self._lent.nbytes} bytes, but this call needs {self.nbytes}; "
                f"plan.workspace_bytes(batch) says how many suffice"
            )
        for source, target in self._conversions:
            convert(self._device, source, target)

    def _of(self, array: Any, dtype: np.dtype[Any]) -> Any:
        key = (id(array), dtype.name)
        if key not in self._converted:
            self._converted[key] = self.empty(array.shape, dtype)
            self._conversions.append((array, self._converted[key]))
        return self._converted[key]
