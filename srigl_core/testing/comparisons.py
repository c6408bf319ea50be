"""Compare results, and say where they first differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.weight import CondensedWeight
from srigl_core._update import CondensedUpdate, MaskUpdate
from srigl_core.testing.bounds import Outcome, first_violation
from srigl_core.testing.law import LawViolation
from srigl_core.testing.problem_arrays import BETWEEN, laid_out
from srigl_core.testing.product_problems import MatmulProblem

__all__ = [
    "assert_near",
    "assert_neighbours_untouched",
    "assert_same_bits",
    "assert_same_numbers",
    "assert_same_update",
    "assert_unwritten",
    "assert_within",
    "out_array",
]

Result = TypeVar("Result")
Update = TypeVar("Update", MaskUpdate, CondensedUpdate)


def assert_within(result: NDArray[Any], outcome: Outcome, what: str) -> None:
    """Raise `LawViolation` if `result` is not within the error bound of SPEC 2."""
    if result.shape != outcome.z.shape:
        raise LawViolation(f"{what} has shape {result.shape}, expected {outcome.z.shape}")
    violation = first_violation(result, outcome)
    if violation is not None:
        raise LawViolation(f"{what} {violation[1]}")


def assert_near(result: NDArray[Any], other: NDArray[Any], bound: NDArray[Any], what: str) -> None:
    """Raise `LawViolation` if two finite results differ by more than a finite `bound`."""
    if result.shape != other.shape:
        raise LawViolation(f"{what} has shape {result.shape}, the other {other.shape}")
    with np.errstate(all="ignore"):
        got, expected = result.astype(np.float64), other.astype(np.float64)
        decided = np.isfinite(got) & np.isfinite(expected) & np.isfinite(bound)
        far = decided & (np.abs(got - expected) > bound)
    if far.any():
        where = tuple(int(i) for i in np.argwhere(far)[0])
        raise LawViolation(
            f"{what} differs at {where}: expected {float(expected[where])!r}, got "
            f"{float(got[where])!r}, where {bound[where]:.3g} is allowed"
        )


def assert_same_bits(result: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Raise `LawViolation` if dtype, shape or any bit differs."""
    if result.dtype != expected.dtype or result.shape != expected.shape:
        raise LawViolation(
            f"{what}: {result.dtype} {result.shape} instead of {expected.dtype} {expected.shape}"
        )
    if result.tobytes() != expected.tobytes():
        differs = np.argwhere(_bits(result) != _bits(expected))
        where = tuple(int(i) for i in differs[0])
        raise LawViolation(
            f"{what}: at {where} expected {expected[where]!r}, got {result[where]!r}"
        )


def assert_same_numbers(result: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Raise `LawViolation` as `assert_same_bits` does, but let one NaN be as good as another."""
    assert_same_bits(_with_one_nan(result), _with_one_nan(expected), what)


def _with_one_nan(array: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isnan(array), array.dtype.type(np.nan), array)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind in "bi":
        return array
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def assert_same_update(update: Update, expected: Update) -> None:
    """Raise `LawViolation` if two updates differ; inactive zeros may have any sign."""
    for part in fields(expected):
        got, wanted = getattr(update, part.name), getattr(expected, part.name)
        what = f"{part.name} of the update"
        if isinstance(wanted, CondensedWeight):
            for name in ("values", "indices", "active"):
                assert_same_bits(getattr(got, name), getattr(wanted, name), f"{name} of the {what}")
        elif isinstance(wanted, np.ndarray):
            if (
                isinstance(expected, MaskUpdate)
                and part.name == "weight"
                and got.shape == wanted.shape
            ):
                got, wanted = (
                    np.where(expected.mask, array, abs(array)) for array in (got, wanted)
                )
            assert_same_bits(got, wanted, what)
        elif got != wanted:
            raise LawViolation(f"{what} is {got}, expected {wanted}")


def assert_unwritten(arrays: Sequence[NDArray[Any] | None], call: Callable[[], Result]) -> Result:
    """Return the result of a call; raise `LawViolation` if it writes to one of the arrays."""
    before = [array if array is None else array.tobytes() for array in arrays]
    result = call()
    if before != [array if array is None else array.tobytes() for array in arrays]:
        raise LawViolation("an input was written")
    return result


def out_array(shape: tuple[int, ...], problem: MatmulProblem) -> NDArray[Any]:
    """Return an array of NaN with the dtype and memory layout of a problem's `out`."""
    return laid_out(np.full(shape, np.nan, problem.out_dtype), problem.out_layout)


def assert_neighbours_untouched(out: NDArray[Any], problem: MatmulProblem) -> None:
    """Raise `LawViolation` if memory between the elements of `out` was written."""
    if out.base is None:
        return
    between, untouched = out.base[:0], float(BETWEEN)
    if problem.out_layout == "every second":
        between = out.base[..., 1::2]
    elif problem.out_layout == "F within a larger array":
        between = out.base[-1:]
    elif problem.out_layout == "columns of a wider array":
        between, untouched = out.base[..., [0, -2, -1]], np.nan
    if not np.array_equal(between, np.full_like(between, untouched), equal_nan=True):
        raise LawViolation("memory between the elements of out was written")
