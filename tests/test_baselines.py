"""RigL, SET and static: unstructured, on the primitives of SRigL (SPEC 5)."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from srigl_core import SriglError, ValueTypeError
from srigl_core.reference import update_rigl, update_set, update_static

SMALL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5])


@st.composite
def layers(draw):
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 7)))
    weight = draw(hnp.arrays(np.float64, shape, elements=SMALL))
    grad = draw(hnp.arrays(np.float64, shape, elements=SMALL))
    mask = draw(hnp.arrays(bool, shape))
    return weight, grad, mask, draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]) | st.floats(0, 1))


def ranked(scores, pool, count):
    """The first `count` flat positions of `pool`, largest magnitude first, then lowest index."""
    order = sorted(np.flatnonzero(pool).tolist(), key=lambda i: (-abs(scores.flat[i]), i))
    return order[:count]


def kept_of(weight, mask, drop_fraction):
    n_weights = int(mask.sum())
    n_keep = n_weights - int(np.floor(n_weights * drop_fraction))
    return ranked(weight, mask & (weight != 0), n_keep)


def check_weights(update, weight, mask, grown_init):
    expected = np.where(mask & update.mask, weight, 0)
    expected[update.mask & ~mask] = grown_init
    assert update.weight.tobytes() == expected.tobytes()
    assert update.n_pruned == np.count_nonzero(mask & ~update.mask)
    assert update.n_grown == np.count_nonzero(update.mask & ~mask)
    rows = update.mask.any(axis=1)
    assert update.ablated.tolist() == np.flatnonzero(~rows).tolist()
    assert update.revived.tolist() == np.flatnonzero(rows & ~mask.any(axis=1)).tolist()
    assert update.fan_in is None
    assert update.salient_counts.size == 0


@given(layer=layers(), grown_init=st.sampled_from([0.0, 0.25]))
def test_rigl_prunes_the_smallest_and_grows_the_largest_of_the_layer(layer, grown_init):
    weight, grad, mask, drop_fraction = layer
    update = update_rigl(weight, grad, mask, drop_fraction=drop_fraction, grown_init=grown_init)
    kept = kept_of(weight, mask, drop_fraction)
    free = np.ones(mask.shape, bool)
    free.flat[kept] = False
    expected = np.zeros(mask.shape, bool)
    expected.flat[kept + ranked(grad, free, int(mask.sum()) - len(kept))] = True
    np.testing.assert_array_equal(update.mask, expected)
    assert update.nnz == mask.sum()
    check_weights(update, weight, mask, grown_init)


@given(layer=layers(), seed=st.integers(0, 100))
def test_set_prunes_the_smallest_and_grows_as_many_at_random(layer, seed):
    weight, _, mask, drop_fraction = layer
    update = update_set(
        weight, mask, drop_fraction=drop_fraction, rng=np.random.default_rng(seed), grown_init=0.5
    )
    assert update.mask.flat[kept_of(weight, mask, drop_fraction)].all()
    assert update.nnz == mask.sum()
    check_weights(update, weight, mask, 0.5)
    again = update_set(
        weight, mask, drop_fraction=drop_fraction, rng=np.random.default_rng(seed), grown_init=0.5
    )
    np.testing.assert_array_equal(again.mask, update.mask)


def test_set_grows_uniformly_among_all_positions_not_kept():
    """Each of 8 free positions is drawn in 2 of 8 of 20000 updates, give or take 5 sigma."""
    weight = np.array([[9.0, 8.0, 0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    mask = np.array([[True, True, True, True, False], [False] * 5])
    rng = np.random.default_rng(7)
    n_draws, n_grown = 20_000, np.zeros((2, 5))
    for _ in range(n_draws):
        n_grown += update_set(weight, mask, drop_fraction=0.5, rng=rng).mask
    assert (n_grown[0, :2] == n_draws).all()
    drawn = n_grown.ravel()[2:]
    deviations = (drawn - n_draws / 4) / np.sqrt(n_draws * 3 / 16)
    assert np.abs(deviations).max() < 5


@given(layer=layers())
def test_static_changes_no_connection_and_zeroes_inactive_weights(layer):
    weight, _, mask, _ = layer
    update = update_static(weight, mask)
    np.testing.assert_array_equal(update.mask, mask)
    assert not np.shares_memory(update.mask, mask)
    assert update.weight.tobytes() == np.where(mask, weight, 0).tobytes()
    assert (update.n_pruned, update.n_grown) == (0, 0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_baselines_keep_shape_and_dtype(dtype):
    rng = np.random.default_rng(0)
    shape = (4, 3, 2, 2)
    weight = rng.standard_normal(shape).astype(dtype)
    mask = rng.random(shape) < 0.5
    for update in (
        update_rigl(weight, weight[::-1], mask, drop_fraction=0.3),
        update_set(weight, mask, drop_fraction=0.3, rng=rng),
        update_static(weight, mask),
    ):
        assert update.mask.shape == update.weight.shape == shape
        assert update.weight.dtype == dtype
        assert update.nnz == mask.sum()


def test_baselines_take_what_speaks_dlpack_alone():
    class Tensor:
        def __init__(self, array):
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    weight = np.arange(1.0, 7).reshape(2, 3)
    mask = np.array([[True, False, True], [True, True, False]])
    tensor = Tensor(weight)
    np.testing.assert_array_equal(update_static(tensor, mask).weight, weight * mask)
    rng = np.random.default_rng(0)
    assert update_set(tensor, mask, drop_fraction=0.5, rng=rng).mask[1, :2].all()
    assert update_rigl(tensor, tensor, mask, drop_fraction=0.5).nnz == 4


@pytest.mark.parametrize(
    "update",
    [
        lambda w, m, **options: update_rigl(w, w, m, **{"drop_fraction": 0.3, **options}),
        lambda w, m, **options: update_set(
            w, m, rng=np.random.default_rng(0), **{"drop_fraction": 0.3, **options}
        ),
    ],
    ids=["rigl", "set"],
)
def test_bad_input_is_an_error_and_changes_nothing(update):
    weight = np.array([[1.0, np.nan], [3.0, 4.0]])
    with pytest.raises(SriglError, match="not finite in 1 of 4"):
        update(weight, np.ones((2, 2), bool))
    right = np.nan_to_num(weight)
    with pytest.raises(SriglError, match=r"mask has shape \(2, 3\), but must have \(2, 2\)"):
        update(right, np.ones((2, 3), bool))
    with pytest.raises(ValueTypeError, match="mask must be an array of bool"):
        update(right, np.ones((2, 2)))
    with pytest.raises(ValueTypeError, match="weight of dtype 'int64'"):
        update(np.ones((2, 2), np.int64), np.ones((2, 2), bool))
    with pytest.raises(SriglError, match=r"drop_fraction=1\.25"):
        update(right, np.ones((2, 2), bool), drop_fraction=1.25)


def test_rigl_refuses_a_gradient_of_another_shape_or_not_finite():
    weight, mask = np.ones((2, 2)), np.ones((2, 2), bool)
    with pytest.raises(SriglError, match=r"grad has shape \(2,\)"):
        update_rigl(weight, np.ones(2), mask, drop_fraction=0.3)
    with pytest.raises(SriglError, match="grad is not finite in 4 of 4"):
        update_rigl(weight, weight * np.inf, mask, drop_fraction=0.3)
