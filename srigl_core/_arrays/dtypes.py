"""The value types of a condensed layer, and how they combine (SPEC 1 and 2).

NumPy has no bfloat16. Its dtype comes from ``ml_dtypes``, which is imported only to make a bfloat16
array. Recognising one needs no import: its dtype exists only once ``ml_dtypes`` is imported.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from srigl_core.errors import ValueTypeError

__all__ = [
    "VALUE_TYPES",
    "accumulator_dtype",
    "as_float_view",
    "index_dtype",
    "is_half",
    "result_dtype",
    "round_to",
    "value_dtype",
]

VALUE_TYPES = ("float16", "bfloat16", "float32", "float64")

_NATIVE: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float16): np.dtype(np.float16),
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(np.float64): np.dtype(np.float64),
}


def value_dtype(dtype: DTypeLike, what: str = "dtype") -> np.dtype[Any]:
    """Return `dtype` as one of the four value types, in native byte order.

    Parameters
    ----------
    dtype : dtype-like
        A NumPy dtype, or a name from `VALUE_TYPES`.
    what : str
        Name of the argument that has the dtype, for the error message.

    Returns
    -------
    numpy.dtype
        float16, bfloat16, float32 or float64.

    Raises
    ------
    ValueTypeError
        If `dtype` is not one of the four.
    """
    if isinstance(dtype, str) and dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    try:
        result: np.dtype[Any] = np.dtype(dtype)
    except Exception:  # NumPy raises many kinds: for texts, tuples and objects with a dtype
        raise ValueTypeError(
            f"{what} {dtype!r} is not a number type; use one of {', '.join(VALUE_TYPES)}"
        ) from None
    if result in _NATIVE:
        return _NATIVE[result]
    if result.name == "bfloat16":
        return result
    if result.kind == "f" and result.newbyteorder("=") in _NATIVE:
        return result.newbyteorder("=")
    raise ValueTypeError(
        f"{what} {result.name!r} is not supported; convert to one of {', '.join(VALUE_TYPES)} "
        f"first, for example array.astype(numpy.float32)"
    )


def result_dtype(x: np.dtype[Any], values: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a product of `x` and `values` (SPEC 2, Types).

    Raises
    ------
    ValueTypeError
        If one is float16 and the other bfloat16: neither can represent the other.
    """
    if x == values:
        return x
    if {x.name, values.name} == {"float16", "bfloat16"}:
        raise ValueTypeError(
            f"{x.name} and {values.name} do not combine: neither holds the other's numbers; "
            f"convert one of them, for example to float32"
        )
    return np.result_type(x, values)


@functools.cache
def accumulator_dtype(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """Return float64 if any of `dtypes` is float64, else float32 (SPEC 2, Types)."""
    wide = any(dtype == np.float64 for dtype in dtypes)
    return np.dtype(np.float64 if wide else np.float32)


def index_dtype(n_in: int) -> np.dtype[Any]:
    """Return uint16 if it can number `n_in` columns, else uint32 (SPEC 1)."""
    return np.dtype(np.uint16 if n_in <= 65536 else np.uint32)


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether `dtype` is one of the two 16-bit value types."""
    return dtype.char in ("e", "E")  # float16, and bfloat16 of ml_dtypes; `dtype.name` is slow


def as_float_view(array: NDArray[Any]) -> NDArray[Any]:
    """Return `array` itself, or an exact float32 copy of 16-bit numbers."""
    return array.astype(np.float32) if is_half(array.dtype) else array


def round_to(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round `array` once, to nearest even, to `dtype`.

    NumPy rounds its own types once. ``ml_dtypes`` converts float64 to bfloat16 through float32,
    which rounds twice. Here the first rounding is to odd, which makes the second one exact
    (S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums", 2008).

    Parameters
    ----------
    array : ndarray, float32 or float64
    dtype : numpy.dtype
        One of the four value types.

    Returns
    -------
    ndarray of `dtype`
        `array` itself if it has that dtype already.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype.name == "bfloat16" and array.dtype == np.float64:
            nearest = array.astype(np.float32)
            inexact = (nearest != array) & np.isfinite(nearest)
            away = inexact & (np.abs(nearest) > np.abs(array))
            bits = nearest.view(np.uint32) - away
            array = (bits | inexact).view(np.float32)
        return array.astype(dtype)
