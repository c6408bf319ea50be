"""Array operations of a benchmark problem: NumPy arrays on a CPU, PyTorch tensors on a GPU."""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype

__all__ = ["Arrays", "TorchArrays"]


class Arrays:
    """Operations that NumPy arrays and PyTorch tensors spell differently; here, of NumPy arrays."""

    def array(self, array: NDArray[Any]) -> Any:
        """Return a NumPy array as an array of the problem."""
        return array

    def normal(self, shape: tuple[int, ...], seed: int) -> Any:
        """Return normally distributed float32 numbers."""
        return np.random.default_rng(seed).standard_normal(shape, np.float32)

    def cast(self, array: Any, dtype: str) -> Any:
        """Return an array rounded to `dtype`."""
        return array.astype(value_dtype(dtype), copy=False)

    def largest_of_rows(self, array: Any) -> Any:
        """Return the largest number of each row."""
        return array.max(axis=1)

    def tensor(self, array: Any) -> Any:
        """Return an array of the problem, or one of NumPy, as a PyTorch tensor."""
        import torch

        return torch.from_numpy(array)

    def for_backend(self, array: Any) -> Any:
        """Return an array of the problem as our backend takes it, without a copy."""
        return array

    def result(self, result: Any) -> Any:
        """Return a result of any library as an array of the problem, without a copy."""
        return np.asarray(result)


class TorchArrays(Arrays):
    """PyTorch tensors on a CUDA device; our GPU backend takes CuPy arrays of the same memory.

    CuPy arrays cost the host least: tensors are imported through DLPack at each call, and their
    stream is asked for. DLPack does not pass bfloat16 and bool between the two libraries, so these
    pass as integers.

    Parameters
    ----------
    place : str
        A device of PyTorch.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    @cached_property
    def _torch(self) -> Any:
        return importlib.import_module("torch")

    def array(self, array: NDArray[Any]) -> Any:
        return self._torch.tensor(array, device=self.place)

    def normal(self, shape: tuple[int, ...], seed: int) -> Any:
        generator = self._torch.Generator(self.place).manual_seed(seed)
        return self._torch.randn(shape, generator=generator, device=self.place)

    def cast(self, array: Any, dtype: str) -> Any:
        return array.to(getattr(self._torch, dtype))

    def largest_of_rows(self, array: Any) -> Any:
        return array.amax(dim=1)

    def tensor(self, array: Any) -> Any:
        return self.array(array) if isinstance(array, np.ndarray) else array

    def for_backend(self, array: Any) -> Any:
        import cupy
        import ml_dtypes

        torch = self._torch
        if array.dtype == torch.bfloat16:
            return cupy.from_dlpack(array.view(torch.int16)).view(ml_dtypes.bfloat16)
        if array.dtype == torch.bool:
            return cupy.from_dlpack(array.view(torch.uint8)).view(np.bool_)
        return cupy.from_dlpack(array)

    def result(self, result: Any) -> Any:
        torch = self._torch
        if isinstance(result, torch.Tensor):
            return result
        if result.dtype.name == "bfloat16":
            return torch.from_dlpack(result.view(np.int16)).view(torch.bfloat16)
        if result.dtype == np.bool_:
            return torch.from_dlpack(result.view(np.uint8)).view(torch.bool)
        return torch.from_dlpack(result)
