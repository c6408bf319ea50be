"""Calls of Python functions from jitted JAX computations on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from srigl_core.errors import BackendUnavailableError

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # before JAX 0.6.1, or if a later JAX removes it
    buffer_callback = None

__all__ = ["check_on_cpu", "host_call"]


def check_on_cpu(*arrays: Any) -> None:
    """Raise BackendUnavailableError if a JAX array, not a tracer, is on another device."""
    for array in arrays:
        if not isinstance(array, jax.core.Tracer | np.ndarray):
            _check_platform(next(iter(array.devices())).platform)


def host_call(
    function: Callable[..., None], shape: tuple[int, ...], dtype: np.dtype[Any], *operands: Any
) -> Any:
    """Return the array that `function` writes at run time.

    JAX's ``buffer_callback`` passes XLA's memory to `function`. Without it ``jax.pure_callback`` is
    used, which is slower because it makes JAX arrays of the operands and copies the result.

    Parameters
    ----------
    function : callable
        Called as ``function(out, *operands)`` with NumPy arrays; it must write `out`. It must be
        hashable, and equal to functions that may share compiled code.
    shape : tuple of int
        Shape of `out`.
    dtype : numpy.dtype
        Dtype of `out`.
    operands : array

    Raises
    ------
    BackendUnavailableError
        If it runs on another device. In a jitted function JAX raises the error at run time.
    """
    result = jax.ShapeDtypeStruct(shape, dtype)
    if buffer_callback is not None:
        return buffer_callback(_OnBuffers(function), result)(*operands)
    _check_platform(jax.default_backend())
    return jax.pure_callback(_OnArrays(function, shape, dtype), result, *operands)


@dataclass(frozen=True)
class _OnBuffers:
    """Calls a function with XLA's buffers, for ``buffer_callback``."""

    function: Callable[..., None]

    def __call__(self, context: Any, out: Any, *operands: Any) -> None:
        try:
            arrays = [np.asarray(buffer) for buffer in (out, *operands)]
        except RuntimeError:  # raised by JAX for buffers on a GPU
            _check_platform("another device")
            raise
        self.function(*arrays)


@dataclass(frozen=True)
class _OnArrays:
    """Calls a function with a new array to write, and returns it, for ``jax.pure_callback``."""

    function: Callable[..., None]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __call__(self, *operands: Any) -> Any:
        out = np.empty(self.shape, self.dtype)
        self.function(out, *(np.asarray(operand) for operand in operands))
        return out


def _check_platform(platform: str) -> None:
    if platform != "cpu":
        raise BackendUnavailableError(
            f"srigl_core.jax computes on the CPU, but an array is on {platform}; call a plan "
            f"outside of jit instead: srigl_core.prepare(weight, backend='cupy')(x)"
        )
