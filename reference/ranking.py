"""The one total order of all selections: score descending, then flat index ascending (SPEC 4.9)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.value_types import as_float_view

__all__ = ["largest"]


def largest(scores: NDArray[Any], candidates: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Mark the `count` candidates of largest absolute score, or all if there are fewer.

    Parameters
    ----------
    scores : ndarray
        Any shape; finite at candidates.
    candidates : ndarray of bool, same shape
    count : int

    Returns
    -------
    ndarray of bool, same shape

    Notes
    -----
    Ties go to the lowest flat index, and -0.0 equals 0.0: a stable sort of the negated magnitudes
    does both. Cost O(n log n) for n candidates.
    """
    chosen = np.zeros(scores.shape, np.bool_)
    positions = np.flatnonzero(candidates)
    magnitudes = np.abs(as_float_view(scores.ravel()[positions]))
    chosen.ravel()[positions[np.argsort(-magnitudes, kind="stable")[:count]]] = True
    return chosen
