"""Static sparse training: the first mask stays."""

from __future__ import annotations

from srigl_core._training.methods import Method
from srigl_core.reference.baselines import update_static

__all__ = ["STATIC"]

STATIC = Method(lambda layer: update_static(layer.weight, layer.mask))
