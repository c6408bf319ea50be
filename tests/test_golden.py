"""What the authors' released code computed, reproduced (SPEC 3 and 4)."""

import warnings

import numpy as np
import pytest

from srigl_core import SriglError, update_mask
from srigl_core.reference import UpdateSchedule, erk, uniform

N_UPDATES, N_DISTRIBUTIONS = 80, 64


def test_the_golden_data_is_whole(released_updates, released_distributions):
    assert [case.case for case in released_updates] == list(range(N_UPDATES))
    assert len(released_distributions) == N_DISTRIBUTIONS
    assert sum(len(case.ablated) > 0 for case in released_updates) >= 10
    assert {case.gamma_sal for case in released_updates} >= {None, 0.3}
    assert sum(max(entry["sparsities"]) > 1 for entry in released_distributions) == 4


def test_released_updates_are_reproduced_exactly(released_updates, update_backend):
    for case in released_updates:
        update = update_mask(
            case.weight, case.grad, case.mask, backend=update_backend, **case.settings
        )
        np.testing.assert_array_equal(update.mask, case.new_mask, err_msg=f"case {case.case}")
        np.testing.assert_array_equal(update.weight, case.new_weight, err_msg=f"case {case.case}")
        facts = update.weight.dtype, update.ablated.tolist(), update.fan_in
        assert facts == (case.new_weight.dtype, case.ablated, case.fan_in), case.case


def test_released_drop_fractions_are_reproduced_exactly(released_updates):
    for case in released_updates:
        schedule = UpdateSchedule(case.t_end, alpha=case.alpha)
        assert schedule.drop_fraction(case.step) == case.drop_fraction, case.case


def test_the_golden_updates_tell_the_two_scopes_apart(released_updates):
    def differs(case):
        settings = {**case.settings, "saliency_scope": "inactive"}
        update = update_mask(case.weight, case.grad, case.mask, backend="reference", **settings)
        return not np.array_equal(update.mask, case.new_mask)

    assert any(differs(case) for case in released_updates)


def test_released_distributions_are_reproduced(released_distributions):
    for entry in released_distributions:
        _assert_reproduced(entry)


def _assert_reproduced(entry):
    shapes = [tuple(shape) for shape in entry["shapes"]]
    dense = [0] if entry["keep_first_dense"] else []
    share = {"erk": erk, "uniform": uniform}[entry["distribution"]]
    sparsity = 1 - entry["density"]
    if max(entry["sparsities"]) > 1:
        with pytest.raises(SriglError, match="lower the sparsity"):
            share(shapes, sparsity, dense=dense)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = share(shapes, sparsity, dense=dense)
    for layer, shape, released in zip(layers, shapes, entry["sparsities"], strict=True):
        assert layer.shape == shape
        assert abs(layer.sparsity - released) <= 1e-4, entry
    unaffordable = share is uniform and _dense_layers_alone_exceed(shapes, dense, entry["density"])
    assert [warning.category for warning in caught] == [UserWarning] * unaffordable, entry


def _dense_layers_alone_exceed(shapes, dense, density):
    sizes = [int(np.prod(shape)) for shape in shapes]
    return sum(sizes[i] for i in dense) >= sum(sizes) * density


def test_the_golden_distributions_include_the_fallback_of_uniform(released_distributions):
    fallbacks = [
        entry
        for entry in released_distributions
        if entry["distribution"] == "uniform"
        and entry["keep_first_dense"]
        and _dense_layers_alone_exceed(entry["shapes"], [0], entry["density"])
    ]
    assert fallbacks
    for entry in fallbacks:
        shapes = [tuple(shape) for shape in entry["shapes"]]
        with pytest.warns(UserWarning, match="the network will have more weights"):
            uniform(shapes, 1 - entry["density"], dense=[0])
