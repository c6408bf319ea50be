"""The adapter of JAX arrays."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.libraries.array_library import ArrayLibrary
from srigl_core.errors import ValueTypeError

__all__ = ["JaxArrays"]

_MOST_COPIED = 1 << 14
"""Elements up to which JAX copies a result in a few microseconds."""


class JaxArrays(ArrayLibrary):
    """JAX arrays, which are read-only."""

    def owns(self, cls: type) -> bool:
        """Return whether `cls` is a class of arrays or of tracers."""
        jax: Any = sys.modules.get("jax")
        is_imported = hasattr(jax, "Array") and hasattr(jax, "core")  # not so during its import
        return is_imported and issubclass(cls, (jax.Array, jax.core.Tracer))

    def describe(self, array: object) -> str:
        """Return a noun phrase for error messages."""
        return "a JAX array"

    def device(self, array: Any) -> str:
        """Return the array's platform."""
        if _is_tracer(array):
            return "cpu"
        platform = str(next(iter(array.devices())).platform)
        return "cuda" if platform == "gpu" else platform

    def check(self, array: Any, what: str) -> None:
        """Raise ValueTypeError for tracers and for arrays that are sharded over several devices."""
        if _is_tracer(array):
            raise ValueTypeError(
                f"{what} is a JAX tracer, which holds no numbers yet; inside jit, grad and vmap "
                f"use srigl_core.jax.condensed_linear; draw connections and update masks outside"
            )
        if len(array.devices()) > 1:
            raise ValueTypeError(
                f"{what} is spread over {len(array.devices())} JAX devices; pass an array on one "
                f"device, for example jax.device_put({what}, jax.devices()[0])"
            )

    def export(self, array: Any) -> tuple[Any, np.dtype[Any] | None]:
        """Return a NumPy view of the array; on a GPU the array itself, which CuPy can read.

        ``numpy.asarray`` gives the bfloat16 of ml_dtypes, which NumPy's DLPack does not support.
        """
        return (np.asarray(array) if self.device(array) == "cpu" else array), None

    def as_numpy_fast(self, array: Any) -> NDArray[Any] | None:
        """Return a NumPy view of a small array, whose result JAX copies quickly."""
        if _is_tracer(array) or array.size > _MOST_COPIED:
            return None
        on_cpu = len(array.devices()) == 1 and self.device(array) == "cpu"
        return np.asarray(array) if on_cpu else None

    def to_caller(self, array: Any, like: Any) -> Any:
        """Return a JAX array, which shares memory that is aligned to 64 bytes.

        Without jax_enable_x64 JAX would silently round float64 to float32.
        """
        jax = sys.modules["jax"]
        if array.dtype == np.float64 and not jax.config.jax_enable_x64:
            raise ValueTypeError(
                "the result is float64, which JAX supports with jax_enable_x64 only; enable it, or "
                "convert the weight to float32"
            )
        if not isinstance(array, np.ndarray):
            return jax.dlpack.from_dlpack(array)
        (device,) = like.devices()
        made = jax.device_put(array, device if like.committed else None, may_alias=True)
        return made if made.devices() == {device} else jax.device_put(made, device)

    def check_writable(self, array: Any, what: str) -> None:
        """Raise ValueTypeError: JAX may share an array's memory with other arrays."""
        raise self.not_writable(array, what)


def _is_tracer(array: object) -> bool:
    return isinstance(array, sys.modules["jax"].core.Tracer)
