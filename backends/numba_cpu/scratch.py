"""Working memory inside a kernel."""

from __future__ import annotations

import numpy as np

from srigl_core.backends.numba_cpu.compiling import kernel

__all__ = ["scratch"]


@kernel()
def scratch(size, like):
    """Return uninitialised memory of the dtype of `like`, aligned to a cache line."""
    spare = 64 // like.itemsize
    memory = np.empty(size + spare, like.dtype)
    skip = (-memory.ctypes.data % 64) // like.itemsize
    return memory[skip : skip + size]
