"""Make a thread flush subnormal numbers to zero, to test that kernels do not depend on its mode."""

from __future__ import annotations

import platform
import sys
from contextlib import AbstractContextManager, nullcontext

from srigl_core._arrays.float_mode import float_environment

__all__ = ["can_flush_subnormals", "flushing_subnormals"]

_MXCSR = slice(28, 32)  # in glibc's fenv_t for x86-64, behind the x87 environment
_FLUSH = (1 << 15) | (1 << 6)


def can_flush_subnormals() -> bool:
    """Whether the mode can be set on this platform: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def flushing_subnormals() -> AbstractContextManager[None]:
    """Flush subnormals in this thread; does nothing where `can_flush_subnormals` is False."""
    return float_environment(_flushing) if can_flush_subnormals() else nullcontext()


def _flushing(environment: bytes) -> bytes:
    mode = int.from_bytes(environment[_MXCSR], "little") | _FLUSH
    return environment[: _MXCSR.start] + mode.to_bytes(4, "little") + environment[_MXCSR.stop :]
