"""The adapter of PyTorch tensors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.libraries.array_library import ArrayLibrary, bfloat16
from srigl_core.errors import ValueTypeError

__all__ = ["PytorchTensors"]


class PytorchTensors(ArrayLibrary):
    """PyTorch tensors."""

    hint = (
        "a dense tensor; under torch.func, torch.compile and torch.export use "
        "srigl_core.torch.CondensedLinear"
    )

    def owns(self, cls: type) -> bool:
        """Return whether `cls` is a tensor class."""
        tensor = getattr(sys.modules.get("torch"), "Tensor", None)
        return tensor is not None and issubclass(cls, tensor)

    def describe(self, array: object) -> str:
        """Return a noun phrase for error messages."""
        return "a PyTorch tensor"

    def device(self, array: Any) -> str:
        """Return the tensor's device type; "cpu" for the meta device, which holds no data."""
        return "cpu" if array.is_cpu or array.is_meta else str(array.device.type)

    def check(self, array: Any, what: str) -> None:
        """Raise ValueTypeError for meta tensors and for fake tensors.

        A FakeTensor exports itself by DLPack although it has no memory.
        """
        if array.is_meta or any(base.__name__ == "FakeTensor" for base in type(array).__mro__):
            raise ValueTypeError(
                f"{what} of type {type(array).__name__} on device {array.device} holds no numbers; "
                f"under torch.compile and torch.export use srigl_core.torch.CondensedLinear"
            )

    def export(self, array: Any) -> tuple[Any, np.dtype[Any] | None]:
        """Return the detached tensor, with bfloat16 numbers as their bits.

        PyTorch exports neither tensors that require a gradient nor dtypes that NumPy lacks.
        """
        torch, tensor, dtype = sys.modules["torch"], array.detach(), None
        if tensor.dtype == torch.bfloat16:
            tensor, dtype = tensor.view(torch.int16), bfloat16()
        # On the CPU DLPack takes three times as long.
        return (tensor.numpy() if tensor.is_cpu else tensor), dtype

    def as_numpy_fast(self, array: Any) -> NDArray[Any] | None:
        """Return a NumPy array of a float32 or float64 CPU tensor's memory."""
        if array.element_size() < 4:
            return None  # the exception for bfloat16 takes 50 us
        try:
            shared: NDArray[Any] = (array.detach() if array.requires_grad else array).numpy()
        except (RuntimeError, TypeError):
            return None
        return shared

    def to_caller(self, array: Any, like: Any) -> Any:
        """Return a tensor of the array's memory.

        PyTorch has no read-only tensors, so a read-only array is copied.
        """
        torch = sys.modules["torch"]
        if array.dtype.isbuiltin != 1:  # bfloat16, which torch.from_numpy does not accept
            return self.to_caller(array.view(np.int16), like).view(torch.bfloat16)
        if not isinstance(array, np.ndarray):
            return torch.from_dlpack(array)
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def check_writable(self, array: Any, what: str) -> None:
        """Raise ValueTypeError if `array` requires a gradient: autograd would miss the write."""
        if array.requires_grad:
            raise ValueTypeError(
                f"{what} is a PyTorch tensor that requires a gradient, which a write in place "
                f"would make wrong; pass {what}.detach()"
            )

    def written(self, array: Any) -> None:
        """Increment the tensor's version, so that autograd refuses saved values that are stale."""
        sys.modules["torch"].autograd.graph.increment_version(array)

    def stream(self, array: Any) -> int | None:
        """Return the address of PyTorch's current stream on the tensor's device."""
        if not array.is_cuda:
            return None
        return int(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)

    def memory(self, nbytes: int) -> tuple[int, Any]:
        """Return the address and the owner of memory from PyTorch's allocator.

        Unlike CuPy's pool it has memory while a graph is captured.
        """
        torch = sys.modules["torch"]
        owner = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        return owner.data_ptr(), owner
