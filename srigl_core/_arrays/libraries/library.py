"""What there is to know of a library's arrays; here, of those that need no conversion."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core.errors import ValueTypeError

__all__ = ["ArrayLibrary", "bfloat16"]

_DLPACK_CUDA = 2, 13
"""DLPack's numbers for memory of CUDA devices: their own, and managed."""


class ArrayLibrary:
    """NumPy, CuPy, and whatever speaks a protocol: results stay what the backend makes them.

    A subclass is for a library whose arrays NumPy or CuPy must be lent, and results turned into.
    """

    remedy: str | None = None
    """What to pass instead of what cannot be read; None is an array of the backend's own."""

    def owns(self, kind: type) -> bool:
        """Return whether `kind` is the type of an array of this library."""
        return True

    def describe(self, array: object) -> str:
        """Return what an array is, with an article."""
        kind = type(array)
        if kind.__name__ == "ndarray":
            return f"a {'CuPy' if kind.__module__.startswith('cupy') else 'NumPy'} array"
        return f"a{'n' * (kind.__name__[0] in 'AEIOU')} {kind.__name__}"

    def device(self, array: Any) -> str:
        """Return "cpu", "cuda", or another device's name, without looking at the numbers."""
        if type(array) is np.ndarray:
            return "cpu"
        if hasattr(type(array), "__cuda_array_interface__"):
            return "cuda"
        if hasattr(array, "__dlpack_device__"):
            return "cuda" if array.__dlpack_device__()[0] in _DLPACK_CUDA else "cpu"
        return "cuda" if hasattr(array, "__cuda_array_interface__") else "cpu"

    def check(self, array: Any, what: str) -> None:
        """Raise ValueTypeError if `array` only stands for one, and holds no numbers."""

    def lend(self, array: Any) -> tuple[Any, np.dtype[Any] | None]:
        """Return an object of the same memory that NumPy or CuPy can read, and its true dtype.

        None is the dtype that they find. Raises whatever the library does where it cannot.
        """
        return array, None

    def lend_at_once(self, array: Any) -> NDArray[Any] | None:
        """Return a NumPy array of the same memory if that takes no time to speak of."""
        return None

    def adopt(self, array: Any, like: Any) -> Any:
        """Return a new result, an array of NumPy's or CuPy's, as what `like` is, on its device."""
        return array

    def check_writable(self, array: Any, what: str) -> None:
        """Raise ValueTypeError if nobody may write to `array`."""
        if type(array).__name__ != "ndarray":  # CuPy, whose arrays say so only of a device
            interface = getattr(array, "__cuda_array_interface__", None)
            if interface is not None and interface["data"][1]:
                raise self.not_writable(array, what)

    def not_writable(self, array: Any, what: str) -> ValueTypeError:
        """Return the error that says so."""
        return ValueTypeError(
            f"{what} of type {type(array).__name__} cannot be written; leave {what} away, or pass "
            f"all arrays as NumPy's, CuPy's or PyTorch's"
        )

    def written(self, array: Any) -> None:
        """Tell the library that `array` has been written."""

    def stream(self, array: Any) -> int | None:
        """Return the address of the CUDA stream that is current where `array` comes from."""
        return None


@functools.cache
def bfloat16() -> np.dtype[Any]:
    """Return bfloat16, which the DLPack of NumPy does not know: others' is passed as the bits."""
    return value_dtype("bfloat16")
