"""Put a thread into the mode in which it flushes subnormals, to test that kernels do not care."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["can_flush_subnormals", "flushing_subnormals"]

_MXCSR_OFFSET = 28  # in glibc's fenv_t for x86-64, behind the x87 environment
_FLUSH = (1 << 15) | (1 << 6)


def can_flush_subnormals() -> bool:
    """Whether this platform is one whose mode can be set here: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


@contextmanager
def flushing_subnormals() -> Iterator[None]:
    """Flush subnormals in this thread; does nothing where `can_flush_subnormals` is False."""
    if not can_flush_subnormals():
        yield
        return
    libm = ctypes.CDLL("libm.so.6")
    saved, changed = (ctypes.create_string_buffer(512) for _ in range(2))
    libm.fegetenv(saved)
    changed.raw = saved.raw
    mxcsr = ctypes.c_uint32.from_buffer(changed, _MXCSR_OFFSET)
    mxcsr.value |= _FLUSH
    libm.fesetenv(changed)
    try:
        yield
    finally:
        libm.fesetenv(saved)
