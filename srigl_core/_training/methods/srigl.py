"""SRigL: constant fan-in, with neurons ablated (Lasby et al., ICLR 2024)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._api import apply_update
from srigl_core._format.connections import flat_shape
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.errors import SriglError
from srigl_core.reference.init import random_mask

__all__ = ["Srigl", "initial_fan_in"]


class Srigl:
    """The method of the paper; its update is `srigl_core.update_mask`."""

    constant_fan_in = uses_gradients = on_device = True

    def initial_mask(
        self, shape: tuple[int, ...], nnz_budget: int, rng: np.random.Generator
    ) -> NDArray[np.bool_]:
        """Draw a mask of constant fan-in."""
        return random_mask(shape, fan_in=initial_fan_in(shape, nnz_budget), rng=rng)

    def update(
        self, weight: Any, grad: Any, mask: Any, settings: UpdateSettings, *, rng: Any, backend: Any
    ) -> MaskUpdate:
        """Prune, grow and ablate."""
        return apply_update(weight, grad, mask, settings, backend=backend)


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
