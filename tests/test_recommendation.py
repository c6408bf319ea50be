"""Condensed or dense: what the model says, and that measuring does not need one."""

from pathlib import Path

import numpy as np
import pytest

import srigl_core
from srigl_core import CondensedWeight, SriglError, recommend
from srigl_core.benchmarks.results import load_results

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu.json"


def layer(fan_in, shape=(768, 3072), dtype="float32"):
    return CondensedWeight.random(shape, fan_in=fan_in, rng=0, dtype=dtype)


@pytest.fixture(autouse=True)
def _numba_is_under_test(backend_names):
    if "numba" not in backend_names("condensed_matmul"):
        pytest.skip("the numba backend is not under test")


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 40, 256, 5000])
def test_sparser_layers_have_a_greater_speed_up(batch):
    speed_ups = [
        recommend(layer(fan_in), batch=batch, backend="numba").speed_up
        for fan_in in (2000, 614, 307, 154, 31)
    ]
    assert speed_ups == sorted(speed_ups)


def test_a_layer_that_is_hardly_sparse_is_better_dense():
    advice = recommend(layer(3000), batch=256, backend="numba")
    assert advice.use == "dense"
    assert advice.speed_up < 1
    assert str(advice).startswith("dense at batch 256")
    plan = srigl_core.prepare(layer(3000), backend="numba")
    assert "dense is faster" in plan.describe()["estimate at batch 256"]


def test_a_sparse_layer_is_better_condensed_and_the_plan_says_by_how_much():
    weight = layer(307)
    advice = recommend(weight, batch=64, backend="numba")
    assert advice.use == "condensed"
    assert not advice.measured
    described = srigl_core.prepare(weight, backend="numba").describe()
    assert described["estimate at batch 64"] == f"{advice.speed_up:.1f}x dense"


@pytest.mark.parametrize("batch", [1, 4, 8, 64, 2048])
def test_estimates_grow_with_the_batch(batch):
    plan = srigl_core.prepare(layer(307), backend="numba")
    # Twice the rows may fill the lanes of a vector that the half of them left empty.
    assert plan.nanoseconds(2 * batch) >= plan.nanoseconds(batch)
    assert plan.nanoseconds(8 * batch) > plan.nanoseconds(batch)


def test_measuring_needs_no_model():
    weight = layer(4, shape=(16, 32))
    with pytest.raises(SriglError, match="measure=True"):
        recommend(weight, batch=2, backend="reference")
    assert srigl_core.prepare(weight, backend="reference").nanoseconds(1) is None
    advice = recommend(weight, batch=2, backend="reference", measure=True)
    assert advice.measured
    assert advice.condensed > 0
    assert advice.dense > 0
    assert advice.use == ("condensed" if advice.dense >= advice.condensed else "dense")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_value_type_can_be_measured_and_estimated(dtype):
    weight = layer(8, shape=(64, 128), dtype=dtype)
    for measure in (False, True):
        assert recommend(weight, batch=3, backend="numba", measure=measure).speed_up > 0


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 64, 256, 2048])
def test_the_dense_model_is_what_the_committed_benchmark_measured(batch):
    results = load_results(RESULTS)
    (row,) = results.find(
        operation="forward",
        n_in=3072,
        n_out=768,
        sparsity=0.9,
        batch=batch,
        threads=1,
        weights="hot",
        dtype="float32",
        mask="random",
        instructions="native",
    )
    _, microseconds = row.best("dense")
    modelled = recommend(layer(307), batch=batch, backend="numba").dense
    assert f"{modelled / 1e3:.2g}" == f"{microseconds:.2g}"


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_a_batch_that_is_none_is_an_error(batch):
    with pytest.raises(SriglError, match="batch"):
        recommend(layer(4, shape=(16, 32)), batch=batch, backend="numba")


def test_weights_of_ablated_layers_are_estimated_by_their_connections():
    rng = np.random.default_rng(0)
    full = layer(100, shape=(512, 1024))
    half = CondensedWeight(
        full.values[::2],
        full.indices[::2],
        np.sort(rng.choice(512, 256, replace=False)),
        (512, 1024),
    )
    full_plan, half_plan = (srigl_core.prepare(w, backend="numba") for w in (full, half))
    assert half_plan.nanoseconds(64) < full_plan.nanoseconds(64)
