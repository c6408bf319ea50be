"""Run a kernel over items, in one thread or several, with little overhead.

Numba's dispatcher determines the type of each argument at each call, and compiles a kernel again
for read-only inputs. For a small layer that takes longer than the product. A `Launcher` chooses the
compiled code by the arguments' dtypes and numbers of axes only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.float_mode import honour_subnormals, restore_float_mode

__all__ = [
    "Arguments",
    "Call",
    "Launcher",
    "NativeCode",
    "compiled_code",
    "native_code",
    "uncounted",
]

Arguments = tuple[Any, ...]


@intrinsic
def uncounted(typing_context: Any, argument: Any) -> Any:
    """Return an array, or a tuple of arrays, without reference counting.

    Something else must keep the memory alive, as the caller in Python does. Counting takes 5
    nanoseconds for each array that is passed to a kernel.
    """

    def without_count(context: Any, builder: Any, numba_type: Any, value: Any) -> Any:
        if isinstance(numba_type, types.Array):
            array = context.make_array(numba_type)(context, builder, value)
            array.meminfo = context.get_constant_null(types.voidptr)
            return array._getvalue()
        if isinstance(numba_type, types.BaseTuple):
            parts = [
                without_count(context, builder, part_type, part)
                for part_type, part in zip(
                    numba_type, cgutils.unpack_tuple(builder, value), strict=True
                )
            ]
            return context.make_tuple(builder, numba_type, parts)
        return value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return without_count(context, builder, argument, args[0])

    return argument(argument), generate


class Launcher:
    """Runs a kernel over items.

    Parameters
    ----------
    compute : kernel
        Called as ``compute(first, last, *arguments)`` for the items ``range(first, last)``. It must
        not write to its inputs, since nothing checks whether they are read-only.
    """

    def __init__(self, compute: Any) -> None:
        @kernel()
        def serial(n_items, arguments):
            mode = honour_subnormals()
            compute(0, n_items, *uncounted(arguments))
            restore_float_mode(mode)

        @kernel(parallel=True)
        def parallel(n_items, n_threads, arguments):
            for t in prange(n_threads):
                mode = honour_subnormals()
                # Without the cast Numba compiles twice, for signed and for unsigned t.
                part = np.int64(t)
                first, last = n_items * part // n_threads, n_items * (part + 1) // n_threads
                compute(first, last, *uncounted(arguments))
                restore_float_mode(mode)

        @kernel(parallel=True)
        def parallel_nested(n_items, n_threads, before, group, after):
            for t in prange(n_threads):
                mode = honour_subnormals()
                part = np.int64(t)
                first, last = n_items * part // n_threads, n_items * (part + 1) // n_threads
                arguments = (*before, group, *after)
                compute(first, last, *uncounted(arguments))
                restore_float_mode(mode)

        self._serial, self._parallel = serial, parallel
        self._parallel_nested = parallel_nested

    def __call__(self, n_items: int, n_threads: int, arguments: Arguments) -> None:
        """Compute all items.

        Parameters
        ----------
        n_items : int
        n_threads : int
            One thread does not use the pool.
        arguments : tuple
            Contiguous, aligned arrays, and ints. One of them may be a tuple of these.
        """
        if n_threads == 1:
            self.serial(arguments)(n_items, arguments)
            return
        parts: tuple[Any, ...] = (arguments,)
        compiled = self._parallel
        for i, argument in enumerate(arguments):
            if type(argument) is tuple:  # Numba hands no tuple within a tuple to other threads
                compiled = self._parallel_nested
                parts = (arguments[:i], argument, arguments[i + 1 :])
        compiled_code(compiled, (n_items, n_threads, *parts))(n_items, n_threads, *parts)

    def serial(self, arguments: Arguments) -> Callable[[int, Arguments], None]:
        """Return the compiled code for one thread, called as ``code(n_items, arguments)``.

        It takes all arguments with the same dtypes and numbers of axes.
        """
        return compiled_code(self._serial, (0, arguments))

    def native(self, arguments: Arguments) -> NativeCode:
        """Return the native code for one thread, of the same arguments as `serial`."""
        return native_code(self._serial, _numba_type((0, arguments)).types)


Call = tuple[Launcher, int, Arguments]
"""A kernel, its number of items, and its arguments."""


class NativeCode(NamedTuple):
    """Code that compiled code calls by its address, in Numba's calling convention."""

    address: int
    signature: tuple[Any, ...]
    """Numba's types of the arguments."""
    compiled: Any
    """What keeps the code."""


def compiled_code(compiled: Any, arguments: Arguments) -> Callable[..., Any]:
    """Return the code of a kernel for arguments of these dtypes and numbers of axes."""
    key = (compiled, _key(arguments))
    code = _codes.get(key)
    if code is None:
        code = _codes[key] = _compiled(compiled, _numba_type(arguments).types).entry_point
    return code


_codes: dict[Hashable, Callable[..., Any]] = {}


def native_code(compiled: Any, signature: tuple[Any, ...]) -> NativeCode:
    """Return the native code of a kernel for arguments of Numba's types."""
    result = _compiled(compiled, signature)._asdict()
    address = result["library"].get_pointer_to_function(result["fndesc"].llvm_func_name)
    return NativeCode(address, signature, compiled)


def _compiled(compiled: Any, signature: tuple[Any, ...]) -> Any:
    compiled.compile(signature)
    return compiled.overloads[signature]


def _key(argument: Any) -> Hashable:
    """Return a hashable that determines an argument's type; hashing the dtype itself is slow."""
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
