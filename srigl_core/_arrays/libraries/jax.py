"""What is particular to JAX's arrays."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.libraries.library import ArrayLibrary
from srigl_core.errors import ValueTypeError

__all__ = ["JaxArrays"]

_MOST_COPIED = 1 << 14
"""Elements up to which a result may lie where JAX has to copy it from: that takes a few us."""


class JaxArrays(ArrayLibrary):
    """JAX's arrays, which nobody may write."""

    def owns(self, kind: type) -> bool:
        """Return whether `kind` is a class of arrays, or of what stands for them in a trace."""
        jax: Any = sys.modules.get("jax")
        is_there = hasattr(jax, "Array") and hasattr(jax, "core")  # it may just be imported
        return is_there and issubclass(kind, (jax.Array, jax.core.Tracer))

    def describe(self, array: object) -> str:
        """Return what it is."""
        return "a JAX array"

    def device(self, array: Any) -> str:
        """Return the platform that the array is on."""
        if _is_tracer(array):
            return "cpu"
        platform = str(next(iter(array.devices())).platform)
        return "cuda" if platform == "gpu" else platform

    def check(self, array: Any, what: str) -> None:
        """Refuse tracers, which hold no numbers, and arrays that several devices hold parts of."""
        if _is_tracer(array):
            raise ValueTypeError(
                f"{what} is a JAX tracer, which holds no numbers yet; inside jit, grad and vmap "
                f"use srigl_core.jax.condensed_linear, and update masks outside of them"
            )
        if len(array.devices()) > 1:
            raise ValueTypeError(
                f"{what} is spread over {len(array.devices())} JAX devices; pass what one of them "
                f"holds, for example jax.device_put({what}, jax.devices()[0])"
            )

    def lend(self, array: Any) -> tuple[Any, np.dtype[Any] | None]:
        """Return NumPy's view of the array, or on a GPU the array, which CuPy can read.

        NumPy's own reading of DLPack knows no bfloat16; JAX gives it one of ml_dtypes.
        """
        return (np.asarray(array) if self.device(array) == "cpu" else array), None

    def lend_at_once(self, array: Any) -> NDArray[Any] | None:
        """Return a NumPy array of a small array's memory: a small result is copied in no time."""
        if _is_tracer(array) or array.size > _MOST_COPIED:
            return None
        is_here = len(array.devices()) == 1 and self.device(array) == "cpu"
        return np.asarray(array) if is_here else None

    def adopt(self, array: Any, like: Any) -> Any:
        """Return a JAX array, of the same memory where that begins at a multiple of 64 bytes.

        JAX makes float32 of float64 without a word unless it was told otherwise.
        """
        jax, wide = sys.modules["jax"], array.dtype == np.float64
        if wide and not jax.config.jax_enable_x64:
            raise ValueTypeError(
                "the result is float64, which JAX has only with jax_enable_x64; switch that on, "
                "or convert the weight to float32"
            )
        if not isinstance(array, np.ndarray):
            return jax.dlpack.from_dlpack(array)
        (device,) = like.devices()
        made = jax.device_put(array, device if like.committed else None, may_alias=True)
        return made if made.devices() == {device} else jax.device_put(made, device)

    def check_writable(self, array: Any, what: str) -> None:
        """Refuse: JAX shares an array's memory with whatever was computed from it."""
        raise self.not_writable(array, what)


def _is_tracer(array: object) -> bool:
    return isinstance(array, sys.modules["jax"].core.Tracer)
