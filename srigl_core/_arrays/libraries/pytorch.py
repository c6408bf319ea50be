"""What is particular to PyTorch's tensors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.libraries.library import ArrayLibrary, bfloat16
from srigl_core.errors import ValueTypeError

__all__ = ["PytorchTensors"]


class PytorchTensors(ArrayLibrary):
    """PyTorch's tensors."""

    remedy = (
        "a dense tensor; under torch.func, torch.compile and torch.export use "
        "srigl_core.torch.CondensedLinear"
    )

    def owns(self, kind: type) -> bool:
        """Return whether `kind` is a class of tensors."""
        tensor = getattr(sys.modules.get("torch"), "Tensor", None)
        return tensor is not None and issubclass(kind, tensor)

    def describe(self, array: object) -> str:
        """Return what it is."""
        return "a PyTorch tensor"

    def device(self, array: Any) -> str:
        """Return the tensor's kind of device; of the meta device, on which nothing is, the CPU."""
        return "cpu" if array.is_cpu or array.is_meta else str(array.device.type)

    def check(self, array: Any, what: str) -> None:
        """Refuse tensors of the meta device, and those that a tracer makes up.

        PyTorch lends a FakeTensor's memory by DLPack, and there is none: one would read anything.
        """
        if array.is_meta or any(base.__name__ == "FakeTensor" for base in type(array).__mro__):
            raise ValueTypeError(
                f"{what} of type {type(array).__name__} on device {array.device} holds no numbers; "
                f"under torch.compile and torch.export use srigl_core.torch.CondensedLinear"
            )

    def lend(self, array: Any) -> tuple[Any, np.dtype[Any] | None]:
        """Return the tensor without its gradient, and bfloat16 as its bits.

        PyTorch lends neither what requires a gradient, nor what NumPy has no type for.
        """
        torch, plain, dtype = sys.modules["torch"], array.detach(), None
        if plain.dtype == torch.bfloat16:
            plain, dtype = plain.view(torch.int16), bfloat16()
        # Not by DLPack, which takes thrice as long, and reads from what has no memory.
        return (plain.numpy() if plain.is_cpu else plain), dtype

    def lend_at_once(self, array: Any) -> NDArray[Any] | None:
        """Return a NumPy array of the memory of a tensor of single or double precision."""
        if array.element_size() < 4:
            return None  # soon, since PyTorch takes 50 us to say that it cannot
        try:
            lent: NDArray[Any] = (array.detach() if array.requires_grad else array).numpy()
        except (RuntimeError, TypeError):
            return None
        return lent

    def adopt(self, array: Any, like: Any) -> Any:
        """Return a tensor of the array's memory.

        PyTorch knows no read-only memory: what must not be written, it gets a copy of.
        """
        torch = sys.modules["torch"]
        if array.dtype.isbuiltin != 1:  # bfloat16, which only PyTorch knows
            return self.adopt(array.view(np.int16), like).view(torch.bfloat16)
        if not isinstance(array, np.ndarray):
            return torch.from_dlpack(array)
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def check_writable(self, array: Any, what: str) -> None:
        """Refuse what autograd watches, since it would not see the writing."""
        if array.requires_grad:
            raise ValueTypeError(
                f"{what} is a PyTorch tensor that requires a gradient, which none can be given; "
                f"pass {what}.detach()"
            )

    def written(self, array: Any) -> None:
        """Count the writing, so that autograd refuses what it has kept of the old numbers."""
        sys.modules["torch"].autograd.graph.increment_version(array)

    def stream(self, array: Any) -> int | None:
        """Return PyTorch's current stream on the tensor's device."""
        if not array.is_cuda:
            return None
        return int(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)
