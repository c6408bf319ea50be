"""Inputs and output gradients of condensed layers, kept for a mask update when asked for.

A layer without a dense weight has no dense gradient, but a mask update needs it: it is formed from
these, a block of rows at a time. It is the dense form of the gradient that the optimiser gets: what
is no part of that, such as the gradient of an input alone, or one that was zeroed since, is none of
the dense one either.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch

__all__ = ["Captured", "is_capturing", "record", "start"]


class Captured(list[tuple[Any, Any]]):
    """For each product that a layer's gradient is of: its input, (rows, n_in), and dL/dz, as flat.

    Parameters
    ----------
    indices : torch.Tensor
    values : torch.nn.Parameter
        The layer's.
    """

    def __init__(self, indices: Any, values: Any) -> None:
        super().__init__()
        self._indices, self._values, self._last_pass = indices, values, -1
        self._kind = values.dtype, values.device
        # Asked for here, since within an op's kernel a tensor has none.
        self._accumulator = (
            torch.autograd.graph.get_gradient_edge(values).node if values.requires_grad else None
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        kept = start(copy.deepcopy(self._indices, memo), copy.deepcopy(self._values, memo))
        kept.extend(copy.deepcopy(list(self), memo))
        return kept

    def add(self, x: Any, grad: Any) -> None:
        """Keep a product, if its backward pass is one that adds to the values' gradient."""
        this_pass = torch._C._current_graph_task_id()
        if this_pass >= 0:  # which it is not where an op is called by hand
            if not self._is_added_to():
                return  # as of torch.autograd.grad
            if this_pass != self._last_pass and _is_zero(self._values.grad):
                self.clear()  # the gradient that these were of has been zeroed
            self._last_pass = this_pass
        self.append((_copied(x), _copied(grad)))

    def _is_added_to(self) -> bool:
        """Whether the backward pass that runs accumulates a gradient for the values."""
        known = self._accumulator
        if known is None or self._kind != (self._values.dtype, self._values.device):
            return True  # to all knowledge: a tensor that was converted has another one by now
        try:
            return bool(torch._C._will_engine_execute_node(known))
        except RuntimeError:  # which it raises where torch.autograd.grad is asked for the values'
            return False


_capturing: weakref.WeakValueDictionary[int, Captured] = weakref.WeakValueDictionary()
"""By the address of a layer's indices; who lets go of a list, captures no more."""


def start(indices: Any, values: Any) -> Captured:
    """Return a list that is filled with what passes a layer, for as long as the list is held.

    Parameters
    ----------
    indices, values : torch.Tensor
        The layer's, to be held as long.
    """
    kept = Captured(indices, values)
    _capturing[indices.data_ptr()] = kept
    return kept


def is_capturing(indices: Any) -> bool:
    """Whether the layer with these indices is being captured."""
    return bool(_capturing) and indices.data_ptr() in _capturing


def record(indices: Any, x: Any, grad: Any) -> None:
    """Keep a backward pass, if the layer is being captured."""
    if _capturing:
        found = _capturing.get(indices.data_ptr())
        if found is not None:
            found.add(x, grad)


def _copied(array: Any) -> Any:
    """Return a copy with two axes: a compiled graph uses its buffers again."""
    return array.detach().clone(memory_format=torch.contiguous_format).view(-1, array.shape[-1])


def _is_zero(grad: Any | None) -> bool:
    return grad is None or not grad.any()
