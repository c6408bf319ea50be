"""What `explain_update` says of right masks, of known deviations, and of anything else."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from srigl_core import SriglError, UpdateSettings, ValueTypeError
from srigl_core.reference import explain_update, update_mask
from srigl_core.reference.explain import STAGES

# ---------------------------------------------------------------- updates with one deviation

# name of the deviation here: (what the explanation says of it, the first stage it changes)
DEVIATIONS = {
    "rounded": ("n_prune were rounded", "counts"),
    "other scope": ("the other saliency_scope", "R"),
    "n_keep gradients": ("n_keep gradients", "R"),
    "only weights": ("only weights were salient", "salient counts"),
    "no clamp": ("not clamped", "threshold"),
    "rounded up": ("threshold were rounded up", "threshold"),
    "gamma one": ("is a count of one", "threshold"),
    "none ablated": ("no neuron were ablated", "ablated rows"),
    "threshold ablated": ("exactly the threshold were ablated", "ablated rows"),
    "for good": ("never revive", "ablated rows"),
    "not redistributed": ("not redistributed", "fan-in"),
    "one less": ("truncated to one weight less", "fan-in"),
    "first of row": ("keep their first", "kept"),
    "last of row": ("keep their last", "kept"),
    "used up": ("used up the weights to keep", "kept"),
    "zeros kept": ("inactive zeros count as kept", "kept"),
    "signed weights": ("weights were ranked with their sign", "kept"),
    "signed gradients": ("gradients were ranked with their sign", "grown"),
    "no regrowth": ("could not be regrown", "grown"),
    "by magnitude": ("filled by magnitude", "grown"),
    "highest index": ("ties went to the highest index", None),
}


def deviating_update(weight, grad, mask, settings, deviation=None):
    """The update with one deviation, or the right one; None where the deviation fails."""
    n_out, n_in = mask.shape
    budget = settings.nnz_budget

    def best(scores, pool, count):
        places = np.flatnonzero(pool).tolist()
        order = -1 if deviation == "highest index" else 1
        places.sort(key=lambda place: (-scores.flat[place], order * place))
        chosen = np.zeros(mask.shape, bool)
        chosen.flat[places[: max(count, 0)]] = True
        return chosen

    def row(r):
        return np.arange(n_out)[:, None] == r

    size, pull = np.abs(weight), np.abs(grad)
    n = int(mask.sum())
    n_prune = round(n * settings.drop_fraction) if deviation == "rounded" else None
    n_prune = math.floor(n * settings.drop_fraction) if n_prune is None else n_prune
    n_keep = min(n - n_prune, int((mask & (weight != 0)).sum()))
    n_prune = n - n_keep

    everywhere = (settings.saliency_scope == "all") != (deviation == "other scope")
    salient = best(size, mask, n_keep)
    if deviation == "n_keep gradients":
        salient |= best(pull, np.ones_like(mask), n_keep)
    elif deviation != "only weights":
        salient |= best(pull, np.ones_like(mask) if everywhere else ~mask, n_prune)
    counts = salient.sum(axis=1)

    gamma_sal = settings.gamma_sal
    if gamma_sal is None:
        threshold = settings.min_salient or 0
    elif deviation == "gamma one" and gamma_sal == 1:
        threshold = 1
    elif deviation == "rounded up":
        threshold = max(1, math.ceil(gamma_sal * (budget // n_out)))
    else:
        threshold = max(1, math.floor(gamma_sal * (budget // n_out)))
    if deviation != "no clamp":
        fewest = budget // n_in
        threshold = min(threshold, sorted(counts)[::-1][fewest]) if fewest < n_out else 0
    survives = counts >= threshold
    if deviation == "threshold ablated":
        survives = counts > threshold
    elif deviation == "for good":
        survives &= mask.any(axis=1)
    elif deviation == "none ablated":
        survives[:] = True
    if not survives.any():
        return None

    k = budget // survives.sum()
    if deviation == "not redistributed":
        k = budget // n_out
    elif deviation == "one less":
        k = (budget - 1) // survives.sum()

    candidates = mask & (weight != 0) & survives[:, None]
    if deviation == "used up":
        kept = best(size, mask & (weight != 0), n_keep) & survives[:, None]
    elif deviation == "zeros kept":
        kept = best(np.where(mask, size, 0), survives[:, None] & np.ones_like(mask), n_keep)
    elif deviation == "signed weights":
        kept = best(weight, mask & survives[:, None], n_keep)
    else:
        kept = best(size, candidates, n_keep)
    for r in range(n_out):
        columns = np.flatnonzero(kept[r])
        if deviation == "first of row":
            kept[r, columns[k:]] = False
        elif deviation == "last of row":
            kept[r, columns[: max(columns.size - k, 0)]] = False
        elif columns.size > k:
            kept[r] = best(weight if deviation == "signed weights" else size, kept & row(r), k)[r]

    new_mask = kept.copy()
    for r in np.flatnonzero(survives):
        free = ~kept & row(r)
        if deviation == "no regrowth":
            free &= ~mask
        scores = {"signed gradients": grad, "by magnitude": size}.get(deviation, pull)
        new_mask |= best(scores, free, k - int(kept[r].sum()))
    return new_mask


def random_case(seed, *, ties=False):
    """A layer of uneven rows, some of them empty, with a few active zeros."""
    rng = np.random.default_rng(seed)
    n_out, n_in = int(rng.integers(4, 9)), int(rng.integers(4, 13))
    if ties:
        weight, grad = rng.integers(-2, 3, (2, n_out, n_in)).astype(np.float64)
    else:
        weight, grad = rng.standard_normal((2, n_out, n_in)) * rng.choice(
            [0.2, 1, 5], (2, n_out, 1)
        )
        weight[rng.random(weight.shape) < 0.1] = 0
    mask = rng.random((n_out, n_in)) < rng.choice([0.0, 0.3, 0.6, 0.9], (n_out, 1))
    weight = np.where(mask, weight, 0)
    most = max(n_out, min(mask.size - 1, int(1.3 * mask.sum())))
    gamma_sal = rng.choice([0.3, 0.5, 0.75, 0.9, 1.0, None])
    settings = UpdateSettings(
        nnz_budget=int(rng.integers(n_out, most + 1)),
        drop_fraction=float(rng.choice([0.1, 0.3, 0.5])),
        gamma_sal=gamma_sal,
        min_salient=int(rng.integers(0, n_in)) if gamma_sal is None else None,
        saliency_scope=str(rng.choice(["inactive", "all"])),
    )
    return weight, grad, mask, settings


def explain(case, new_mask):
    weight, grad, mask, settings = case
    return explain_update(weight, grad, mask, new_mask, UpdateSettings(**vars(settings)))


def right_mask(case):
    weight, grad, mask, settings = case
    return update_mask(weight, grad, mask, UpdateSettings(**vars(settings))).mask


@pytest.mark.parametrize("ties", [False, True])
def test_right_masks_match(ties):
    for seed in range(60):
        case = random_case(seed, ties=ties)
        new_mask = deviating_update(*case)
        explanation = explain(case, new_mask)
        assert explanation.matches, (seed, str(explanation))
        assert explanation
        assert str(explanation) == "the mask is the definition's"
        assert (explanation.stage, explanation.known_deviation) == (None, None)


def test_released_updates_match_in_the_released_scope(released_updates):
    for case in released_updates:
        assert explain_update(
            case.weight, case.grad, case.mask, case.new_mask, UpdateSettings(**case.settings)
        )


def test_released_updates_are_recognised_as_the_other_scope(released_updates):
    n_recognised = 0
    for case in released_updates:
        settings = {**case.settings, "saliency_scope": "inactive"}
        found = explain_update(
            case.weight, case.grad, case.mask, case.new_mask, UpdateSettings(**settings)
        )
        if not found:
            assert "the other saliency_scope gives (decision O3)" in found.known_deviation
            assert found.stage == "R"
            assert found.rows.size
            n_recognised += 1
    assert n_recognised >= 3


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_a_known_deviation_is_recognised_and_its_stage_named(deviation):
    exact = 0
    for seed in range(80):
        case = random_case(seed, ties=deviation == "highest index" or seed % 4 == 0)
        new_mask = deviating_update(*case, deviation)
        if new_mask is None or np.array_equal(new_mask, right_mask(case)):
            continue
        explanation = explain(case, new_mask)
        assert not explanation
        assert explanation.known_deviation, (seed, str(explanation))
        named = [
            name for name, (text, _) in DEVIATIONS.items() if text in explanation.known_deviation
        ]
        assert len(named) == 1, explanation.known_deviation
        # where two deviations give the same mask either may be named, but it must give that mask
        assert np.array_equal(deviating_update(*case, named[0]), new_mask), seed
        assert explanation.stage == DEVIATIONS[named[0]][1] or named[0] == "highest index"
        assert explanation.known_deviation in str(explanation)
        exact += named[0] == deviation
    assert exact >= 1


@pytest.mark.parametrize("seed", range(5))
def test_the_released_boolean_sort_is_recognised_whichever_weights_it_keeps(seed):
    """The sort is unstable: an over-full row keeps any k of its weights."""
    rng = np.random.default_rng(seed)
    weight, grad = rng.standard_normal((2, 6, 20))
    weight[1] *= 50
    weight[4] *= 50
    mask = rng.random((6, 20)) < 0.3
    mask[[1, 4]] = True
    settings = UpdateSettings(30, 0.2, gamma_sal=None)
    case = (np.where(mask, weight, 0), grad, mask, settings)
    new_mask = right_mask(case)
    magnitudes = np.sort(np.abs(case[0][mask]))
    smallest_kept = magnitudes[int(magnitudes.size * 0.2)]
    for row in (1, 4):
        eligible = np.flatnonzero(np.abs(case[0][row]) >= smallest_kept)
        new_mask[row] = False
        new_mask[row, rng.choice(eligible, 5, replace=False)] = True
    explanation = explain(case, new_mask)
    assert "boolean sort, over-full rows keep any k (decision O1)" in explanation.known_deviation
    assert explanation.stage == "kept"
    assert explanation.rows.tolist() == [1, 4]


# ---------------------------------------------------------------- deviations nobody has named


def large_case(seed=0):
    rng = np.random.default_rng(seed)
    weight, grad = rng.standard_normal((2, 16, 30))
    weight *= np.linspace(0.2, 2, 16)[:, None]
    grad *= np.linspace(0.5, 2, 16)[:, None]
    mask = rng.random((16, 30)) < 0.4
    settings = UpdateSettings(int(mask.sum()), 0.3, gamma_sal=0.75)
    return np.where(mask, weight, 0), grad, mask, settings


def places(explanation):
    return [tuple(place) for place in explanation.positions.tolist()]


def test_the_case_for_the_deviations_ablates_and_prunes_and_grows():
    case = large_case()
    update = update_mask(*case[:3], UpdateSettings(**vars(case[3])))
    assert 0 < update.ablated.size < 12
    assert update.threshold > 3
    assert update.n_grown > 10
    assert update.n_pruned > 10


def test_a_grown_position_that_moved_is_named():
    case = large_case()
    _, grad, mask, _ = case
    new_mask = right_mask(case)
    row = int(np.flatnonzero((new_mask & ~mask).any(axis=1))[3])
    grown = int(np.flatnonzero(new_mask[row] & ~mask[row])[0])
    free = np.flatnonzero(~new_mask[row] & ~mask[row])
    other = int(free[np.argmin(np.abs(grad[row, free]))])
    new_mask[row, [grown, other]] = False, True
    explanation = explain(case, new_mask)
    assert (explanation.stage, explanation.known_deviation) == ("grown", None)
    assert explanation.rows.tolist() == [row]
    assert places(explanation) == sorted([(row, grown), (row, other)])
    assert str((row, grown)) in explanation.expected
    assert str((row, other)) in explanation.got


def test_a_kept_weight_exchanged_for_another_is_named():
    case = large_case()
    weight, _, mask, _ = case
    new_mask = right_mask(case)
    row = int(np.flatnonzero((new_mask & mask).sum(axis=1) > 4)[0])
    largest = int(np.argmax(np.abs(weight[row])))
    other = int(np.flatnonzero(~new_mask[row] & ~mask[row])[0])
    new_mask[row, [largest, other]] = False, True
    explanation = explain(case, new_mask)
    assert (explanation.stage, explanation.known_deviation) == ("kept", None)
    assert explanation.rows.tolist() == [row]
    assert (row, largest) in places(explanation)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_row_with_another_fan_in_is_named(change):
    case = large_case()
    new_mask = right_mask(case)
    row = int(np.flatnonzero(new_mask.any(axis=1))[2])
    fan_in = int(new_mask[row].sum())
    column = int(np.flatnonzero(new_mask[row] == (change < 0))[0])
    new_mask[row, column] ^= True
    explanation = explain(case, new_mask)
    assert (explanation.stage, explanation.known_deviation) == ("fan-in", None)
    assert explanation.rows.tolist() == [row]
    assert explanation.expected == fan_in
    assert f"[{fan_in + change}] in 1 rows" in str(explanation)


def test_another_threshold_is_named():
    case = large_case()
    weight, grad, mask, settings = case
    right = update_mask(weight, grad, mask, UpdateSettings(**vars(settings)))
    for threshold in (right.threshold - 2, right.threshold + 2):
        other = {**vars(settings), "gamma_sal": None, "min_salient": threshold}
        update = update_mask(weight, grad, mask, UpdateSettings(**other))
        assert update.threshold == threshold
        explanation = explain(case, update.mask)
        assert (explanation.stage, explanation.known_deviation) == ("threshold", None)
        changed = np.setxor1d(update.ablated, right.ablated)
        assert changed.size
        assert explanation.rows.tolist() == changed.tolist()
        assert explanation.expected == right.threshold
        low, high = map(int, explanation.got.removeprefix("a threshold of at least ").split(
            " and at most "
        ))  # fmt: skip
        assert low <= threshold <= high


def test_ablated_rows_that_no_threshold_gives_are_named():
    case = large_case()
    weight, grad, mask, settings = case
    right = update_mask(weight, grad, mask, UpdateSettings(**vars(settings)))
    most = int(np.argmax(right.salient_counts))
    new_mask = right.mask.copy()
    new_mask[most] = False
    explanation = explain(case, new_mask)
    assert (explanation.stage, explanation.known_deviation) == ("salient counts", None)
    assert explanation.rows.tolist() == [most]
    assert str(right.salient_counts[most]) in explanation.expected


def test_a_mask_of_nothing_is_explained():
    case = large_case()
    explanation = explain(case, np.zeros((16, 30), bool))
    assert explanation.stage == "threshold"
    assert "a threshold of at least" in str(explanation)


# ---------------------------------------------------------------- whatever comes


@given(data=st.data(), seed=st.integers(0, 10**6), ties=st.booleans())
def test_any_mask_of_the_right_shape_is_explained(data, seed, ties):
    case = random_case(seed, ties=ties)
    mask = case[2]
    drawn = data.draw(hnp.arrays(bool, mask.shape, elements=st.booleans(), fill=st.nothing()))
    try:
        right = right_mask(case)
    except SriglError:
        with pytest.raises(SriglError):
            explain(case, drawn)
        return
    for new_mask in (drawn, right ^ (drawn & (np.cumsum(drawn.ravel()) <= 2).reshape(mask.shape))):
        explanation = explain(case, new_mask)
        assert explanation.matches == np.array_equal(new_mask, right)
        text = str(explanation)
        assert all(len(line) <= 240 for line in text.splitlines())
        assert not any(word in text for word in ("array", "np.", "object at", "nan"))
        if explanation:
            continue
        assert explanation.stage in STAGES
        assert repr(explanation.stage) in text.splitlines()[0]
        assert {line.split()[0] for line in text.splitlines()[1:]} >= {"expected", "got"}
        assert explanation.rows.tolist() == sorted(set(explanation.rows.tolist()))
        if explanation.positions.size:
            found = sorted(set(explanation.positions[:, 0].tolist()))
            assert found == explanation.rows.tolist()


@given(
    mask=hnp.arrays(bool, (3, 4)),
    new_mask=hnp.arrays(bool, (3, 4)),
    scale=st.sampled_from([1.0, 1e308, 5e-324]),
)
@example(mask=np.zeros((3, 4), bool), new_mask=np.eye(3, 4, dtype=bool), scale=1.0)
@example(mask=np.ones((3, 4), bool), new_mask=np.eye(3, 4, dtype=bool), scale=1e308)
def test_extreme_numbers_and_empty_masks_are_explained(mask, new_mask, scale):
    rng = np.random.default_rng(0)
    weight, grad = np.sign(rng.standard_normal((2, 3, 4))) * scale
    weight = np.where(mask, weight, np.nan)  # inactive: does not count
    settings = UpdateSettings(6, 0.3)
    explanation = explain((weight, grad, mask, settings), new_mask)
    assert isinstance(str(explanation), str)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_signs_are_recognised_in_every_dtype(dtype):
    case = random_case(6)
    weight, grad, mask, settings = case
    case = (weight.astype(dtype), grad.astype(dtype), mask, settings)
    wide = (case[0].astype(np.float64), case[1].astype(np.float64), mask, settings)
    explanation = explain(case, deviating_update(*wide, "signed gradients"))
    assert "gradients were ranked with their sign" in explanation.known_deviation


def test_a_convolution_is_explained():
    rng = np.random.default_rng(2)
    weight, grad = rng.standard_normal((2, 4, 3, 2, 2))
    mask = rng.random((4, 3, 2, 2)) < 0.5
    settings = {"nnz_budget": 24, "drop_fraction": 0.3}
    new_mask = update_mask(weight, grad, mask, UpdateSettings(**settings)).mask
    assert explain_update(weight, grad, mask, new_mask, UpdateSettings(**settings))
    new_mask[0] = ~new_mask[0]
    assert explain_update(
        weight, grad, mask, new_mask, UpdateSettings(**settings)
    ).rows.tolist() == [0]


def test_a_mask_of_another_shape_or_dtype_is_an_error():
    case = large_case()
    with pytest.raises(SriglError, match=r"new_mask has shape \(16, 29\)"):
        explain(case, np.zeros((16, 29), bool))
    with pytest.raises(ValueTypeError, match="new_mask must be an array of bool"):
        explain(case, np.zeros((16, 30)))
