"""The array operations that arguments are checked and results are made with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.checks import as_float_array, as_mask, as_out, check_workspace
from srigl_core._arrays.dtypes import accumulator_dtype, is_half, round_to
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._arrays.libraries import library_of
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["HOST_ARRAYS", "ArrayOps", "HostArrays"]

_ALIGNMENT, _LARGE_BYTES = 64, 1 << 16
"""JAX adopts buffers that are aligned to 64 bytes without a copy. Small ones are copied instead."""


class ArrayOps(ABC):
    """Array operations of a backend, for arrays of one library on one type of device.

    A backend whose arrays are not NumPy arrays has an instance as its attribute ``arrays``. The
    arrays have ``shape``, ``ndim``, ``reshape`` and NumPy's indexing. Arguments of the `as_`
    methods may be arrays of any library that can export its memory; they are never copied.

    Implementations: `HostArrays` for NumPy, ``CudaArrays`` of the CuPy backend, and
    `srigl_core.torch.TorchArrays` for backends that compute with PyTorch tensors.
    """

    @abstractmethod
    def execution_context(self, like: object) -> AbstractContextManager[Any]:
        """Return a context to compute in: the stream or the float mode for a call with `like`."""

    @abstractmethod
    def as_float_array(self, array: object, what: str) -> Any:
        """Return `array` as an array of a value type.

        Raises
        ------
        ValueTypeError
            If it is not an array, is on another device, or has another dtype. The message calls it
            `what`.
        """

    @abstractmethod
    def as_mask(self, mask: object, shape: tuple[int, ...] | None) -> Any:
        """Return `mask` as an array of bool.

        Raises
        ------
        ValueTypeError
            If it is not an array of bool on this device.
        SriglError
            If `shape` is not None and differs.
        """

    @abstractmethod
    def as_out(self, out: object, shape: tuple[int, ...], inputs: dict[str, Any]) -> Any:
        """Return `out` as an array of a value type to which a result can be written.

        Raises
        ------
        ValueTypeError
            If it is not an array of a value type, or is read-only by its library's rules.
        SriglError
            If its shape differs, or it shares memory with itself or with one of `inputs`.
        """

    @abstractmethod
    def as_workspace(self, workspace: object, others: dict[str, Any]) -> Any:
        """Return `workspace` as an array of uint8.

        Raises
        ------
        ValueTypeError
            If it is not a writable array of uint8.
        SriglError
            If it is not contiguous and aligned, or shares memory with one of `others`.
        """

    def dtype(self, array: Any) -> np.dtype[Any]:
        """Return the NumPy dtype of an array."""
        dtype: np.dtype[Any] = array.dtype
        return dtype

    @abstractmethod
    def contiguous(self, array: Any) -> Any:
        """Return an array in C order, itself if it is."""

    def count_nonfinite(self, array: Any, mask: Any | None = None) -> int:
        """Return how many numbers are NaN or infinite, where `mask` is True if there is one.

        A backend that declares `Capabilities.checks_finite` does not need it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no count_nonfinite; add it, or declare "
            f"Capabilities(checks_finite=True) if update_mask itself refuses such numbers"
        )

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a new array."""

    @abstractmethod
    def assign(self, target: Any, source: Any) -> None:
        """Copy `source` to `target`: an array of the same dtype and shape, or 0."""

    @abstractmethod
    def round_to(self, array: Any, dtype: np.dtype[Any]) -> Any:
        """Return an array rounded once to `dtype`."""

    @abstractmethod
    def share_memory(self, one: Any, other: Any) -> bool:
        """Return whether two arrays may share memory."""

    def to_caller(self, array: Any, like: object) -> Any:
        """Convert a result to the array library of `like`."""
        return library_of(like).to_caller(array, like)

    @abstractmethod
    def from_host(self, array: NDArray[Any]) -> Any:
        """Return a copy of a NumPy array."""

    @abstractmethod
    def to_host(self, array: Any) -> NDArray[Any]:
        """Return a copy of an array as a NumPy array."""

    @abstractmethod
    def accumulate(self, total: Any | None, array: Any) -> Any:
        """Return ``total + array``, or a copy of `array`, in the accumulator's dtype."""

    @abstractmethod
    def divide(self, array: Any, divisor: int) -> Any:
        """Return ``array / divisor`` in the dtype of `array`."""

    @abstractmethod
    def union(self, one: Any, other: Any) -> Any:
        """Return a new array of bool, True where either of two masks is."""

    @abstractmethod
    def row_counts(self, mask: Any) -> NDArray[np.int64]:
        """Return how many elements of each row of a mask are True: a NumPy array, (n_out,)."""


class HostArrays(ArrayOps):
    """NumPy arrays, for backends that name no other."""

    as_float_array = staticmethod(as_float_array)
    as_mask = staticmethod(as_mask)
    as_out = staticmethod(as_out)
    round_to = staticmethod(round_to)
    contiguous: Any = staticmethod(np.ascontiguousarray)
    share_memory: Any = staticmethod(np.may_share_memory)
    from_host: Any = staticmethod(np.copy)
    to_host: Any = staticmethod(np.copy)
    union: Any = staticmethod(np.logical_or)

    def execution_context(self, like: object) -> AbstractContextManager[None]:
        """Return a context in which this thread computes with subnormals."""
        return honour_subnormals()

    def as_workspace(self, workspace: object, others: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
        if type(workspace) is not np.ndarray:
            raise ValueTypeError(
                f"workspace must be a NumPy array of uint8, got {type(workspace).__name__}"
            )
        check_workspace(workspace, workspace.ctypes.data)
        if not workspace.flags.writeable:
            raise SriglError("workspace is read-only; pass a writeable array")
        for name, array in others.items():
            if np.may_share_memory(workspace, array):
                raise SriglError(f"workspace shares memory with {name}; pass one of its own")
        return workspace

    def count_nonfinite(self, array: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> int:
        nonfinite = ~_is_finite(array)
        return int(np.count_nonzero(nonfinite if mask is None else mask & nonfinite))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a new array; a large one is aligned so that JAX can adopt it."""
        size = math.prod(shape) * dtype.itemsize
        if size < _LARGE_BYTES:
            return np.empty(shape, dtype)
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        return np.ndarray(shape, dtype, memory, -memory.ctypes.data % _ALIGNMENT)

    def assign(self, target: NDArray[Any], source: NDArray[Any] | int) -> None:
        target[...] = source

    def accumulate(self, total: NDArray[Any] | None, array: NDArray[Any]) -> NDArray[Any]:
        widened = array.astype(accumulator_dtype(array.dtype))
        with honour_subnormals(), np.errstate(over="ignore", invalid="ignore"):
            return widened if total is None else total + widened

    def divide(self, array: NDArray[Any], divisor: int) -> NDArray[Any]:
        with honour_subnormals():
            quotient: NDArray[Any] = array / divisor
        return quotient

    def row_counts(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = np.count_nonzero(mask.reshape(mask.shape[0], -1), axis=1)
        return counts


def _is_finite(array: NDArray[Any]) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_]
    if is_half(array.dtype):  # by the exponent's bits; NumPy would convert every number
        infinity = np.array(np.inf, array.dtype).view(np.uint16)
        finite = (array.view(np.uint16) & infinity) != infinity
    else:
        finite = np.isfinite(array)
    return finite


HOST_ARRAYS = HostArrays()
