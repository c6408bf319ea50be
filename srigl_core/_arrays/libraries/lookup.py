"""Find out whose an array is, and read it where it lies."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from srigl_core._arrays.libraries.array_api import ArrayApiObjects
from srigl_core._arrays.libraries.jax import JaxArrays
from srigl_core._arrays.libraries.library import ArrayLibrary
from srigl_core._arrays.libraries.pytorch import PytorchTensors
from srigl_core.errors import ValueTypeError

__all__ = ["borrowed", "common_library", "device_of", "library_of"]

_OWN = ArrayLibrary()
_LIBRARIES = PytorchTensors(), JaxArrays()


def library_of(array: Any) -> ArrayLibrary:
    """Return the library that an array is of; for what is no array, NumPy."""
    kind: Any = type(array)
    return _library_of_type(kind)


# A type's library never changes: no type can be of one that was not imported when it was made.
@functools.lru_cache(maxsize=1024)
def _library_of_type(kind: type) -> ArrayLibrary:
    cupy = sys.modules.get("cupy")
    if issubclass(kind, np.ndarray) or (cupy is not None and issubclass(kind, cupy.ndarray)):
        return _OWN
    for library in _LIBRARIES:
        if library.owns(kind):
            return library
    if hasattr(kind, "__array_namespace__") and not issubclass(kind, np.generic):
        return _of_array_api(kind.__module__.partition(".")[0])
    return _OWN


@functools.cache
def _of_array_api(package: str) -> ArrayApiObjects:
    return ArrayApiObjects(package)


def device_of(array: object) -> str:
    """Return the kind of device that an array is on: "cpu", "cuda" or another's name."""
    return library_of(array).device(array)


def common_library(arrays: Mapping[str, object]) -> ArrayLibrary:
    """Return the library that all arrays are of; those that are None are left out.

    Parameters
    ----------
    arrays : mapping of str to array
        By the names that messages give them.

    Raises
    ------
    ValueTypeError
        If two are of different libraries, or on different kinds of devices; names both.
    """
    (first, one), *others = ((name, a) for name, a in arrays.items() if a is not None)
    library = library_of(one)
    for name, other in others:
        its_library = library_of(other)
        if its_library is not library:
            raise ValueTypeError(
                f"{first} is {library.describe(one)}, {name} {its_library.describe(other)}: pass "
                f"both as one kind"
            )
        devices = library.device(one), library.device(other)
        if devices[0] != devices[1]:
            raise ValueTypeError(_on_two_devices(first, one, name, other, devices))
    return library


def _on_two_devices(
    first: str, one: object, name: str, other: object, devices: tuple[str, str]
) -> str:
    if "cuda" in devices:
        are = ["is" if device == "cuda" else "is not" for device in devices]
        return (
            f"{name} of type {type(other).__name__} {are[1]} on a CUDA device, and {first} of type "
            f"{type(one).__name__} {are[0]}; move one to the other's device"
        )
    return f"{first} is on device {devices[0]}, {name} on {devices[1]}; move one to the other's"


def borrowed(array: object, what: str, read: Callable[[Any], Any], remedy: str) -> Any:
    """Return an array of NumPy's or CuPy's, of the same memory as `array`.

    Parameters
    ----------
    array : array
    what : str
        Its name, for error messages.
    read : callable
        Turns what a library lends into an array of NumPy's or CuPy's.
    remedy : str
        What to pass instead of what cannot be read, unless the library says that.

    Raises
    ------
    ValueTypeError
        If it holds no numbers, or none that can be read where they lie.
    """
    library = library_of(array)
    library.check(array, what)
    try:
        lent, dtype = library.lend(array)
        found = read(lent)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ValueTypeError(
            f"{what} of type {type(array).__name__} cannot be read without a copy ({error}); pass "
            f"{library.remedy or remedy}"
        ) from error
    return found if dtype is None else found.view(dtype)
