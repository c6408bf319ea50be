"""Compile kernels that run without the GIL, and cache them on disk where that is possible."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numba
import numpy as np
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numpy.typing import NDArray

from srigl_core._cache_folder import keep_kernel, kept_kernel
from srigl_core.backends.numba_cpu.cache_folder import cache_directory

__all__ = ["cache_directory", "frozen", "kernel"]


def kernel(
    *, parallel: bool = False, reorder: bool = False, exact: bool = False, inline: bool = False
) -> Callable[[Any], Any]:
    """Return the decorator that compiles a kernel.

    Parameters
    ----------
    parallel : bool
        Whether the kernel uses the thread pool.
    reorder : bool
        Whether the compiler may change the order of a sum, so that it can use vector registers.
        That order is fixed at compile time.
    exact : bool
        Whether each operation rounds by itself. Otherwise the compiler may fuse a product and a sum
        into one rounding. NaN, infinity and signed zero always keep their IEEE meaning.
    inline : bool
        Whether the code always becomes a part of the kernels that call it. Otherwise LLVM decides.

    Notes
    -----
    A kernel of this package is compiled once for each combination of argument types, and cached in
    `cache_directory`. A kernel of another package is compiled in each process, since its sources
    are not part of the cache version.
    """
    flags = set() if exact else {"contract", "reassoc"} if reorder else {"contract"}

    def decorate(function: Any) -> Any:
        if function.__closure__:
            # A symbol of compiled code consists of this name and a number that counts compilations
            # of the process. Two kernels of one factory, cached by two processes, could have the
            # same symbol, and a third process would then run one in place of the other.
            identity = hashlib.sha256(repr(_identity(function)).encode()).hexdigest()[:16]
            function.__qualname__ = f"{function.__qualname__}_{identity}"
        compiled = numba.njit(
            function, nogil=True, parallel=parallel, fastmath=flags, forceinline=inline
        )
        if function.__module__.startswith(f"{__package__}."):
            compiled._cache = _KernelCache(compiled)
        return compiled

    return decorate


class _KernelCache:
    """A kernel's cache with Numba's interface, and one file for each compiled result.

    Numba's own cache hashes only the kernel's file, not the helpers that are compiled into it. It
    also numbers the results in an index. If two processes write the index at once, a kernel may
    later load the code of another one.
    """

    def __init__(self, compiled: Any) -> None:
        self._kernel = compiled

    @property
    def cache_path(self) -> str | None:
        return cache_directory()

    def load_overload(self, types: Any, target: Any) -> Any:
        """Return the cached result for arguments of these types, or None."""
        file = self._file(types, target.codegen())
        data = None if file is None else kept_kernel(file)
        if data is None:
            return None
        target.refresh()
        try:
            result = CompileResult._rebuild(target, *pickle.loads(data))
        except Exception:  # whatever it holds, a file only ever costs time
            return None
        return result if result.signature.args == types else None

    def save_overload(self, types: Any, result: Any) -> None:
        """Write a result; if that fails, the next process compiles it again."""
        file = self._file(types, result.codegen)
        machine_code = result._asdict()["library"]
        if file is None or machine_code.has_dynamic_globals:
            return
        keep_kernel(file, dumps(result._reduce()))

    def _file(self, types: Any, codegen: Any) -> Path | None:
        folder = cache_directory()
        if folder is None:
            return None
        key = (str(types), codegen.magic_tuple(), _identity(self._kernel))
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        return Path(folder, f"{self._kernel.__name__}-{name}.kernel")


def _identity(value: Any) -> Any:
    """Return an object that identifies `value`, and whose repr is the same in each process.

    The identity of a kernel covers its code and everything that is compiled into it: the constants
    of its factory, global constants, and other kernels. Other sources that it uses are part of the
    cache version.
    """
    function = getattr(value, "py_func", getattr(value, "_defn", value))
    if isinstance(function, FunctionType):
        variables = inspect.getclosurevars(function)
        used = dict(variables.nonlocals)
        options = []
        if hasattr(value, "py_func"):
            used |= variables.globals
            options = sorted(
                (name, sorted(option) if isinstance(option, set) else option)
                for name, option in value.targetoptions.items()
            )
        parts = [(name, _identity(used[name])) for name in sorted(used)]
        name = (function.__module__, function.__qualname__)
        return name, _identity(function.__code__), options, parts
    if isinstance(value, CodeType):
        return value.co_code, [_identity(constant) for constant in value.co_consts], value.co_names
    if isinstance(value, tuple):
        return tuple(_identity(part) for part in value)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return repr(value)


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view: Numba compiles a kernel for each combination of writeable inputs."""
    view = array.view()
    view.flags.writeable = False
    return view
