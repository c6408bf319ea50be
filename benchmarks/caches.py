"""The processor's caches: how large they are, and how to empty them of what was used."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

__all__ = ["Flush", "cache_sizes"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_LAST_LEVEL = 64 << 20


def cache_sizes(folder: Path = _CACHES) -> dict[str, int]:
    """Return the bytes of each data cache that a core sees, such as ``{"L1": 32768}``.

    Empty where the system does not say.
    """
    sizes = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = (
            (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


class Flush:
    """Replaces what every core's caches hold by reading something larger.

    Parameters
    ----------
    threads : int
        Cores to do it on, each the whole of it, at the same time.

    Notes
    -----
    The helpers are threads of Python that sleep between calls, so that they disturb nothing.
    """

    def __init__(self, threads: int) -> None:
        largest = max(cache_sizes().values(), default=_UNKNOWN_LAST_LEVEL)
        self._buffer = np.ones(2 * largest // 8)
        self._threads = threads

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return self._buffer.nbytes

    def __call__(self) -> None:
        """Read everything; NumPy's sum lets the other threads run meanwhile."""
        helpers = [threading.Thread(target=self._buffer.sum) for _ in range(self._threads - 1)]
        for helper in helpers:
            helper.start()
        self._buffer.sum()
        for helper in helpers:
            helper.join()
