"""The schedule, initial masks and initial weights (SPEC 4.1 and 5)."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srigl_core import SriglError, ValueTypeError
from srigl_core.reference import (
    UpdateSchedule,
    random_mask,
    random_unstructured_mask,
    sparse_init,
)
from srigl_core.reference.init import INITS

# ---------------------------------------------------------------- schedule


@given(t_end=st.integers(1, 10**6), delta_t=st.integers(1, 500), step=st.integers(0, 2000))
def test_steps_count_from_one_and_a_multiple_before_the_end_is_due(t_end, delta_t, step):
    schedule = UpdateSchedule(t_end, delta_t=delta_t)
    assert schedule.is_due(step) == (step >= 1 and step % delta_t == 0 and step < t_end)


@given(t_end=st.integers(1, 60), delta_t=st.integers(1, 12), step=st.integers(0, 70))
def test_next_due_is_the_first_step_that_is_due(t_end, delta_t, step):
    schedule = UpdateSchedule(t_end, delta_t=delta_t)
    due = [later for later in range(step, 100) if schedule.is_due(later)]
    assert schedule.next_due(step) == (due[0] if due else None)


@given(
    t_end=st.integers(1, 10**6),
    alpha=st.floats(0, 1),
    step=st.integers(0, 10**6),
)
def test_drop_fraction_is_the_cosine_of_the_paper(t_end, alpha, step):
    schedule = UpdateSchedule(t_end, alpha=alpha)
    assert schedule.drop_fraction(step) == alpha / 2 * (1 + math.cos(math.pi * step / t_end))
    if step <= t_end:
        assert 0 <= schedule.drop_fraction(step) <= alpha


def test_drop_fraction_falls_from_alpha_to_zero():
    schedule = UpdateSchedule(1000, alpha=0.3)
    fractions = [schedule.drop_fraction(step) for step in range(0, 1001, 10)]
    assert fractions[0] == 0.3
    assert fractions[50] == 0.15
    assert fractions[-1] == 0.0
    assert all(later < earlier for earlier, later in itertools.pairwise(fractions))


def test_a_float32_alpha_is_computed_with_in_float64():
    narrow, wide = (
        UpdateSchedule(1000, alpha=a) for a in (np.float32(0.3), float(np.float32(0.3)))
    )
    assert narrow == wide
    assert narrow.drop_fraction(437) == wide.drop_fraction(437)


def test_defaults_are_those_of_the_paper():
    schedule = UpdateSchedule.for_training(1000)
    assert schedule == UpdateSchedule(750, delta_t=7, alpha=0.3)
    for n, t_end, delta_t in ((1, 0, 5), (133, 99, 5), (10_001, 7500, 75), (20_000, 15_000, 100)):
        assert UpdateSchedule.for_training(n) == UpdateSchedule(t_end, delta_t)
    assert UpdateSchedule(0).drop_fraction(0) == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"t_end": -1}, SriglError, "t_end=-1 must be at least 0"),
        ({"t_end": 7.5}, ValueTypeError, r"t_end=7\.5 must be an integer"),
        ({"delta_t": 0}, SriglError, "delta_t=0 must be at least 1"),
        ({"alpha": 1.5}, SriglError, r"alpha=1\.5 must be in \[0, 1\]"),
        ({"alpha": math.nan}, SriglError, "alpha=nan must be finite"),
        ({"alpha": None}, ValueTypeError, "alpha=None must be a number"),
    ],
)
def test_a_schedule_out_of_range_is_an_error(settings, error, message):
    with pytest.raises(error, match=message):
        UpdateSchedule(**{"t_end": 100, **settings})
    with pytest.raises(SriglError, match="total_steps=0 must be at least 1"):
        UpdateSchedule.for_training(0)


# ---------------------------------------------------------------- masks


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12))
    | st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_every_neuron_of_a_random_mask_has_the_fan_in(shape, seed, data):
    n_in = math.prod(shape[1:])
    fan_in = data.draw(st.integers(1, n_in))
    mask = random_mask(shape, fan_in=fan_in, rng=np.random.default_rng(seed))
    assert mask.shape == shape
    assert mask.dtype == bool
    assert (mask.reshape(shape[0], n_in).sum(axis=1) == fan_in).all()
    again = random_mask(shape, fan_in=fan_in, rng=np.random.default_rng(seed))
    assert np.array_equal(mask, again)


def test_columns_are_drawn_uniformly():
    """Each column is drawn in 6000 of 24000 rows, give or take 5 standard deviations."""
    n_rows, n_in, fan_in = 24_000, 12, 3
    mask = random_mask((n_rows, n_in), fan_in=fan_in, rng=np.random.default_rng(1))
    p = fan_in / n_in
    deviations = (mask.sum(axis=0) - n_rows * p) / math.sqrt(n_rows * p * (1 - p))
    assert np.abs(deviations).max() < 5
    # and so is each pair of columns
    pairs = np.count_nonzero(mask[:, :1] & mask[:, 1:], axis=0)
    p = fan_in * (fan_in - 1) / (n_in * (n_in - 1))
    deviations = (pairs - n_rows * p) / math.sqrt(n_rows * p * (1 - p))
    assert np.abs(deviations).max() < 5


def test_rows_and_seeds_differ():
    mask = random_mask((50, 64), fan_in=8, rng=np.random.default_rng(0))
    assert len({row.tobytes() for row in mask}) == 50
    other = random_mask((50, 64), fan_in=8, rng=np.random.default_rng(1))
    assert not np.array_equal(mask, other)


def test_an_unstructured_mask_has_the_number_of_weights_and_uneven_rows():
    rng = np.random.default_rng(0)
    mask = random_unstructured_mask((8, 4, 3, 3), nnz=100, rng=rng)
    assert mask.shape == (8, 4, 3, 3)
    assert np.count_nonzero(mask) == 100
    assert len(set(mask.sum(axis=(1, 2, 3)).tolist())) > 1
    assert random_unstructured_mask((3, 4), nnz=12, rng=rng).all()


@pytest.mark.parametrize("fan_in", [0, 17, -1])
def test_a_fan_in_out_of_range_is_an_error(fan_in):
    with pytest.raises(SriglError, match=f"fan_in={fan_in} must be between 1 and 16"):
        random_mask((4, 16), fan_in=fan_in, rng=np.random.default_rng(0))
    with pytest.raises(ValueTypeError, match="fan_in"):
        random_mask((4, 16), fan_in=2.0, rng=np.random.default_rng(0))
    with pytest.raises(SriglError, match="nnz=65 must be between 1 and 64"):
        random_unstructured_mask((4, 16), nnz=65, rng=np.random.default_rng(0))


# ---------------------------------------------------------------- weights

# init: (standard deviation times sqrt(k), kurtosis); k is the fan-in
MOMENTS = {
    "kaiming_normal": (math.sqrt(2), 3.0),
    "grad_flow": (math.sqrt(2), 3.0),
    "kaiming_uniform": (math.sqrt(2), 1.8),
    "torch_default": (math.sqrt(1 / 3), 1.8),
}


@pytest.mark.parametrize("init", MOMENTS)
@pytest.mark.parametrize("fan_in", [1, 7, 64])
def test_weights_have_the_variance_of_their_fan_in(init, fan_in):
    """Of n draws the variance is off by sqrt((kurtosis - 1) / n), the mean by sqrt(1 / n)."""
    scale, kurtosis = MOMENTS[init]
    mask = random_mask((40_000 // fan_in, 64), fan_in=fan_in, rng=np.random.default_rng(3))
    weight = sparse_init(mask, init, rng=np.random.default_rng(4), dtype=np.float64)
    drawn = weight[mask] / (scale / math.sqrt(fan_in))
    n = drawn.size
    assert abs(drawn.var() - 1) < 5 * math.sqrt((kurtosis - 1) / n)
    assert abs(drawn.mean()) < 5 / math.sqrt(n)
    fourth_moment = np.mean(drawn**4)
    assert abs(fourth_moment - kurtosis) < 0.15 * kurtosis  # normal and uniform are 67% apart
    assert not weight[~mask].any()


def test_the_released_grad_flow_has_the_variance_for_a_standard_deviation():
    mask = random_mask((4000, 64), fan_in=16, rng=np.random.default_rng(3))
    drawn = sparse_init(mask, "grad_flow_released", rng=np.random.default_rng(4))[mask]
    assert abs(drawn.std() / (2 / 16) - 1) < 5 * math.sqrt(0.5 / drawn.size)


def test_uniform_weights_stay_within_their_bound():
    mask = random_mask((2000, 32), fan_in=8, rng=np.random.default_rng(0))
    for init, bound in (("kaiming_uniform", math.sqrt(6 / 8)), ("torch_default", math.sqrt(1 / 8))):
        drawn = sparse_init(mask, init, rng=np.random.default_rng(0), dtype=np.float64)[mask]
        assert 0.999 * bound < np.abs(drawn).max() <= bound


def test_each_row_is_scaled_by_its_own_fan_in_and_ablated_rows_are_zero():
    mask = np.zeros((3, 20_000), bool)
    mask[0, :20_000] = mask[2, :5000] = True
    weight = sparse_init(mask, rng=np.random.default_rng(5), dtype=np.float64)
    for row, fan_in in ((0, 20_000), (2, 5000)):
        variance = weight[row][mask[row]].var() * fan_in / 2
        assert abs(variance - 1) < 5 * math.sqrt(2 / fan_in)
    assert not weight[1].any()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_weights_are_reproducible_and_of_the_dtype_asked_for(init, dtype):
    mask = random_mask((6, 3, 2, 2), fan_in=5, rng=np.random.default_rng(0))
    drawn = [sparse_init(mask, init, rng=np.random.default_rng(9), dtype=dtype) for _ in range(2)]
    assert drawn[0].dtype == dtype
    assert drawn[0].shape == mask.shape
    assert drawn[0].tobytes() == drawn[1].tobytes()
    other = sparse_init(mask, init, rng=np.random.default_rng(8), dtype=dtype)
    assert drawn[0].tobytes() != other.tobytes()


def test_kaiming_normal_in_float32_is_the_default():
    mask = random_mask((6, 12), fan_in=5, rng=np.random.default_rng(0))
    default = sparse_init(mask, rng=np.random.default_rng(9))
    named = sparse_init(mask, "kaiming_normal", rng=np.random.default_rng(9), dtype="float32")
    assert default.dtype == np.float32
    assert default.tobytes() == named.tobytes()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[True]],), ValueTypeError, "mask must be an array of bool, got list"),
        ((np.ones((2, 2)),), ValueTypeError, "mask must be an array of bool, got dtype"),
        ((np.ones(3, bool),), SriglError, r"shape \(3,\) has no neurons"),
        ((np.ones((2, 2), bool), "xavier"), SriglError, "init='xavier' is unknown; use one of"),
    ],
)
def test_bad_init_arguments_are_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        sparse_init(*arguments, rng=np.random.default_rng(0))


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, "float8", object])
def test_an_init_dtype_that_is_no_value_type_is_an_error(dtype):
    mask = np.ones((2, 2), bool)
    with pytest.raises(ValueTypeError, match="float16, bfloat16, float32, float64"):
        sparse_init(mask, rng=np.random.default_rng(0), dtype=dtype)
