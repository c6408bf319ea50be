"""Training of condensed layers has the masks and weights of training with dense masks."""

import pickle

import numpy as np
import pytest
from training_options import training_options

from srigl_core import (
    CondensedTrainer,
    CondensedWeight,
    Connections,
    LayerOptions,
    SparseTrainer,
    SriglError,
)
from srigl_core.reference import UpdateSchedule

SHAPES = {"first": (24, 30), "conv": (12, 6, 3, 3), "last": (8, 12)}
OPTIONS = {
    "sparsity": 0.7,
    "schedule": UpdateSchedule(t_end=40, delta_t=4, alpha=0.5),
    "gamma_sal": 0.9,
    "seed": 3,
}


def flat(array):
    return array.reshape(len(array), -1)


def gradient(name, step):
    shape = SHAPES[name]
    return np.random.default_rng((len(name), step)).standard_normal(shape)


def rows_of(dense):
    return lambda start, stop: flat(dense)[start:stop]


def values_of(mask, name):
    """Return values that depend on the position alone."""
    dense = np.random.default_rng(len(name)).standard_normal(mask.shape)
    return dense[mask.active[:, None], mask.indices]


def trained(trainer, weights, steps):
    for _ in range(steps):
        grads = {name: gradient(name, trainer.step_count + 1) for name in weights}
        updates = trainer.step(weights, {name: rows_of(grad) for name, grad in grads.items()})
        weights |= {name: update.weight for name, update in updates.items()}
    return weights


def start(**options):
    trainer = CondensedTrainer(SHAPES, **training_options(**(OPTIONS | options)))
    return trainer, {
        name: CondensedWeight.from_connections(values_of(part, name), part)
        for name, part in trainer.connections.items()
    }


@pytest.mark.parametrize("layers", [{}, {"last": LayerOptions(dense=True)}])
@pytest.mark.parametrize("scope", ["inactive", "all"])
def test_masks_and_weights_are_those_of_the_trainer_with_dense_masks(layers, scope):
    options = {"layers": layers, "saliency_scope": scope}
    dense = SparseTrainer(SHAPES, **training_options(**(OPTIONS | options)))
    condensed, weights = start(**options)
    dense_weights = {n: w.to_dense().reshape(SHAPES[n]) for n, w in weights.items()}
    ablated = 0
    for step in range(1, 31):
        assert condensed.needs_grad == dense.needs_grad
        if dense.needs_grad:
            for name in SHAPES:
                dense.accumulate(name, gradient(name, step))
        for name, update in dense.step(dense_weights).items():
            dense_weights[name] = update.weight
            ablated += update.ablated.size
        trained(condensed, weights, 1)
        for name, mask in condensed.connections.items():
            np.testing.assert_array_equal(mask.to_mask(), flat(dense.masks[name]))
            np.testing.assert_array_equal(weights[name].to_dense(), flat(dense_weights[name]))
    assert ablated
    for name in ("fan_in", "n_active", "nnz", "sparsity", "step_count"):
        assert getattr(condensed, name) == getattr(dense, name)
    assert condensed.itop_rates() == dense.itop_rates()
    assert condensed.report() == dense.report()


def test_resume_is_exact():
    whole, weights = start()
    expected = trained(whole, dict(weights), 30)
    half, weights = start()
    weights = trained(half, weights, 10)
    resumed, _ = start()
    resumed.load_state_dict(pickle.loads(pickle.dumps(half.state_dict())))
    got = trained(resumed, weights, 20)
    assert got == expected
    assert resumed.itop_rates() == whole.itop_rates()


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    trainer, weights = start()
    trained(trainer, weights, 10)
    good = trainer.state_dict()
    other = SparseTrainer(SHAPES, **training_options(**OPTIONS)).state_dict()
    too_many = np.tile(np.arange(30), (24, 1))
    bad = {
        "lacks connections": other,
        "other settings: grad_window": start(grad_window=2)[0].state_dict(),
        "the budget is": good
        | {
            "connections": good["connections"]
            | {"first": {"indices": too_many, "active": np.arange(24)}}
        },
        "'first'.*ascending": good
        | {
            "connections": good["connections"]
            | {"first": {"indices": np.zeros((24, 2), int), "active": np.arange(24)}}
        },
        "ever_active of": good | {"ever_active": {}},
        "ever_active in state has shape": good
        | {"ever_active": good["ever_active"] | {"last": np.zeros(3)}},
        "got list": [1],
    }
    before = trainer.state_dict()
    for message, state in bad.items():
        with pytest.raises(SriglError, match=message):
            trainer.load_state_dict(state)
    np.testing.assert_equal(trainer.state_dict(), before)


def test_what_is_missing_or_changed_is_named_and_the_step_not_counted():
    trainer, weights = start()
    trained(trainer, weights, 3)
    grads = {name: rows_of(gradient(name, 4)) for name in weights}
    other = CondensedWeight.random((8, 12), fan_in=weights["last"].fan_in, dtype=np.float64, rng=9)
    nan = {"last": lambda a, b: np.full((b - a, 12), np.nan)}
    before = trainer.state_dict()
    for message, changed, gradients in (
        ("layer 'first': weights has no entry for it", {"first": None}, grads),
        ("layer 'last': weight has other connections", {"last": other}, grads),
        ("layer 'last': weight must be a Cond", {"last": other.to_dense()}, grads),
        ("layer 'last': gradients has no entry", {}, {n: grads[n] for n in ("first", "conv")}),
        ("layer 'last': grad is not finite in 96 of 96", {}, grads | nan),
    ):
        wrong = {n: w for n, w in (weights | changed).items() if w is not None}
        with pytest.raises(SriglError, match=message):
            trainer.step(wrong, gradients)
    np.testing.assert_equal(trainer.state_dict(), before)


def test_without_itop_nothing_is_kept_for_each_position():
    trainer, weights = start(track_itop=False)
    trained(trainer, weights, 8)
    assert trainer.state_dict()["ever_active"] == {}
    with pytest.raises(SriglError, match="track_itop=True"):
        trainer.itop_rates()


def test_given_connections_and_layers_without_a_gradient_are_as_with_dense_masks():
    drawn, _ = start(seed=8)
    given = {name: drawn.connections[name] for name in ("first", "conv")}
    condensed, weights = start(connections=given)
    masks = {name: part.to_mask().reshape(SHAPES[name]) for name, part in given.items()}
    dense = SparseTrainer(SHAPES, **training_options(**OPTIONS), masks=masks)
    for name, part in given.items():
        assert condensed.connections[name] == part
    for step in range(1, 5):
        grads = {name: gradient(name, step) for name in SHAPES}
        if dense.needs_grad:
            for name, grad in grads.items():
                dense.accumulate(name, None if name == "conv" else grad)
        arrays = {n: w.to_dense().reshape(SHAPES[n]) for n, w in weights.items()}
        rows = {n: None if n == "conv" else rows_of(grad) for n, grad in grads.items()}
        if step < 4:
            assert not dense.step(arrays)
            assert not condensed.step(weights, rows)
    with pytest.warns(UserWarning, match="no gradient reached layer 'conv'"):
        expected = dense.step(arrays)
    with pytest.warns(UserWarning, match="no gradient reached layer 'conv'"):
        updates = condensed.step(weights, rows)
    assert updates.keys() == expected.keys() == {"first", "last"}
    for name, part in condensed.connections.items():
        np.testing.assert_array_equal(part.to_mask(), flat(dense.masks[name]))
    assert condensed.connections["conv"] == given["conv"]
    with pytest.raises(SriglError, match=r"layer 'last': the given connections are of shape"):
        start(connections={"last": Connections.random((4, 5), fan_in=2)})
    with pytest.raises(SriglError, match="an entry 'nope', but the layers are: first"):
        start(connections={"nope": given["first"]})
    kept, _ = start(connections=dict(drawn.connections), sparsity=None)
    assert kept.nnz == drawn.nnz == {name: b.nnz_budget for name, b in kept.budgets.items()}
