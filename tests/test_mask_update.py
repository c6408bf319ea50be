"""The mask update of SPEC 4, step by step, and against an independent telling of it."""

import re
import tracemalloc
from collections import namedtuple
from dataclasses import fields

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from srigl_core import SriglError, UpdateSettings, ValueTypeError, update_mask
from srigl_core.reference import remap_state
from srigl_core.reference import update_mask as reference_update

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


def array(rows, dtype=np.float64):
    return np.array(rows, dtype)


def active(*rows):
    """Masks drawn as text: x is active."""
    return np.array([[place == "x" for place in row] for row in rows])


# ---------------------------------------------------------------- SPEC 4 told by sorting tuples


def specified_update(weight, grad, mask, settings):
    """Return (active places, new values, facts) of SPEC 4, on dicts of places and plain numbers."""
    n_out, n_in = len(weight), len(weight[0])
    budget = settings.nnz_budget
    places = [(r, c) for r in range(n_out) for c in range(n_in)]
    size = {(r, c): abs(weight[r][c]) for r, c in places}
    pull = {(r, c): abs(grad[r][c]) for r, c in places}
    before = [place for place in places if mask[place[0]][place[1]]]

    def best(score, pool, count):
        ranked = sorted((-score[place], place) for place in pool)
        return {place for _, place in ranked[: max(count, 0)]}

    # 4.2
    n = len(before)
    n_prune = int(n * settings.drop_fraction // 1)
    n_keep = n - n_prune
    nnz = sum(size[place] > 0 for place in before)
    if nnz < n_keep:
        n_keep, n_prune = nnz, n - nnz
    # 4.3
    K = best(size, before, n_keep)
    everywhere = settings.saliency_scope == "all"
    R = best(pull, [p for p in places if everywhere or p not in before], n_prune)
    count = [sum(r == row for r, _ in K | R) for row in range(n_out)]
    # 4.4
    if settings.min_salient is not None:
        t = settings.min_salient
    elif settings.gamma_sal is not None:
        t = max(1, int(settings.gamma_sal * (budget // n_out) // 1))
    else:
        t = 0
    lo = budget // n_in
    t = 0 if lo >= n_out else min(t, sorted(count, reverse=True)[lo])
    rows = [row for row in range(n_out) if not count[row] < t]
    # 4.5
    k = budget // len(rows)
    if k == 0:
        return None
    # 4.6
    pool = [(r, c) for r, c in before if r in rows and size[r, c] > 0]
    kept = best(size, pool, n_keep)
    for row in rows:
        own = [place for place in kept if place[0] == row]
        kept -= set(own) - best(size, own, k)
    # 4.7
    after = set(kept)
    for row in rows:
        free = [(row, c) for c in range(n_in) if (row, c) not in kept]
        after |= best(pull, free, k - sum(r == row for r, _ in kept))
    # 4.8
    value = {p: weight[p[0]][p[1]] if p in before else settings.grown_init for p in after}
    facts = {
        "ablated": [row for row in range(n_out) if row not in rows],
        "revived": [row for row in rows if not any(mask[row])],
        "fan_in": k,
        "n_pruned": len(set(before) - after),
        "n_grown": len(after - set(before)),
        "threshold": t,
        "salient_counts": count,
    }
    return after, value, facts


def smallest_budget_that_works(weight, grad, mask, settings):
    for budget in range(1, len(weight) * len(weight[0]) + 1):
        other = UpdateSettings(**{**vars(settings), "nnz_budget": budget})
        if specified_update(weight, grad, mask, other) is not None:
            return budget
    raise AssertionError("no budget works")


@st.composite
def update_cases(draw):
    """Tie-rich small integers, any mask, any budget."""
    n_out, n_in = draw(st.integers(1, 7)), draw(st.integers(1, 8))
    dtype = draw(st.sampled_from(DTYPES))
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, 0.5])
    rows = st.lists(numbers, min_size=n_in, max_size=n_in)
    matrices = st.lists(rows, min_size=n_out, max_size=n_out)
    bits = st.lists(st.booleans(), min_size=n_in, max_size=n_in)
    mask = draw(st.lists(bits, min_size=n_out, max_size=n_out))
    gamma_sal = draw(st.sampled_from([None, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0]))
    settings = UpdateSettings(
        nnz_budget=draw(st.integers(1, n_out * n_in)),
        drop_fraction=draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]) | st.floats(0, 1)),
        gamma_sal=gamma_sal,
        min_salient=draw(st.integers(0, n_in + 2)) if gamma_sal is None else None,
        saliency_scope=draw(st.sampled_from(["inactive", "all"])),
        grown_init=draw(st.sampled_from([0.0, 0.25])),
    )
    return draw(matrices), draw(matrices), mask, dtype, settings


def run(case, **options):
    weight, grad, mask, dtype, settings = case
    return update_mask(
        array(weight, dtype), array(grad, dtype), np.array(mask), **vars(settings), **options
    )


@given(case=update_cases())
@example(  # a smaller budget than the one given works, since its clamp is higher
    case=([[1.0, 2.0]] + [[0.0, 0.0]] * 3, [[0.0] * 2] * 4, [[True, True]] + [[False] * 2] * 3,
          np.float32, UpdateSettings(2, 0.0)),
)  # fmt: skip
def test_update_is_what_the_specification_says(update_backend, case):
    weight, grad, mask, dtype, settings = case
    expected = specified_update(weight, grad, mask, settings)
    if expected is None:
        enough = smallest_budget_that_works(weight, grad, mask, settings)
        with pytest.raises(SriglError, match=rf"smallest budget that works here is {enough}$"):
            run(case, backend=update_backend)
        return
    places, values, facts = expected
    update = run(case, backend=update_backend)
    assert {tuple(place) for place in np.argwhere(update.mask).tolist()} == places
    dense = np.zeros(update.mask.shape, dtype)
    for place, value in values.items():
        dense[place] = value
    assert update.weight.dtype == dtype
    assert update.weight.tobytes() == dense.tobytes()
    for name, value in facts.items():
        found = getattr(update, name)
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == value, name


@given(case=update_cases())
def test_invariants_hold_and_inputs_are_untouched(update_backend, case):
    weight, grad, mask, dtype, settings = case
    w, g, m = array(weight, dtype), array(grad, dtype), np.array(mask)
    copies = w.tobytes(), g.tobytes(), m.tobytes()
    for part in (w, g, m):
        part.setflags(write=False)
    try:
        update = update_mask(w, g, m, **vars(settings), backend=update_backend)
    except SriglError:
        assert settings.nnz_budget < len(weight)
        return
    finally:
        assert (w.tobytes(), g.tobytes(), m.tobytes()) == copies
    counts = np.count_nonzero(update.mask, axis=1)
    assert set(counts.tolist()) <= {0, update.fan_in}
    assert update.n_active == np.count_nonzero(counts) >= 1
    assert update.nnz == update.fan_in * update.n_active <= settings.nnz_budget
    assert update.ablated.tolist() == np.flatnonzero(counts == 0).tolist()
    assert not update.weight[~update.mask].any()
    assert update.ablated.dtype == update.revived.dtype == np.int64
    for fresh in (update.mask, update.weight):
        assert not any(np.shares_memory(fresh, part) for part in (w, g, m))


@given(case=update_cases())
def test_update_does_not_depend_on_memory_layout(update_backend, case):
    weight, grad, mask, dtype, settings = case
    try:
        expected = run(case, backend=update_backend)
    except SriglError:
        return
    wide = np.zeros((len(weight), 2 * len(weight[0])), dtype)
    wide[:, ::2] = weight
    found = update_mask(
        wide[:, ::2],
        array(grad, dtype)[::-1, ::-1].copy()[::-1, ::-1],
        np.asfortranarray(np.array(mask)),
        **vars(settings),
        backend=update_backend,
    )
    assert found.mask.tobytes() == expected.mask.tobytes()
    assert found.weight.tobytes() == expected.weight.tobytes()


# ---------------------------------------------------------------- 4.2 counts


@pytest.mark.parametrize(
    ("n_weights", "drop_fraction", "n_prune"),
    [
        (10, 0.19, 1),
        (10, 0.3, 3),
        (10, 0.0, 0),
        (10, 1.0, 10),
        (100, 0.29, 28),  # 100 * 0.29 is 28.999999999999996 in float64
        (10, np.float32(0.7), 6),  # 6.99999988 in float64, 7.0 in float32
        (3, 0.33, 0),
    ],
)
def test_number_pruned_is_the_floor_of_the_float64_product(
    update_backend, n_weights, drop_fraction, n_prune
):
    weight = np.arange(1.0, 2 * n_weights + 1)[None]
    grad = np.where(np.arange(2 * n_weights) < n_weights, 0.0, 1.0)[None]
    mask = grad == 0
    update = update_mask(
        weight,
        grad,
        mask,
        nnz_budget=n_weights,
        drop_fraction=drop_fraction,
        backend=update_backend,
    )
    assert update.n_pruned == n_prune
    assert not update.mask[0, :n_prune].any()
    assert update.mask[0, n_prune:n_weights].all()


def test_active_zeros_are_pruned_whatever_the_drop_fraction(update_backend):
    weight = array([[0.0, -0.0, 3.0, 9.0, 9.0, 9.0]])
    grad = array([[0.0, 0.0, 0.0, 1.0, 3.0, 2.0]])
    update = update_mask(
        weight, grad, active("xxx..."), nnz_budget=3, drop_fraction=0.0, backend=update_backend
    )
    np.testing.assert_array_equal(update.mask, active("..x.xx"))


def test_zeros_pruned_make_as_many_gradients_salient(update_backend):
    """n_prune = n - nnz: three zeros are pruned, so three inactive gradients count."""
    weight = array([[0.0, 0.0, 0.0, 1.0], [2.0, 3.0, 4.0, 5.0]])
    grad = array([[0.0] * 4, [4.0, 3.0, 2.0, 1.0]])
    mask = active("xxxx", "....")
    update = update_mask(
        weight, grad, mask, nnz_budget=4, drop_fraction=0.0, backend=update_backend
    )
    assert update.salient_counts.tolist() == [1, 3]


# ---------------------------------------------------------------- 4.3 saliency


def test_gradients_are_salient_among_inactive_positions_or_among_all(update_backend):
    weight = array([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]])
    grad = array([[9.0, 8.0, 2.0, 1.0], [7.0, 6.0, 4.0, 3.0]])
    mask = active("xx..", "xx..")
    counts = {
        scope: update_mask(
            weight,
            grad,
            mask,
            nnz_budget=4,
            drop_fraction=0.5,
            saliency_scope=scope,
            backend=update_backend,
        ).salient_counts.tolist()
        for scope in ("inactive", "all")
    }
    assert counts == {"inactive": [0, 4], "all": [2, 2]}


def test_a_position_salient_twice_counts_once(update_backend):
    weight = array([[5.0, 4.0, 1.0, 2.0]])
    grad = array([[9.0, 8.0, 0.0, 0.0]])
    update = update_mask(
        weight,
        grad,
        active("xxxx"),
        nnz_budget=4,
        drop_fraction=0.5,
        saliency_scope="all",
        backend=update_backend,
    )
    assert update.salient_counts.tolist() == [2]


def test_fewer_inactive_positions_than_pruned_are_all_salient(update_backend):
    weight = array([[1.0, 2.0, 3.0, 4.0, 0.0]])
    update = update_mask(
        weight,
        array([[0.0] * 5]),
        active("xxxx."),
        nnz_budget=4,
        drop_fraction=0.75,
        backend=update_backend,
    )
    assert update.salient_counts.tolist() == [2]


# ---------------------------------------------------------------- 4.4 ablation


def with_counts(counts, n_in=4):
    """A layer whose salient counts are `counts` when nothing is pruned."""
    mask = np.arange(n_in) < np.array(counts)[:, None]
    weight = np.where(mask, 1.0 + np.arange(mask.size).reshape(mask.shape), 0.0)
    grad = np.arange(mask.size, 0.0, -1).reshape(mask.shape)
    return weight, grad, mask


@pytest.mark.parametrize(
    ("counts", "nnz_budget", "settings", "threshold", "ablated"),
    [
        # the threshold itself
        ([4, 3, 1, 0], 8, {}, 1, [3]),  # max(1, floor(.3 * 2)) = 1
        ([4, 4, 1, 1], 8, {"gamma_sal": 1.0}, 1, []),  # clamped from 2 by the third largest
        ([4, 4, 4, 1], 8, {"gamma_sal": 1.0}, 2, [3]),  # all of k0 = 2, and not a count of one
        ([4, 4, 4, 1], 8, {"gamma_sal": 0.99}, 1, []),
        ([4, 4, 4, 2], 12, {"gamma_sal": 0.99}, 2, []),  # floor(2.97)
        ([4, 4, 4, 2], 11, {"gamma_sal": None, "min_salient": 3}, 3, [3]),
        ([4, 4, 4, 2], 11, {"gamma_sal": None, "min_salient": 2}, 2, []),
        ([4, 3, 1, 0], 8, {"gamma_sal": None, "min_salient": 0}, 0, []),
        ([4, 3, 1, 0], 8, {"gamma_sal": None}, 0, []),
        # the clamp: at least B // n_in + 1 rows survive, those that tie with it too
        ([4, 3, 1, 0], 8, {"gamma_sal": None, "min_salient": 4}, 1, [3]),
        ([4, 2, 2, 2], 8, {"gamma_sal": None, "min_salient": 4}, 2, []),
        ([4, 4, 3, 2], 8, {"gamma_sal": None, "min_salient": 4}, 3, [3]),
        ([4, 4, 3, 2], 7, {"gamma_sal": None, "min_salient": 4}, 4, [2, 3]),
        ([4, 4, 3, 2], 3, {"gamma_sal": None, "min_salient": 99}, 4, [2, 3]),
        # clamped to 0, nothing is ablated, not even a row with nothing
        ([4, 3, 0, 0], 8, {"gamma_sal": None, "min_salient": 4}, 0, []),
        ([4, 3, 0, 0], 7, {"gamma_sal": None, "min_salient": 4}, 3, [2, 3]),
        # lo = n_out: every row is needed
        ([4, 4, 4, 0], 16, {"gamma_sal": None, "min_salient": 4}, 0, []),
        ([4, 4, 4, 0], 15, {"gamma_sal": None, "min_salient": 4}, 0, []),
        ([4, 4, 4, 1], 15, {"gamma_sal": None, "min_salient": 4}, 1, []),
    ],
)
def test_threshold_and_its_clamp(update_backend, counts, nnz_budget, settings, threshold, ablated):
    weight, grad, mask = with_counts(counts)
    update = update_mask(
        weight,
        grad,
        mask,
        nnz_budget=nnz_budget,
        drop_fraction=0.0,
        backend=update_backend,
        **settings,
    )
    assert update.salient_counts.tolist() == counts
    assert update.threshold == threshold
    assert update.ablated.tolist() == ablated
    assert update.fan_in == nnz_budget // (len(counts) - len(ablated)) <= mask.shape[1]


def test_a_single_row_is_never_ablated(update_backend):
    update = update_mask(
        array([[1.0, 2.0, 3.0]]),
        array([[0.0, 0.0, 0.0]]),
        active("xx."),
        nnz_budget=2,
        drop_fraction=0.0,
        gamma_sal=None,
        min_salient=3,
        backend=update_backend,
    )
    assert (update.threshold, update.ablated.size, update.fan_in) == (2, 0, 2)


def test_a_count_beyond_any_integer_type_is_clamped_too(update_backend):
    weight, grad, mask = with_counts([4, 3, 1, 0])
    update = update_mask(
        weight,
        grad,
        mask,
        nnz_budget=8,
        drop_fraction=0.0,
        gamma_sal=None,
        min_salient=10**30,
        backend=update_backend,
    )
    assert update.threshold == 1


# ---------------------------------------------------------------- 4.5 fan-in


def test_budget_of_ablated_rows_goes_to_the_others(update_backend):
    weight, grad, mask = with_counts([4, 4, 1, 1], n_in=8)
    update = update_mask(
        weight,
        grad,
        mask,
        nnz_budget=11,
        drop_fraction=0.0,
        gamma_sal=None,
        min_salient=2,
        backend=update_backend,
    )
    assert update.ablated.tolist() == [2, 3]
    assert update.fan_in == 5


def test_no_weight_left_for_a_row_is_an_error_with_the_smallest_budget(update_backend):
    weight, grad, mask = with_counts([1, 1, 1, 1, 1])
    options = {"drop_fraction": 0.0, "backend": update_backend}
    with pytest.raises(SriglError, match=r"nnz_budget=3 .* 5 active neurons") as caught:
        update_mask(weight, grad, mask, nnz_budget=3, **options)
    enough = int(re.search(r"works here is (\d+)", str(caught.value))[1])
    assert enough == 5
    for budget in range(1, enough):
        with pytest.raises(SriglError):
            update_mask(weight, grad, mask, nnz_budget=budget, **options)
    assert update_mask(weight, grad, mask, nnz_budget=enough, **options).fan_in == 1


def test_smallest_budget_is_found_quickly_in_a_large_layer():
    """One vectorised search, not one sort for each of 30,000 budgets: a hang fails by time-out."""
    n_out = 30_000
    weight, grad = np.zeros((n_out, 2), np.float32), np.zeros((n_out, 2), np.float32)
    with pytest.raises(SriglError, match=f"works here is {n_out}$"):
        reference_update(weight, grad, weight == 0, UpdateSettings(nnz_budget=1, drop_fraction=0.0))


# ---------------------------------------------------------------- 4.6 prune


def test_an_over_full_row_keeps_its_largest_weights(update_backend):
    weight = array([[1.0, -2.0, 3.0, -4.0, 5.0, 6.0], [0.5, 0.25, 0.0, 0.0, 0.0, 0.0]])
    grad = array([[0.0] * 6, [0.0, 0.0, 9.0, 8.0, 7.0, 6.0]])
    update = update_mask(
        weight,
        grad,
        active("xxxxxx", "xx...."),
        nnz_budget=6,
        drop_fraction=0.0,
        gamma_sal=None,
        backend=update_backend,
    )
    np.testing.assert_array_equal(update.mask, active("...xxx", "xxx..."))


def test_weights_kept_are_the_largest_of_the_layer_and_not_of_each_row(update_backend):
    weight = array([[1.0, 2.0, 0.0, 0.0], [5.0, 6.0, 0.0, 0.0]])
    grad = array([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 2.0, 1.0]])
    update = update_mask(
        weight,
        grad,
        active("xx..", "xx.."),
        nnz_budget=4,
        drop_fraction=0.5,
        gamma_sal=None,
        backend=update_backend,
    )
    np.testing.assert_array_equal(update.mask, active("..xx", "xx.."))


def test_rows_that_survive_keep_more_where_ablated_rows_held_large_weights(update_backend):
    """n_keep is spent on surviving rows alone: the 9 of the ablated row uses up none of it."""
    weight = array([[1.0, 2.0, 3.0, 0.0], [4.0, 5.0, 6.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    grad = array([[0.0, 0.0, 0.0, 7.0], [0.0, 0.0, 0.0, 8.0], [0.0] * 4])
    mask = active("xxx.", "xxx.", "x...")
    update = update_mask(
        weight,
        grad,
        mask,
        nnz_budget=6,
        drop_fraction=1 / 7,
        gamma_sal=None,
        min_salient=2,
        backend=update_backend,
    )
    assert update.ablated.tolist() == [2]
    np.testing.assert_array_equal(update.mask, active("xxx.", "xxx.", "...."))


# ---------------------------------------------------------------- 4.7 grow and 4.8 weights


def test_rows_are_filled_where_the_gradient_is_largest(update_backend):
    weight = array([[8.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]])
    grad = array([[-9.0, -3.0, 2.0, 1.0], [-1.0, 0.0, 2.0, -3.0]])
    update = update_mask(
        weight,
        grad,
        active("x...", ".x.."),
        nnz_budget=6,
        drop_fraction=0.0,
        backend=update_backend,
    )
    np.testing.assert_array_equal(update.mask, active("xxx.", ".xxx"))
    assert (update.n_grown, update.n_pruned) == (4, 0)


def test_a_position_regrown_keeps_its_value_and_a_new_one_gets_grown_init(update_backend):
    weight = array([[0.125, 3.0, 4.0, 7.0]])
    grad = array([[9.0, 0.0, 0.0, 8.0]])
    update = update_mask(
        weight,
        grad,
        active("xxx."),
        nnz_budget=4,
        drop_fraction=0.34,
        grown_init=-0.5,
        backend=update_backend,
    )
    np.testing.assert_array_equal(update.weight, [[0.125, 3.0, 4.0, -0.5]])
    assert (update.n_grown, update.n_pruned) == (1, 0)


def test_an_active_zero_that_is_regrown_keeps_its_sign(update_backend):
    update = update_mask(
        array([[-0.0, 1.0]]),
        array([[1.0, 0.0]]),
        active("xx"),
        nnz_budget=2,
        drop_fraction=0.0,
        grown_init=5.0,
        backend=update_backend,
    )
    assert update.weight.tobytes() == array([[-0.0, 1.0]]).tobytes()


def test_inactive_weights_become_zero_whatever_they_were(update_backend):
    weight = array([[5.0, np.nan, -np.inf, 2.0], [np.inf, 1.0, 3.0, np.nan]])
    mask = active("x..x", ".xx.")
    update = update_mask(
        weight, np.ones((2, 4)), mask, nnz_budget=4, drop_fraction=0.0, backend=update_backend
    )
    np.testing.assert_array_equal(update.mask, mask)
    np.testing.assert_array_equal(update.weight, [[5.0, 0.0, 0.0, 2.0], [0.0, 1.0, 3.0, 0.0]])


def test_an_ablated_neuron_revives_where_its_gradients_earn_it(update_backend):
    weight = array([[1.0, 2.0, 3.0, 4.0], [7.0, 7.0, 7.0, 7.0]])
    grad = array([[0.0, 0.0, 0.0, 0.0], [1.0, 4.0, 3.0, 2.0]])
    mask = active("xxxx", "....")
    update = update_mask(
        weight,
        grad,
        mask,
        nnz_budget=4,
        drop_fraction=0.5,
        gamma_sal=1.0,
        backend=update_backend,
    )
    assert (update.revived.tolist(), update.ablated.tolist()) == ([1], [])
    np.testing.assert_array_equal(update.mask, active("..xx", ".xx."))
    np.testing.assert_array_equal(update.weight[1], 0.0)


# ---------------------------------------------------------------- 4.9 ties


def test_ties_of_weights_go_to_the_lowest_flat_index(update_backend):
    weight = array([[-1.0, 1.0, -1.0, 0.0], [1.0, -1.0, 1.0, 0.0]])
    grad = array([[0.0, 0.0, 0.0, 1.0]] * 2)
    mask = active("xxx.", "xxx.")
    update = update_mask(
        weight,
        grad,
        mask,
        nnz_budget=6,
        drop_fraction=0.34,
        gamma_sal=None,
        backend=update_backend,
    )
    np.testing.assert_array_equal(update.mask, active("xxx.", "xx.x"))


def test_ties_of_gradients_go_to_the_lowest_flat_index(update_backend):
    update = update_mask(
        np.zeros((2, 5)),
        array([[2.0, -2.0, 0.0, 2.0, -2.0], [-0.0, 0.0, -0.0, 0.0, 1.0]]),
        np.zeros((2, 5), bool),
        nnz_budget=6,
        drop_fraction=0.3,
        backend=update_backend,
    )
    np.testing.assert_array_equal(update.mask, active("xx.x.", "xx..x"))


def test_ties_of_salient_gradients_go_to_the_lowest_flat_index(update_backend):
    weight = array([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    update = update_mask(
        weight,
        array([[3.0, -3.0], [3.0, 3.0], [0.0, 0.0]]),
        active("..", "..", "xx"),
        nnz_budget=3,
        drop_fraction=0.5,
        backend=update_backend,
    )
    assert update.salient_counts.tolist() == [1, 0, 1]


def test_ties_in_an_over_full_row_go_to_the_lowest_column(update_backend):
    update = update_mask(
        array([[2.0, -2.0, 2.0, -2.0, 3.0]]),
        np.zeros((1, 5)),
        active("xxxxx"),
        nnz_budget=3,
        drop_fraction=0.0,
        backend=update_backend,
    )
    np.testing.assert_array_equal(update.mask, active("xx..x"))


@pytest.mark.parametrize(
    ("dtype", "small", "smaller"),
    [
        (np.float64, 1 + 2**-40, 1.0),
        (np.float64, 1e-323, 5e-324),
        (np.float32, 2.8e-45, 1.4e-45),
        (np.float16, 1.2e-7, 6e-8),
        (ml_dtypes.bfloat16, 1.8e-40, 9.2e-41),
        (ml_dtypes.bfloat16, 1.0078125, 1.0),
    ],
)
def test_magnitudes_are_ranked_in_full_precision(update_backend, dtype, small, smaller):
    weight = array([[0.0, smaller, -small, smaller]], dtype)
    assert abs(float(weight[0, 2])) > float(weight[0, 1]) > 0
    update = update_mask(
        weight,
        weight[:, ::-1],
        active(".xxx"),
        nnz_budget=2,
        drop_fraction=0.67,
        backend=update_backend,
    )
    # kept: the largest weight; grown: the largest gradient, now at column 1
    np.testing.assert_array_equal(update.mask, active(".xx."))
    assert update.weight.dtype == dtype
    assert update.weight.tobytes() == np.where(update.mask, weight, weight[0, 0]).tobytes()


def test_an_active_zero_is_pruned_beside_the_smallest_weights(update_backend):
    for dtype in DTYPES:
        tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
        update = update_mask(
            array([[0.0, tiny, -0.0, -tiny, 0.0]], dtype),
            array([[0.0, 0.0, 0.0, 0.0, tiny]], dtype),
            active("xxxx."),
            nnz_budget=3,
            drop_fraction=0.0,
            backend=update_backend,
        )
        np.testing.assert_array_equal(update.mask, active(".x.xx"))


@pytest.mark.parametrize("scope", ["inactive", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 70_001), (301, 467)])
def test_ties_go_to_the_lowest_index_however_the_layer_is_divided(
    update_backend, shape, dtype, scope
):
    """Large enough to be cut up for threads; the last weight kept has equals in all parts."""
    rng = np.random.default_rng(7)
    weight, grad = (rng.integers(-3, 4, shape).astype(dtype) for _ in range(2))
    mask = (rng.random(shape) < 0.3) & (rng.random((shape[0], 1)) < 0.9)
    options = {
        "nnz_budget": mask.size // 5,
        "drop_fraction": 0.45,
        "gamma_sal": 0.9,
        "saliency_scope": scope,
        "grown_init": 0.1,
    }
    for threads in (1, 2, 3):
        assert_updates_like_the_reference(
            update_backend, weight, grad, mask, options, threads=threads
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 5), (20, 20), (40, 100), (600, 600)])
def test_neighbouring_magnitudes_are_told_apart(update_backend, shape, dtype):
    """Three neighbours in many places each, so that the last chosen differ in the last bit."""
    rng = np.random.default_rng(11)
    one = np.ones(1, dtype)
    bits = one.view(f"u{one.itemsize}")
    for drop_fraction in (0.2, 0.5, 0.8):
        for gamma_sal in (None, 1.0):
            weight, grad = (
                (bits + rng.integers(0, 3, shape).astype(bits.dtype)).view(dtype) for _ in range(2)
            )
            options = {
                "nnz_budget": weight.size // 3,
                "drop_fraction": drop_fraction,
                "gamma_sal": gamma_sal,
            }
            mask = rng.random(shape) < 0.5
            assert_updates_like_the_reference(update_backend, weight, grad, mask, options)


def assert_updates_like_the_reference(backend, weight, grad, mask, options, threads=None):
    expected = reference_update(weight, grad, mask, UpdateSettings(**options))
    update = update_mask(weight, grad, mask, **options, backend=backend, threads=threads)
    for part in fields(update):
        found, due = getattr(update, part.name), getattr(expected, part.name)
        assert np.asarray(found).dtype == np.asarray(due).dtype, part.name
        assert np.asarray(found).tobytes() == np.asarray(due).tobytes(), part.name


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 1000), (1, 300_000)])
def test_update_needs_at_most_one_dense_layer_beside_its_result(
    backend_names, shape, dtype, density
):
    if "numba" not in backend_names("update_mask"):
        pytest.skip("a promise of the numba backend, which is not under test")
    rng = np.random.default_rng(3)
    weight, grad = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    mask = rng.random(shape) < density
    options = {"nnz_budget": weight.size // 10, "drop_fraction": 0.3, "backend": "numba"}
    for scope in ("inactive", "all"):
        for threads in (1, 3):
            update_mask(weight, grad, mask, **options, saliency_scope=scope, threads=threads)
            tracemalloc.start()
            try:
                update = update_mask(
                    weight, grad, mask, **options, saliency_scope=scope, threads=threads
                )
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert peak - update.weight.nbytes - update.mask.nbytes <= weight.nbytes


# ---------------------------------------------------------------- bad numbers, shapes, extremes


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_not_finite_is_an_error_with_the_count(update_backend, wrong, dtype):
    weight, grad, mask = with_counts([2, 2, 2])
    weight, grad = weight.astype(dtype), grad.astype(dtype)
    options = {"nnz_budget": 6, "drop_fraction": 0.5, "backend": update_backend}
    bad = grad.copy()
    bad[0, 0] = bad[1, 3] = bad[2, 2] = wrong
    with pytest.raises(SriglError, match=r"grad is not finite in 3 of 12 places"):
        update_mask(weight, bad, mask, **options)
    bad = weight.copy()
    bad[0, 0] = bad[1, 1] = wrong
    bad[2, 3] = wrong  # inactive: does not count
    copies = bad.tobytes(), grad.tobytes(), mask.tobytes()
    with pytest.raises(SriglError, match=r"weight at active positions is not finite in 2 of 12"):
        update_mask(bad, grad, mask, **options)
    assert (bad.tobytes(), grad.tobytes(), mask.tobytes()) == copies


def test_a_convolution_is_its_flattened_layer(update_backend):
    rng = np.random.default_rng(5)
    shape = (6, 4, 3, 2)
    weight = rng.standard_normal(shape).astype(np.float32)
    grad = rng.standard_normal(shape).astype(np.float32)
    mask = rng.random(shape) < 0.3
    options = {"nnz_budget": 40, "drop_fraction": 0.3, "gamma_sal": 0.9, "backend": update_backend}
    update = update_mask(weight, grad, mask, **options)
    flat = update_mask(*(part.reshape(6, 24) for part in (weight, grad, mask)), **options)
    assert update.mask.shape == update.weight.shape == shape
    np.testing.assert_array_equal(update.mask.reshape(6, 24), flat.mask)
    np.testing.assert_array_equal(update.weight.reshape(6, 24), flat.weight)
    assert update.ablated.tolist() == flat.ablated.tolist()


def test_an_empty_mask_grows_where_the_gradient_is_largest(update_backend):
    grad = array([[1.0, 3.0, 2.0], [6.0, 5.0, 4.0]])
    update = update_mask(
        np.zeros((2, 3)),
        grad,
        np.zeros((2, 3), bool),
        nnz_budget=4,
        drop_fraction=0.3,
        backend=update_backend,
    )
    np.testing.assert_array_equal(update.mask, active(".xx", "xx."))
    assert update.revived.tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 4)])
def test_a_full_budget_makes_the_layer_dense(update_backend, shape):
    weight = np.arange(1.0, np.prod(shape) + 1).reshape(shape)
    update = update_mask(
        weight,
        weight,
        np.zeros(shape, bool),
        nnz_budget=weight.size,
        drop_fraction=0.5,
        gamma_sal=1.0,
        backend=update_backend,
    )
    assert update.mask.all()
    assert update.fan_in == shape[1]


def test_weight_and_gradient_may_differ_in_dtype(update_backend):
    weight, grad, mask = with_counts([3, 2])
    options = {"nnz_budget": 4, "drop_fraction": 0.4, "backend": update_backend}
    expected = update_mask(weight, grad, mask, **options)
    for w_dtype in DTYPES:
        for g_dtype in DTYPES:
            found = update_mask(weight.astype(w_dtype), grad.astype(g_dtype), mask, **options)
            np.testing.assert_array_equal(found.mask, expected.mask)
            assert found.weight.dtype == w_dtype


@pytest.mark.parametrize(
    ("dtype", "grown_init"), [(np.float16, 1e5), (np.float32, 1e39), (ml_dtypes.bfloat16, -1e39)]
)
def test_a_grown_init_that_overflows_the_weight_is_an_error(update_backend, dtype, grown_init):
    weight = array([[1.0, 2.0]], dtype)
    with pytest.raises(SriglError, match="grown_init"):
        update_mask(
            weight,
            weight,
            active("x."),
            nnz_budget=2,
            drop_fraction=0.0,
            grown_init=grown_init,
            backend=update_backend,
        )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"nnz_budget": 0}, SriglError, "nnz_budget=0 must be at least 1"),
        ({"nnz_budget": 13}, SriglError, r"nnz_budget=13 exceeds the 12 weights .* 1\.\.12"),
        ({"nnz_budget": 6.0}, ValueTypeError, r"nnz_budget=6\.0 must be an integer"),
        ({"nnz_budget": True}, ValueTypeError, "nnz_budget=True must be an integer"),
        ({"drop_fraction": -0.1}, SriglError, r"drop_fraction=-0\.1 must be in \[0, 1\]"),
        ({"drop_fraction": 1.5}, SriglError, r"drop_fraction=1\.5 must be in \[0, 1\]"),
        ({"drop_fraction": np.nan}, SriglError, "drop_fraction=nan must be finite"),
        ({"drop_fraction": 10**400}, SriglError, "must be finite"),
        ({"drop_fraction": "0.3"}, ValueTypeError, "drop_fraction='0.3' must be a number"),
        ({"gamma_sal": 0.0}, SriglError, r"gamma_sal=0\.0 must be in \(0, 1\].*min_salient"),
        ({"gamma_sal": 30}, SriglError, r"gamma_sal=30 must be in \(0, 1\].*min_salient"),
        ({"min_salient": 2}, SriglError, "gamma_sal=0.3 and min_salient=2 .* pass gamma_sal=None"),
        ({"gamma_sal": None, "min_salient": -1}, SriglError, "min_salient=-1 must be at least 0"),
        ({"gamma_sal": None, "min_salient": 1.0}, ValueTypeError, r"min_salient=1\.0"),
        ({"saliency_scope": "paper"}, SriglError, "saliency_scope='paper' must be one of"),
        ({"grown_init": np.inf}, SriglError, "grown_init=inf must be finite"),
    ],
)
def test_a_setting_out_of_range_is_an_error(update_backend, settings, error, message):
    weight, grad, mask = with_counts([2, 2, 2])
    with pytest.raises(error, match=message):
        update_mask(
            weight,
            grad,
            mask,
            **{"nnz_budget": 6, "drop_fraction": 0.5, **settings},
            backend=update_backend,
        )


# ---------------------------------------------------------------- optimiser state


def test_optimiser_state_of_any_kind_is_remapped():
    Adam = namedtuple("Adam", ["mu", "nu", "count"])
    before, after = active("xx..", "..xx"), active("x.x.", "..xx")
    stays = before & after
    moment = np.arange(1.0, 9.0).reshape(2, 4)
    square = moment.astype(np.float32) ** 2
    state = {
        "momentum_buffer": moment,
        "step": 7,
        "none": None,
        "adam": Adam(moment, square, np.array(3)),
        "list": [moment, (square, "text")],
        "other shape": np.arange(4.0),
        "half": moment.astype(ml_dtypes.bfloat16),
    }
    copy = moment.copy()
    remapped = remap_state(state, before, after)
    np.testing.assert_array_equal(moment, copy)
    np.testing.assert_array_equal(remapped["momentum_buffer"], np.where(stays, moment, 0))
    assert (remapped["step"], remapped["none"]) == (7, None)
    assert isinstance(remapped["adam"], Adam)
    np.testing.assert_array_equal(remapped["adam"].nu, np.where(stays, square, 0))
    assert remapped["adam"].nu.dtype == np.float32
    assert remapped["adam"].count == 3
    np.testing.assert_array_equal(remapped["list"][1][0], np.where(stays, square, 0))
    assert remapped["list"][1][1] == "text"
    np.testing.assert_array_equal(remapped["other shape"], np.arange(4.0))
    assert remapped["half"].dtype == ml_dtypes.bfloat16
    assert not np.shares_memory(remapped["momentum_buffer"], moment)


def test_a_nan_in_dropped_state_does_not_survive():
    remapped = remap_state(np.array([[np.nan, 1.0]]), active("xx"), active(".x"))
    np.testing.assert_array_equal(remapped, [[0.0, 1.0]])


def test_state_is_remapped_for_masks_of_one_shape_only():
    with pytest.raises(SriglError, match=r"\(2, 1\).*\(1, 2\)"):
        remap_state(np.zeros((1, 2)), active("xx"), active("x", "x"))
