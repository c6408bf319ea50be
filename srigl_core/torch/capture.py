"""Inputs and output gradients of condensed layers, kept for a mask update when asked for.

A layer without a dense weight has no dense gradient, but a mask update needs it: it is formed from
these, a block of rows at a time.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Captured", "record", "start", "stop"]

Captured = list[tuple[Any, Any]]
"""For each backward pass through a layer: its input, (..., n_in), and dL/dz, (..., n_out)."""

_capturing: dict[int, tuple[Any, Captured]] = {}
"""By the address of a layer's indices, which the layer keeps alive while it is here."""


def start(indices: Any) -> Captured:
    """Begin to keep what passes a layer, and return the list that is filled."""
    kept: Captured = []
    _capturing[indices.data_ptr()] = (indices, kept)
    return kept


def stop(indices: Any) -> None:
    """Keep no more of that layer."""
    _capturing.pop(indices.data_ptr(), None)


def record(indices: Any, x: Any, grad: Any) -> None:
    """Keep a backward pass, if the layer is being captured."""
    if _capturing:
        found = _capturing.get(indices.data_ptr())
        if found is not None:
            # Copies: a compiled graph uses its buffers again.
            found[1].append((x.detach().clone(), grad.detach().clone()))
