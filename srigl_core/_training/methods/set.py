"""SET: unstructured, grown at random (Mocanu et al., 2018)."""

from __future__ import annotations

from srigl_core._training.methods import LayerState, Method
from srigl_core._update import MaskUpdate
from srigl_core.reference.baselines import update_set

__all__ = ["SET"]


def _update(layer: LayerState) -> MaskUpdate:
    settings = layer.settings
    return update_set(
        layer.weight,
        layer.mask,
        drop_fraction=settings.drop_fraction,
        rng=layer.rng,
        grown_init=settings.grown_init,
    )


SET = Method(_update)
