"""How this backend's kernels are compiled: without the GIL, cached where a cache can be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numpy.typing import NDArray

__all__ = ["frozen", "kernel"]


def kernel(*, parallel: bool = False, reorder: bool = False) -> Callable[[Any], Any]:
    """Return the decorator that compiles a kernel.

    Parameters
    ----------
    parallel : bool
        Whether it starts the thread pool. One that does not never touches it.
    reorder : bool
        Whether a sum's terms may be added in another order, which lets the compiler use vector
        registers; the order it picks is fixed at compile time. Contracting a product and a sum to
        one rounding is always allowed. NaN, infinity and signed zero are always honoured.

    Notes
    -----
    Numba refuses, when the function is defined, to cache where neither the source folder nor the
    user's cache folder can be written; the kernel is then compiled anew in each process.
    """
    flags = {"contract", "reassoc"} if reorder else {"contract"}

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(function, cache=True, nogil=True, parallel=parallel, fastmath=flags)
        except RuntimeError:
            return numba.njit(function, nogil=True, parallel=parallel, fastmath=flags)

    return decorate


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view: Numba compiles a kernel anew for each mix of writeable inputs."""
    view = array.view()
    view.flags.writeable = False
    return view
