"""Times of dense products; ``srigl bench model`` makes this file of a JSON.

3072 inputs, 768 neurons, one thread, the fastest library of each kind: AMD EPYC, 2026-11-30.
"""

from __future__ import annotations

__all__ = ["BATCHES", "CALL_NANOSECONDS", "WEIGHT_NANOSECONDS"]

BATCHES = (1, 2, 4, 8, 16, 64, 256, 2048)

CALL_NANOSECONDS = {"dense": 1342.0, "int8": 4016.0}
"""Of a layer with hardly any weights."""

WEIGHT_NANOSECONDS = {
    "dense": (0.04228, 0.04338, 0.0483, 0.07729, 0.1316, 0.5369, 2.084, 16.61),
    "int8": (0.01148, 0.01261, 0.01346, 0.02103, 0.03696, 0.1334, 0.5523, 5.983),
}
"""Of each dense weight, at these batch sizes."""
