"""The adapter of any other library that follows the array API standard."""

from __future__ import annotations

from typing import Any

from srigl_core._arrays.libraries.array_library import ArrayLibrary

__all__ = ["ArrayApiObjects"]


class ArrayApiObjects(ArrayLibrary):
    """Arrays with ``__array_namespace__``; results are imported by its ``from_dlpack``.

    Parameters
    ----------
    package : str
        The package that defines the array class.
    """

    def __init__(self, package: str) -> None:
        self._package = package

    def describe(self, array: object) -> str:
        """Return a noun phrase for error messages."""
        return f"an array of {self._package}"

    def to_caller(self, array: Any, like: Any) -> Any:
        """Return an array of the library of `like`."""
        return like.__array_namespace__().from_dlpack(array)
