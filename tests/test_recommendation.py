"""Condensed or dense: what the model says, and that measuring does not need one."""

from pathlib import Path

import numpy as np
import pytest

import srigl_core
from srigl_core import CondensedWeight, SriglError, _dense_times, recommend
from srigl_core.benchmarks.dense_times import dense_times
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


def described(weight, batch):
    return srigl_core.prepare(weight, backend="numba").describe()[f"estimate at batch {batch}"]


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 64, 256])
def test_a_layer_that_is_hardly_sparse_is_better_dense(batch):
    weight = layer(3000)
    advice = recommend(weight, batch=batch, backend="numba")
    assert advice.use == "dense"
    assert advice.speed_up < 1
    assert str(advice).startswith(f"dense at batch {batch}")
    assert "dense and dense int8 are faster" in described(weight, batch)


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 64, 256])
def test_a_sparse_layer_is_better_condensed_and_the_plan_says_by_how_much(batch):
    weight = layer(31)
    advice = recommend(weight, batch=batch, backend="numba")
    assert advice.use == "condensed"
    assert "faster" not in str(advice)
    assert not advice.measured
    int8 = advice.times["dense int8"] / advice.condensed
    assert described(weight, batch) == f"{advice.speed_up:.1f}x dense, {int8:.1f}x dense int8"


def test_dense_int8_is_named_where_it_is_faster_and_not_recommended_since_it_rounds():
    weight = layer(900)
    advice = recommend(weight, batch=8, backend="numba")
    assert advice.times["dense int8"] < advice.condensed < advice.dense
    assert advice.use == "condensed"
    assert "dense int8 is faster, and rounds weights and inputs" in str(advice)
    assert described(weight, 8).endswith("x dense int8: dense int8 is faster")


@pytest.mark.parametrize("inputs", ["float", "int8"])
def test_a_quantised_layer_is_compared_too(inputs):
    sparse, dense = (layer(fan_in).quantize() for fan_in in (31, 3000))
    options = {"batch": 8, "inputs": inputs, "backend": "numba"}
    assert recommend(sparse, **options).use == "condensed"
    advice = recommend(dense, **options)
    # Dense int8 rounds the inputs, which is no loss where they are rounded anyway.
    assert advice.use == ("dense int8" if inputs == "int8" else "dense")
    assert recommend(sparse, measure=True, **options).speed_up > 0


def test_int8_inputs_are_recommended_for_quantised_weights_only():
    with pytest.raises(SriglError, match="needs a quantised weight"):
        recommend(layer(31), batch=8, inputs="int8", backend="numba")


def test_a_layer_with_ablated_neurons_is_compared_with_dense_without_them():
    weight = CondensedWeight.random((768, 3072), fan_in=2900, n_active=77, rng=0)
    advice = recommend(weight, batch=64, backend="numba")
    dropped = advice.times["dense without ablated rows"]
    assert advice.use == "dense without ablated rows"
    assert dropped < min(advice.condensed, advice.dense)
    measured = recommend(weight, batch=64, backend="numba", measure=True)
    assert measured.times.keys() == advice.times.keys() - {"dense int8"}  # NumPy has none
    assert measured.use == min(measured.times, key=measured.times.get)
    full = recommend(layer(31), batch=64, backend="numba")
    assert full.times.keys() == advice.times.keys() - {"dense without ablated rows"}


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


def test_the_model_of_dense_products_is_made_of_the_committed_benchmark():
    results = load_results(RESULTS)
    if not any(row.best("int8") for row in results.rows):
        pytest.skip("the committed benchmark was measured before dense int8 was a contender")
    assert Path(_dense_times.__file__).read_text(encoding="utf-8") == dense_times(results)


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
