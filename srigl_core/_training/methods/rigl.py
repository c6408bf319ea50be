"""RigL: unstructured, grown where gradients are largest (Evci et al., ICML 2020)."""

from __future__ import annotations

from srigl_core._training.methods import LayerState, Method
from srigl_core._update import MaskUpdate
from srigl_core.reference.baselines import update_rigl

__all__ = ["RIGL"]


def _update(layer: LayerState) -> MaskUpdate:
    settings = layer.settings
    return update_rigl(
        layer.weight,
        layer.grad,
        layer.mask,
        drop_fraction=settings.drop_fraction,
        grown_init=settings.grown_init,
    )


RIGL = Method(_update, uses_gradients=True)
