"""The laws of the mask update of a condensed layer (SPEC 2, Condensed update)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._api import update_condensed
from srigl_core._format.weight import CondensedWeight
from srigl_core._update import CondensedUpdate, MaskUpdate
from srigl_core.contract import Backend
from srigl_core.reference.condensed_update import srigl_condensed_update
from srigl_core.reference.mask_update import srigl_update
from srigl_core.testing.comparisons import assert_same_update, assert_unwritten
from srigl_core.testing.flush_mode import flushing_subnormals
from srigl_core.testing.kernel_capabilities import KernelCapabilities
from srigl_core.testing.law import Law, LawViolation, law_decorator
from srigl_core.testing.problems import (
    CondensedUpdateProblem,
    DataSource,
    condensed_update_problem,
)
from srigl_core.testing.thread_calls import assert_same_in_threads
from srigl_core.testing.update_laws import assert_refused, unaffordable

__all__ = ["CONDENSED_UPDATE_LAWS"]

CONDENSED_UPDATE_LAWS: list[Law] = []
_law = law_decorator(CONDENSED_UPDATE_LAWS, "update_condensed", condensed_update_problem)


def _rows(problem: CondensedUpdateProblem, start: int, stop: int) -> NDArray[Any]:
    return problem.grad[start:stop]


def _update(backend: Backend, problem: CondensedUpdateProblem, **options: Any) -> CondensedUpdate:
    rows = options.pop("rows", partial(_rows, problem))
    options |= {"backend": backend, "block_rows": problem.block_rows}
    return update_condensed(problem.weight, rows, problem.settings, **options)


@_law("the reference's updates of the dense and of the condensed layer", "bit for bit")
def condensed_update_is_that_of_the_dense_layer(
    backend: Backend, problem: CondensedUpdateProblem
) -> None:
    """Connections, values and report are those of the mask update, however large the blocks."""
    update = _update(backend, problem)
    weight, mask, settings = problem.weight, problem.weight.to_mask(), problem.settings
    dense = srigl_update(weight.to_dense(), problem.grad, mask, settings)
    assert_same_update(update, _condensed(dense, mask))
    rows = partial(_rows, problem)
    whole = srigl_condensed_update(weight, rows, settings, block_rows=len(mask))
    assert_same_update(update, whole)


def _condensed(update: MaskUpdate, mask: NDArray[np.bool_]) -> CondensedUpdate:
    """Return the update of a dense layer as that of a condensed one; `mask` is the old mask."""
    weight = CondensedWeight.from_dense(update.weight, update.mask)
    was_at = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, -1)
    report = {name: part for name, part in vars(update).items() if "mask" not in name}
    report |= {"weight": weight, "source": was_at[weight.active[:, None], weight.indices]}
    return CondensedUpdate(**report)


@_law("the contract", "exactly")
def gradient_rows_are_asked_for_in_blocks(
    backend: Backend, problem: CondensedUpdateProblem
) -> None:
    """Blocks of gradient rows lie within the layer, are no larger than allowed, and consecutive."""
    n_out, end = len(problem.grad), 0

    def rows(start: int, stop: int) -> NDArray[Any]:
        nonlocal end
        if start not in (0, end) or not start < stop <= min(n_out, start + problem.block_rows):
            raise LawViolation(
                f"rows {start} to {stop} of {n_out} were asked for after row {end}, where a block "
                f"has at most {problem.block_rows} rows"
            )
        end = stop
        return _rows(problem, start, stop)

    _update(backend, problem, rows=rows)


@_law("itself", "bit for bit")
def condensed_update_does_not_write_its_inputs(
    backend: Backend, problem: CondensedUpdateProblem
) -> None:
    """Neither the weight nor rows of the gradient change, and the new values are a new array."""
    weight = problem.weight
    arrays = (weight.values, weight.indices, weight.active, problem.grad)
    update = assert_unwritten(arrays, lambda: _update(backend, problem))
    if any(np.shares_memory(update.weight.values, old) for old in arrays):
        raise LawViolation("the new values share memory with an input")


@_law("itself", "bit for bit")
def same_inputs_give_the_same_condensed_update(
    backend: Backend, problem: CondensedUpdateProblem
) -> None:
    """An update is the same when repeated, on any number of threads, also in a flushing thread."""
    first = _update(backend, problem)
    repeats = [_update(backend, problem, threads=threads) for threads in (1, 2, 3, 8)]
    with flushing_subnormals():
        repeats.append(_update(backend, problem))
    for again in repeats:
        assert_same_update(again, first)


@_law("itself", "bit for bit")
def condensed_updates_leave_others_alone(backend: Backend, problem: CondensedUpdateProblem) -> None:
    """Neither later updates nor those of other threads change an update."""
    budget = max(problem.settings.nnz_budget, len(problem.grad))  # enough for any gradient
    one = replace(problem, settings=replace(problem.settings, nnz_budget=budget))
    other = replace(one, grad=one.grad[::-1, ::-1].copy())
    first = _update(backend, one)
    kept = copy.deepcopy(first)
    _update(backend, other)
    assert_same_update(first, kept)
    calls = [partial(_update, backend, case) for case in (one, other)]
    assert_same_in_threads(calls, assert_same_update)


def _unaffordable_problem(
    source: DataSource, capabilities: KernelCapabilities
) -> CondensedUpdateProblem:
    return unaffordable(source, condensed_update_problem(source, capabilities))


@_law("SPEC 4.5", "exactly", build=_unaffordable_problem)
def a_condensed_fan_in_of_zero_is_an_error(
    backend: Backend, problem: CondensedUpdateProblem
) -> None:
    """Where the budget is less than one weight for each active neuron, SriglError is raised."""
    assert_refused(partial(_update, backend), problem)
