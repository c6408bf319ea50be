"""Inputs and output gradients of condensed layers, recorded for mask updates.

A condensed layer has no dense gradient, but a mask update needs one. It is rebuilt from these
arrays, a block of rows at a time. Only backward passes that reach the optimiser count:
`torch.autograd.grad` and gradients zeroed before the step do not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["Captured", "is_capturing", "record", "start"]


class Captured(list[tuple[Any, Any]]):
    """The input, (rows, n_in), and output gradient, (rows, n_out), of each product of a layer.

    Parameters
    ----------
    indices : torch.Tensor
    values : torch.nn.Parameter
        Tensors of the layer.
    """

    def __init__(self, indices: Any, values: Any) -> None:
        super().__init__()
        self._indices, self._values, self._last_pass = indices, values, -1
        self._dtype_and_device = values.dtype, values.device
        # Looked up here, because tensors inside the kernel of an op have no graph.
        self._accumulator = (
            torch.autograd.graph.get_gradient_edge(values).node if values.requires_grad else None
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return start, (self._indices, self._values, list(self))

    def add(self, x: Any, grad: Any) -> None:
        """Add a product if its backward pass accumulates the gradient of the values."""
        this_pass = torch._C._current_graph_task_id()
        if this_pass >= 0:  # negative outside of autograd, where an op is called directly
            if not self._accumulates():
                return  # for example in torch.autograd.grad
            if this_pass != self._last_pass and _is_zero(self._values.grad):
                self.clear()  # the gradient of the earlier products has been zeroed
            self._last_pass = this_pass
        self.append((_copied(x), _copied(grad)))

    def _accumulates(self) -> bool:
        """Return whether the running backward pass accumulates the gradient of the values."""
        node, values = self._accumulator, self._values
        if node is None or self._dtype_and_device != (values.dtype, values.device):
            return True  # assumed: a converted tensor has another node
        try:
            return bool(torch._C._will_engine_execute_node(node))
        except RuntimeError:  # raised if torch.autograd.grad computes the gradient of the values
            return False


_capturing: weakref.WeakValueDictionary[int, Captured] = weakref.WeakValueDictionary()
"""Recorded products by the address of a layer's indices, while their list is alive."""


def start(indices: Any, values: Any, products: Iterable[tuple[Any, Any]] = ()) -> Captured:
    """Record the products of a layer while the returned list is alive.

    Parameters
    ----------
    indices, values : torch.Tensor
        Tensors of the layer. The list keeps them alive.
    products : iterable of tuple
        Inputs and output gradients that are recorded already.
    """
    captured = _capturing[indices.data_ptr()] = Captured(indices, values)
    captured.extend(products)
    return captured


def is_capturing(indices: Any) -> bool:
    """Return whether products of the layer with these indices are recorded."""
    return bool(_capturing) and indices.data_ptr() in _capturing


def record(indices: Any, x: Any, grad: Any) -> None:
    """Record a product in its backward pass if the layer is captured."""
    captured = _capturing.get(indices.data_ptr()) if _capturing else None
    if captured is not None:
        captured.add(x, grad)


def _copied(array: Any) -> Any:
    """Return a copy with two axes; a compiled graph reuses its buffers."""
    return array.detach().clone(memory_format=torch.contiguous_format).view(-1, array.shape[-1])


def _is_zero(grad: Any | None) -> bool:
    return grad is None or not grad.any()
