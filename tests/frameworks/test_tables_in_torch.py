"""What the tables of activations and methods mean in PyTorch."""

import numpy as np
import pytest
from two_masks import registered  # noqa: F401

from srigl_core import TrainingConfig
from srigl_core.contract import ACTIVATIONS
from srigl_core.reference import UpdateSchedule
from srigl_core.reference.activations import activate

torch = pytest.importorskip("torch")

from srigl_core.torch import SRigL  # noqa: E402


def test_formulas_compute_in_other_libraries():
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for name, activation in ACTIVATIONS.items():
        expected = activate(z.numpy(), name)
        np.testing.assert_allclose(activation.formula(z, torch), expected, rtol=1e-12)


@pytest.mark.usefixtures("registered")
def test_hidden_weights_train_like_those_of_a_dense_parameter():
    """The parameter shows the forward pass's weights; the others keep theirs, and come back."""
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(
        [{"params": model.weight, "weight_decay": 0.2}, {"params": model.bias}], lr=0.1
    )
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
        theta = torch.where(backward, theta - 0.1 * (grad.T @ x + 0.2 * theta), 0.0)
        bias -= 0.1 * grad.sum(0)
        optimizer.step()
        updates = srigl.step()
        assert bool(updates) == (step % 3 == 0)
        if step == 5:  # resume in the middle of a window
            state = srigl.state_dict()
            srigl.detach()
            with torch.no_grad():
                model.weight.fill_(1)
            srigl = SRigL(model, optimizer, sparsity=0.75, schedule=schedule, config=config)
            with torch.no_grad():
                model.weight.copy_(theta * state["masks"][name])
            srigl.load_state_dict(state)
        torch.testing.assert_close(model.weight.detach(), theta * srigl.mask(name))
    assert (torch.tensor(srigl.trainer.backward_mask(name)) & ~srigl.mask(name)).any()
