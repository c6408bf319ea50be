"""Small problems whose sums are exact, and what skips a test where there is no CUDA device."""

import cupy
import numpy as np
import pytest

from srigl_core import CondensedWeight
from srigl_core._arrays.dtypes import value_dtype

UPDATE = {"nnz_budget": 100, "drop_fraction": 0.3}


def number_of_devices():
    try:
        return cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


needs_device = pytest.mark.skipif(not number_of_devices(), reason="there is no CUDA device")


def problem(dtype="float32", batch=(2, 33), seed=0):
    """Return a weight, an input, a gradient and a bias, of small integers: each sum is exact."""
    rng, kind = np.random.default_rng(seed), value_dtype(dtype)
    weight = CondensedWeight.random((12, 30), fan_in=5, n_active=9, rng=rng)
    values = rng.integers(-2, 3, weight.values.shape).astype(kind)
    weight = CondensedWeight(values, weight.indices, weight.active, weight.shape)
    shapes = (*batch, 30), (*batch, 12), (12,)
    return weight, *(rng.integers(-2, 3, shape).astype(kind) for shape in shapes)


def update_problem(dtype="float32"):
    rng, kind = np.random.default_rng(1), value_dtype(dtype)
    weight, grad = (rng.standard_normal((12, 30)).astype(kind) for _ in range(2))
    return weight, grad, rng.random((12, 30)) < 0.3
