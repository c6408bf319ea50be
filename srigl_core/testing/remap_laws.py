"""The laws of remapped optimiser state (SPEC 4.8).

After a mask update, state follows the weights that stay, and starts anew elsewhere. A remap is a
function of the library, not an operation of a backend (decision D75), so only functions are tried.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._format.weight import CondensedWeight
from srigl_core._update import CondensedUpdate, MaskUpdate
from srigl_core.reference.condensed_update import srigl_condensed_update
from srigl_core.reference.mask_update import srigl_update
from srigl_core.testing.comparisons import assert_same_bits, assert_unwritten
from srigl_core.testing.kernel_capabilities import (
    DISTINCT_LAYOUTS,
    EVERYTHING,
    KernelCapabilities,
    capabilities_of,
)
from srigl_core.testing.law import Law, LawViolation, NotApplicable, law_decorator
from srigl_core.testing.problem_arrays import combinable_dtypes, laid_out
from srigl_core.testing.problem_sources import DataSource
from srigl_core.testing.update_problems import condensed_update_problem, update_problem

__all__ = [
    "REMAP_LAWS",
    "CondensedRemapProblem",
    "RemapProblem",
    "condensed_remap_problem",
    "remap_problem",
]

OTHER_DTYPES = ("int32", "int8", "uint8", "bool")
"""State that is no number of a value type: step counts, quantised moments, flags."""

_NOT_FINITE = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F80_0000,
    "float64": 0x7FF << 52,
}
"""The bits that all infinities and NaN of a type have."""

REMAP_LAWS: list[Law] = []


@dataclass(frozen=True, eq=False)
class RemapProblem:
    """State of a dense layer, to be remapped.

    Parameters
    ----------
    weight : ndarray, (n_out, n_in)
        Before the update.
    mask : ndarray of bool, (n_out, n_in)
        Before the update.
    update : MaskUpdate
    state : ndarray, (n_out, n_in)
        Of any dtype, with any bits.
    start : float
        What state of a new weight is.
    """

    weight: NDArray[Any]
    mask: NDArray[np.bool_]
    update: MaskUpdate
    state: NDArray[Any]
    start: float

    @property
    def source(self) -> NDArray[np.int64]:
        """Where each number of the result is in `state`, flat; -1 where it starts anew."""
        stays = self.mask & self.update.mask
        return np.where(stays, np.arange(stays.size).reshape(stays.shape), -1)

    def remapped(self, backend: Any, state: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return `state`, or another one of its kind, as a backend remaps it."""
        state = self.state if state is None else state
        return _checked(
            backend.remap_state(state, self.mask, self.update.mask, start=self.start), self
        )


@dataclass(frozen=True, eq=False)
class CondensedRemapProblem:
    """State of a condensed layer's values, to be remapped.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
        Before the update.
    update : CondensedUpdate
    state : ndarray, (n_active, k)
        One number of any dtype for each old value.
    start : float
        What state of a new weight is.
    """

    weight: CondensedWeight
    update: CondensedUpdate
    state: NDArray[Any]
    start: float

    @property
    def source(self) -> NDArray[np.int64]:
        """As in `RemapProblem`; found by the connections, and not by the update's own source."""
        old, new = self.weight, self.update.weight
        was_at = np.full(old.shape, -1, np.int64)
        was_at[old.active[:, None], old.indices] = np.arange(old.nnz).reshape(old.indices.shape)
        source: NDArray[np.int64] = was_at[new.active[:, None], new.indices]
        return source

    def remapped(self, backend: Any, state: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return `state`, or another one of its kind, as a backend remaps it."""
        state = self.state if state is None else state
        return _checked(
            backend.remap_condensed(state, self.weight, self.update, start=self.start), self
        )


Remap = RemapProblem | CondensedRemapProblem


def _checked(result: NDArray[Any], problem: Remap) -> NDArray[Any]:
    shape, dtype = problem.source.shape, problem.state.dtype
    if result.shape != shape or result.dtype != dtype:
        raise LawViolation(
            f"the new state is {result.dtype} {result.shape}, expected {dtype} {shape}"
        )
    return result


def remap_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> RemapProblem:
    """Build a remap of a dense layer: any update, any dtype, any bits, any memory layout."""
    problem = update_problem(source, capabilities)
    update = srigl_update(problem.weight, problem.grad, problem.mask, problem.settings)
    state, start = _state(source, capabilities, problem.mask.shape)
    return RemapProblem(problem.weight, problem.mask, update, state, start)


def condensed_remap_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> CondensedRemapProblem:
    """Build a remap of a condensed layer: any update, any dtype, any bits, any memory layout."""
    problem = condensed_update_problem(source, capabilities)
    weight, grad = problem.weight, problem.grad
    update = srigl_condensed_update(
        weight, lambda start, stop: grad[start:stop], problem.settings, block_rows=len(grad)
    )
    state, start = _state(source, capabilities, weight.values.shape)
    return CondensedRemapProblem(weight, update, state, start)


def _state(
    source: DataSource, capabilities: KernelCapabilities, shape: tuple[int, ...]
) -> tuple[NDArray[Any], float]:
    """Draw state of any bits, and what state of a new weight is."""
    names = [dtype.name for dtype in combinable_dtypes(capabilities)]
    name = source.sampled_from((*names, *names, *OTHER_DTYPES))
    layout = source.sampled_from(_distinct_layouts(capabilities))
    starts: tuple[float, ...] = (0.0,)
    if "start" in capabilities.settings:  # integers have no fractions
        starts = (0.0, 0.0, 1.0) if name in OTHER_DTYPES else (0.0, 0.0, 1.0, 0.1, 0.1, -0.5)
    start, rng = source.sampled_from(starts), source.rng()
    if name == "bool":
        return laid_out(rng.random(shape) < 0.5, layout), start
    dtype = np.dtype(name) if name in OTHER_DTYPES else value_dtype(name)
    bits = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(f"u{dtype.itemsize}")
    bits = bits.reshape(shape)
    bits[rng.random(shape) < 0.2] &= bits.dtype.type(1 << 8 * dtype.itemsize - 1)  # zeros, signed
    if name in _NOT_FINITE:
        bits[rng.random(shape) < 0.3] |= bits.dtype.type(_NOT_FINITE[name])
    return laid_out(bits.view(dtype), layout), start


def _distinct_layouts(capabilities: KernelCapabilities) -> list[str]:
    return [each for each in DISTINCT_LAYOUTS if each in capabilities.layouts]


_law = law_decorator(REMAP_LAWS, "remap_state", remap_problem)
_condensed_law = law_decorator(REMAP_LAWS, "remap_condensed", condensed_remap_problem)


def _assert_kept(result: NDArray[Any], problem: Remap, state: NDArray[Any], what: str) -> None:
    """Raise `LawViolation` unless state that stays has the bits that it had."""
    source = problem.source
    kept = np.where(source >= 0, state.reshape(-1)[source], result)
    assert_same_bits(result, kept, what)


def _assert_starts(result: NDArray[Any], problem: Remap, where: NDArray[np.bool_]) -> None:
    """Raise `LawViolation` unless state starts anew at some places, with +0.0 if that is zero."""
    new = np.where(where, result.dtype.type(problem.start), result)
    assert_same_bits(result, new, "the state of a new weight")


def _assert_inputs_stay(backend: Any, problem: Remap) -> None:
    arrays = [problem.state, *_masks(problem)]
    result = assert_unwritten(arrays, lambda: problem.remapped(backend))
    if any(np.shares_memory(result, array) for array in arrays):
        raise LawViolation("the new state shares memory with an input")


def _masks(problem: Remap) -> list[NDArray[Any]]:
    if isinstance(problem, RemapProblem):
        return [problem.mask, problem.update.mask]
    return [problem.update.source, problem.update.weight.indices]


def _unchanged(problem: RemapProblem) -> RemapProblem:
    """Return the problem with an update that leaves the mask as it is."""
    return replace(problem, update=replace(problem.update, mask=problem.mask.copy()))


def _assert_any_layout(backend: Any, problem: Remap) -> None:
    layouts = _distinct_layouts(capabilities_of(backend))
    if len(layouts) == 1:
        raise NotApplicable("it takes arrays in C order only")
    for layout in layouts:
        elsewhere = laid_out(problem.state, layout)
        result = problem.remapped(backend, elsewhere)
        _assert_kept(result, problem, problem.state, f"state laid out {layout!r}, remapped,")


def _assert_stays(backend: Any, problem: Remap) -> None:
    first = problem.remapped(backend)
    kept = first.copy()
    problem.remapped(backend, np.ascontiguousarray(problem.state[::-1, ::-1]))
    assert_same_bits(first, kept, "state remapped earlier")
    assert_same_bits(problem.remapped(backend), kept, "state remapped again")


@_law("the state before", "bit for bit")
def kept_weights_keep_their_state(backend: Any, problem: RemapProblem) -> None:
    """Where a weight is active before and after, state has its bits, those of any NaN included."""
    _assert_kept(problem.remapped(backend), problem, problem.state, "the state of a kept weight")


@_law("SPEC 4.8", "bit for bit")
def grown_weights_start_with_new_state(backend: Any, problem: RemapProblem) -> None:
    """Where a weight is newly active, state is that of a new weight, whatever it was."""
    grown = problem.update.mask & ~problem.mask
    _assert_starts(problem.remapped(backend), problem, grown)


@_law("SPEC 4.8", "bit for bit")
def inactive_weights_have_no_state(backend: Any, problem: RemapProblem) -> None:
    """Where a weight is not active, as in an ablated neuron, state is that of a new weight."""
    _assert_starts(problem.remapped(backend), problem, ~problem.update.mask)


@_law("the state before", "bit for bit")
def an_unchanged_mask_keeps_all_state(backend: Any, problem: RemapProblem) -> None:
    """Where the mask stays as it is, so does all state of active weights."""
    same = _unchanged(problem)
    _assert_kept(same.remapped(backend), same, same.state, "the state under the same mask")


@_law("itself", "bit for bit")
def remap_does_not_write_its_inputs(backend: Any, problem: RemapProblem) -> None:
    """Neither state nor masks change, and the new state is a new array, under any new mask."""
    _assert_inputs_stay(backend, problem)
    _assert_inputs_stay(backend, _unchanged(problem))


@_law("the state before", "bit for bit")
def memory_layout_of_state_does_not_matter(backend: Any, problem: RemapProblem) -> None:
    """State of any strides and alignment is remapped the same."""
    _assert_any_layout(backend, problem)


@_law("itself", "bit for bit")
def earlier_state_stays(backend: Any, problem: RemapProblem) -> None:
    """Later remaps do not change an earlier result, and it is the same when repeated."""
    _assert_stays(backend, problem)


@_condensed_law("the state before", "bit for bit")
def state_follows_its_connection(backend: Any, problem: CondensedRemapProblem) -> None:
    """A connection that stays keeps its state, bit for bit, wherever it is among the new ones."""
    result = problem.remapped(backend)
    _assert_kept(result, problem, problem.state, "the state of a kept connection")


@_condensed_law("SPEC 4.8", "bit for bit")
def new_connections_start_with_new_state(backend: Any, problem: CondensedRemapProblem) -> None:
    """A new connection, as all those of a revived neuron, has the state of a new weight."""
    _assert_starts(problem.remapped(backend), problem, problem.source < 0)


@_condensed_law("itself", "bit for bit")
def condensed_remap_does_not_write_its_inputs(backend: Any, problem: CondensedRemapProblem) -> None:
    """Neither state nor update change, and the new state is a new array."""
    _assert_inputs_stay(backend, problem)


@_condensed_law("the state before", "bit for bit")
def memory_layout_of_condensed_state_does_not_matter(
    backend: Any, problem: CondensedRemapProblem
) -> None:
    """State of any strides and alignment is remapped the same."""
    _assert_any_layout(backend, problem)


@_condensed_law("itself", "bit for bit")
def earlier_condensed_state_stays(backend: Any, problem: CondensedRemapProblem) -> None:
    """Later remaps do not change an earlier result, and it is the same when repeated."""
    _assert_stays(backend, problem)
