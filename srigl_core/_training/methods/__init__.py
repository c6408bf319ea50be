"""The registry of dynamic sparse training methods."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.contract import Backend
from srigl_core.errors import SriglError

__all__ = ["ENTRY_POINT_GROUP", "Method", "get_method", "list_methods"]

ENTRY_POINT_GROUP = "srigl_core.methods"


class Method(Protocol):
    """A method of dynamic sparse training.

    A package registers a method by an entry point of the group ``srigl_core.methods``. The entry
    point names a class or another callable that takes no arguments and returns the method.

    Attributes
    ----------
    constant_fan_in : bool
        Whether all active rows of a mask have the same number of weights, so that layers can be
        condensed.
    uses_gradients : bool
        Whether updates need the dense gradient.
    on_device : bool
        Whether `update` passes its arrays to `backend`; other methods get NumPy arrays.
    """

    constant_fan_in: bool
    uses_gradients: bool
    on_device: bool

    def initial_mask(
        self, shape: tuple[int, ...], nnz_budget: int, rng: np.random.Generator
    ) -> NDArray[np.bool_]:
        """Draw a layer's first mask, of `shape`.

        Raises
        ------
        SriglError
            If the budget is too small.
        """
        ...

    def update(
        self,
        weight: Any,
        grad: Any | None,
        mask: Any,
        settings: UpdateSettings,
        *,
        rng: np.random.Generator,
        backend: Backend | None,
    ) -> MaskUpdate:
        """Return the update of one layer.

        Parameters
        ----------
        weight : array, (n_out, ...)
            After the optimiser's step. If the two passes have different masks it holds the weights
            of both.
        grad : array, same shape, or None
            The mean dense gradient of the window; None if the method uses no gradients.
        mask : array of bool, same shape
        settings : UpdateSettings
        rng : numpy.random.Generator
        backend : Backend or None

        Returns
        -------
        MaskUpdate
            `backward_mask` is None unless gradients reach other weights than the forward pass uses.
        """
        ...


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
        method: Method = entry_point.load()()
        return method
    raise SriglError(f"method={name!r} is unknown; use one of {', '.join(list_methods())}")
