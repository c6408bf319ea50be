"""Times of dense products; ``srigl bench model`` makes this file of a JSON.

3072 inputs, 768 neurons, one thread, the fastest library of each kind: AMD EPYC, 2026-11-30.
"""

from __future__ import annotations

__all__ = ["BATCHES", "CALL_NANOSECONDS", "WEIGHT_NANOSECONDS"]

BATCHES = (1, 2, 4, 8, 16, 64, 256, 2048)

CALL_NANOSECONDS = {"dense": 1352.0, "int8": 4081.0}
"""Of a layer with hardly any weights."""

WEIGHT_NANOSECONDS = {
    "dense": (0.03961, 0.04325, 0.04736, 0.07538, 0.1304, 0.5186, 2.003, 16.06),
    "int8": (0.01134, 0.01266, 0.01403, 0.02077, 0.03606, 0.1315, 0.5387, 4.601),
}
"""Of each dense weight, at these batch sizes."""
