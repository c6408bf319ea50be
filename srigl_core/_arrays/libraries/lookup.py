"""Find the library of an array, and read the array without a copy."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from srigl_core._arrays.libraries.array_api import ArrayApiObjects
from srigl_core._arrays.libraries.array_library import ArrayLibrary
from srigl_core._arrays.libraries.jax import JaxArrays
from srigl_core._arrays.libraries.pytorch import PytorchTensors
from srigl_core.errors import ValueTypeError

__all__ = ["as_array", "common_library", "device_of", "library_of"]

_OWN = ArrayLibrary()
_LIBRARIES = PytorchTensors(), JaxArrays()


def library_of(array: Any) -> ArrayLibrary:
    """Return the library of an array; NumPy's adapter for anything that is not an array."""
    cls: Any = type(array)
    return _library_of_type(cls)


# A class exists only once its library is imported, so the answer for a class never changes.
@functools.lru_cache(maxsize=1024)
def _library_of_type(cls: type) -> ArrayLibrary:
    cupy = sys.modules.get("cupy")
    if issubclass(cls, np.ndarray) or (cupy is not None and issubclass(cls, cupy.ndarray)):
        return _OWN
    for library in _LIBRARIES:
        if library.owns(cls):
            return library
    if hasattr(cls, "__array_namespace__") and not issubclass(cls, np.generic):
        return _of_array_api(cls.__module__.partition(".")[0])
    return _OWN


@functools.cache
def _of_array_api(package: str) -> ArrayApiObjects:
    return ArrayApiObjects(package)


def device_of(array: object) -> str:
    """Return the type of the device that holds an array: "cpu", "cuda" or another name."""
    return library_of(array).device(array)


def common_library(arrays: Mapping[str, object]) -> ArrayLibrary:
    """Return the library of all arrays; arguments that are None are skipped.

    Parameters
    ----------
    arrays : mapping of str to array
        By the names of the arguments, for error messages.

    Raises
    ------
    ValueTypeError
        If all are None, or two are of different libraries or on different types of devices; names
        both.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    if not given:
        raise ValueTypeError(f"{next(iter(arrays))} must be an array, got None")
    (first, one), *others = given.items()
    library = library_of(one)
    for name, other in others:
        its_library = library_of(other)
        if its_library is not library:
            raise ValueTypeError(
                f"{first} is {library.describe(one)}, {name} {its_library.describe(other)}; pass "
                f"arrays of one library"
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


def as_array(array: object, what: str, read: Callable[[Any], Any], hint: str) -> Any:
    """Return a NumPy or CuPy array of the same memory as `array`.

    Parameters
    ----------
    array : array
    what : str
        The argument's name, for error messages.
    read : callable
        Makes a NumPy or CuPy array of an exported object.
    hint : str
        What to pass instead of an array that cannot be read; the library's own hint comes first.

    Raises
    ------
    ValueTypeError
        If it holds no numbers, or its memory cannot be shared.
    """
    library = library_of(array)
    library.check(array, what)
    try:
        exported, dtype = library.export(array)
        result = read(exported)
    except Exception as error:  # an object's own code is run, which may raise anything
        raise ValueTypeError(
            f"{what} of type {type(array).__name__} cannot be read without a copy ({error}); pass "
            f"{library.hint or hint}"
        ) from error
    return result if dtype is None else result.view(dtype)
