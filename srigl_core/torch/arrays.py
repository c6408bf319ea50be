"""The array operations of backends that compute with PyTorch tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srigl_core._arrays.checks import check_workspace, overlaps_itself
from srigl_core._arrays.dtypes import accumulator_dtype
from srigl_core._arrays.libraries import device_of, library_of
from srigl_core.contract import ArrayOps
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch.tensors import as_numpy, from_numpy, numpy_dtype, torch_dtype

__all__ = ["TorchArrays"]


class TorchArrays(ArrayOps):
    """PyTorch tensors on one type of device, for example for a backend with Triton kernels.

    Parameters
    ----------
    device : str
        The device type, "cpu" or "cuda", as in the backend's capabilities.

    Notes
    -----
    New tensors are on the current device. Gradients are not recorded.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def execution_context(self, like: object) -> AbstractContextManager[Any]:
        """Return a context in which autograd records nothing."""
        no_grad: AbstractContextManager[Any] = torch.no_grad()
        return no_grad

    def as_float_array(self, array: object, what: str) -> Any:
        tensor = self._as_tensor(array, what)
        numpy_dtype(tensor.dtype, what)
        return tensor

    def as_mask(self, mask: object, shape: tuple[int, ...] | None) -> Any:
        tensor = self._as_tensor(mask, "mask")
        if tensor.dtype != torch.bool:
            raise ValueTypeError(
                f"mask must be an array of bool, got {tensor.dtype}; pass mask != 0"
            )
        if shape is not None and tensor.shape != shape:
            raise SriglError(f"mask has shape {tuple(tensor.shape)}, but must have {tuple(shape)}")
        return tensor

    def as_out(self, out: object, shape: tuple[int, ...], inputs: dict[str, Any]) -> Any:
        library_of(out).check_writable(out, "out")
        tensor = self.as_float_array(out, "out")
        if tensor.shape != shape:
            raise SriglError(
                f"out has shape {tuple(tensor.shape)}, but the result has {tuple(shape)}"
            )
        self._check_memory(tensor, "out", inputs)
        return tensor

    def as_workspace(self, workspace: object, others: dict[str, Any]) -> Any:
        library_of(workspace).check_writable(workspace, "workspace")
        tensor = self._as_tensor(workspace, "workspace")
        if tensor.dtype != torch.uint8:
            raise ValueTypeError(f"workspace must be an array of uint8, got {tensor.dtype}")
        if tensor.is_cpu:
            check_workspace(tensor.numpy(), tensor.data_ptr())
        self._check_memory(tensor, "workspace", others)
        return tensor

    def dtype(self, array: Any) -> np.dtype[Any]:
        return numpy_dtype(array.dtype)

    def contiguous(self, array: Any) -> Any:
        return array.contiguous()

    def count_nonfinite(self, array: Any, mask: Any | None = None) -> int:
        nonfinite = ~torch.isfinite(array)
        return int((nonfinite if mask is None else nonfinite & mask).sum())

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a new tensor."""
        return torch.empty(shape, dtype=torch_dtype(dtype), device=self._device)

    def assign(self, target: Any, source: Any) -> None:
        target.fill_(source) if isinstance(source, int) else target.copy_(source)

    def round_to(self, array: Any, dtype: np.dtype[Any]) -> Any:
        if array.dtype == torch.float64 and dtype.name == "bfloat16":
            array = _rounded_to_odd(array)  # PyTorch would round twice, first to float32
        return array.to(torch_dtype(dtype))

    def share_memory(self, one: Any, other: Any) -> bool:
        (start, end), (other_start, other_end) = _bounds(one), _bounds(other)
        return start < other_end and other_start < end

    def to_caller(self, array: Any, like: object) -> Any:
        if isinstance(like, torch.Tensor):
            return array
        exported, dtype = library_of(array).export(array)
        if isinstance(exported, np.ndarray):
            exported = exported if dtype is None else exported.view(dtype)
        return library_of(like).to_caller(exported, like)

    def from_host(self, array: NDArray[Any]) -> Any:
        return from_numpy(array.copy()).to(self._device)

    def to_host(self, array: Any) -> NDArray[Any]:
        return as_numpy(array).copy()

    def accumulate(self, total: Any | None, array: Any) -> Any:
        dtype = torch_dtype(accumulator_dtype(numpy_dtype(array.dtype)))
        return array.to(dtype, copy=True) if total is None else total + array.to(dtype)

    def divide(self, array: Any, divisor: int) -> Any:
        return array / torch.tensor(divisor, dtype=array.dtype, device=array.device)

    def union(self, one: Any, other: Any) -> Any:
        return one | other

    def row_counts(self, mask: Any) -> NDArray[np.int64]:
        return as_numpy(mask.reshape(mask.shape[0], -1).sum(dim=1))

    def _as_tensor(self, array: object, what: str) -> Any:
        """Return `array`, which must be on this device, as a tensor that shares its memory."""
        if device_of(array) != self._device:
            raise ValueTypeError(
                f"{what} of type {type(array).__name__} is on device {device_of(array)}, but this "
                f"backend takes arrays on {self._device}; move it there"
            )
        library_of(array).check(array, what)
        if isinstance(array, torch.Tensor):
            return array.detach()
        try:
            return torch.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ValueTypeError(
                f"{what} of type {type(array).__name__} cannot be read as a tensor ({error}); pass "
                f"a PyTorch tensor"
            ) from error

    def _check_memory(self, tensor: Any, what: str, others: dict[str, Any]) -> None:
        if tensor.numel() and what == "out" and _overlaps_itself(tensor):
            raise SriglError(
                f"out of strides {tensor.stride()} has elements that share memory; pass an array "
                f"of its own"
            )
        for name, other in others.items():
            if self.share_memory(tensor, other):
                raise SriglError(f"{what} shares memory with {name}; pass one of its own")


def _rounded_to_odd(array: Any) -> Any:
    """Return float64 as float32, with the last bit of inexact numbers set (round to odd)."""
    nearest = array.float()
    inexact = (nearest.double() != array) & torch.isfinite(nearest)
    away = inexact & (nearest.abs().double() > array.abs())
    return ((nearest.view(torch.int32) - away.int()) | inexact.int()).view(torch.float32)


def _bounds(tensor: Any) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the byte after its last."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((length - 1) * stride for length, stride in steps)
    return start, start + (last + 1) * tensor.element_size()


def _overlaps_itself(tensor: Any) -> bool:
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    return overlaps_itself(SimpleNamespace(itemsize=size, strides=strides, shape=tensor.shape))
