"""Compare results, and say where they first differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.testing.bounds import Outcome, first_violation
from srigl_core.testing.law import LawViolation

__all__ = ["assert_near", "assert_same_bits", "assert_within"]


def assert_within(got: NDArray[Any], outcome: Outcome, what: str) -> None:
    """Raise `LawViolation` if `got` is not within the error bound of SPEC 2."""
    if got.shape != outcome.z.shape:
        raise LawViolation(f"{what} has shape {got.shape}, expected {outcome.z.shape}")
    violation = first_violation(got, outcome)
    if violation is not None:
        raise LawViolation(f"{what} {violation[1]}")


def assert_near(got: NDArray[Any], other: NDArray[Any], bound: NDArray[Any], what: str) -> None:
    """Raise `LawViolation` if two results differ by more than `bound`, where all is finite."""
    if got.shape != other.shape:
        raise LawViolation(f"{what} has shape {got.shape}, the other {other.shape}")
    with np.errstate(all="ignore"):
        mine, theirs = got.astype(np.float64), other.astype(np.float64)
        decided = np.isfinite(mine) & np.isfinite(theirs) & np.isfinite(bound)
        far = decided & (np.abs(mine - theirs) > bound)
    if far.any():
        where = tuple(int(i) for i in np.argwhere(far)[0])
        raise LawViolation(
            f"{what} differs at {where}: expected {float(theirs[where])!r}, got "
            f"{float(mine[where])!r}, where {bound[where]:.3g} is allowed"
        )


def assert_same_bits(got: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Raise `LawViolation` if dtype, shape or any bit differs."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise LawViolation(
            f"{what}: {got.dtype} {got.shape} instead of {expected.dtype} {expected.shape}"
        )
    if got.tobytes() != expected.tobytes():
        differs = np.argwhere(_bits(got) != _bits(expected))
        where = tuple(int(i) for i in differs[0])
        raise LawViolation(f"{what}: at {where} expected {expected[where]!r}, got {got[where]!r}")


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind in "bi":
        return array
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
