"""The SRigL mask update of a layer that has no dense weight and no dense gradient (SPEC 2, 4).

The gradient comes in blocks of rows, twice. The first pass selects the largest gradients, which say
how many neurons survive and with which fan-in; the second one grows each surviving row. The result
is that of `update_mask` on the dense arrays, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import as_float_array, check_integer
from srigl_core._arrays.dtypes import as_float_view
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._format.weight import CondensedWeight
from srigl_core._plan import check_condensed
from srigl_core._update import CondensedUpdate, UpdateSettings
from srigl_core.errors import SriglError
from srigl_core.reference.mask_update import (
    ablation_threshold,
    grow,
    keep_and_prune,
    new_fan_in,
    prune,
)
from srigl_core.reference.ranking import largest

__all__ = ["update_condensed"]

GradientRows = Callable[[int, int], ArrayLike]

BLOCK_NUMBERS = 1 << 18
"""Numbers of the gradient in a block, if no other number of rows is asked for."""


def update_condensed(
    weight: CondensedWeight,
    gradient_rows: GradientRows,
    *,
    nnz_budget: int,
    drop_fraction: float,
    gamma_sal: float | None = 0.3,
    min_salient: int | None = None,
    saliency_scope: str = "inactive",
    grown_init: float = 0.0,
    block_rows: int | None = None,
) -> CondensedUpdate:
    """Return the SRigL update of one condensed layer.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
        After the optimiser's step.
    gradient_rows : callable of two ints
        Returns rows ``start`` to ``stop`` of the dense gradient G, ablated neurons' included, an
        array of a value type, (stop - start, n_in). Called twice for every row, with the same
        blocks in the same order; must return the same numbers both times.
    nnz_budget, drop_fraction, gamma_sal, min_salient, saliency_scope, grown_init
        As in `UpdateSettings`.
    block_rows : int or None
        Rows to ask for at once; None is about 2^18 numbers. Never changes the result.

    Returns
    -------
    CondensedUpdate

    Raises
    ------
    SriglError
        If a setting is out of range, a block has another shape, a number is not finite, or the
        budget leaves the active neurons no weight. Nothing is changed.
    ValueTypeError
        If `weight` is no condensed weight, or a block no array of a value type.

    Notes
    -----
    SPEC 2 (Backward) and 4; the paper, sec. 3. Extra memory is O(block + nnz): at most about 40
    bytes for each number of a block, and 40 for each active weight, whatever the layer's size.

    Examples
    --------
    The example of `update_mask`, its gradient one row at a time:

    >>> import numpy as np
    >>> weight = CondensedWeight(
    ...     np.array([[0.1, -0.9], [0.5, 0.4]]), [[1, 2], [0, 2]], active=[0, 1], shape=(2, 3)
    ... )
    >>> grad = np.array([[-3.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
    >>> update = update_condensed(
    ...     weight, lambda start, stop: grad[start:stop], nnz_budget=4, drop_fraction=0.25
    ... )
    >>> update.weight.to_dense()
    array([[ 0. ,  0. , -0.9],
           [ 0.5,  0. ,  0.4]])
    >>> update.weight.indices
    array([[0, 2],
           [0, 2]], dtype=uint16)
    >>> update.source
    array([[-1,  1],
           [ 2,  3]])
    """
    check_condensed(weight)
    settings = UpdateSettings(
        nnz_budget, drop_fraction, gamma_sal, min_salient, saliency_scope, grown_init
    )
    settings.check_fits(weight.shape, weight.dtype)
    if block_rows is None:
        block_rows = max(1, BLOCK_NUMBERS // weight.shape[1])
    rows = check_integer(block_rows, "block_rows", least=1)
    n_wrong = np.count_nonzero(~np.isfinite(as_float_view(weight.values)))
    if n_wrong:
        raise SriglError(
            f"weight is not finite in {n_wrong} of {weight.nnz} places (NaN or inf); skip this "
            f"update, or find where the loss diverged. Nothing was changed"
        )
    with honour_subnormals():
        return _update(weight, _Gradient(gradient_rows, weight.shape, rows), settings)


def _update(
    weight: CondensedWeight, gradient: _Gradient, settings: UpdateSettings
) -> CondensedUpdate:
    n_in = weight.shape[1]
    values, all_active = weight.values, np.ones(weight.values.shape, np.bool_)
    n_keep, n_prune = keep_and_prune(
        values.size, int(np.count_nonzero(values)), settings.drop_fraction
    )
    by_magnitude = largest(values, all_active, n_keep)
    by_gradient = _largest_salient(gradient, weight, n_prune, settings.saliency_scope)
    salient_counts = _salient_counts(weight, by_magnitude, by_gradient, settings.saliency_scope)
    threshold = ablation_threshold(salient_counts, settings, n_in)
    survives = salient_counts >= threshold
    fan_in = new_fan_in(salient_counts, threshold, settings, n_in)
    kept = prune(values, all_active, survives[weight.active], n_keep, fan_in)
    new_weight, source = _grown(gradient, weight, kept, survives, fan_in, settings.grown_init)
    n_stay = int(np.count_nonzero(source >= 0))
    return CondensedUpdate(
        weight=new_weight,
        source=source,
        ablated=np.flatnonzero(~survives),
        revived=np.setdiff1d(new_weight.active, weight.active, assume_unique=True),
        fan_in=fan_in,
        n_pruned=weight.nnz - n_stay,
        n_grown=new_weight.nnz - n_stay,
        threshold=threshold,
        salient_counts=salient_counts,
    )


def _largest_salient(
    gradient: _Gradient, weight: CondensedWeight, n_prune: int, scope: str
) -> NDArray[np.int64]:
    """Return the flat positions of largest gradient, R, in order (SPEC 4.3): the first pass."""
    chosen = _Selection(n_prune)
    n_wrong = 0
    for start, scores in gradient.blocks():
        candidates = np.ones(scores.shape, np.bool_)
        if scope == "inactive":
            rows, columns, _ = _connections(weight, start, len(scores))
            candidates[rows, columns] = False
        n_wrong += int(np.count_nonzero(~np.isfinite(scores)))
        if not n_wrong:
            chosen.add(scores, candidates, start * scores.shape[1])
    if n_wrong:
        raise SriglError(
            f"grad is not finite in {n_wrong} of {gradient.size} places (NaN or inf); skip this "
            f"update, or find where the loss diverged. Nothing was changed"
        )
    return chosen.positions


def _salient_counts(
    weight: CondensedWeight,
    by_magnitude: NDArray[np.bool_],
    by_gradient: NDArray[np.int64],
    scope: str,
) -> NDArray[np.int64]:
    """Return how many positions of each row are in K or R (SPEC 4.3)."""
    n_out, n_in = weight.shape
    if scope == "all":  # only then may a position be in both
        positions = (weight.active[:, None] * n_in + weight.indices)[by_magnitude]
        by_gradient = np.setdiff1d(by_gradient, positions, assume_unique=True)
    counts = np.bincount(by_gradient // n_in, minlength=n_out)
    counts[weight.active] += np.count_nonzero(by_magnitude, axis=1)
    return counts


def _grown(
    gradient: _Gradient,
    weight: CondensedWeight,
    kept: NDArray[np.bool_],
    survives: NDArray[np.bool_],
    fan_in: int,
    grown_init: float,
) -> tuple[CondensedWeight, NDArray[np.int64]]:
    """Return the new weight, and where its values were (SPEC 4.7, 4.8): the second pass."""
    active = np.flatnonzero(survives)
    indices = np.empty((active.size, fan_in), weight.indices.dtype)
    source = np.empty(indices.shape, np.int64)
    done = 0
    for start, scores in gradient.blocks():
        rows, columns, entries = _connections(weight, start, len(scores))
        was_at = np.full(scores.shape, -1, np.int64)
        was_at[rows, columns] = np.arange(entries.start, entries.stop).reshape(columns.shape)
        block = np.zeros(scores.shape, np.bool_)
        block[rows, columns] = kept.reshape(-1)[entries].reshape(columns.shape)
        block = grow(scores, block, survives[start : start + len(scores)], fan_in)
        new_rows, new_columns = np.nonzero(block)
        part = slice(done, done + new_columns.size // fan_in)
        indices[part] = new_columns.reshape(-1, fan_in)
        source[part] = was_at[new_rows, new_columns].reshape(-1, fan_in)
        done = part.stop
    values = weight.values.reshape(-1)[source]
    values[source < 0] = grown_init
    return CondensedWeight(values, indices, active, weight.shape), source


def _connections(
    weight: CondensedWeight, start: int, n_rows: int
) -> tuple[NDArray[np.int64], NDArray[Any], slice]:
    """Return the connections of a block of rows.

    Returns
    -------
    tuple
        The row of each neuron within the block, (neurons, 1); its columns, (neurons, k); and which
        of all values these are.
    """
    begin, end = np.searchsorted(weight.active, [start, start + n_rows])
    rows = weight.active[begin:end, None] - start
    entries = slice(begin * weight.fan_in, end * weight.fan_in)
    return rows, weight.indices[begin:end], entries


class _Gradient:
    """The dense gradient, of which there is one block of rows at a time."""

    def __init__(self, rows: GradientRows, shape: tuple[int, int], block_rows: int) -> None:
        self._rows, self._shape, self._block_rows = rows, shape, block_rows
        self.size = shape[0] * shape[1]

    def blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the first row and the numbers of each block."""
        n_out, n_in = self._shape
        for start in range(0, n_out, self._block_rows):
            stop = min(n_out, start + self._block_rows)
            what = f"gradient_rows({start}, {stop})"
            rows = as_float_array(self._rows(start, stop), what)
            if rows.shape != (stop - start, n_in):
                raise SriglError(
                    f"{what} has shape {rows.shape}, but must have {(stop - start, n_in)}"
                )
            yield start, as_float_view(rows)


class _Selection:
    """The positions of largest magnitude, of numbers that come in order of their positions.

    Attributes
    ----------
    positions : ndarray of int64
        Those chosen so far, ascending.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.positions = np.empty(0, np.int64)
        self._magnitudes: NDArray[Any] = np.empty(0, np.float32)

    def add(self, scores: NDArray[Any], candidates: NDArray[np.bool_], first: int) -> None:
        """Take in a block, whose first number has the position `first`."""
        magnitudes = np.abs(scores)
        if self.positions.size == self._count:
            # One that comes later and equals the least chosen loses the tie.
            candidates &= magnitudes > self._magnitudes.min(initial=np.inf)
        found = np.flatnonzero(largest(magnitudes, candidates, self._count))
        positions = np.concatenate([self.positions, found + first])
        magnitudes = np.concatenate([self._magnitudes, magnitudes.reshape(-1)[found]])
        chosen = largest(magnitudes, np.ones(positions.size, np.bool_), self._count)
        self.positions, self._magnitudes = positions[chosen], magnitudes[chosen]
