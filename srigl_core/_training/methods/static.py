"""Static sparse training: the first mask stays."""

from __future__ import annotations

from typing import Any

from srigl_core._training.methods.rigl import Rigl
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.reference.baselines import update_static

__all__ = ["Static"]


class Static(Rigl):
    """An unstructured mask that never changes."""

    uses_gradients = False

    def update(
        self, weight: Any, grad: Any, mask: Any, settings: UpdateSettings, *, rng: Any, backend: Any
    ) -> MaskUpdate:
        """Return the same mask."""
        return update_static(weight, mask)
