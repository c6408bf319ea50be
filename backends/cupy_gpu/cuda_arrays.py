"""The array operations of the CuPy backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.checks import check_out, check_workspace
from srigl_core._arrays.dtypes import accumulator_dtype, value_dtype
from srigl_core._arrays.libraries import ArrayLibrary, as_array, device_of, library_of
from srigl_core.backends.cupy_gpu.conversions import converted
from srigl_core.backends.cupy_gpu.cupy_device import CupyDevice, cupy
from srigl_core.contract import ArrayOps
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["CudaArrays"]


class CudaArrays(ArrayOps):
    """CuPy arrays on the current CUDA device, and arrays that export their memory to CuPy."""

    def __init__(self, device: CupyDevice) -> None:
        self._device = device

    def execution_context(self, like: object) -> AbstractContextManager[Any]:
        """Return a context with stream and memory of the library of `like`, if it has a stream."""
        library = library_of(like)
        address = library.stream(like)
        if address is None:
            return nullcontext()
        device = cupy.cuda.runtime.getDevice()
        return _context(_stream(address, device), _allocator(library, device))

    def as_float_array(self, array: object, what: str) -> Any:
        shared = self._as_array(array, what)
        value_dtype(shared.dtype, f"{what} of dtype")
        return shared

    def as_mask(self, mask: object, shape: tuple[int, ...] | None) -> Any:
        shared = self._as_array(mask, "mask")
        if shared.dtype != np.bool_:
            raise ValueTypeError(
                f"mask must be an array of bool, got {shared.dtype}; pass mask != 0"
            )
        if shape is not None and shared.shape != shape:
            raise SriglError(f"mask has shape {shared.shape}, but must have {shape}")
        return shared

    def as_out(self, out: object, shape: tuple[int, ...], inputs: dict[str, Any]) -> Any:
        library_of(out).check_writable(out, "out")
        shared = self.as_float_array(out, "out")
        check_out(shared, shape, inputs, cupy.may_share_memory)
        return shared

    def as_workspace(self, workspace: object, others: dict[str, Any]) -> Any:
        library_of(workspace).check_writable(workspace, "workspace")
        shared = self._as_array(workspace, "workspace")
        check_workspace(shared, shared.data.ptr)
        for name, array in others.items():
            if cupy.may_share_memory(shared, array):
                raise SriglError(f"workspace shares memory with {name}; pass one of its own")
        return shared

    def contiguous(self, array: Any) -> Any:
        return self._device.contiguous(array)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a new array from CuPy's pool."""
        return self._device.empty(shape, dtype)

    def assign(self, target: Any, source: Any) -> None:
        bits = f"u{target.dtype.itemsize}"
        target.view(bits)[...] = source if isinstance(source, int) else source.view(bits)

    def round_to(self, array: Any, dtype: np.dtype[Any]) -> Any:
        return converted(self._device, array, dtype)

    def share_memory(self, one: Any, other: Any) -> bool:
        return bool(cupy.may_share_memory(one, other))

    def from_host(self, array: NDArray[Any]) -> Any:
        copy = self._device.upload(array)
        self._device.finish()  # any stream can read the copy
        return copy

    def to_host(self, array: Any) -> NDArray[Any]:
        return self._device.download(array)

    def accumulate(self, total: Any | None, array: Any) -> Any:
        widened = converted(self._device, array, accumulator_dtype(array.dtype))
        if total is None:
            return widened.copy() if widened is array else widened
        return total + widened

    def divide(self, array: Any, divisor: int) -> Any:
        return array / array.dtype.type(divisor)

    def union(self, one: Any, other: Any) -> Any:
        return one | other

    def row_counts(self, mask: Any) -> NDArray[np.int64]:
        return self._device.download(mask.reshape(mask.shape[0], -1).sum(axis=1, dtype=np.int64))

    def _as_array(self, array: object, what: str) -> Any:
        """Return `array` as a CuPy array of the same memory, on the current device."""
        if isinstance(array, cupy.ndarray):
            shared = array
        elif device_of(array) == "cuda":
            shared = as_array(array, what, _read, "a CuPy array")
        else:
            raise ValueTypeError(
                f"{what} of type {type(array).__name__} is not on a CUDA device, as backend 'cupy' "
                f"requires; pass cupy.asarray({what}), or name a CPU backend"
            )
        current = cupy.cuda.runtime.getDevice()
        if shared.device.id != current:
            raise ValueTypeError(
                f"{what} is on CUDA device {shared.device.id}, but device {current} is current; "
                f"call within `with cupy.cuda.Device({shared.device.id}):`, or copy it"
            )
        return shared


@dataclass(frozen=True)
class _Address:
    """The address of a stream, as CuPy reads it from other libraries' streams."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the protocol's version, and the address."""
        return 0, self.address


@functools.lru_cache(maxsize=64)
def _stream(address: int, device: int) -> AbstractContextManager[Any]:
    """Return CuPy's stream of an address on a device, which must be the current one."""
    stream: AbstractContextManager[Any]
    if not address:
        stream = cupy.cuda.Stream.null  # the legacy stream, PyTorch's default
    elif hasattr(cupy.cuda.Stream, "from_external"):
        stream = cupy.cuda.Stream.from_external(_Address(address))
    else:  # CuPy 13
        stream = cupy.cuda.ExternalStream(address)
    return stream


@functools.cache
def _allocator(library: ArrayLibrary, device: int) -> Callable[[int], Any]:
    """Return a function that takes CuPy's memory on a device from another library."""

    def allocate(nbytes: int) -> Any:
        address, owner = library.memory(nbytes)
        memory = cupy.cuda.UnownedMemory(address, nbytes, owner, device)
        return cupy.cuda.MemoryPointer(memory, 0)

    return allocate


@contextmanager
def _context(
    stream: AbstractContextManager[Any], allocator: Callable[[int], Any]
) -> Iterator[None]:
    with stream, cupy.cuda.using_allocator(allocator):
        yield


def _read(array: Any) -> Any:
    """Return a CuPy array of the memory of another library's array.

    By DLPack PyTorch would make the current stream wait for its own, although they are the same:
    it compares its numbers of streams, not their addresses. The other interface waits for nothing.
    """
    if library_of(array).stream(array) is None and hasattr(array, "__dlpack__"):
        return cupy.from_dlpack(array)
    return cupy.asarray(array)
