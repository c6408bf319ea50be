"""The training driver: budgets, windows, updates, resume (SPEC 4 and 5)."""

import contextlib
import copy
import dataclasses
import json
import pickle
import warnings
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_options import training_options

from srigl_core import (
    LayerOptions,
    SparseTrainer,
    SriglError,
    TrainingConfig,
    UpdateSettings,
    ValueTypeError,
    update_mask,
)
from srigl_core.reference import (
    UpdateSchedule,
    erk,
    nnz_budget,
    uniform,
    update_rigl,
    update_set,
    update_static,
)
from srigl_core.testing.flush_mode import flushing_subnormals

SHAPES = {"conv": (8, 3, 3, 3), "hidden": (12, 16), "out": (5, 12)}
METHODS = ("srigl", "rigl", "set", "static")


def make(method="srigl", *, shapes=SHAPES, sparsity=0.6, schedule=None, **options):
    schedule = schedule or UpdateSchedule(1000, delta_t=4)
    options = training_options(method=method, **options)
    return SparseTrainer(shapes, sparsity=sparsity, schedule=schedule, **options)


def initial_weights(trainer, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(mask.shape) * mask for name, mask in trainer.masks.items()}


def gradients(trainer, step):
    """Return gradients that depend on the step alone."""
    rng = np.random.default_rng((77, step))
    return {name: rng.standard_normal(mask.shape) for name, mask in trainer.masks.items()}


def train(trainer, weights, steps, *, calls=1):
    """Take steps of a training that moves weights by their gradients; return all updates."""
    history = []
    for _ in range(steps):
        grads = gradients(trainer, trainer.step_count + 1)
        for name, weight in weights.items():
            weights[name] = weight - 0.1 * grads[name] * trainer.masks[name]
            for part in range(calls):
                if trainer.needs_grad:
                    trainer.accumulate(name, grads[name] + part)
        updates = trainer.step(weights)
        weights.update({name: update.weight for name, update in updates.items()})
        history.append({name: update.mask.copy() for name, update in updates.items()})
    return history


def snapshot(trainer):
    """Return everything that a step may change, with arrays as bytes."""

    def plain(part):
        if isinstance(part, dict):
            return {name: plain(value) for name, value in part.items()}
        if isinstance(part, tuple):
            return tuple(plain(value) for value in part)
        if isinstance(part, np.ndarray):
            return part.shape, part.dtype, part.tobytes()
        return part

    return plain(trainer.state_dict())


# ---------------------------------------------------------------- budgets and initial masks


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("method", METHODS)
def test_budgets_are_those_of_the_distribution(method, distribution):
    trainer = make(method, distribution=distribution)
    share = {"erk": erk, "uniform": uniform}[distribution]
    assert list(trainer.budgets.values()) == share(list(SHAPES.values()), 0.6)
    assert list(trainer.masks) == list(SHAPES)
    for name, mask in trainer.masks.items():
        budget = trainer.budgets[name].nnz_budget
        assert mask.shape == SHAPES[name]
        assert mask.dtype == bool
        counts = mask.reshape(len(mask), -1).sum(axis=1)
        if method == "srigl":
            assert (counts == budget // len(mask)).all()
            assert trainer.fan_in[name] == budget // len(mask)
        else:
            assert counts.sum() == budget
        assert trainer.nnz[name] == counts.sum()
        assert trainer.n_active[name] == np.count_nonzero(counts)
    n_weights = sum(mask.size for mask in trainer.masks.values())
    assert trainer.sparsity == 1 - sum(trainer.nnz.values()) / n_weights
    assert trainer.step_count == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_masks_and_another_seed_others(method):
    first, again, other = make(method, seed=5), make(method, seed=5), make(method, seed=6)
    for name, mask in first.masks.items():
        np.testing.assert_array_equal(mask, again.masks[name])
        assert not np.array_equal(mask, other.masks[name])


def test_masks_handed_out_cannot_be_written():
    trainer = make()
    with pytest.raises(ValueError, match="read-only"):
        trainer.masks["hidden"][0, 0] = True
    weights = initial_weights(trainer)
    train(trainer, weights, 4)
    with pytest.raises(ValueError, match="read-only"):
        trainer.masks["hidden"][0, 0] = True


def test_layers_may_differ():
    layers = {
        "conv": LayerOptions(dense=True),
        "hidden": LayerOptions(nnz_budget=50),
        "out": LayerOptions(sparsity=0.25),
    }
    for method in METHODS:
        trainer = make(method, layers=layers, sparsity=0.3)
        assert trainer.masks["conv"].all()
        assert trainer.budgets["conv"].nnz_budget == 216
        assert trainer.budgets["hidden"].nnz_budget == 50
        assert trainer.budgets["out"].nnz_budget == nnz_budget(60, 0.25) == 45
        assert trainer.nnz["hidden"] == (48 if method == "srigl" else 50)
    trainer = make(layers={"out": LayerOptions(dense=True)}, distribution="uniform")
    assert trainer.nnz["out"] == 60
    plain = make(distribution="uniform")
    assert trainer.budgets["hidden"].nnz_budget < plain.budgets["hidden"].nnz_budget


def test_a_dense_layer_is_left_alone():
    trainer = make(layers={"out": LayerOptions(dense=True)})
    weights = initial_weights(trainer)
    for step in range(8):
        for name in ("conv", "hidden"):
            trainer.accumulate(name, gradients(trainer, step)[name])
        trainer.accumulate("out", np.full(SHAPES["out"], np.nan))  # not used
        updates = trainer.step({name: weights[name] for name in ("conv", "hidden")})
    assert updates.keys() == {"conv", "hidden"}
    assert trainer.masks["out"].all()
    assert trainer.itop_rates().keys() == {"conv", "hidden"}


# ---------------------------------------------------------------- steps and windows


@given(
    delta_t=st.integers(1, 6),
    t_end=st.integers(1, 25),
    window=st.integers(1, 6),
    method=st.sampled_from(METHODS),
)
def test_gradients_are_needed_in_the_window_and_updates_come_when_due(
    delta_t, t_end, window, method
):
    window, schedule = min(window, delta_t), UpdateSchedule(t_end, delta_t=delta_t)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule without updates
        trainer = make(
            method,
            shapes={"a": (3, 4), "b": (2, 3)},
            schedule=schedule,
            grad_window=window,
        )
    weights = initial_weights(trainer)
    due = [step for step in range(1, 31) if step % delta_t == 0 and step < t_end]
    for step in range(1, 31):
        wanted = method in ("srigl", "rigl") and any(0 <= d - step < window for d in due)
        assert trainer.needs_grad == wanted
        if wanted:
            for name, weight in weights.items():
                trainer.accumulate(name, weight + step)
        updates = trainer.step(weights)
        assert trainer.step_count == step
        assert updates.keys() == (weights.keys() if step in due else set())
        assert not trainer.state_dict()["window"] or step not in due
        assert trainer.n_updates == sum(d <= step for d in due)
    assert schedule.n_updates == len(due)


@pytest.mark.parametrize(
    ("schedule", "n_updates"),
    [
        *((1, 0), (6, 0), (50, 7), (67, 9), (68, None), (1000, None)),
        *((UpdateSchedule(5), 0), (UpdateSchedule(11, delta_t=5), None)),
    ],
)
def test_a_schedule_with_few_updates_is_reported(schedule, n_updates):
    """Few is less than 10 where the schedule follows from the number of steps, otherwise none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(schedule=schedule)
        make("static", schedule=schedule)
    caught = [warning for warning in caught if "mask updates" in str(warning.message)]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (n_updates is not None)
    assert all(f" has {n_updates} mask updates; " in message for message in messages)
    assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize("method", ["srigl", "rigl"])
@pytest.mark.parametrize("explicit", [True, False])
def test_a_layer_that_had_no_gradient_keeps_its_mask(method, explicit):
    trainer, other, resumed = (make(method, schedule=UpdateSchedule(9, 1)) for _ in range(3))
    weights, before = initial_weights(trainer), dict(trainer.masks)
    for name, grad in gradients(trainer, 1).items():
        other.accumulate(name, grad)
        if name != "conv":
            trainer.accumulate(name, grad)
        elif explicit:
            trainer.accumulate(name, None)
    expected = other.step(weights)
    resumed.load_state_dict(trainer.state_dict())
    for each in (trainer, resumed):
        with pytest.warns(UserWarning, match="no gradient reached layer 'conv' since the last"):
            updates = each.step(weights)
        assert updates.keys() == SHAPES.keys() - {"conv"}
        np.testing.assert_array_equal(each.masks["conv"], before["conv"])
        for name, update in updates.items():
            np.testing.assert_array_equal(update.mask, expected[name].mask)
        assert each.step_count == 1
        assert not each.state_dict()["window"]


def test_steps_without_a_part_do_not_count_in_the_mean():
    trainers = [make(grad_window=3, schedule=UpdateSchedule(100, delta_t=3)) for _ in range(2)]
    weights = initial_weights(trainers[0])
    for step in (1, 2, 3):
        for name, grad in gradients(trainers[0], step).items():
            trainers[0].accumulate(name, None if step == 2 else grad)
            if step != 2:
                trainers[1].accumulate(name, grad)
        one, two = (trainer.step(weights) for trainer in trainers)
    for name, update in one.items():
        np.testing.assert_array_equal(update.mask, two[name].mask)


# ---------------------------------------------------------------- given masks


def test_training_can_start_from_given_masks():
    first = make(seed=1)
    masks = dict(first.masks)
    drawn = make(seed=2)
    for sparsity in (None, 0.6):
        trainer = make(sparsity=sparsity, masks=masks, seed=2)
        for name, mask in masks.items():
            np.testing.assert_array_equal(trainer.masks[name], mask)
            count = int(np.count_nonzero(mask))
            expected = count if sparsity is None else first.budgets[name].nnz_budget
            assert trainer.budgets[name].nnz_budget == expected
    some = make(masks={"conv": masks["conv"]}, seed=2)
    np.testing.assert_array_equal(some.masks["conv"], masks["conv"])
    assert some.nnz == drawn.nnz


def test_given_masks_that_do_not_suit_are_refused_by_name():
    mask = make().masks["hidden"]
    uneven = mask.copy()
    uneven[0, np.flatnonzero(uneven[0])[0]] = False
    wrong = {
        r"masks has an entry 'nope', but the layers are: conv": {"nope": mask},
        r"layer 'hidden': .* constant fan-in: active rows have \d+ to \d+": {"hidden": uneven},
        r"layer 'hidden': .* no active weight": {"hidden": np.zeros_like(mask)},
        r"layer 'hidden': .*shape": {"hidden": mask[1:]},
        r"layer 'hidden': .*bool": {"hidden": mask.astype(int)},
        r"layer 'hidden': the given mask has \d+ weights, but the budget is": {
            "hidden": np.ones_like(mask)
        },
    }
    for message, masks in wrong.items():
        with pytest.raises(SriglError, match=message):
            make(masks=masks)
    dense = {"hidden": LayerOptions(dense=True)}
    with pytest.raises(SriglError, match=r"layer 'hidden': the given mask .* the layer is dense"):
        make(masks={"hidden": mask}, layers=dense, sparsity=0.3)
    make(masks={"hidden": np.ones_like(mask)}, layers=dense, sparsity=0.3)
    make("rigl", masks={"hidden": uneven})
    with pytest.raises(SriglError, match=r"layer 'conv': sparsity is missing; only layers with"):
        make(sparsity=None, masks={"hidden": mask})


@pytest.mark.parametrize("method", METHODS)
def test_an_update_uses_the_mean_of_all_calls_in_the_window(method):
    """The update is that of the reference, which also sets inactive weights to zero."""
    schedule = UpdateSchedule(1000, delta_t=4)
    trainer = make(method, grad_window=3, schedule=schedule, gamma_sal=0.3)
    before = dict(trainer.masks)
    set_rng, rng = np.random.default_rng(), np.random.default_rng(3)
    set_rng.bit_generator.state = trainer.state_dict()["rng"]
    weights = {name: rng.standard_normal(mask.shape) for name, mask in before.items()}
    sums = {name: np.zeros(mask.shape) for name, mask in before.items()}
    n_calls = 0
    for step in range(1, 5):
        for _ in range(step):  # another number of calls in each step
            grads = {name: rng.integers(-8, 9, m.shape) / 4 for name, m in before.items()}
            for name, grad in grads.items():
                trainer.accumulate(name, grad * (1 if step > 1 else 1e6))  # step 1 is outside
                sums[name] += grad * (step > 1)
            n_calls += step > 1
        updates = trainer.step(weights)
    assert n_calls == 9
    for name, update in updates.items():
        weight, grad, mask = weights[name], sums[name] / 9, before[name]
        zeta = {"drop_fraction": schedule.drop_fraction(4)}
        budget, gamma_sal = trainer.budgets[name].nnz_budget, None if name == "out" else 0.3
        functions = {
            "srigl": partial(
                update_mask, weight, grad, mask, nnz_budget=budget, gamma_sal=gamma_sal, **zeta
            ),
            "rigl": partial(update_rigl, weight, grad, mask, **zeta),
            "set": partial(update_set, weight, mask, rng=set_rng, **zeta),
            "static": partial(update_static, weight, mask),
        }
        expected = functions[method]()
        np.testing.assert_array_equal(update.mask, expected.mask)
        np.testing.assert_array_equal(update.weight, expected.weight)
        np.testing.assert_array_equal(trainer.masks[name], expected.mask)


def test_gradients_of_16_bit_are_added_in_float32():
    """256 + 1 is 256 in bfloat16."""
    trainer = make(grad_window=4, method="rigl")
    for step in range(1, 5):
        for name, mask in trainer.masks.items():
            for _ in range(80):
                trainer.accumulate(name, np.ones(mask.shape, ml_dtypes.bfloat16))
        if step < 4:
            trainer.step({})
    total, calls = trainer.state_dict()["window"]["hidden"]
    assert (total.dtype, calls) == (np.float32, 320)
    assert (total == 320).all()


@pytest.mark.parametrize("order", [(np.float64, np.float32), (np.float32, np.float64)])
def test_gradients_of_two_precisions_are_added_in_the_wider(order):
    trainer = make(schedule=UpdateSchedule(10, delta_t=1))
    values = {np.float64: 2**-40, np.float32: 1.0}
    for dtype in order:
        trainer.accumulate("hidden", np.full(SHAPES["hidden"], values[dtype], dtype))
    total, _ = trainer.state_dict()["window"]["hidden"]
    assert (total == 1 + 2**-40).all()


def test_a_gradient_is_copied():
    trainer = make(schedule=UpdateSchedule(10, delta_t=1))
    grad = np.ones(SHAPES["hidden"])
    trainer.accumulate("hidden", grad)
    grad[:] = 9
    assert (trainer.state_dict()["window"]["hidden"][0] == 1).all()


def test_weights_are_not_written(update_backend):
    trainer = make(schedule=UpdateSchedule(10, delta_t=1), backend=update_backend)
    weights = initial_weights(trainer)
    for name, weight in weights.items():
        weight.setflags(write=False)
        trainer.accumulate(name, np.arange(1.0, weight.size + 1).reshape(weight.shape))
    updates = trainer.step(weights)
    assert all(u.weight.shape == SHAPES[name] for name, u in updates.items())
    assert sum(u.n_grown for u in updates.values()) > 0


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize("method", METHODS)
def test_every_update_of_a_training_stays_in_its_budget(method):
    trainer = make(method, gamma_sal=0.9, ablate_last=True)
    weights = initial_weights(trainer)
    start = {name: mask.copy() for name, mask in trainer.masks.items()}
    history = train(trainer, weights, 40)
    assert sum(bool(masks) for masks in history) == 10
    for masks in filter(None, history):
        for name, mask in masks.items():
            counts = mask.reshape(len(mask), -1).sum(axis=1)
            budget = trainer.budgets[name].nnz_budget
            if method == "srigl":
                active = counts[counts > 0]
                assert len(set(active.tolist())) == 1
                assert active[0] == budget // active.size
            else:
                assert counts.sum() == budget
    changed = any(not np.array_equal(trainer.masks[name], start[name]) for name in start)
    assert changed == (method != "static")
    if method == "srigl":
        assert any((mask.reshape(len(mask), -1).sum(axis=1) == 0).any()
                   for masks in history for mask in masks.values())  # fmt: skip


def test_all_backends_give_the_same_training(backend_names):
    results = []
    for backend in backend_names("update_mask"):
        trainer = make(gamma_sal=0.9, backend=backend)
        weights = initial_weights(trainer)
        train(trainer, weights, 24)
        results.append({name: weight.tobytes() for name, weight in weights.items()})
    assert all(result == results[0] for result in results)


def test_set_grows_by_its_seed():
    runs = {}
    for seed in (1, 1, 2):
        trainer = make("set", seed=seed)
        masks = {name: mask.copy() for name, mask in make("set", seed=0).masks.items()}
        state = trainer.state_dict() | {"masks": masks}
        trainer.load_state_dict(state)
        history = train(trainer, initial_weights(trainer), 8)
        runs.setdefault(seed, []).append([m.tobytes() for step in history for m in step.values()])
    assert runs[1][0] == runs[1][1] != runs[2][0]


def test_settings_reach_the_update():
    shapes = {"a": (6, 8), "b": (6, 8)}
    for settings in (
        {"gamma_sal": None, "min_salient": 3},
        {"saliency_scope": "all", "gamma_sal": 0.3},
        {"grown_init": 0.5, "gamma_sal": None},
        {"gamma_sal": 1.0},
    ):
        schedule = UpdateSchedule(50, delta_t=1, alpha=0.8)
        trainer = make(shapes=shapes, schedule=schedule, ablate_last=True, **settings)
        weights = initial_weights(trainer)
        grads = gradients(trainer, 1)
        before = dict(trainer.masks)
        for name, grad in grads.items():
            trainer.accumulate(name, grad)
        for name, update in trainer.step(weights).items():
            expected = update_mask(
                weights[name],
                grads[name],
                before[name],
                nnz_budget=trainer.budgets[name].nnz_budget,
                drop_fraction=schedule.drop_fraction(1),
                **settings,
            )
            np.testing.assert_array_equal(update.mask, expected.mask)
            np.testing.assert_array_equal(update.weight, expected.weight)
            assert update.threshold == expected.threshold


def test_gamma_sal_follows_from_the_shape_and_each_layer_may_have_its_own():
    """Kernels have more than two axes, a 1x1 convolution's too (SPEC 4.4)."""
    shapes = {"pointwise": (6, 40, 1, 1), "matrix": (6, 40), "own": (6, 40), "kept": (6, 40)}
    layers = {"own": LayerOptions(gamma_sal=0.5), "kept": LayerOptions(ablate=False)}
    options = {"shapes": shapes, "sparsity": 0.5, "ablate_last": True, "layers": layers}
    schedule = UpdateSchedule(50, delta_t=1)
    for settings, shares in (
        ({}, (0.3, 0.9, 0.5, None)),
        ({"gamma_sal": 0.7}, (0.7, 0.7, 0.5, None)),
        ({"min_salient": 3}, (None, None, 0.5, None)),
        ({"gamma_sal": None}, (None, None, 0.5, None)),
    ):
        trainer = make(schedule=schedule, **options, **settings)
        weights, grads = initial_weights(trainer), gradients(trainer, 1)
        for name, grad in grads.items():
            trainer.accumulate(name, grad)
        masks = dict(trainer.masks)
        updates = trainer.step(weights)
        for (name, update), share in zip(updates.items(), shares, strict=True):
            expected = update_mask(
                weights[name],
                grads[name],
                masks[name],
                nnz_budget=trainer.budgets[name].nnz_budget,
                drop_fraction=schedule.drop_fraction(1),
                gamma_sal=share,
                min_salient=settings.get("min_salient")
                if name in ("pointwise", "matrix")
                else None,
            )
            np.testing.assert_array_equal(update.mask, expected.mask)
            assert update.threshold == expected.threshold
    with pytest.raises(SriglError, match=r"gamma_sal=1\.5"):
        LayerOptions(gamma_sal=1.5)
    with pytest.raises(ValueTypeError, match="gamma_sal='auto' must be a number"):
        UpdateSettings(10, 0.3, gamma_sal="auto")


def test_a_threshold_of_one_weight_is_reported():
    shapes = {"a": (20, 40), "conv": (20, 4, 3, 3), "last": (5, 20)}
    options = {"shapes": shapes, "sparsity": 0.85, "distribution": "uniform"}
    with pytest.warns(UserWarning, match=r"^layer 'conv' \(gamma_sal=0.3, fan-in 5\): ablation"):
        make(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(**options, layers={"conv": LayerOptions(gamma_sal=0.5)})
        make("rigl", **options)
        make(**options, gamma_sal=None)


# ---------------------------------------------------------------- ITOP and the report


def test_itop_rate_is_the_share_of_positions_ever_active():
    trainer = make("set")
    ever = {name: mask.copy() for name, mask in trainer.masks.items()}
    assert trainer.itop_rates() == {name: seen.mean() for name, seen in ever.items()}
    weights = initial_weights(trainer)
    for _ in range(5):
        for masks in train(trainer, weights, 4):
            for name, mask in masks.items():
                ever[name] |= mask
        assert trainer.itop_rates() == {name: seen.mean() for name, seen in ever.items()}
    assert all(seen.mean() > trainer.masks[name].mean() for name, seen in ever.items())


def test_report_shows_what_was_asked_for_and_what_is_realised():
    trainer = make(layers={"hidden": LayerOptions(nnz_budget=50)}, gamma_sal=0.9)
    train(trainer, initial_weights(trainer), 8)
    header, *rows = trainer.report().splitlines()
    assert header.split() == ["layer", "shape", "budget", "weights", "sparsity", "fan-in", "active"]
    assert [row.split()[0] for row in rows] == list(SHAPES)
    for row, (name, mask) in zip(rows, trainer.masks.items(), strict=True):
        _, shape, budget, weights, sparsity, fan_in, active = row.split()
        assert shape == "x".join(map(str, SHAPES[name]))
        assert int(budget) == trainer.budgets[name].nnz_budget
        assert int(weights) == mask.sum() <= int(budget)
        assert sparsity == f"{1 - mask.mean():.2%}"
        assert int(fan_in) == trainer.fan_in[name]
        assert active == f"{trainer.n_active[name]}/{len(mask)}"
    assert "-" in make("rigl").report().splitlines()[1].split()  # no constant fan-in


# ---------------------------------------------------------------- errors change nothing


def ready(method="srigl", **options):
    """Return a trainer whose next step has an update, with accumulated gradients, and weights."""
    trainer = make(method, schedule=UpdateSchedule(100, delta_t=1), **options)
    grads = gradients(trainer, 1)
    if method in ("srigl", "rigl"):
        for name, grad in grads.items():
            trainer.accumulate(name, grad)
    return trainer, initial_weights(trainer)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_missing_wrong_or_not_finite_is_an_error_that_names_the_layer(method):
    trainer, weights = ready(method)
    before = snapshot(trainer)
    wrong = {
        "layer 'out': weights has no entry for it": None,
        "layer 'out': .*not finite in": np.full((5, 12), np.nan),
        r"layer 'out': .*\(5, 11\)": np.ones((5, 11)),
        r"layer 'out': .*int64": np.ones((5, 12), int),
        r"layer 'out': .*list": [[1.0] * 12] * 5,
    }
    for message, weight in wrong.items():
        changed = {name: w for name, w in weights.items() if name != "out"}
        if weight is not None:
            changed["out"] = weight
        with pytest.raises(SriglError, match=message):
            trainer.step(changed)
        assert snapshot(trainer) == before
    assert trainer.step_count == 0
    assert trainer.step(weights).keys() == SHAPES.keys()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["srigl", "rigl"])
def test_a_gradient_that_is_not_finite_is_an_error_and_one_can_go_on(method, wrong):
    """The layers before it in the network are not changed either."""
    trainer, weights = ready(method)
    bad = np.zeros(SHAPES["out"])
    bad[2, 3] = wrong
    trainer.accumulate("out", bad)
    before = snapshot(trainer)
    with pytest.raises(SriglError, match="layer 'out': grad is not finite in 1 of 60"):
        trainer.step(weights)
    assert snapshot(trainer) == before
    trainer.discard_gradients()
    assert trainer.state_dict()["window"] == {}
    assert trainer.needs_grad
    before = snapshot(trainer)
    with pytest.raises(SriglError, match=r"no gradient was .* step 1; call accumulate before step"):
        trainer.step(weights)
    assert snapshot(trainer) == before
    for name, grad in gradients(trainer, 2).items():
        trainer.accumulate(name, grad)
    assert trainer.step(weights).keys() == SHAPES.keys()
    assert trainer.step_count == 1


def test_set_draws_the_same_after_a_step_that_failed():
    trainer, weights = ready("set")
    twin, _ = ready("set")
    with pytest.raises(SriglError):
        trainer.step(weights | {"out": np.full(SHAPES["out"], np.inf)})
    for name, update in trainer.step(weights).items():
        np.testing.assert_array_equal(update.mask, twin.step(weights)[name].mask if name == "conv"
                                      else twin.masks[name])  # fmt: skip


def test_a_sum_of_gradients_that_overflows_is_an_error_that_names_the_layer():
    shapes = {"hidden": (6, 4), "out": (6, 6)}
    trainer = make(
        shapes=shapes, sparsity=0.5, schedule=UpdateSchedule(10, delta_t=1), distribution="uniform"
    )
    weights = initial_weights(trainer)
    for name, weight in weights.items():
        trainer.accumulate(name, np.ones(weight.shape, np.float32) * 3e38)
        trainer.accumulate(name, np.ones(weight.shape, np.float32) * 3e38)
    with pytest.raises(SriglError, match="layer 'hidden': grad is not finite in 24 of 24"):
        trainer.step(weights)


@pytest.mark.parametrize(
    ("name", "grad", "error", "message"),
    [
        ("fc", np.ones((12, 16)), SriglError, "no layer is called 'fc'; there are conv, hidden"),
        ("hidden", np.ones((16, 12)), SriglError, r"layer 'hidden': grad has shape \(16, 12\)"),
        ("hidden", np.ones((12, 16), int), ValueTypeError, "layer 'hidden': grad of dtype 'int64'"),
        ("hidden", [[1.0]], ValueTypeError, "layer 'hidden': grad must be an array"),
    ],
)
def test_a_bad_gradient_is_an_error_at_once(name, grad, error, message):
    for delta_t in (1, 4):  # in the window and outside
        trainer = make(schedule=UpdateSchedule(100, delta_t=delta_t))
        with pytest.raises(error, match=message):
            trainer.accumulate(name, grad)
        assert trainer.state_dict()["window"] == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shapes": {}}, SriglError, "shapes is empty"),
        ({"shapes": {"a": (4,)}}, SriglError, r"layer 'a': a weight of shape \(4,\)"),
        ({"sparsity": 1.0}, SriglError, r"sparsity=1\.0 must be in \[0, 1\)"),
        ({"sparsity": -0.5}, SriglError, r"sparsity=-0\.5"),
        ({"method": "snfs"}, SriglError, "method='snfs' is unknown; use one of rigl, set"),
        ({"distribution": "erdos"}, SriglError, "distribution='erdos' is unknown; use one of erk"),
        ({"grad_window": 5}, SriglError, "grad_window=5 exceeds delta_t=4"),
        ({"grad_window": 0}, SriglError, "grad_window=0"),
        ({"gamma_sal": 1.5}, SriglError, r"gamma_sal=1\.5"),
        ({"min_salient": 2, "gamma_sal": 0.3}, SriglError, "gamma_sal=None"),
        ({"gamma_sal": "automatic"}, ValueTypeError, "gamma_sal='automatic' must be a number"),
        ({"saliency_scope": "some"}, SriglError, "saliency_scope='some'"),
        ({"seed": -1}, SriglError, "seed=-1 must be at least 0"),
        ({"seed": None}, ValueTypeError, "seed=None must be an integer"),
        ({"schedule": -1}, SriglError, "total_steps=-1 must be at least 1"),
        ({"schedule": "often"}, ValueTypeError, "schedule must be an UpdateSchedule or"),
        ({"backend": "cuda"}, SriglError, "no backend is called 'cuda'"),
        ({"backend": "scipy"}, SriglError, "'scipy' does not offer update_mask"),
        (
            {"layers": {"fc": LayerOptions()}},
            SriglError,
            "layers has an entry 'fc', but the layers are: conv",
        ),
        ({"layers": {"out": {"dense": True}}}, ValueTypeError, r"layers\['out'\]=.* LayerOptions"),
        ({"layers": {"out": LayerOptions(nnz_budget=61)}}, SriglError, "'out': nnz_budget=61"),
        ({"layers": {"out": LayerOptions(nnz_budget=4)}}, SriglError, "'out': nnz_budget=4 .* 5"),
        ({"layers": {"out": LayerOptions(sparsity=1.0)}}, SriglError, r"'out': sparsity=1\.0"),
        ({"layers": {"out": LayerOptions(sparsity=0.999)}}, SriglError, "'out': nnz_budget=0"),
        ({"layers": {"conv": LayerOptions(dense=True)}, "sparsity": 0.9}, SriglError, "lower"),
        (
            {"shapes": {"first": (4, 4), "second": (2000, 2000)}, "sparsity": 0.99}
            | {"distribution": "uniform"},
            SriglError,
            r"layer 'first' of shape .* less than one",
        ),
        ({"shapes": {"a": 5}}, ValueTypeError, "shape"),
        ({"shapes": {"a": "34"}}, ValueTypeError, "shape"),
        ({"shapes": [(3, 4)]}, ValueTypeError, "shapes must be a dict"),
        ({"layers": ["a"]}, ValueTypeError, "layers must be a dict"),
    ],
)
def test_a_bad_setting_is_an_error(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
    for two in ({"dense": True, "sparsity": 0.5}, {"sparsity": 0.5, "nnz_budget": 5}):
        with pytest.raises(SriglError, match="more than once"):
            LayerOptions(**two)


# ---------------------------------------------------------------- resume


CUTS = (0, 5, 6, 7, 8, 13)
WAYS = ("same process", "pickle", "pickled trainer", "deepcopy")


@pytest.mark.parametrize(
    ("method", "way", "cut"), [(METHODS[i // 6], WAYS[i % 4], CUTS[i % 6]) for i in range(24)]
)
def test_resume_is_exact_also_in_the_middle_of_a_window(method, way, cut):
    """The window of three steps is open after steps 6, 7, 10, 11, 14."""
    options = {"grad_window": 3, "gamma_sal": 0.9, "seed": 3}
    whole = make(method, **options)
    expected = initial_weights(whole)
    train(whole, expected, 20, calls=2)

    first = make(method, **options)
    weights = initial_weights(first)
    train(first, weights, cut, calls=2)
    assert bool(first.state_dict()["window"]) == (method in ("srigl", "rigl") and cut in (6, 7))
    if way == "pickled trainer":
        resumed = pickle.loads(pickle.dumps(first))
    elif way == "deepcopy":
        resumed = copy.deepcopy(first)
    else:
        state = first.state_dict()
        if way == "pickle":
            state = pickle.loads(pickle.dumps(state))
        resumed = make(method, **(options | {"seed": 999}))  # the state's generator counts
        resumed.load_state_dict(state)
    train(first, copy.deepcopy(weights), 5)  # must not touch the one resumed
    train(resumed, weights, 20 - cut, calls=2)

    assert resumed.step_count == whole.step_count == 20
    for name in SHAPES:
        np.testing.assert_array_equal(resumed.masks[name], whole.masks[name])
        assert weights[name].tobytes() == expected[name].tobytes()
    assert resumed.itop_rates() == whole.itop_rates()
    assert snapshot(resumed) == snapshot(whole)


def test_a_state_may_be_loaded_on_another_backend(backend_names):
    trainer = make(gamma_sal=0.9)
    weights = initial_weights(trainer)
    train(trainer, weights, 6)
    state = trainer.state_dict()
    for backend in backend_names("update_mask"):
        other = make(gamma_sal=0.9, backend=backend)
        other.load_state_dict(state)
        assert snapshot(other) == snapshot(trainer)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "rigl"}, "method"),
        ({"sparsity": 0.5}, "layers"),
        ({"distribution": "uniform"}, "layers"),
        ({"shapes": {**SHAPES, "out": (6, 12)}}, "layers"),
        ({"ablate_last": True}, "layers"),
        ({"layers": {"hidden": LayerOptions(ablate=False)}}, "layers"),
        ({"schedule": UpdateSchedule(1000, delta_t=5)}, "schedule"),
        ({"schedule": UpdateSchedule(1000, delta_t=4, alpha=0.2)}, "schedule"),
        ({"gamma_sal": 0.5}, "update"),
        ({"gamma_sal": None, "min_salient": 2}, "update"),
        ({"saliency_scope": "all"}, "update"),
        ({"grown_init": 0.1}, "update"),
        ({"grad_window": 2}, "grad_window"),
    ],
)
def test_a_state_of_other_settings_is_refused_and_changes_nothing(options, what):
    trainer = make()
    train(trainer, initial_weights(trainer), 6)
    other = make(**options)
    before = snapshot(other)
    with pytest.raises(SriglError, match=f"other settings: {what} was"):
        other.load_state_dict(trainer.state_dict())
    assert snapshot(other) == before


def test_what_is_no_state_is_refused_and_changes_nothing():
    trainer = make()
    before = snapshot(trainer)
    for state in (None, [], {}, {"version": 2}, {"version": None}):
        with pytest.raises(SriglError, match="not a state_dict"):
            trainer.load_state_dict(state)
    whole = make().state_dict()
    for key in whole:
        if key != "version":
            part = {name: value for name, value in whole.items() if name != key}
            with pytest.raises(SriglError, match=f"lacks {key}"):
                trainer.load_state_dict(part)
    with pytest.raises(SriglError, match="not a whole state_dict"):
        trainer.load_state_dict(whole | {"settings": None})
    for part in ("masks", "ever_active"):
        name = next(iter(whole[part]))
        for wrong in ({}, whole[part] | {name: whole[part][name][:1]}):
            with pytest.raises(SriglError, match=r"mask in state|masks of"):
                trainer.load_state_dict(whole | {part: wrong})
    assert snapshot(trainer) == before


def test_a_state_shares_nothing_with_the_trainer():
    trainer, other = make(grad_window=4), make(grad_window=4)
    weights = initial_weights(trainer)
    train(trainer, weights, 2)
    before, state = snapshot(trainer), trainer.state_dict()
    other.load_state_dict(state)
    for mask in (*state["masks"].values(), *state["ever_active"].values()):
        mask[...] = True
    for total, _ in state["window"].values():
        total[...] = 9
    assert snapshot(trainer) == snapshot(other) == before


@pytest.mark.parametrize(
    "spoiled",
    [
        {"rng": None},
        {"rng": {"x": 1}},
        {"window": []},
        {"window": {"nowhere": 3}},
        {"window": {"in": (np.zeros(3), 1)}},
        {"masks": []},
        {"masks": {}},
        {"step_count": "7"},
        {"step_count": -7},
        {"version": np.ones(3)},
        {"settings": {"layers": np.ones(3)}},
    ],
    ids=str,
)
def test_a_spoiled_state_is_refused_and_changes_nothing(spoiled):
    trainer = make()
    train(trainer, initial_weights(trainer), 3)
    before = snapshot(trainer)
    with pytest.raises(SriglError, match="state"):
        trainer.load_state_dict(trainer.state_dict() | spoiled)
    assert snapshot(trainer) == before


def test_a_state_whose_masks_are_not_constant_fan_in_is_refused():
    trainer = make()
    state = trainer.state_dict()
    mask = next(iter(state["masks"].values()))
    mask[0] = False
    mask[0].flat[0] = True
    with pytest.raises(SriglError, match="not constant fan-in"):
        trainer.load_state_dict(state)


def test_accumulation_does_not_depend_on_the_floating_point_mode():
    masks = []
    for mode in (contextlib.nullcontext, flushing_subnormals):
        trainer = SparseTrainer(
            {"fc": (8, 16)},
            sparsity=0.5,
            schedule=UpdateSchedule(100, 2, 0.5),
            config=TrainingConfig(grad_window=2, ablate_last=True),
        )
        rng = np.random.default_rng(3)
        weight = {"fc": rng.standard_normal((8, 16)).astype(np.float32)}
        for _ in range(2):
            grad = (rng.integers(1, 100, (8, 16)) * 1e-42).astype(np.float32)
            with mode():
                trainer.accumulate("fc", grad)
                trainer.step(weight)
        masks.append(trainer.masks["fc"].tobytes())
    assert masks[0] == masks[1]


def test_settings_become_plain_numbers():
    schedule = UpdateSchedule(t_end=np.int64(10000), delta_t=np.uint8(100), alpha=np.float32(0.25))
    assert schedule.is_due(1000)
    settings = UpdateSettings(
        np.uint8(40), np.float64(0.3), gamma_sal=None, min_salient=np.int16(2)
    )
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["nnz_budget"] == 40
    assert json.loads(json.dumps(dataclasses.asdict(schedule)))["delta_t"] == 100
