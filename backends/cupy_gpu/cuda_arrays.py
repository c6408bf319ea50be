"""What the public door does with CUDA arrays: CuPy's, and what others lend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from srigl_core._arrays.checks import check_workspace, overlaps_itself
from srigl_core._arrays.dtypes import value_dtype
from srigl_core._arrays.libraries import borrowed, device_of, library_of
from srigl_core.backends.cupy_gpu.conversions import converted
from srigl_core.backends.cupy_gpu.cupy_device import CupyDevice, cupy
from srigl_core.backends.cupy_gpu.mask_update import count_not_finite
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["CudaArrays"]


class CudaArrays:
    """Arrays on the current CUDA device: `srigl_core.contract.ArrayKind` of this backend."""

    def __init__(self, device: CupyDevice) -> None:
        self._device = device

    def computing(self, like: object) -> AbstractContextManager[Any]:
        """Return a context with the stream that is current where `like` comes from."""
        number = library_of(like).stream(like)
        if number is None:
            return nullcontext()
        # Stream 0 is the legacy one, PyTorch's default.
        stream: AbstractContextManager[Any] = (
            cupy.cuda.ExternalStream(number) if number else cupy.cuda.Stream.null
        )
        return stream

    def as_float_array(self, array: object, what: str) -> Any:
        """Return `array` as a CuPy array of a value type, of the same memory."""
        found = self._borrowed(array, what)
        value_dtype(found.dtype, f"{what} of dtype")
        return found

    def as_mask(self, mask: object, shape: tuple[int, ...]) -> Any:
        """Return `mask` as a CuPy array of bool."""
        found = self._borrowed(mask, "mask")
        if found.dtype != np.bool_:
            raise ValueTypeError(
                f"mask must be an array of bool, got {found.dtype}; pass mask != 0"
            )
        if found.shape != shape:
            raise SriglError(f"mask has shape {found.shape}, but must have {shape}")
        return found

    def contiguous(self, array: Any) -> Any:
        """Return an array in C order, itself if it is."""
        return self._device.contiguous(array)

    def count_not_finite(self, array: Any, mask: Any | None = None) -> int:
        """Return how many numbers, of those where `mask` is True, are NaN or infinite."""
        return count_not_finite(self._device, array, mask)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a new array, of CuPy's pool."""
        return self._device.empty(shape, dtype)

    def as_out(self, out: object, shape: tuple[int, ...], inputs: dict[str, Any]) -> Any:
        """Return `out` as a CuPy array of the same memory."""
        library_of(out).check_writable(out, "out")
        found = self.as_float_array(out, "out")
        if found.shape != shape:
            raise SriglError(f"out has shape {found.shape}, but the result has {shape}")
        if found.size and overlaps_itself(found):
            raise SriglError(
                f"out of strides {found.strides} has elements that share memory; pass an array of "
                f"its own"
            )
        for name, array in inputs.items():
            if cupy.may_share_memory(found, array):
                raise SriglError(
                    f"out shares memory with {name}, which must not be written; copy one"
                )
        return found

    def as_workspace(self, workspace: object, others: dict[str, Any]) -> Any:
        """Return `workspace` as a CuPy array of the same memory."""
        library_of(workspace).check_writable(workspace, "workspace")
        found = self._borrowed(workspace, "workspace")
        check_workspace(found, found.data.ptr)
        for name, array in others.items():
            if cupy.may_share_memory(found, array):
                raise SriglError(f"workspace shares memory with {name}; pass one of its own")
        return found

    def assign(self, target: Any, source: Any) -> None:
        """Copy `source`, an array of the same type or 0, to `target`, by the bits."""
        bits = f"u{target.dtype.itemsize}"
        target.view(bits)[...] = source if isinstance(source, int) else source.view(bits)

    def round_to(self, array: Any, dtype: np.dtype[Any]) -> Any:
        """Return `array` rounded once to `dtype`."""
        return converted(self._device, array, dtype)

    def share_memory(self, one: Any, other: Any) -> bool:
        """Whether a view and its array are still of the same memory."""
        return bool(cupy.may_share_memory(one, other))

    def given_back(self, array: Any, like: object) -> Any:
        """Return a result in the kind of array that `like` is."""
        return library_of(like).adopt(array, like)

    def _borrowed(self, array: object, what: str) -> Any:
        """Return `array` as one of CuPy's, of the same memory, on the current device."""
        if isinstance(array, cupy.ndarray):
            found = array
        elif device_of(array) == "cuda":
            found = borrowed(array, what, _read, "a CuPy array")
        else:
            raise ValueTypeError(
                f"{what} of type {type(array).__name__} is not on a CUDA device, where backend "
                f"'cupy' takes arrays; pass cupy.asarray({what}), or name a CPU backend"
            )
        current = cupy.cuda.runtime.getDevice()
        if found.device.id != current:
            raise ValueTypeError(
                f"{what} is on CUDA device {found.device.id}, but device {current} is current; "
                f"call within `with cupy.cuda.Device({found.device.id}):`, or copy it"
            )
        return found


def _read(array: Any) -> Any:
    return cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else cupy.asarray(array)
