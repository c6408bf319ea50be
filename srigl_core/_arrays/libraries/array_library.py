"""The adapter of an array library, and the one of arrays that need no conversion."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core.errors import ValueTypeError

__all__ = ["ArrayLibrary", "bfloat16"]

_DLPACK_CUDA = 2, 13
"""DLPack's device types of CUDA memory: device memory and managed memory."""


class ArrayLibrary:
    """Base adapter: arrays that need no conversion (NumPy, CuPy, objects with a protocol).

    Subclass it for a library whose arrays have to be exported to NumPy or CuPy, and whose users
    expect results as arrays of that library.
    """

    hint: str | None = None
    """What to pass instead of an array that cannot be read; None for a backend's own advice."""

    def owns(self, cls: type) -> bool:
        """Return whether `cls` is an array class of this library."""
        return True

    def describe(self, array: object) -> str:
        """Return a noun phrase for error messages."""
        cls = type(array)
        if cls.__name__ == "ndarray":
            return f"a {'CuPy' if cls.__module__.startswith('cupy') else 'NumPy'} array"
        return f"a{'n' * (cls.__name__[0] in 'AEIOU')} {cls.__name__}"

    def device(self, array: Any) -> str:
        """Return "cpu", "cuda", or another device's name; the numbers are not read.

        Raises
        ------
        ValueTypeError
            If the object has a device, and cannot say which.
        """
        if type(array) is np.ndarray:
            return "cpu"
        if hasattr(type(array), "__cuda_array_interface__"):
            return "cuda"
        if hasattr(array, "__dlpack_device__"):
            try:
                kind = array.__dlpack_device__()[0]
            except Exception as error:  # an object's own code is run, which may raise anything
                raise ValueTypeError(
                    f"an array of type {type(array).__name__} does not say its device ({error!r})"
                ) from error
            return "cuda" if kind in _DLPACK_CUDA else "cpu"
        return "cuda" if hasattr(array, "__cuda_array_interface__") else "cpu"

    def check(self, array: Any, what: str) -> None:
        """Raise ValueTypeError if `array` is a placeholder without numbers, such as a tracer."""

    def export(self, array: Any) -> tuple[Any, np.dtype[Any] | None]:
        """Return an object of the same memory that NumPy or CuPy can read, and its dtype.

        A dtype of None means the one that NumPy or CuPy reads. Raises the library's own error
        where the memory cannot be shared.
        """
        return array, None

    def as_numpy_fast(self, array: Any) -> NDArray[Any] | None:
        """Return a NumPy array of the same memory where that is cheap, else None."""
        return None

    def to_caller(self, array: Any, like: Any) -> Any:
        """Return a new NumPy or CuPy array as an array of `like`'s library, on its device."""
        return array

    def check_writable(self, array: Any, what: str) -> None:
        """Raise ValueTypeError if `array` is read-only."""
        if type(array).__name__ != "ndarray":  # CuPy has no flag; others say so in the interface
            interface = getattr(array, "__cuda_array_interface__", None)
            if interface is not None and interface["data"][1]:
                raise self.not_writable(array, what)

    def not_writable(self, array: Any, what: str) -> ValueTypeError:
        """Return the error for an array that is read-only."""
        return ValueTypeError(
            f"{what} of type {type(array).__name__} cannot be written; leave {what} out, or pass "
            f"all arrays as NumPy, CuPy or PyTorch arrays"
        )

    def written(self, array: Any) -> None:
        """Tell the library that `array` has been written."""

    def stream(self, array: Any) -> int | None:
        """Return the address of the library's current CUDA stream; None if it has none."""
        return None

    def memory(self, nbytes: int) -> tuple[int, Any]:
        """Return the address and the owner of new memory on the current CUDA device.

        Work on the library's current stream may use it. Only for libraries with a stream.
        """
        raise NotImplementedError


@functools.cache
def bfloat16() -> np.dtype[Any]:
    """Return bfloat16. NumPy's DLPack does not support it, so libraries export its bits."""
    return value_dtype("bfloat16")
