"""The registry of training methods, and methods whose passes have different masks."""

import numpy as np
import pytest
from two_masks import registered  # noqa: F401

from srigl_core import SparseTrainer, SriglError, TrainingConfig, list_methods
from srigl_core.reference import UpdateSchedule


def test_the_methods_of_the_paper_are_registered():
    assert list_methods() == ["rigl", "set", "srigl", "static"]


@pytest.mark.usefixtures("registered")
def test_a_package_registers_a_method_of_its_own():
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
