"""What the public door does with NumPy's arrays, and with what can be read as one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.array_checks import as_float_array, as_mask, check_out, check_workspace
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.float_mode import honour_subnormals
from srigl_core.value_types import round_to

__all__ = ["HOST_ARRAYS", "HostArrays"]


class HostArrays:
    """Arrays in the host's memory: `srigl_core.contract.ArrayKind` of backends that name none."""

    def computing(self, like: object) -> AbstractContextManager[None]:
        """Return a context in which this thread computes with subnormals."""
        return honour_subnormals()

    def as_float_array(self, array: object, what: str) -> NDArray[Any]:
        """Return `array` as an ndarray of a value type; see `as_float_array`."""
        return as_float_array(array, what)

    def as_mask(self, mask: object, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Return `mask`, once it is checked."""
        return as_mask(mask, shape)

    def contiguous(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array in C order."""
        return np.ascontiguousarray(array)

    def count_not_finite(self, array: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> int:
        """Return how many numbers, of those where `mask` is True, are NaN or infinite."""
        wrong = ~_is_finite(array)
        return int(np.count_nonzero(wrong if mask is None else mask & wrong))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a new array."""
        return np.empty(shape, dtype)

    def as_out(
        self, out: object, shape: tuple[int, ...], inputs: dict[str, NDArray[Any]]
    ) -> NDArray[Any]:
        """Return `out`, once it is checked."""
        check_out(out, shape, inputs)
        return np.asarray(out)

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

    def given_back(self, array: NDArray[Any], like: object) -> object:
        """Return a result in the caller's kind of array, which here is NumPy's."""
        return array


def _is_finite(array: NDArray[Any]) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_]
    if array.itemsize == 2:  # not all exponent bits are set; NumPy would convert every number
        infinity = np.array(np.inf, array.dtype).view(np.uint16)
        finite = (array.view(np.uint16) & infinity) != infinity
    else:
        finite = np.isfinite(array)
    return finite


HOST_ARRAYS = HostArrays()
