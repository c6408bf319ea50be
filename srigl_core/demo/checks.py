"""What the paper leads one to expect, held against the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from srigl_core.demo.experiment import Cell

__all__ = ["Check", "checks"]


@dataclass(frozen=True)
class Check:
    """An expectation and what became of it; accuracies in percentage points.

    Parameters
    ----------
    statement : str
    difference : float
        Mean accuracy of the first less that of the second.
    standard_error : float
        Of the difference.
    allowed : float
        The least difference that meets the expectation.
    """

    statement: str
    difference: float
    standard_error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the numbers meet the expectation."""
        return self.difference >= self.allowed


def checks(cells: Sequence[Cell]) -> list[Check]:
    """Return the expectations that these cells can decide."""
    found = {(cell.method, cell.sparsity): cell for cell in cells}
    asked = (
        (
            "SRigL at 90% is within 1 point and 1 standard error of dense",
            ("srigl", 0.9),
            ("dense", 0.0),
            1.0,
        ),
        (
            "SRigL at 99% is within 1 standard error of SRigL without ablation, or better",
            ("srigl", 0.99),
            ("srigl-no-ablation", 0.99),
            0.0,
        ),
    )
    return [
        _check(statement, found[first], found[second], points)
        for statement, first, second, points in asked
        if first in found and second in found
    ]


def _check(statement: str, first: Cell, second: Cell, points: float) -> Check:
    error = 100 * math.hypot(first.standard_error, second.standard_error)
    difference = 100 * (first.accuracy - second.accuracy)
    return Check(statement, difference, error, -(points + error))
