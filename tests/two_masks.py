"""A training method whose passes have different masks, and its registration."""

from types import SimpleNamespace

import numpy as np
import pytest

from srigl_core import MaskUpdate, Method
from srigl_core._training import methods


def two_masks(layer):
    """Use the largest weights in the forward pass, and train as many others."""
    order = np.argsort(-np.abs(layer.weight), axis=None, kind="stable")
    forward, backward = np.zeros((2, *layer.weight.shape), bool)
    forward.reshape(-1)[order[: layer.settings.nnz_budget]] = True
    backward.reshape(-1)[order[: 2 * layer.settings.nnz_budget]] = True
    rows = np.flatnonzero(~forward.any(axis=1))
    counts = int((layer.mask & ~forward).sum()), int((forward & ~layer.mask).sum())
    new_weight = np.where(backward, layer.weight, 0)
    return MaskUpdate(forward, new_weight, rows, rows[:0], None, *counts, backward_mask=backward)


@pytest.fixture
def registered(monkeypatch):
    """Let a package's entry point name a method."""
    found = methods.entry_points

    def entry_points(**selection):
        own = SimpleNamespace(name="two_masks", load=lambda: Method(two_masks))
        ours = [own] if selection.get("name", own.name) == own.name else []
        return [*found(**selection), *ours]

    monkeypatch.setattr(methods, "entry_points", entry_points)
    methods.get_method.cache_clear()
    yield
    methods.get_method.cache_clear()
