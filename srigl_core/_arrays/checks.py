"""Checks of array arguments at the public door; each error says what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._arrays.libraries import as_array, library_of
from srigl_core.errors import SriglError, ValueTypeError

__all__ = [
    "as_float_array",
    "as_mask",
    "as_out",
    "check_generator",
    "check_integer",
    "check_lengths",
    "check_real",
    "check_workspace",
    "overlaps_itself",
]

_WORKSPACE_ALIGNMENT = 16
"""Bytes; kernels load as many at a time."""


def as_float_array(array: object, what: str) -> NDArray[Any]:
    """Return `array` as an ndarray of a value type, without a copy but for foreign byte order.

    Parameters
    ----------
    array : array
        NumPy's, PyTorch's or JAX's, a memoryview, or an object with ``__array_interface__`` or
        ``__dlpack__``; in the host's memory.
    what : str
        Its name, for error messages.

    Raises
    ------
    ValueTypeError
        If it is no such object, or holds other numbers.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise ValueTypeError(f"{what} is a masked array; pass its .filled(0), or its .data")
    found = _on_host(array, what)
    if found is None:
        raise ValueTypeError(
            f"{what} must be an array (NumPy, __array_interface__ or CPU DLPack), got "
            f"{type(array).__name__}; convert it with numpy.asarray(..., dtype=numpy.float32)"
        )
    dtype = value_dtype(found.dtype, f"{what} of dtype")
    return found if found.dtype == dtype else found.astype(dtype)


def as_mask(mask: object, shape: tuple[int, ...] | None, what: str = "mask") -> NDArray[np.bool_]:
    """Return `mask` as a boolean array of `shape`, or of any if that is None.

    Raises
    ------
    ValueTypeError
        If it is not an array of bool: numbers are not guessed to be masks.
    SriglError
        If it has another shape.
    """
    found = None if isinstance(mask, np.ma.MaskedArray) else _on_host(mask, what)
    if found is None or found.dtype != np.bool_:
        came = type(mask).__name__ if found is None else f"dtype {found.dtype}"
        raise ValueTypeError(f"{what} must be an array of bool, got {came}; pass mask != 0")
    if shape is not None and found.shape != shape:
        raise SriglError(f"{what} has shape {found.shape}, but must have {shape}")
    return found


def _on_host(array: object, what: str) -> NDArray[Any] | None:
    """Return an array as one of NumPy's, of the same memory; None for what is no array."""
    if isinstance(array, np.ndarray):
        return np.asarray(array)  # numpy.matrix has products of its own
    hint = "a NumPy array, for example what its .numpy() or numpy.asarray(...) gives"
    found: NDArray[Any] | None = as_array(array, what, _read, hint)
    return found


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


def check_lengths(shape: object, what: str) -> tuple[int, ...]:
    """Return `shape` as a tuple of ints of at least 0.

    Raises
    ------
    ValueTypeError
        If it is no tuple or list of integers.
    SriglError
        If a length is negative.
    """
    if not isinstance(shape, tuple | list):
        raise ValueTypeError(f"{what}={shape!r} must be a tuple of lengths, such as (16, 32)")
    return tuple(check_integer(length, f"length of {what}", least=0) for length in shape)


def check_generator(rng: object) -> np.random.Generator:
    """Return `rng`, or a new generator where it is a seed or None.

    Raises
    ------
    ValueTypeError
        If it is neither.
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
        If `out` is no array of a value type, or its library lets nobody write to it.
    SriglError
        If its shape differs, it is read-only, several of its elements share memory, or it shares
        memory with one of `inputs`.
    """
    if type(out) is not np.ndarray:
        library_of(out).check_writable(out, "out")
    found = None if isinstance(out, np.ma.MaskedArray) else _on_host(out, "out")
    if found is None:
        raise ValueTypeError(f"out must be an array, got {type(out).__name__}")
    if value_dtype(found.dtype, "out of dtype") != found.dtype:
        raise ValueTypeError(f"out of dtype {found.dtype.str!r} must be in native byte order")
    if found.shape != shape:
        raise SriglError(f"out has shape {found.shape}, but the result has {shape}")
    if not found.flags.writeable:
        raise SriglError("out is read-only; pass a writeable array")
    if found.size and overlaps_itself(found):
        raise SriglError(
            f"out of strides {found.strides} has elements that share memory; pass an array of its "
            f"own"
        )
    for name, array in inputs.items():
        if np.may_share_memory(found, array) and _share_memory(found, array):
            raise SriglError(f"out shares memory with {name}, which must not be written; copy one")
    return found


def check_workspace(workspace: Any, address: int) -> None:
    """Check that an array, NumPy's or a device's, is bytes that kernels can use as they like.

    Parameters
    ----------
    workspace : array
    address : int
        Of its first byte.

    Raises
    ------
    ValueTypeError
        If it holds anything but bytes.
    SriglError
        If it is not one run of bytes, or begins at an odd address.
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
    try:
        return np.shares_memory(out, array, max_work=10_000)  # type: ignore[arg-type] # numpy: any int
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(array: Any) -> bool:
    """Return whether several elements of an array, NumPy's or a device's, may share memory."""
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
