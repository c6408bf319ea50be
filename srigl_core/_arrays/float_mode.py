"""Compute with subnormal numbers, whatever mode the calling thread is in (SPEC 2).

XLA's CPU threads, ``torch.set_flush_denormal`` and code built with ``-ffast-math`` make the
processor replace subnormals by zero. Detecting that takes two Python float operations. Only a
thread in that mode pays for the switch to IEEE arithmetic and back.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from srigl_core.errors import SriglError

__all__ = ["float_environment", "honour_subnormals", "subnormals_are_flushed"]

_SMALLEST_NORMAL = 2.2250738585072014e-308
_SMALLEST_SUBNORMAL = 5e-324
_HALF = 0.5
_FENV_BYTES = 512  # larger than any platform's fenv_t
_MCW_DN, _DN_SAVE = 0x03000000, 0  # of Windows' <float.h>


def subnormals_are_flushed() -> bool:
    """Whether this thread replaces subnormal results or operands by zero."""
    return _SMALLEST_NORMAL * _HALF == 0.0 or _SMALLEST_SUBNORMAL + _SMALLEST_SUBNORMAL == 0.0


def honour_subnormals() -> AbstractContextManager[None]:
    """Return a context in which this thread computes with subnormals.

    Raises
    ------
    SriglError
        If the thread flushes them and cannot be switched.
    """
    return _ieee_environment() if subnormals_are_flushed() else nullcontext()


@contextmanager
def _ieee_environment() -> Iterator[None]:
    is_windows = sys.platform == "win32"
    with _windows_saves_denormals() if is_windows else float_environment(_default_environment):
        if subnormals_are_flushed():
            raise SriglError(
                "this thread flushes subnormal numbers to zero and could not be switched back; "
                "call from a thread in the default floating-point mode"
            )
        yield


@contextmanager
def float_environment(changed: Callable[[bytes], Any]) -> Iterator[None]:
    """Run this thread in the environment that `changed` makes of the current ``fenv_t``'s bytes."""
    libm = _c_library()
    if not hasattr(libm, "fesetenv"):
        raise SriglError(
            "this thread flushes subnormal numbers to zero, and this platform's C library offers "
            "no way to switch back; call from a thread in the default floating-point mode"
        )
    saved = ctypes.create_string_buffer(_FENV_BYTES)
    libm.fegetenv(saved)
    libm.fesetenv(changed(saved.raw))
    try:
        yield
    finally:
        libm.fesetenv(saved)


def _default_environment(current: bytes) -> Any:
    """Return the pointer FE_DFL_ENV."""
    try:  # macOS: an object
        return (ctypes.c_char * _FENV_BYTES).in_dll(_c_library(), "_FE_DFL_ENV")
    except ValueError:  # glibc and musl
        return ctypes.c_void_p(-1)


@contextmanager
def _windows_saves_denormals() -> Iterator[None]:
    """Honour subnormals by the one function that Windows documents for it."""
    control = _c_library()._controlfp_s
    before, ignored = ctypes.c_uint(), ctypes.c_uint()
    control(ctypes.byref(before), 0, 0)
    control(ctypes.byref(ignored), _DN_SAVE, _MCW_DN)
    try:
        yield
    finally:
        control(ctypes.byref(ignored), before.value, _MCW_DN)


@functools.cache
def _c_library() -> ctypes.CDLL:
    if sys.platform == "win32":
        return ctypes.CDLL("ucrtbase")
    try:
        return ctypes.CDLL("libm.so.6")
    except OSError:  # macOS and musl have no library of its own for <fenv.h>
        return ctypes.CDLL(None)
