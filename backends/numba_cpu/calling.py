"""Call a kernel without Numba's dispatch, which takes longer than a small layer's product.

Dispatch finds out the type of each argument at each call, and compiles a kernel anew for a
read-only input. Here the caller knows the types: all arrays are contiguous and aligned, and their
dtypes and axes are in the key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numba
import numpy as np
from numba import types

__all__ = ["Direct"]


class Direct:
    """A kernel, called by its compiled code for the arguments' types.

    Parameters
    ----------
    compiled : kernel
        It must write to none of its inputs, since their flag is not looked at.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._codes: dict[Hashable, Callable[..., Any]] = {}

    def code(self, key: Hashable, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """Return the compiled code for arguments of the types of `arguments`.

        Parameters
        ----------
        key : hashable
            What these types are determined by.
        arguments : tuple
            Contiguous, aligned arrays, ints, and tuples of ints.
        """
        found = self._codes.get(key)
        if found is None:
            signature = tuple(_type_of(argument) for argument in arguments)
            self._compiled.compile(signature)
            found = self._codes[key] = self._compiled.overloads[signature].entry_point
        return found


def _type_of(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return types.Array(numba.from_dtype(argument.dtype), argument.ndim, "C")
    return numba.typeof(argument)
