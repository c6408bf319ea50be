"""Inputs and output gradients of condensed layers, kept for a mask update when asked for.

A layer without a dense weight has no dense gradient, but a mask update needs it: it is formed from
these, a block of rows at a time.
"""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["Captured", "record", "start"]


class Captured(list[tuple[Any, Any]]):
    """For each backward pass through a layer: its input, (..., n_in), and dL/dz, (..., n_out)."""


_capturing: weakref.WeakValueDictionary[int, Captured] = weakref.WeakValueDictionary()
"""By the address of a layer's indices; who lets go of a list, captures no more."""


def start(indices: Any) -> Captured:
    """Return a list that is filled with what passes a layer, for as long as the list is held.

    Parameters
    ----------
    indices : torch.Tensor
        The layer's, to be held as long.
    """
    kept = Captured()
    _capturing[indices.data_ptr()] = kept
    return kept


def record(indices: Any, x: Any, grad: Any) -> None:
    """Keep a backward pass, if the layer is being captured."""
    if _capturing:
        found = _capturing.get(indices.data_ptr())
        if found is not None:
            # Copies: a compiled graph uses its buffers again.
            found.append((x.detach().clone(), grad.detach().clone()))
