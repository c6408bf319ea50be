"""A condensed layer is updated as its dense form is, without dense arrays.

`srigl_core/testing/update_laws.py` has the laws of the result.
"""

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srigl_core import CondensedWeight, SriglError, UpdateSettings, ValueTypeError, update_mask
from srigl_core.reference import remap_state, update_condensed
from srigl_core.testing.problem_sources import SeededSource
from srigl_core.testing.update_problems import condensed_update_problem


@given(st.integers(0, 10**6))
def test_state_is_remapped_as_that_of_the_dense_layer(seed):
    problem = condensed_update_problem(SeededSource(seed))
    mask = problem.weight.to_mask()
    update = update_condensed(problem.weight, lambda a, b: problem.grad[a:b], problem.settings)
    new_mask = update.weight.to_mask()
    momentum = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    remapped = remap_state(momentum, mask, new_mask)
    got = update.remap(momentum[mask].reshape(problem.weight.values.shape))
    np.testing.assert_array_equal(got.ravel(), remapped[new_mask])


def layer(n_out=40, n_in=30, fan_in=6):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((n_out, n_in), fan_in=fan_in, rng=rng)
    return weight, rng.standard_normal((n_out, n_in))


def test_state_of_another_size_is_refused():
    weight, grad = layer()
    update = update_condensed(
        weight, lambda a, b: grad[a:b], UpdateSettings(nnz_budget=weight.nnz, drop_fraction=0.3)
    )
    with pytest.raises(SriglError, match=r"shape \(239,\), but needs .* each of the 240 values"):
        update.remap(np.zeros(239))


def test_a_budget_that_is_too_small_is_refused_as_for_the_dense_layer():
    weight, grad = layer()
    settings = {"nnz_budget": 39, "drop_fraction": 0.3, "gamma_sal": None}
    with pytest.raises(SriglError, match="smallest budget that works here is 40") as dense:
        update_mask(weight.to_dense(), grad, weight.to_mask(), **settings)
    with pytest.raises(SriglError, match=re.escape(str(dense.value))):
        update_condensed(weight, lambda a, b: grad[a:b], UpdateSettings(**settings))


def test_the_same_blocks_are_asked_for_twice_in_order():
    weight, grad = layer()
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return grad[start:stop]

    update_condensed(
        weight, rows, UpdateSettings(nnz_budget=weight.nnz, drop_fraction=0.3), block_rows=16
    )
    assert asked == [(0, 16), (16, 32), (32, 40)] * 2


def test_memory_is_that_of_a_block_and_of_the_weights():
    """O(block + nnz): here a quarter of the gradient."""
    n_out, n_in = 4096, 4096
    weight = CondensedWeight.random((n_out, n_in), fan_in=41, rng=0)
    numbers = np.random.default_rng(0).standard_normal(n_in + n_out).astype(np.float32)

    def rows(start, stop):
        return np.stack([numbers[row : row + n_in] for row in range(start, stop)])

    tracemalloc.start()
    try:
        update_condensed(
            weight, rows, UpdateSettings(nnz_budget=weight.nnz, drop_fraction=0.3), block_rows=64
        )
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 40 * (64 * n_in + weight.nnz), f"{most:,} bytes"


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (lambda grad, a, b: grad[a : b - 1], SriglError, r"gradient_rows\(0, 40\) has shape"),
        (lambda grad, a, b: grad[a:b].astype(int), ValueTypeError, "of dtype 'int64'"),
        (lambda grad, a, b: grad[a:b].tolist(), ValueTypeError, "must be an array"),
        (
            lambda grad, a, b: np.where(np.abs(grad[a:b]) > 2, np.nan, grad[a:b]),
            SriglError,
            r"grad is not finite in \d\d of 1200 places",
        ),
    ],
)
def test_a_bad_gradient_is_refused(rows, error, message):
    weight, grad = layer()
    with pytest.raises(error, match=message):
        update_condensed(
            weight,
            lambda a, b: rows(grad, a, b),
            UpdateSettings(nnz_budget=weight.nnz, drop_fraction=0.3),
        )


def test_numbers_that_are_not_finite_are_counted_over_all_blocks():
    weight, grad = layer()
    grad[[1, 20, 39], [2, 3, 4]] = np.inf
    with pytest.raises(SriglError, match="grad is not finite in 3 of 1200 places"):
        update_condensed(
            weight,
            lambda a, b: grad[a:b],
            UpdateSettings(nnz_budget=9, drop_fraction=0.3),
            block_rows=8,
        )


def test_a_bad_weight_or_setting_is_refused_before_the_gradient_is_asked_for():
    weight, _ = layer()
    values = weight.values.copy()
    values[3, 2] = np.nan
    settings = {"nnz_budget": 240, "drop_fraction": 0.3}

    def never(start, stop):
        raise AssertionError

    for bad, changed, message in (
        (weight.with_values(values), {}, "weight is not finite in 1 of 240 places"),
        (weight, {"nnz_budget": 1201}, "exceeds the 1200 weights"),
        (weight, {"drop_fraction": 1.5}, "drop_fraction=1.5"),
        (weight, {"grown_init": 1e300}, "too large for float32"),
        (weight, {"block_rows": 0}, "block_rows=0"),
        (weight.to_dense(), {}, "must be a CondensedWeight"),
    ):
        options = {"block_rows": changed.pop("block_rows", None)}
        with pytest.raises(SriglError, match=message):
            update_condensed(bad, never, UpdateSettings(**settings | changed), **options)
