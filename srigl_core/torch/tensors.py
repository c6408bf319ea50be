"""Tensors as NumPy arrays, and arrays as tensors: the same memory where both can have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype

__all__ = ["as_numpy", "from_numpy"]


def as_numpy(tensor: Any) -> NDArray[Any]:
    """Return a tensor as a NumPy array: a view of its memory, or a copy of another device's.

    Parameters
    ----------
    tensor : torch.Tensor
        NumPy has no bfloat16: the array is of that of ``ml_dtypes``.
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
    """Return a NumPy array as a tensor of its memory, or of a copy where that cannot be one's.

    Parameters
    ----------
    array : ndarray
        Of any of the value types, bfloat16 included, or of numbers that PyTorch has. One that is
        read-only, misaligned, or runs backwards is copied.
    """
    steps = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    if not (array.flags.behaved and steps):
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
