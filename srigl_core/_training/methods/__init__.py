"""The registry of dynamic sparse training methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.contract import Backend
from srigl_core.errors import SriglError
from srigl_core.reference.init import random_unstructured_mask

__all__ = ["LayerState", "Method", "get_method", "list_methods"]

ENTRY_POINT_GROUP = "srigl_core.methods"


@dataclass(frozen=True, eq=False)
class LayerState:
    """The arguments of one layer's update.

    Parameters
    ----------
    weight : array, (n_out, ...)
        The weight after the optimiser's step. If the two passes have different masks it holds the
        weights of both.
    grad : array, same shape, or None
        The mean dense gradient of the window; None if the method uses no gradients.
    mask : array of bool, same shape
    settings : UpdateSettings
    rng : numpy.random.Generator
    backend : Backend or None
    """

    weight: Any
    grad: Any
    mask: Any
    settings: UpdateSettings
    rng: np.random.Generator
    backend: Backend | None


def _draw(shape: tuple[int, ...], nnz_budget: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    return random_unstructured_mask(shape, nnz=nnz_budget, rng=rng)


@dataclass(frozen=True)
class Method:
    """A method of dynamic sparse training, named by an entry point of ``srigl_core.methods``.

    Parameters
    ----------
    update : callable
        Takes a `LayerState` and returns a `MaskUpdate`, whose `backward_mask` is None unless
        gradients reach other weights than the forward pass uses.
    initial_mask : callable
        Takes a shape, an nnz_budget and a generator, and returns the first mask. The default draws
        positions anywhere in the layer.
    constant_fan_in : bool
        Whether all active rows of a mask have the same number of weights.
    uses_gradients : bool
        Whether updates need the dense gradient.
    on_device : bool
        Whether `update` takes arrays of the backend; other methods get NumPy arrays.
    """

    update: Callable[[LayerState], MaskUpdate]
    initial_mask: Callable[[tuple[int, ...], int, np.random.Generator], NDArray[np.bool_]] = _draw
    constant_fan_in: bool = False
    uses_gradients: bool = False
    on_device: bool = False


def list_methods() -> list[str]:
    """Return the names of the registered methods."""
    return sorted({entry_point.name for entry_point in entry_points(group=ENTRY_POINT_GROUP)})


@functools.cache
def get_method(name: str) -> Method:
    """Return the method of that name.

    Raises
    ------
    SriglError
        If no method is registered under that name.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        method: Method = entry_point.load()
        return method
    raise SriglError(f"method={name!r} is unknown; use one of {', '.join(list_methods())}")
