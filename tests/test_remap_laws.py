"""The laws of remapped optimiser state accept the library's remaps, and reject wrong ones.

More wrong remaps are in `mutants/remap_state` and `mutants/remap_condensed`.
"""

import numpy as np
import pytest

from srigl_core.errors import SriglError
from srigl_core.reference import remap_state
from srigl_core.testing import (
    LAWS,
    ConformanceError,
    FunctionBackend,
    KernelCapabilities,
    check_kernel,
    verify,
)

SMALL_PROBLEMS = KernelCapabilities(largest_problem=50_000)


def condensed(state, update):
    return update.remap(state)


def condensed_flat(state, update):
    return update.remap(state.reshape(-1))


def dense_from(state, mask, new_mask, start):
    return np.where(mask & new_mask, state, state.dtype.type(start))


def condensed_from(state, source, start):
    return np.where(source < 0, state.dtype.type(start), state.reshape(-1)[source])


RIGHT = [
    ("remap_state", remap_state),
    ("remap_state", dense_from),
    ("remap_condensed", condensed),
    ("remap_condensed", condensed_flat),
    ("remap_condensed", condensed_from),
]


@pytest.mark.parametrize(
    ("op", "function"), RIGHT, ids=lambda part: getattr(part, "__name__", part)
)
def test_the_remaps_of_the_library_obey_the_laws(op, function):
    report = check_kernel(function, op, capabilities=SMALL_PROBLEMS, max_examples=20)
    assert report.n_run == sum(law.operation == op for law in LAWS)


def start_forgotten(state, mask, new_mask, start):
    return dense_from(state, mask, new_mask, 0)


def start_at_kept_weights_that_are_zero(state, mask, new_mask, start):
    return np.where(mask & new_mask & (state != 0), state, state.dtype.type(start))


def start_at_grown_weights_only(state, mask, new_mask, start):
    stays, grown = mask & new_mask, new_mask & ~mask
    return np.where(stays, state, np.where(grown, start, 0).astype(state.dtype))


def ablated_neurons_forgotten(state, mask, new_mask, start):
    survives = new_mask.any(axis=1, keepdims=True)
    return np.where(mask & (new_mask | ~survives), state, state.dtype.type(start))


def promoted(state, mask, new_mask, start):
    return np.where(mask & new_mask, state, np.float64(start))


def negative_zero(state, mask, new_mask):
    return np.where(mask & new_mask, state, -np.zeros((), state.dtype))


def nan_replaced(state, mask, new_mask):
    with_numbers = np.nan_to_num(state) if state.dtype.kind == "f" else state
    return np.where(mask & new_mask, with_numbers, state.dtype.type(0))


def view_of_the_state(state, mask, new_mask):
    if (mask == new_mask).all():
        return state
    return remap_state(state, mask, new_mask)


def condensed_start_forgotten(state, source, start):
    return condensed_from(state, source, 0)


def rows_kept_in_place(state, source, start):
    new = np.full(source.shape, start, state.dtype)
    rows, columns = np.minimum(state.shape, source.shape)
    new[:rows, :columns] = state[:rows, :columns]
    return np.where(source < 0, state.dtype.type(start), new)


def source_of_sixteen_bits_sorted(state, source, start):
    return condensed_from(state, np.sort(source, axis=1), start)


def old_shape(state, source, start):
    new = np.full(state.shape, start, state.dtype)
    stays = source[source >= 0]
    new.reshape(-1)[stays] = state.reshape(-1)[stays]
    return new


def promoted_condensed(state, source, start):
    return np.where(source < 0, float(start), state.reshape(-1)[source])


WRONG = [
    ("remap_state", start_forgotten, "grown_weights_start_with_new_state"),
    ("remap_state", start_at_kept_weights_that_are_zero, "kept_weights_keep_their_state"),
    ("remap_state", start_at_grown_weights_only, "inactive_weights_have_no_state"),
    ("remap_state", ablated_neurons_forgotten, "inactive_weights_have_no_state"),
    ("remap_state", promoted, "kept_weights_keep_their_state"),
    ("remap_state", negative_zero, "inactive_weights_have_no_state"),
    ("remap_state", nan_replaced, "kept_weights_keep_their_state"),
    ("remap_state", view_of_the_state, "remap_does_not_write_its_inputs"),
    ("remap_condensed", condensed_start_forgotten, "new_connections_start_with_new_state"),
    ("remap_condensed", rows_kept_in_place, "state_follows_its_connection"),
    ("remap_condensed", source_of_sixteen_bits_sorted, "state_follows_its_connection"),
    ("remap_condensed", old_shape, "state_follows_its_connection"),
    ("remap_condensed", promoted_condensed, "state_follows_its_connection"),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("op", "function", "law"), WRONG, ids=[function.__name__ for _, function, _ in WRONG]
)
def test_a_wrong_remap_is_rejected_by_its_law(op, function, law, seed):
    backend = FunctionBackend(function, op)
    laws = [each for each in LAWS if each.name == law]
    (result,) = verify(backend, laws=laws, seed=seed, max_examples=50, shrink=False).results
    assert result.status == "failed"


def test_a_failure_of_a_remap_can_be_reproduced():
    with pytest.raises(ConformanceError, match=r"check_law\(.*\"remap_state\"") as failed:
        check_kernel(start_forgotten, "remap_state", capabilities=SMALL_PROBLEMS, max_examples=20)
    code = failed.value.report.failures[0].failure.code
    with pytest.raises(AssertionError, match="the state of a new weight"):
        exec(code)


def test_a_remap_that_takes_no_start_is_tried_with_zero():
    assert "start" in check_kernel(remap_state, "remap_state", max_examples=2).left_out
    assert check_kernel(dense_from, "remap_state", max_examples=2).left_out == ()


def test_a_backend_offers_no_remap():
    report = verify("reference", op="remap_state", max_examples=1)
    assert report.counts["not applicable"] == len(report.results)
    with pytest.raises(SriglError, match=r"op='remap' .* remap_state, remap_condensed"):
        check_kernel(remap_state, "remap")
