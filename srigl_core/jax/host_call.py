"""Have JAX call a function of NumPy arrays in the middle of a computation, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from srigl_core.errors import BackendUnavailableError

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # an older JAX, or one that has outgrown it
    buffer_callback = None

__all__ = ["check_on_cpu", "host_call"]


def check_on_cpu(*arrays: Any) -> None:
    """Raise BackendUnavailableError if an array is on another device; a tracer is on none."""
    for array in arrays:
        if not isinstance(array, jax.core.Tracer):
            _check_platform(next(iter(array.devices())).platform)


def host_call(
    function: Callable[..., None], shape: tuple[int, ...], dtype: np.dtype[Any], *operands: Any
) -> Any:
    """Return what `function` writes when the operands have been computed.

    Called through XLA's foreign function interface, where JAX has a way from there to Python: it
    hands over its own memory, while ``jax.pure_callback`` makes arrays of it, and copies results.

    Parameters
    ----------
    function : callable
        Called as ``function(out, *operands)`` with NumPy arrays; `out` is to be written. Hashable,
        and equal to what is to be compiled alike. Under ``vmap`` all have a leading axis more, of
        length 1 where an operand is not mapped.
    shape, dtype
        Of `out`.
    operands : array

    Raises
    ------
    BackendUnavailableError
        If it is to run on another device; in a jitted function JAX says so when it runs.
    """
    if buffer_callback is not None:
        result = jax.ShapeDtypeStruct(shape, dtype)
        return buffer_callback(_Lent(function), result, vmap_method="expand_dims")(*operands)
    _check_platform(jax.default_backend())
    returned = _Returned(function, shape, dtype, operands[0].ndim)
    result = jax.ShapeDtypeStruct(shape, dtype)
    return jax.pure_callback(returned, result, *operands, vmap_method="expand_dims")


@dataclass(frozen=True)
class _Lent:
    """Calls a function with buffers of XLA's."""

    function: Callable[..., None]

    def __call__(self, context: Any, out: Any, *operands: Any) -> None:
        try:
            arrays = [np.asarray(buffer) for buffer in (out, *operands)]
        except RuntimeError:  # which is what JAX says of a GPU's
            _check_platform("another device")
            raise
        self.function(*arrays)


@dataclass(frozen=True)
class _Returned:
    """Calls a function with an array of its own to write, and returns that."""

    function: Callable[..., None]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rank: int

    def __call__(self, *operands: Any) -> Any:
        arrays = [np.asarray(operand) for operand in operands]
        n_mapped = arrays[0].ndim - self.rank
        mapped = np.broadcast_shapes(*(array.shape[:n_mapped] for array in arrays))
        out = np.empty((*mapped, *self.shape), self.dtype)
        self.function(out, *arrays)
        return out


def _check_platform(platform: str) -> None:
    if platform != "cpu":
        raise BackendUnavailableError(
            f"srigl_core.jax computes on the CPU, and this is on {platform}; call a plan outside "
            f"of jit instead: srigl_core.prepare(weight, backend='cupy')(x)"
        )
