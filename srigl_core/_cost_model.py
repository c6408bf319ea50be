"""The time of dense products, which condensed ones are compared with."""

from __future__ import annotations

import numpy as np

from srigl_core._format.packed_weight import PackedWeight

__all__ = ["dense_nanoseconds"]

# Nanoseconds for each weight of a float32 layer by batch, with one thread, by the fastest dense
# product of benchmarks/results/cpu.json (3072 inputs, 768 neurons; a test compares). Times hold on
# that machine; ratios to the condensed kernels, measured there too, travel better.
_DENSE_BATCH = (1, 2, 4, 8, 16, 64, 256, 2048)
_DENSE_NANOSECONDS = (0.0511, 0.0628, 0.0819, 0.153, 0.299, 1.20, 4.56, 38.0)


def dense_nanoseconds(weight: PackedWeight, batch: int) -> float:
    """Estimate the single-threaded time of a layer's masked dense product, in floating point."""
    last = _DENSE_NANOSECONDS[-1] / _DENSE_BATCH[-1]
    each = float(np.interp(batch, _DENSE_BATCH, _DENSE_NANOSECONDS))
    each += max(0, batch - _DENSE_BATCH[-1]) * last
    n_out, n_in = weight.shape
    return each * n_out * n_in * max(4, weight.float_dtype.itemsize) / 4
