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

from srigl_core.torch.sharded_tensors import is_sharded

__all__ = ["Captured", "is_capturing", "record", "start"]


_PRODUCT_NODES = ("condensed_linear", "CondensedLinearFunction")
"""Parts of the names of autograd's nodes for products, as operators and in eager mode."""


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
        self._is_replaced = self._had_gradient = False
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
            if this_pass != self._last_pass:
                if self._is_zeroed():
                    self.clear()  # the gradient of the earlier products has been zeroed
                if is_sharded(self._values):
                    torch.autograd.Variable._execution_engine.queue_callback(self._note_gradient)
            self._last_pass = this_pass
        self.append((_copied(x), _copied(grad)))

    def _accumulates(self) -> bool:
        """Return whether the running backward pass accumulates the gradient of the values."""
        node, values = self._accumulator, self._values
        if node is None or self._dtype_and_device != (values.dtype, values.device):
            return True  # assumed: a converted tensor has another node
        if _will_be_executed(node):
            return True
        # fully_shard computes with a parameter of its own, and sums up its gradient afterwards.
        other = _accumulator_of_current_product()
        self._is_replaced = other is not None and other.variable is not values
        return self._is_replaced and _will_be_executed(other)

    def _is_zeroed(self) -> bool:
        """Return whether the gradient of earlier products has been set to None, or to zero."""
        grad = self._values.grad
        if self._is_replaced:
            # A rank's part may be zero by chance, but ranks must do the same. And there is no
            # gradient yet after a pass without gradient synchronisation.
            return self._had_gradient and grad is None
        return grad is None or not grad.any()

    def _note_gradient(self) -> None:
        """After a backward pass, note whether the values have a gradient."""
        self._had_gradient = self._values.grad is not None


def _will_be_executed(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # raised if torch.autograd.grad computes the gradient of the values
        return False


def _accumulator_of_current_product() -> Any | None:
    """Return the node that accumulates the gradient of the values in the running product."""
    node = torch._C._current_autograd_node()
    if node is None or not any(name in node.name() for name in _PRODUCT_NODES):
        return None  # for example in a compiled graph
    accumulator = node.next_functions[1][0]
    return accumulator if hasattr(accumulator, "variable") else None


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
