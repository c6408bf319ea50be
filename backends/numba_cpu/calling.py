"""Run a kernel over items, in one thread or shared out among several, with little overhead.

Numba's dispatch finds out the type of each argument at each call, and compiles a kernel anew for a
read-only input: for a small layer that takes longer than the product. Here the compiled code is
called, by the dtypes and axes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numba
import numpy as np
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.float_mode import honour_subnormals, restore_float_mode

__all__ = ["Launcher", "borrowed"]

Arguments = tuple[Any, ...]


@intrinsic
def borrowed(typing_context: Any, argument: Any) -> Any:
    """Return arrays, or tuples of them, that are not counted as references.

    Somebody else must hold them, as the caller in Python does. To count takes 5 nanoseconds a time,
    and Numba does it for each array that a kernel is handed.
    """

    def borrow(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        if isinstance(kind, types.Array):
            array = context.make_array(kind)(context, builder, value)
            array.meminfo = context.get_constant_null(types.voidptr)
            return array._getvalue()
        if isinstance(kind, types.BaseTuple):
            parts = cgutils.unpack_tuple(builder, value)
            parts = [borrow(context, builder, *part) for part in zip(kind, parts, strict=True)]
            return context.make_tuple(builder, kind, parts)
        return value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return borrow(context, builder, argument, args[0])

    return argument(argument), generate


class Launcher:
    """A kernel to be run over items.

    Parameters
    ----------
    compute : kernel
        Called as ``compute(first, last, *arguments)`` for the items from `first` to before `last`;
        returns whether the result can be trusted. It must write to none of its inputs, since their
        flag is not looked at.
    """

    def __init__(self, compute: Any) -> None:
        @kernel()
        def alone(n_items, arguments):
            mode = honour_subnormals()
            is_good = compute(0, n_items, *borrowed(arguments))
            restore_float_mode(mode)
            return is_good

        @kernel(parallel=True)
        def shared_out(n_items, n_threads, arguments):
            n_bad = 0
            for t in prange(n_threads):
                mode = honour_subnormals()
                # Numba types the range as signed first and then as unsigned: two compilations.
                part = np.int64(t)
                first, last = n_items * part // n_threads, n_items * (part + 1) // n_threads
                n_bad += not compute(first, last, *borrowed(arguments))
                restore_float_mode(mode)
            return n_bad == 0

        self._alone, self._shared_out = alone, shared_out
        self._codes: dict[Hashable, Callable[..., bool]] = {}

    def __call__(self, n_items: int, n_threads: int, arguments: Arguments) -> bool:
        """Compute all items; return whether the result can be trusted.

        Parameters
        ----------
        n_items : int
        n_threads : int
            With one the pool is not touched.
        arguments : tuple
            Contiguous, aligned arrays, and ints.
        """
        if n_threads == 1:
            return self.alone(arguments)(n_items, arguments)
        code = self._code(self._shared_out, (n_items, n_threads, arguments))
        return code(n_items, n_threads, arguments)

    def alone(self, arguments: Arguments) -> Callable[[int, Arguments], bool]:
        """Return the compiled code for one thread, called as ``code(n_items, arguments)``.

        It may be called again with other arguments of the same dtypes and axes.
        """
        return self._code(self._alone, (0, arguments))

    def _code(self, compiled: Any, arguments: Arguments) -> Callable[..., bool]:
        key = _key(arguments)
        found = self._codes.get((compiled, key))
        if found is None:
            signature = tuple(_numba_type(argument) for argument in arguments)
            compiled.compile(signature)
            found = self._codes[compiled, key] = compiled.overloads[signature].entry_point
        return found


def _key(argument: Any) -> Hashable:
    """Return what an argument's type is determined by: the hash of a dtype itself is slow."""
    if isinstance(argument, np.ndarray):
        return argument.dtype.num, argument.ndim
    if isinstance(argument, tuple):
        return tuple([_key(part) for part in argument])
    return type(argument).__name__


def _numba_type(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return types.Array(numba.from_dtype(argument.dtype), argument.ndim, "C")
    if isinstance(argument, tuple):
        return types.BaseTuple.from_types([_numba_type(part) for part in argument])
    return numba.typeof(argument)
