"""Arrays of any dtype, magnitude and memory layout, and masks of any density."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._format.weight import CondensedWeight
from srigl_core.testing.bounds import float_limits
from srigl_core.testing.kernel_capabilities import KernelCapabilities

__all__ = [
    "BETWEEN",
    "MAGNITUDES",
    "ORDERED_DTYPES",
    "UPDATE_MAGNITUDES",
    "any_mask",
    "array_of",
    "combinable_dtypes",
    "laid_out",
    "random_numbers",
]

MAGNITUDES = ("integers", "normal", "zeros", "cancelling", "subnormal", "huge", "spread")


UPDATE_MAGNITUDES = ("integers", "normal", "zeros", "subnormal", "spread", "close")


ORDERED_DTYPES = ("float32", "float64", "float16", "bfloat16")


BETWEEN = 77  # in memory between the elements of an array


def combinable_dtypes(
    capabilities: KernelCapabilities, *others: np.dtype[Any]
) -> list[np.dtype[Any]]:
    """Return the value types that combine with all `others`, float32 first."""
    refused = {{"float16": "bfloat16", "bfloat16": "float16"}.get(other.name) for other in others}
    names = [name for name in ORDERED_DTYPES if name in capabilities.value_dtypes - refused]
    return [value_dtype(name) for name in names]


def array_of(
    numbers: Any, dtype: str, layout: str = "C", shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    """Return an array of bool or a value type, named by `dtype`, in a layout of `LAYOUTS`."""
    array = np.array(numbers, bool if dtype == "bool" else value_dtype(dtype))
    return laid_out(array if shape is None else array.reshape(shape), layout)


def laid_out(array: NDArray[Any], layout: str) -> NDArray[Any]:
    """Return the numbers of `array` in a memory layout of `LAYOUTS`."""
    if layout == "F":
        return np.asfortranarray(array)
    if layout == "reversed":
        return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    if layout == "rows reversed":
        return np.ascontiguousarray(array[::-1])[::-1]
    if layout == "shared rows" and array.ndim > 1:
        return np.broadcast_to(array[:1], array.shape)
    if layout == "shared columns":
        return np.broadcast_to(array[..., :1], array.shape)
    if layout == "shared everywhere":
        return np.broadcast_to(array[(slice(1),) * array.ndim], array.shape)
    if layout == "every second":
        shape = (*array.shape[:-1], 2 * array.shape[-1])
        view = np.full(shape, BETWEEN, array.dtype)[..., ::2]
    elif layout == "columns of a wider array":
        shape = (*array.shape[:-1], array.shape[-1] + 3)
        beyond = BETWEEN if array.dtype.kind in "biu" else np.nan
        view = np.full(shape, beyond, array.dtype)[..., 1:-2]
    elif layout == "F within a larger array":
        shape = (array.shape[0] + 1, *array.shape[1:])
        view = np.full(shape, BETWEEN, array.dtype, order="F")[:-1]
    elif layout == "offset by a byte":
        view = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    else:
        return np.ascontiguousarray(array)
    view[...] = array
    return view


def any_mask(
    rng: np.random.Generator, shape: tuple[int, int], *, constant_fan_in: bool
) -> NDArray[np.bool_]:
    """Return a mask: any constant fan-in with any ablation, or rows that differ."""
    n_out, n_in = shape
    if not constant_fan_in:
        return rng.random(shape) < rng.random()
    weight = CondensedWeight.random(
        shape,
        fan_in=int(rng.integers(1, n_in + 1)),
        n_active=int(rng.integers(1, n_out + 1)),
        rng=rng,
    )
    return weight.to_mask()


def random_numbers(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], magnitude: str
) -> NDArray[Any]:
    """Return finite numbers of a magnitude in `MAGNITUDES` or `UPDATE_MAGNITUDES`.

    The numbers "away from zero" are 0.5 or more, or -0.5 or less.
    """
    limits = float_limits(dtype)
    numbers: NDArray[Any]
    if magnitude == "integers":
        numbers = rng.integers(-4, 5, shape).astype(np.float64)
    elif magnitude == "zeros":
        numbers = rng.choice([0.0, -0.0, 1.0, -2.0], shape, p=[0.4, 0.3, 0.2, 0.1])
    elif magnitude == "subnormal":
        numbers = rng.integers(-9, 10, shape) * limits.smallest
        numbers = np.where(rng.random(shape) < 0.5, numbers, rng.integers(-3, 4, shape))
    elif magnitude == "close":
        signs = rng.choice([-1.0, 1.0], shape)
        numbers = signs * (1 + rng.integers(0, 16, shape) * 2 * limits.roundoff)
    elif magnitude == "away from zero":
        numbers = rng.standard_normal(shape)
        numbers += np.copysign(0.5, numbers)
    elif magnitude == "huge":
        numbers = rng.standard_normal(shape) * np.sqrt(limits.largest) / 4
    elif magnitude == "spread":
        reach = 3.0 if dtype == np.float16 else 12.0
        numbers = rng.standard_normal(shape) * 10.0 ** rng.uniform(-reach, reach, shape)
    else:
        numbers = rng.standard_normal(shape)
    return np.asarray(numbers).astype(dtype)
