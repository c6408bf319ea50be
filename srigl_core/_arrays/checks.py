"""Checks of the arguments of public functions; errors say what was expected and what was passed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._arrays.libraries import as_array, library_of
from srigl_core.errors import SriglError, ValueTypeError

__all__ = [
    "as_float_array",
    "as_int8_array",
    "as_mask",
    "as_out",
    "check_choice",
    "check_flag",
    "check_generator",
    "check_integer",
    "check_lengths",
    "check_out",
    "check_real",
    "check_workspace",
    "overlaps_itself",
]

_WORKSPACE_ALIGNMENT = 16
"""In bytes: the size of a kernel's widest loads."""


def as_float_array(array: object, what: str) -> NDArray[Any]:
    """Return `array` as an ndarray of a value type; only foreign byte order makes a copy.

    Parameters
    ----------
    array : array
        A NumPy, PyTorch or JAX array, a memoryview, or another object with
        ``__array_interface__`` or ``__dlpack__``; in the host's memory.
    what : str
        Name of the argument, for error messages.

    Raises
    ------
    ValueTypeError
        If it is not such an object, or has another dtype.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise ValueTypeError(f"{what} is a masked array; pass its .filled(0), or its .data")
    result = _on_host(array, what)
    if result is None:
        raise ValueTypeError(
            f"{what} must be an array (NumPy, __array_interface__ or CPU DLPack), got "
            f"{type(array).__name__}; convert it with numpy.asarray(..., dtype=numpy.float32)"
        )
    dtype = value_dtype(result.dtype, f"{what} of dtype")
    return result if result.dtype == dtype else result.astype(dtype)


def as_int8_array(array: object, what: str) -> NDArray[np.int8]:
    """Return `array` as an ndarray of int8, without a copy.

    Raises
    ------
    ValueTypeError
        If it is not an array, or has another dtype.
    """
    result = None if isinstance(array, np.ma.MaskedArray) else _on_host(array, what)
    if result is None or result.dtype != np.int8:
        actual = type(array).__name__ if result is None else f"dtype {result.dtype}"
        raise ValueTypeError(f"{what} must be an array of int8, got {actual}")
    return result


def as_mask(mask: object, shape: tuple[int, ...] | None, what: str = "mask") -> NDArray[np.bool_]:
    """Return `mask` as a boolean array of `shape`, or of any shape if that is None.

    Raises
    ------
    ValueTypeError
        If it is not an array of bool. Arrays of numbers are not taken for masks.
    SriglError
        If it has another shape.
    """
    result = None if isinstance(mask, np.ma.MaskedArray) else _on_host(mask, what)
    if result is None or result.dtype != np.bool_:
        actual = type(mask).__name__ if result is None else f"dtype {result.dtype}"
        raise ValueTypeError(f"{what} must be an array of bool, got {actual}; pass mask != 0")
    if shape is not None and result.shape != shape:
        raise SriglError(f"{what} has shape {result.shape}, but must have {shape}")
    return result


def _on_host(array: object, what: str) -> NDArray[Any] | None:
    """Return an array as a NumPy array of the same memory, or None if it is not an array."""
    if isinstance(array, np.ndarray):
        return np.asarray(array)  # subclasses such as numpy.matrix define other products
    hint = "a NumPy array, for example what its .numpy() or numpy.asarray(...) gives"
    result: NDArray[Any] | None = as_array(array, what, _read, hint)
    return result


def _read(array: Any) -> NDArray[Any] | None:
    if isinstance(array, np.ndarray | memoryview) or hasattr(array, "__array_interface__"):
        return np.asarray(array)
    return np.from_dlpack(array) if hasattr(array, "__dlpack__") else None


def check_integer(value: object, what: str, *, least: int, most: int | None = None) -> int:
    """Return `value` as an int within ``least..most``.

    Raises
    ------
    ValueTypeError
        If it is not an integer (True and 3.0 are not).
    SriglError
        If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueTypeError(f"{what}={value!r} must be an integer, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"between {least} and {most}"
        raise SriglError(f"{what}={value!r} must be {allowed}")
    return int(value)


def check_flag(value: object, what: str) -> bool:
    """Return `value` as a bool.

    Raises
    ------
    ValueTypeError
        If it is anything else, an array for example.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueTypeError(f"{what} must be True or False, got {type(value).__name__}")
    return bool(value)


def check_choice(value: object, what: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of the names that an argument may be.

    Raises
    ------
    SriglError
        If it is another name, or no name at all.
    """
    if not isinstance(value, str) or value not in choices:
        raise SriglError(f"{what}={value!r} is unknown; use one of {', '.join(choices)}")
    return value


def check_lengths(shape: object, what: str) -> tuple[int, ...]:
    """Return `shape` as a tuple of ints of at least 0.

    Raises
    ------
    ValueTypeError
        If it is not a tuple or list of integers.
    SriglError
        If a length is negative.
    """
    if not isinstance(shape, tuple | list):
        raise ValueTypeError(f"{what}={shape!r} must be a tuple of lengths, such as (16, 32)")
    return tuple(check_integer(length, f"length of {what}", least=0) for length in shape)


def check_generator(rng: object) -> np.random.Generator:
    """Return `rng` if it is a generator, or a new generator if it is a seed or None.

    Raises
    ------
    ValueTypeError
        If it is anything else.
    SriglError
        If the seed is negative.
    """
    if isinstance(rng, np.random.Generator):
        return rng
    return np.random.default_rng(None if rng is None else check_integer(rng, "rng", least=0))


def check_real(value: object, what: str) -> float:
    """Return `value` as a finite float.

    Raises
    ------
    ValueTypeError
        If it is not a real number.
    SriglError
        If it is NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueTypeError(f"{what}={value!r} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = np.inf
    if not np.isfinite(number):
        raise SriglError(f"{what}={value!r} must be finite")
    return number


def as_out(out: object, shape: tuple[int, ...], inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Return `out` as an ndarray of the same memory, to which a result of `shape` can be written.

    Raises
    ------
    ValueTypeError
        If `out` is not an array of a value type, or the arrays of its library are read-only.
    SriglError
        If its shape differs, it is read-only, several of its elements share memory, or it shares
        memory with one of `inputs`.
    """
    if type(out) is not np.ndarray:
        library_of(out).check_writable(out, "out")
    result = None if isinstance(out, np.ma.MaskedArray) else _on_host(out, "out")
    if result is None:
        raise ValueTypeError(f"out must be an array, got {type(out).__name__}")
    if value_dtype(result.dtype, "out of dtype") != result.dtype:
        raise ValueTypeError(f"out of dtype {result.dtype.str!r} must be in native byte order")
    if not result.flags.writeable:
        raise SriglError("out is read-only; pass a writeable array")
    check_out(result, shape, inputs, _share_memory)
    return result


def check_out(
    out: Any,
    shape: tuple[int, ...],
    inputs: Mapping[str, Any],
    share_memory: Callable[[Any, Any], bool],
) -> None:
    """Check that a result of `shape` can be written to an array of NumPy or of a device.

    Raises
    ------
    SriglError
        If the shape differs, several elements share memory, or `out` shares memory with an input.
    """
    if out.shape != shape:
        raise SriglError(f"out has shape {out.shape}, but the result has {shape}")
    if out.size and overlaps_itself(out):
        raise SriglError(
            f"out of strides {out.strides} has elements that share memory; pass an array of its own"
        )
    for name, array in inputs.items():
        if share_memory(out, array):
            raise SriglError(f"out shares memory with {name}, which must not be written; copy one")


def check_workspace(workspace: Any, address: int) -> None:
    """Check that an array of NumPy or of a device can be the working memory of kernels.

    Parameters
    ----------
    workspace : array
    address : int
        Address of its first byte.

    Raises
    ------
    ValueTypeError
        If its dtype is not uint8.
    SriglError
        If it is not one-dimensional and contiguous, or is not aligned.
    """
    if workspace.dtype != np.uint8:
        raise ValueTypeError(f"workspace must be an array of uint8, got {workspace.dtype}")
    if workspace.ndim != 1 or not workspace.flags.c_contiguous:
        raise SriglError(
            f"workspace has shape {workspace.shape} and strides {workspace.strides}, but must be "
            f"one run of bytes: one axis, contiguous"
        )
    if address % _WORKSPACE_ALIGNMENT:
        raise SriglError(
            f"workspace begins {address % _WORKSPACE_ALIGNMENT} bytes after a multiple of "
            f"{_WORKSPACE_ALIGNMENT}, where it must begin; do not slice off its first bytes"
        )


def _share_memory(out: NDArray[Any], array: NDArray[Any]) -> bool:
    if not np.may_share_memory(out, array):
        return False
    try:
        return np.shares_memory(out, array, max_work=10_000)  # type: ignore[arg-type] # numpy: any int
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(array: Any) -> bool:
    """Return whether elements of an array of NumPy or of a device may share memory."""
    reach = array.itemsize
    for stride, length in sorted(
        (abs(stride), length)
        for stride, length in zip(array.strides, array.shape, strict=True)
        if length > 1
    ):
        if stride < reach:
            return True
        reach = stride * (length - 1) + reach
    return False
