"""Times of the dense forms of a layer, which condensed products are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from srigl_core._dense_times import BATCHES, CALL_NANOSECONDS, WEIGHT_NANOSECONDS
from srigl_core._format.packed_weight import PackedWeight

__all__ = ["ACTIVE_ROWS", "DENSE", "INT8", "compared", "dense_nanoseconds"]

DENSE, ACTIVE_ROWS, INT8 = "dense", "dense without ablated rows", "dense int8"
"""The masked dense product; of the active neurons alone; and that one with weights and inputs
rounded to int8."""

_PLACE_NANOSECONDS = 0.45
"""Of a result of active neurons, which is placed among the biases of the others; measured in the
same layer with 40% of its neurons ablated."""


def dense_nanoseconds(weight: PackedWeight, batch: int) -> dict[str, float]:
    """Estimate the single-threaded times of a layer's dense forms.

    The model has a time for a call and one for each weight, measured with one layer on one machine
    (`srigl_core._dense_times`). Ratios to the condensed kernels, which are modelled from the same
    machine, carry over better than times.
    """
    n_out, n_in = weight.shape
    wide = max(4, weight.float_dtype.itemsize) / 4
    active = weight.n_active * n_in
    placing = batch * n_out * _PLACE_NANOSECONDS if weight.n_active < n_out else 0.0
    forms = {DENSE: _nanoseconds("dense", n_out * n_in * wide, batch)}
    if placing:
        forms[ACTIVE_ROWS] = _nanoseconds("dense", active * wide, batch) + placing
    return forms | {INT8: _nanoseconds("int8", active, batch) + placing}


def _nanoseconds(kind: str, weights: float, batch: int) -> float:
    times = WEIGHT_NANOSECONDS[kind]
    each = float(np.interp(batch, BATCHES, times))
    each += max(0, batch - BATCHES[-1]) * times[-1] / BATCHES[-1]
    return CALL_NANOSECONDS[kind] + each * weights


def compared(condensed: float, others: Mapping[str, float]) -> str:
    """Return how many times as long as `condensed` others take, and which of them are faster."""
    ratios = ", ".join(f"{time / condensed:.1f}x {form}" for form, time in others.items())
    faster = [form for form, time in others.items() if time < condensed]
    verb = "is" if len(faster) == 1 else "are"
    return ratios + (f": {' and '.join(faster)} {verb} faster" if faster else "")
