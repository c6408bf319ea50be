"""Conversions between tensors and NumPy arrays, without a copy where possible."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._product_spec import ArraySpec
from srigl_core.errors import ValueTypeError
from srigl_core.torch.sharded_tensors import is_sharded

__all__ = ["as_numpy", "from_numpy", "numpy_dtype", "on_device_of", "spec_of", "torch_dtype"]

_ON_CPU = nullcontext()


@functools.cache
def numpy_dtype(dtype: Any, what: str = "tensor") -> np.dtype[Any]:
    """Return the NumPy dtype of a `torch.dtype`; bfloat16 is that of ``ml_dtypes``.

    Raises
    ------
    ValueTypeError
        If it is not a value type.
    """
    return value_dtype(str(dtype).removeprefix("torch."), f"{what} of dtype")


@functools.cache
def torch_dtype(dtype: np.dtype[Any]) -> Any:
    """Return the `torch.dtype` of a value type."""
    return getattr(torch, dtype.name)


def spec_of(tensor: Any, what: str) -> ArraySpec:
    """Return the shape and the NumPy dtype of a tensor, which may be a fake tensor."""
    return ArraySpec(tuple(tensor.shape), numpy_dtype(tensor.dtype, what))


def on_device_of(tensor: Any) -> AbstractContextManager[Any]:
    """Return a context in which the CUDA device of a tensor is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _ON_CPU


def as_numpy(tensor: Any) -> NDArray[Any]:
    """Return a tensor as a NumPy array: a view on the CPU, a copy from another device.

    Parameters
    ----------
    tensor : torch.Tensor
        A bfloat16 tensor becomes an array of ``ml_dtypes.bfloat16``.

    Raises
    ------
    ValueTypeError
        If it is sparse, quantised, sharded, or has no numbers, as on the device meta.
    """
    if is_sharded(tensor):
        raise ValueTypeError(
            "a tensor that is sharded over processes (a DTensor) cannot be read as an array; pass "
            "its full_tensor(), which all ranks must call"
        )
    if tensor.is_meta:
        raise ValueTypeError(
            "a tensor on the device meta has no numbers; give the model memory with "
            "to_empty(device=...) and load a state first"
        )
    if tensor.requires_grad:
        tensor = tensor.detach()
    tensor = tensor.resolve_neg()  # of a view such as x.conj().imag, NumPy cannot read the sign
    array: NDArray[Any]
    try:
        if not tensor.is_cpu:
            tensor = tensor.cpu()
        if tensor.dtype is torch.bfloat16:
            array = tensor.view(torch.int16).numpy().view(value_dtype("bfloat16"))
        else:
            array = tensor.numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueTypeError(
            f"a tensor of {tensor.dtype} and {tensor.layout} on device {tensor.device} cannot be "
            f"read as an array ({str(error).splitlines()[0]}); pass a dense one"
        ) from error
    return array


def from_numpy(array: NDArray[Any]) -> Any:
    """Return a NumPy array as a tensor that shares its memory where PyTorch allows it.

    Parameters
    ----------
    array : ndarray
        Of a value type or another dtype of PyTorch. An array that is read-only, misaligned, or has
        negative strides is copied.
    """
    can_step = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    if not (array.flags.behaved and can_step):
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
