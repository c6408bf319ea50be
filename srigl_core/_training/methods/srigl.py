"""SRigL: constant fan-in, with neurons ablated (Lasby et al., ICLR 2024)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from srigl_core._api import apply_update
from srigl_core._format.connections import flat_shape
from srigl_core._training.methods import LayerState, Method
from srigl_core._update import MaskUpdate
from srigl_core.errors import SriglError
from srigl_core.reference.init import random_mask

__all__ = ["SRIGL", "initial_fan_in"]


def initial_fan_in(shape: tuple[int, ...], nnz_budget: int) -> int:
    """Return the fan-in with all neurons active.

    Raises
    ------
    SriglError
        If it is less than one.
    """
    n_out, _ = flat_shape(shape)
    if nnz_budget < n_out:
        raise SriglError(
            f"nnz_budget={nnz_budget} gives each of the {n_out} neurons less than one weight at "
            f"the start; lower the sparsity, or give the layer at least {n_out} with "
            f"LayerOptions(nnz_budget=...)"
        )
    return nnz_budget // n_out


def _initial_mask(
    shape: tuple[int, ...], nnz_budget: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    return random_mask(shape, fan_in=initial_fan_in(shape, nnz_budget), rng=rng)


def _update(layer: LayerState) -> MaskUpdate:
    return apply_update(layer.weight, layer.grad, layer.mask, layer.settings, backend=layer.backend)


SRIGL = Method(_update, _initial_mask, constant_fan_in=True, uses_gradients=True, on_device=True)
