"""What the public door does with NumPy's arrays, and with what can be read as one."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.checks import as_float_array, as_mask, as_out, check_workspace
from srigl_core._arrays.dtypes import round_to
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._arrays.libraries import library_of
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["HOST_ARRAYS", "HostArrays"]

_ALIGNMENT, _MANY_BYTES = 64, 1 << 16
"""JAX takes memory over that begins at such a multiple; a few bytes are sooner copied."""


class HostArrays:
    """Arrays in the host's memory: `srigl_core.contract.ArrayKind` of backends that name none."""

    def computing(self, like: object) -> AbstractContextManager[None]:
        """Return a context in which this thread computes with subnormals."""
        return honour_subnormals()

    def as_float_array(self, array: object, what: str) -> NDArray[Any]:
        """Return `array` as an ndarray of a value type; see `as_float_array`."""
        return as_float_array(array, what)

    def as_mask(self, mask: object, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Return `mask` as an ndarray of bool, once it is checked."""
        return as_mask(mask, shape)

    def contiguous(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array in C order."""
        return np.ascontiguousarray(array)

    def count_not_finite(self, array: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> int:
        """Return how many numbers, of those where `mask` is True, are NaN or infinite."""
        wrong = ~_is_finite(array)
        return int(np.count_nonzero(wrong if mask is None else mask & wrong))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a new array; a large one is of memory that JAX can take over."""
        size = math.prod(shape) * dtype.itemsize
        if size < _MANY_BYTES:
            return np.empty(shape, dtype)
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        return np.ndarray(shape, dtype, memory, -memory.ctypes.data % _ALIGNMENT)

    def as_out(
        self, out: object, shape: tuple[int, ...], inputs: dict[str, NDArray[Any]]
    ) -> NDArray[Any]:
        """Return `out` as an ndarray of the same memory, once it is checked."""
        return as_out(out, shape, inputs)

    def as_workspace(self, workspace: object, others: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Return `workspace`, once it is checked."""
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

    def assign(self, target: NDArray[Any], source: NDArray[Any] | int) -> None:
        """Copy `source` to `target`."""
        target[...] = source

    def round_to(self, array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return `array` rounded once to `dtype`."""
        return round_to(array, dtype)

    def share_memory(self, one: NDArray[Any], other: NDArray[Any]) -> bool:
        """Whether a view and its array are still of the same memory."""
        return np.may_share_memory(one, other)

    def given_back(self, array: NDArray[Any], like: object) -> Any:
        """Return a result in the kind of array that `like` is."""
        return library_of(like).adopt(array, like)


def _is_finite(array: NDArray[Any]) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_]
    if array.itemsize == 2:  # not all exponent bits are set; NumPy would convert every number
        infinity = np.array(np.inf, array.dtype).view(np.uint16)
        finite = (array.view(np.uint16) & infinity) != infinity
    else:
        finite = np.isfinite(array)
    return finite


HOST_ARRAYS = HostArrays()
