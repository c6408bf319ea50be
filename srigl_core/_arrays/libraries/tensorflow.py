"""What is particular to TensorFlow's tensors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from srigl_core._arrays.libraries.library import ArrayLibrary, bfloat16
from srigl_core.errors import ValueTypeError

__all__ = ["TensorflowTensors"]


class TensorflowTensors(ArrayLibrary):
    """TensorFlow's eager tensors and variables, which nobody may write."""

    def owns(self, cls: type) -> bool:
        """Return whether `cls` is a class of tensors or variables."""
        tensorflow = sys.modules.get("tensorflow")
        classes = [getattr(tensorflow, name, None) for name in ("Tensor", "Variable")]
        return issubclass(cls, tuple(c for c in classes if c is not None))

    def describe(self, array: object) -> str:
        """Return a noun phrase for error messages."""
        return "a TensorFlow tensor"

    def device(self, array: Any) -> str:
        """Return the tensor's kind of device."""
        kind, _ = _place(array)
        return {"": "cpu", "gpu": "cuda"}.get(kind, kind)

    def check(self, array: Any, what: str) -> None:
        """Refuse tensors of a graph."""
        if not hasattr(array, "numpy"):
            raise ValueTypeError(
                f"{what} of type {type(array).__name__} is of a TensorFlow graph and holds no "
                f"numbers; call outside tf.function, or through tf.numpy_function"
            )

    def export(self, array: Any) -> tuple[Any, np.dtype[Any] | None]:
        """Return what lends the tensor's memory, and bfloat16 as its bits."""
        tf, dtype = sys.modules["tensorflow"], None
        tensor = tf.convert_to_tensor(array)
        if tensor.dtype == tf.bfloat16:
            tensor, dtype = tf.bitcast(tensor, tf.uint16), bfloat16()
        return _Lender(tf.experimental.dlpack.to_dlpack(tensor), _place(tensor)), dtype

    def to_caller(self, array: Any, like: Any) -> Any:
        """Return a tensor of the array's memory."""
        tf = sys.modules["tensorflow"]
        if array.dtype.isbuiltin != 1:  # bfloat16
            return tf.bitcast(self.to_caller(array.view(np.uint16), like), tf.bfloat16)
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())

    def check_writable(self, array: Any, what: str) -> None:
        """Refuse: a tensor's memory may be shared with others."""
        raise self.not_writable(array, what)


def _place(tensor: Any) -> tuple[str, int]:
    """Return "gpu" and 1 for ".../device:GPU:1"; "" for no device."""
    kind, _, number = str(tensor.device).rpartition("device:")[2].partition(":")
    return kind.lower(), int(number or 0)


class _Lender:
    """A capsule of DLPack, as NumPy and CuPy take one."""

    def __init__(self, capsule: Any, place: tuple[str, int]) -> None:
        self._capsule, self._place = capsule, place

    def __dlpack__(self, **options: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, number = self._place
        return (2, number) if kind == "gpu" else (1, 0)
