"""The registry of training methods, and methods whose passes have different masks."""

from types import SimpleNamespace

import numpy as np
import pytest

from srigl_core import MaskUpdate, Method, SparseTrainer, SriglError, TrainingConfig, list_methods
from srigl_core._training import methods
from srigl_core.reference import UpdateSchedule


def two_masks(layer):
    """Use the largest weights in the forward pass, and train as many others."""
    order = np.argsort(-np.abs(layer.weight), axis=None, kind="stable")
    forward, backward = np.zeros((2, *layer.weight.shape), bool)
    forward.reshape(-1)[order[: layer.settings.nnz_budget]] = True
    backward.reshape(-1)[order[: 2 * layer.settings.nnz_budget]] = True
    rows = np.flatnonzero(~forward.any(axis=1))
    counts = int((layer.mask & ~forward).sum()), int((forward & ~layer.mask).sum())
    new_weight = np.where(backward, layer.weight, 0)
    return MaskUpdate(forward, new_weight, rows, rows[:0], None, *counts, backward_mask=backward)


@pytest.fixture
def registered(monkeypatch):
    """Let a package's entry point name a method."""
    found = methods.entry_points

    def entry_points(**selection):
        own = SimpleNamespace(name="two_masks", load=lambda: Method(two_masks))
        ours = [own] if selection.get("name", own.name) == own.name else []
        return [*found(**selection), *ours]

    monkeypatch.setattr(methods, "entry_points", entry_points)
    methods.get_method.cache_clear()
    yield
    methods.get_method.cache_clear()


def test_the_methods_of_the_paper_are_registered():
    assert list_methods() == ["rigl", "set", "srigl", "static"]


def test_a_package_registers_a_method_of_its_own(registered):
    assert "two_masks" in list_methods()
    options = {"sparsity": 0.8, "schedule": UpdateSchedule(100, delta_t=2)}
    config = TrainingConfig(method="two_masks")
    trainer = SparseTrainer({"fc": (10, 20)}, config=config, **options)
    assert not trainer.needs_grad
    assert trainer.backward_mask("fc") is trainer.masks["fc"]
    weight = np.random.default_rng(0).standard_normal((10, 20))
    assert trainer.step({"fc": weight}) == {}
    update = trainer.step({"fc": weight})["fc"]
    forward, backward = trainer.masks["fc"], trainer.backward_mask("fc")
    assert (forward.sum(), backward.sum()) == (40, 80)
    assert (backward >= forward).all()
    np.testing.assert_array_equal(update.weight != 0, backward)
    assert trainer.nnz == {"fc": 40}

    again = SparseTrainer({"fc": (10, 20)}, config=config, **options)
    again.load_state_dict(trainer.state_dict())
    np.testing.assert_array_equal(again.backward_mask("fc"), backward)
    with pytest.raises(SriglError, match="other settings: method was 'two_masks'"):
        SparseTrainer({"fc": (10, 20)}, **options).load_state_dict(trainer.state_dict())


def test_hidden_weights_train_like_those_of_a_dense_parameter(registered):
    """The parameter shows the forward pass's weights; the others keep theirs, and come back."""
    torch = pytest.importorskip("torch")
    from srigl_core.torch import SRigL

    torch.manual_seed(0)
    model = torch.nn.Linear(12, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = TrainingConfig(method="two_masks", seed=1)
    schedule = UpdateSchedule(100, delta_t=3)
    srigl = SRigL(model, optimizer, sparsity=0.75, schedule=schedule, config=config)
    (name,) = srigl.trainer.masks
    theta, bias = model.weight.detach().clone(), model.bias.detach().clone()
    for step in range(1, 10):
        x = torch.randn(16, 12, dtype=torch.float64)
        forward, backward = srigl.mask(name), torch.tensor(srigl.trainer.backward_mask(name))
        optimizer.zero_grad()
        (model(x) ** 3).sum().mul(0.01).backward()
        srigl.after_backward()
        z = x @ (theta * forward).T + bias
        grad = 0.03 * z**2
        theta = torch.where(backward, theta - 0.1 * grad.T @ x, 0.0)
        bias -= 0.1 * grad.sum(0)
        optimizer.step()
        updates = srigl.step()
        assert bool(updates) == (step % 3 == 0)
        if step == 5:  # resume in the middle of a window
            state = srigl.state_dict()
            srigl.detach()
            srigl = SRigL(model, optimizer, sparsity=0.75, schedule=schedule, config=config)
            with torch.no_grad():
                model.weight.copy_(theta * state["masks"][name])
            srigl.load_state_dict(state)
        torch.testing.assert_close(model.weight.detach(), theta * srigl.mask(name))
    assert (torch.tensor(srigl.trainer.backward_mask(name)) & ~srigl.mask(name)).any()
