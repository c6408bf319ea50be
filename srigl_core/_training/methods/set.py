"""SET: unstructured, grown at random (Mocanu et al., 2018)."""

from __future__ import annotations

from typing import Any

from srigl_core._training.methods.rigl import Rigl
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.reference.baselines import update_set

__all__ = ["Set"]


class Set(Rigl):
    """RigL with random growth."""

    uses_gradients = False

    def update(
        self, weight: Any, grad: Any, mask: Any, settings: UpdateSettings, *, rng: Any, backend: Any
    ) -> MaskUpdate:
        """Prune the smallest weights, and grow at random."""
        return update_set(
            weight,
            mask,
            drop_fraction=settings.drop_fraction,
            rng=rng,
            grown_init=settings.grown_init,
        )
