"""Compute with subnormal numbers, whatever mode the calling thread is in (SPEC 2).

XLA's CPU threads, ``torch.set_flush_denormal`` and code built with ``-ffast-math`` make the
processor replace subnormals by zero. Detecting that takes two Python float operations. Only a
thread in that mode pays for the switch to IEEE arithmetic and back.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from srigl_core.errors import SriglError

__all__ = ["float_environment", "honour_subnormals", "subnormals_are_flushed"]

_SMALLEST_NORMAL = 2.2250738585072014e-308
_SMALLEST_SUBNORMAL = 5e-324
_HALF = 0.5
_FENV_BYTES = 512  # larger than any platform's fenv_t
_FE_DFL_ENV = ctypes.c_void_p(-1)  # glibc and musl: ((const fenv_t *) -1)


def subnormals_are_flushed() -> bool:
    """Whether this thread replaces subnormal results or operands by zero."""
    return _SMALLEST_NORMAL * _HALF == 0.0 or _SMALLEST_SUBNORMAL + _SMALLEST_SUBNORMAL == 0.0


def honour_subnormals() -> AbstractContextManager[None]:
    """Return a context in which this thread computes with subnormals.

    Raises
    ------
    SriglError
        If the thread flushes them and the platform's C library has no ``fesetenv``.
    """
    return _ieee_environment() if subnormals_are_flushed() else nullcontext()


@contextmanager
def _ieee_environment() -> Iterator[None]:
    with float_environment(lambda current: _FE_DFL_ENV):
        if subnormals_are_flushed():
            raise SriglError(
                "this thread flushes subnormal numbers to zero and could not be switched back; "
                "call from a thread in the default floating-point mode"
            )
        yield


@contextmanager
def float_environment(changed: Callable[[bytes], Any]) -> Iterator[None]:
    """Run this thread in the environment that `changed` makes of the current ``fenv_t``'s bytes."""
    libm = _libm()
    saved = ctypes.create_string_buffer(_FENV_BYTES)
    libm.fegetenv(saved)
    libm.fesetenv(changed(saved.raw))
    try:
        yield
    finally:
        libm.fesetenv(saved)


@functools.cache
def _libm() -> ctypes.CDLL:
    try:
        libm = ctypes.CDLL("libm.so.6")
        libm.fegetenv.argtypes = libm.fesetenv.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError):
        raise SriglError(
            "this thread flushes subnormal numbers to zero, and this platform's C library offers "
            "no way to switch back; call from a thread in the default floating-point mode"
        ) from None
    return libm
