"""The laws of the mask updates (SPEC 4)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srigl_core._api import update_condensed, update_mask
from srigl_core._arrays.dtypes import value_dtype
from srigl_core._format.weight import CondensedWeight
from srigl_core._update import CondensedUpdate, MaskUpdate
from srigl_core.contract import Backend
from srigl_core.errors import SriglError
from srigl_core.reference.condensed_update import srigl_condensed_update
from srigl_core.reference.mask_update import srigl_update
from srigl_core.testing.comparisons import assert_same_bits, assert_same_update, assert_unwritten
from srigl_core.testing.kernel_capabilities import KernelCapabilities, capabilities_of
from srigl_core.testing.law import Law, LawViolation, NotApplicable, law_decorator
from srigl_core.testing.problem_arrays import ORDERED_DTYPES
from srigl_core.testing.problem_sources import DataSource
from srigl_core.testing.released_updates import ReleasedUpdate, released_updates
from srigl_core.testing.thread_calls import assert_repeatable, assert_same_in_threads
from srigl_core.testing.update_problems import (
    CondensedUpdateProblem,
    UpdateProblem,
    condensed_update_problem,
    update_problem,
)

__all__ = ["UPDATE_LAWS"]

Condensed = CondensedUpdateProblem
Updated = TypeVar("Updated", UpdateProblem, Condensed)

UPDATE_LAWS: list[Law] = []
_law = law_decorator(UPDATE_LAWS, "update_mask", update_problem)


def _update(backend: Backend, problem: UpdateProblem, **options: Any) -> MaskUpdate:
    options |= {"backend": backend, **asdict(problem.settings)}
    return update_mask(problem.weight, problem.grad, problem.mask, **options)


@_law("the reference", "bit for bit")
def update_is_that_of_the_reference(backend: Backend, problem: UpdateProblem) -> None:
    """Every field of the update is the definition's, bit for bit: ties go to the lowest index."""
    expected = srigl_update(problem.weight, problem.grad, problem.mask, problem.settings)
    assert_same_update(_update(backend, problem), expected)


@_law("the invariants of SPEC 4", "exactly")
def updated_mask_keeps_the_invariants(backend: Backend, problem: UpdateProblem) -> None:
    """Active rows have exactly k weights, at least one is active, and the budget is kept."""
    update = _update(backend, problem)
    counts = np.count_nonzero(update.mask, axis=1)
    active = np.flatnonzero(counts)
    if not active.size or (counts[active] != update.fan_in).any():
        raise LawViolation(f"rows have {counts.tolist()} weights; the fan-in is {update.fan_in}")
    if update.nnz != counts[active[0]] * active.size or update.nnz > problem.settings.nnz_budget:
        raise LawViolation(f"{update.nnz} weights; the budget is {problem.settings.nnz_budget}")
    if update.ablated.tolist() != np.flatnonzero(counts == 0).tolist():
        raise LawViolation(f"ablated is {update.ablated.tolist()}; row counts {counts.tolist()}")
    change = np.count_nonzero(problem.mask) - update.n_pruned + update.n_grown
    if change != update.nnz:
        raise LawViolation("n_pruned and n_grown do not lead from the old mask to the new")
    stays, grown = problem.mask & update.mask, update.mask & ~problem.mask
    weight = np.where(stays, problem.weight, 0).astype(problem.weight.dtype)
    weight[grown] = problem.settings.grown_init
    if not np.array_equal(update.weight, weight):
        raise LawViolation("a weight was not kept, or a new one is not grown_init")


@_law("itself", "bit for bit")
def update_does_not_write_its_inputs(backend: Backend, problem: UpdateProblem) -> None:
    """Neither weight nor gradient nor mask changes, and the results are new arrays."""
    arrays = (problem.weight, problem.grad, problem.mask)
    update = assert_unwritten(arrays, lambda: _update(backend, problem))
    if any(np.shares_memory(new, old) for new in (update.mask, update.weight) for old in arrays):
        raise LawViolation("a result shares memory with an input")


@_law("itself", "bit for bit")
def same_inputs_give_the_same_update(backend: Backend, problem: UpdateProblem) -> None:
    """An update is the same when repeated, on any number of threads, also in a flushing thread."""
    assert_repeatable(partial(_update, backend, problem), assert_same_update, problem.rng())


def _both_ways(problem: UpdateProblem) -> tuple[UpdateProblem, UpdateProblem]:
    """Return an update and that of the rows in reverse, with a budget that is enough for both."""
    one = _with_enough_budget(problem)
    weight, grad, mask = (part[::-1].copy() for part in (one.weight, one.grad, one.mask))
    return one, replace(one, weight=weight, grad=grad, mask=mask)


def _with_enough_budget(problem: Updated) -> Updated:
    """Return a problem whose budget is at least one weight for each neuron."""
    budget = max(problem.settings.nnz_budget, len(problem.grad))
    return replace(problem, settings=replace(problem.settings, nnz_budget=budget))


@_law("itself", "bit for bit")
def earlier_updates_stay(backend: Backend, problem: UpdateProblem) -> None:
    """Later updates do not change an earlier one."""
    one, other = _both_ways(problem)
    _assert_stays(partial(_update, backend, one), partial(_update, backend, other))


def _assert_stays(update: Callable[[], Any], other: Callable[[], Any]) -> None:
    first = update()
    kept = copy.deepcopy(first)
    other()
    assert_same_update(first, kept)


@_law("itself", "bit for bit")
def threads_may_update_at_once(backend: Backend, problem: UpdateProblem) -> None:
    """Called from several threads at once, each update is the same as alone."""
    calls = [partial(_update, backend, case) for case in _both_ways(problem)]
    assert_same_in_threads(calls, assert_same_update)


def _tied_problem(source: DataSource, capabilities: KernelCapabilities) -> UpdateProblem:
    """Build an update in which all weights have one magnitude, and all gradients."""
    problem = update_problem(source, capabilities)
    rng = source.rng()
    signs = [rng.choice([-1.0, 1.0], problem.mask.shape) for _ in range(2)]
    weight, grad = (part.astype(problem.weight.dtype) for part in signs)
    weight[~problem.mask] = 0
    # With ties more neurons may survive than those that the budget was chosen for.
    return _with_enough_budget(replace(problem, weight=weight, grad=grad))


@_law("the reference", "bit for bit", build=_tied_problem)
def ties_go_to_the_lowest_index(backend: Backend, problem: UpdateProblem) -> None:
    """Where all magnitudes are equal, the lowest flat indices win at every step."""
    expected = srigl_update(problem.weight, problem.grad, problem.mask, problem.settings)
    assert_same_update(_update(backend, problem), expected)


@_law("itself", "bit for bit")
def signs_do_not_matter(backend: Backend, problem: UpdateProblem) -> None:
    """Weights and gradients of other signs give the same mask."""
    signs = np.random.default_rng(0).choice([-1, 1], problem.mask.shape)
    other = replace(
        problem,
        weight=(problem.weight * signs).astype(problem.weight.dtype),
        grad=(problem.grad * -signs).astype(problem.grad.dtype),
    )
    _assert_same_masks(backend, problem, [other], "other signs")


@_law("itself", "bit for bit")
def scale_does_not_matter(backend: Backend, problem: UpdateProblem) -> None:
    """Weights times a power of two, and gradients divided by it, give the same mask."""
    pairs = [(_scaled(problem.weight, n), _scaled(problem.grad, -n)) for n in _EXPONENTS]
    others = _with_numbers(problem, pairs)
    if not others:
        raise NotApplicable("no power of two scales its numbers exactly")
    _assert_same_masks(backend, problem, others, "numbers of another scale")


def _with_numbers(
    problem: UpdateProblem, pairs: list[tuple[NDArray[Any] | None, NDArray[Any] | None]]
) -> list[UpdateProblem]:
    """Return updates with each pair of weights and gradients in which neither is None."""
    return [
        replace(problem, weight=weight, grad=grad)
        for weight, grad in pairs
        if weight is not None and grad is not None
    ]


def _assert_same_masks(
    backend: Backend, problem: UpdateProblem, others: list[UpdateProblem], what: str
) -> None:
    """Raise `LawViolation` unless all updates give the same mask."""
    mask = _update(backend, problem).mask
    for other in others:
        assert_same_bits(_update(backend, other).mask, mask, f"the mask for {what}")


_EXPONENTS = (1, -40, 40)


def _scaled(array: NDArray[Any], exponent: int) -> NDArray[Any] | None:
    """Return an array times a power of two, or None if a number would be rounded."""
    numbers = array.astype(np.float64)
    with np.errstate(all="ignore"):
        scaled = np.ldexp(numbers, exponent).astype(array.dtype)
        back = np.ldexp(scaled.astype(np.float64), -exponent)
    return scaled if np.array_equal(back, numbers, equal_nan=True) else None


@_law("itself", "bit for bit")
def only_the_order_of_magnitudes_matters(backend: Backend, problem: UpdateProblem) -> None:
    """Magnitudes that are as near as can be, subnormal or not, give the mask of their order."""
    pairs = [(_in_order(problem.weight, n), _in_order(problem.grad, n)) for n in (0.0, 1.0)]
    others = _with_numbers(problem, pairs)
    if not others:
        raise NotApplicable("its types have too few numbers")
    _assert_same_masks(backend, problem, others, "other numbers of the same order")


def _in_order(array: NDArray[Any], first: float) -> NDArray[Any] | None:
    """Return an array whose magnitudes are neighbours from `first` on; zeros and NaN stay.

    It is None if the type has too few numbers.
    """
    bits = np.dtype(f"u{array.dtype.itemsize}")
    ranks = np.unique(np.abs(array.astype(np.float64)), return_inverse=True)[1]
    ranks = ranks.reshape(array.shape) + (0 if (array == 0).any() else 1)
    start, end = (int(np.array(x, array.dtype).view(bits)) for x in (first, np.inf))
    if start + int(ranks.max(initial=0)) >= end:
        return None
    numbers = (start + ranks).astype(bits).view(array.dtype)
    numbers = np.copysign(numbers, array).astype(array.dtype)
    return np.where((array == 0) | np.isnan(array), array, numbers)


def _unaffordable(
    build: Callable[[DataSource, KernelCapabilities], Updated],
    source: DataSource,
    capabilities: KernelCapabilities,
) -> Updated:
    """Build an update that ablates no neuron and has less than one weight for each."""
    problem = build(source, capabilities)
    budget = source.integer(1, max(1, len(problem.grad) - 1))
    settings = replace(problem.settings, nnz_budget=budget, gamma_sal=None, min_salient=None)
    return replace(problem, settings=settings)


def _assert_refused(update: Callable[[Updated], Any], problem: Updated) -> None:
    """Raise `LawViolation` if an update of `_unaffordable` is not an error."""
    n_out = len(problem.grad)
    if n_out < 2:
        raise NotApplicable("a budget of 1 is enough for one neuron")
    try:
        result = update(problem)
    except SriglError:
        return
    raise LawViolation(
        f"a budget of {problem.settings.nnz_budget} for {n_out} neurons gave a fan-in of "
        f"{result.fan_in}, expected SriglError"
    )


@_law("SPEC 4.5", "exactly", build=partial(_unaffordable, update_problem))
def a_fan_in_of_zero_is_an_error(backend: Backend, problem: UpdateProblem) -> None:
    """Where the budget is less than one weight for each active neuron, SriglError is raised."""
    _assert_refused(partial(_update, backend), problem)


@_law("SPEC 4.9", "exactly")
def numbers_that_are_not_finite_are_refused(backend: Backend, problem: UpdateProblem) -> None:
    """NaN or infinity in the gradient, or in the weight where it is active, is a counted error."""
    rng, size = problem.rng(), problem.mask.size
    places = rng.random(problem.mask.shape) < 0.5
    special = rng.choice([np.nan, np.inf, -np.inf], np.count_nonzero(places))
    types = [name for name in ORDERED_DTYPES if name in capabilities_of(backend).input_dtypes]
    for grad in (np.ones(places.shape, value_dtype(name)) for name in types):
        grad[places] = special
        wrong = replace(problem, grad=grad)
        _assert_counted(partial(_update, backend, wrong), "grad", special.size, size)
    weight = problem.weight.copy()
    weight[places] = special
    count = int(np.count_nonzero(places & problem.mask))
    call = partial(_update, backend, replace(problem, weight=weight))
    _assert_counted(call, "weight at active positions", count, size)


def _assert_counted(update: Callable[[], Any], what: str, count: int, size: int) -> None:
    """Raise `LawViolation` if an update with `count` wrong numbers is no error that says so."""
    try:
        update()
    except SriglError as error:
        if not count or f"{what} is not finite in {count} of {size} places" in str(error):
            return
        raise LawViolation(f"{count} of {what} are not finite; the error was: {error}") from error
    if count:
        raise LawViolation(f"{count} of {what} are not finite, expected SriglError")


def _released_update(source: DataSource, capabilities: KernelCapabilities) -> ReleasedUpdate:
    return source.sampled_from(released_updates())


@_law("recorded updates of the released code", "exactly", build=_released_update)
def released_updates_are_reproduced(backend: Backend, problem: ReleasedUpdate) -> None:
    """Updates of the authors' released code, without ties or its known bugs, are reproduced."""
    if not {"gamma_sal", "saliency_scope"} <= capabilities_of(backend).settings:
        raise NotApplicable("it does not take gamma_sal and saliency_scope")
    update = _update(backend, problem)
    assert_same_bits(update.mask, problem.new_mask, "the mask of a recorded update")
    if not np.array_equal(update.weight, problem.new_weight):  # its zeros have signs
        raise LawViolation("the weight of a recorded update differs")


# The update of a condensed layer (SPEC 2, Condensed update).

_condensed_law = law_decorator(UPDATE_LAWS, "update_condensed", condensed_update_problem)


def _rows(problem: Condensed, start: int, stop: int) -> NDArray[Any]:
    return problem.grad[start:stop]


def _condensed_update(backend: Backend, problem: Condensed, **options: Any) -> CondensedUpdate:
    rows = options.pop("rows", partial(_rows, problem))
    options |= {"backend": backend, "block_rows": problem.block_rows}
    return update_condensed(problem.weight, rows, problem.settings, **options)


@_condensed_law("the reference's updates of the dense and of the condensed layer", "bit for bit")
def condensed_update_is_that_of_the_dense_layer(backend: Backend, problem: Condensed) -> None:
    """Connections, values and report are those of the mask update, however large the blocks."""
    update = _condensed_update(backend, problem)
    weight, mask, settings = problem.weight, problem.weight.to_mask(), problem.settings
    dense = srigl_update(weight.to_dense(), problem.grad, mask, settings)
    assert_same_update(update, _as_condensed(dense, mask))
    rows = partial(_rows, problem)
    whole = srigl_condensed_update(weight, rows, settings, block_rows=len(mask))
    assert_same_update(update, whole)


def _as_condensed(update: MaskUpdate, mask: NDArray[np.bool_]) -> CondensedUpdate:
    """Return the update of a dense layer as that of a condensed one; `mask` is the old mask."""
    weight = CondensedWeight.from_dense(update.weight, update.mask)
    was_at = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, -1)
    report = {name: part for name, part in vars(update).items() if "mask" not in name}
    report |= {"weight": weight, "source": was_at[weight.active[:, None], weight.indices]}
    return CondensedUpdate(**report)


@_condensed_law("the contract", "exactly")
def gradient_rows_are_asked_for_in_blocks(backend: Backend, problem: Condensed) -> None:
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

    _condensed_update(backend, problem, rows=rows)


@_condensed_law("itself", "bit for bit")
def condensed_update_does_not_write_its_inputs(backend: Backend, problem: Condensed) -> None:
    """Neither the weight nor rows of the gradient change, and the new values are a new array."""
    weight = problem.weight
    arrays = (weight.values, weight.indices, weight.active, problem.grad)
    update = assert_unwritten(arrays, lambda: _condensed_update(backend, problem))
    if any(np.shares_memory(update.weight.values, old) for old in arrays):
        raise LawViolation("the new values share memory with an input")


@_condensed_law("itself", "bit for bit")
def same_inputs_give_the_same_condensed_update(backend: Backend, problem: Condensed) -> None:
    """An update is the same when repeated, on any number of threads, also in a flushing thread."""
    call = partial(_condensed_update, backend, problem)
    assert_repeatable(call, assert_same_update, problem.rng())


@_condensed_law("itself", "bit for bit")
def condensed_updates_leave_others_alone(backend: Backend, problem: Condensed) -> None:
    """Neither later updates nor those of other threads change an update."""
    one = _with_enough_budget(problem)
    other = replace(one, grad=one.grad[::-1, ::-1].copy())
    calls = [partial(_condensed_update, backend, case) for case in (one, other)]
    _assert_stays(*calls)
    assert_same_in_threads(calls, assert_same_update)


@_condensed_law("SPEC 4.5", "exactly", build=partial(_unaffordable, condensed_update_problem))
def a_condensed_fan_in_of_zero_is_an_error(backend: Backend, problem: Condensed) -> None:
    """Where the budget is less than one weight for each active neuron, SriglError is raised."""
    _assert_refused(partial(_condensed_update, backend), problem)
