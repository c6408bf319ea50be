"""The processor's caches: their sizes, and a flush of their contents."""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Flush", "cache_sizes"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_LAST_LEVEL = 64 << 20


def cache_sizes(folder: Path = _CACHES) -> dict[str, int]:
    """Return the bytes of each data cache that a core sees, such as ``{"L1": 32768}``.

    Empty where the system does not say.
    """
    sizes = {}
    for index in sorted(folder.glob("index*")):
        level, contents, size = (
            (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
        )
        if contents != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


class Flush:
    """Replaces the contents of the caches: `threads` cores read a larger buffer at the same time.

    The additional threads end with each flush, so that they disturb no call.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads

    @cached_property
    def buffer(self) -> NDArray[Any]:
        """What is read: twice the size of the largest cache."""
        return np.ones(2 * max(cache_sizes().values(), default=_UNKNOWN_LAST_LEVEL) // 8)

    def __call__(self) -> None:
        """Read the buffer; NumPy's sum releases the interpreter lock meanwhile."""
        buffer = self.buffer
        others = [threading.Thread(target=buffer.sum) for _ in range(self._threads - 1)]
        for thread in others:
            thread.start()
        buffer.sum()
        for thread in others:
            thread.join()
