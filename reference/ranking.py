"""The one total order of all selections: score descending, then flat index ascending (SPEC 4.9)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import as_float_view

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
    Ties go to the lowest flat index, and -0.0 equals 0.0. Cost O(n) for n candidates.
    """
    chosen = np.zeros(scores.shape, np.bool_)
    if count == 0:
        return chosen
    positions = np.flatnonzero(candidates)
    if count < positions.size:
        magnitudes = np.abs(as_float_view(scores.ravel()[positions]))
        last = np.partition(magnitudes, -count)[-count]
        above, equal = positions[magnitudes > last], positions[magnitudes == last]
        positions = np.concatenate([above, equal[: count - above.size]])
    chosen.ravel()[positions] = True
    return chosen
