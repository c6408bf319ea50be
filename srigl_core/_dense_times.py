"""Times of dense products; ``srigl bench model`` makes this file of a JSON.

3072 inputs, 768 neurons, one thread, the fastest library of each kind: AMD EPYC, 2026-11-30.
"""

from __future__ import annotations

__all__ = ["BATCHES", "CALL_NANOSECONDS", "WEIGHT_NANOSECONDS"]

BATCHES = (1, 2, 4, 8, 16, 64, 256, 2048)

CALL_NANOSECONDS = {"dense": 1342.0, "int8": 4127.0}
"""Of a layer with hardly any weights."""

WEIGHT_NANOSECONDS = {
    "dense": (0.03652, 0.04406, 0.04589, 0.07738, 0.1329, 0.5212, 2.012, 16.17),
    "int8": (0.01221, 0.01241, 0.01359, 0.0204, 0.03643, 0.1341, 0.5518, 4.614),
}
"""Of each dense weight, at these batch sizes."""
