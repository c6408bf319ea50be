"""Conversions between tensors and NumPy arrays, without a copy where possible."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._product_spec import ArraySpec

__all__ = ["as_numpy", "from_numpy", "numpy_dtype", "spec_of", "torch_dtype"]

_DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}


@functools.cache
def numpy_dtype(dtype: Any, what: str = "tensor") -> np.dtype[Any]:
    """Return the NumPy dtype of a `torch.dtype`; that of bfloat16 is from ``ml_dtypes``.

    Raises
    ------
    ValueTypeError
        If it is not a value type.
    """
    return value_dtype(_DTYPES.get(dtype, str(dtype)), f"{what} of dtype")


def torch_dtype(dtype: np.dtype[Any]) -> Any:
    """Return the `torch.dtype` of a value type."""
    return getattr(torch, dtype.name)


def spec_of(tensor: Any, what: str) -> ArraySpec:
    """Return the shape and the NumPy dtype of a tensor; also of a fake one."""
    return ArraySpec(tuple(tensor.shape), numpy_dtype(tensor.dtype, what))


def as_numpy(tensor: Any) -> NDArray[Any]:
    """Return a tensor as a NumPy array: a view on the CPU, a copy from another device.

    Parameters
    ----------
    tensor : torch.Tensor
        A bfloat16 tensor becomes an array of ``ml_dtypes.bfloat16``.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    array: NDArray[Any]
    if tensor.dtype is torch.bfloat16:
        array = tensor.view(torch.int16).numpy().view(value_dtype("bfloat16"))
    else:
        array = tensor.numpy()
    return array


def from_numpy(array: NDArray[Any]) -> Any:
    """Return a NumPy array as a tensor that shares its memory where PyTorch allows it.

    Parameters
    ----------
    array : ndarray
        Of any value type, bfloat16 included, or another dtype that PyTorch has. An array that is
        read-only, misaligned, or has negative strides is copied.
    """
    steps = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    if not (array.flags.behaved and steps):
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
