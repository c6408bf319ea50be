"""What is particular to arrays of any other library that follows the array API standard."""

from __future__ import annotations

from typing import Any

from srigl_core._arrays.libraries.library import ArrayLibrary

__all__ = ["ArrayApiObjects"]


class ArrayApiObjects(ArrayLibrary):
    """Arrays with ``__array_namespace__``, whose ``from_dlpack`` makes them of results.

    Parameters
    ----------
    package : str
        The package of their class.
    """

    def __init__(self, package: str) -> None:
        self._package = package

    def describe(self, array: object) -> str:
        """Return what it is."""
        return f"an array of {self._package}"

    def adopt(self, array: Any, like: Any) -> Any:
        """Return an array of the library's."""
        return like.__array_namespace__().from_dlpack(array)
