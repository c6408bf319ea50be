"""RigL: unstructured, grown where gradients are largest (Evci et al., ICML 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.reference.baselines import update_rigl
from srigl_core.reference.init import random_unstructured_mask

__all__ = ["Rigl"]


class Rigl:
    """Unstructured dynamic sparse training, the baseline of SRigL."""

    constant_fan_in = on_device = False
    uses_gradients = True

    def initial_mask(
        self, shape: tuple[int, ...], nnz_budget: int, rng: np.random.Generator
    ) -> NDArray[np.bool_]:
        """Draw positions anywhere in the layer."""
        return random_unstructured_mask(shape, nnz=nnz_budget, rng=rng)

    def update(
        self, weight: Any, grad: Any, mask: Any, settings: UpdateSettings, *, rng: Any, backend: Any
    ) -> MaskUpdate:
        """Prune the smallest weights, and grow where gradients are largest."""
        return update_rigl(
            weight,
            grad,
            mask,
            drop_fraction=settings.drop_fraction,
            grown_init=settings.grown_init,
        )
