"""Arrays to write results to, in which a missing or a stray write shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.testing.law import LawViolation
from srigl_core.testing.problems import MatmulProblem, laid_out

__all__ = ["assert_neighbours_untouched", "out_array"]


def out_array(shape: tuple[int, ...], problem: MatmulProblem) -> NDArray[Any]:
    """Return an array of NaN in the type and the layout that a problem has for results."""
    return laid_out(np.full(shape, np.nan, problem.out_dtype), problem.out_layout)


def assert_neighbours_untouched(out: NDArray[Any], problem: MatmulProblem) -> None:
    """Raise `LawViolation` if memory between the elements was written."""
    if out.base is None:
        return
    between = out.base[:0]
    if problem.out_layout == "every second":
        between = out.base[..., 1::2]
    elif problem.out_layout == "F within a larger array":
        between = out.base[-1:]
    if (between != 77).any():
        raise LawViolation("memory between the elements of out was written")
