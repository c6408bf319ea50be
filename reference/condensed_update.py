"""The SRigL mask update of a layer that has no dense weight and no dense gradient (SPEC 2, 4).

The gradient is read in blocks of rows, twice. The first pass selects the largest gradients, which
decide how many neurons survive and with which fan-in. The second pass grows each surviving row. The
result is that of `update_mask` on the dense arrays, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.connections import Connections
from srigl_core._format.weight import CondensedWeight
from srigl_core._update import (
    CondensedUpdate,
    GradientRows,
    UpdateSettings,
    checked_condensed_update,
)
from srigl_core.reference.mask_update import (
    ablation_threshold,
    grow,
    keep_and_prune,
    new_fan_in,
    prune,
)
from srigl_core.reference.ranking import largest

__all__ = ["srigl_condensed_update", "update_condensed"]

Blocks = Iterator[tuple[int, NDArray[Any]]]


def update_condensed(
    weight: CondensedWeight,
    gradient_rows: GradientRows,
    settings: UpdateSettings,
    *,
    block_rows: int | None = None,
) -> CondensedUpdate:
    """Return the SRigL update of one condensed layer.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
        After the optimiser's step.
    gradient_rows : callable of two ints
        Returns rows ``start`` to ``stop`` of the dense gradient G, ablated neurons included: an
        array of a value type, (stop - start, n_in). It is called twice for every row, with the
        same blocks in the same order, and must return the same numbers both times.
    settings : UpdateSettings
    block_rows : int or None
        Rows in a block; None is the whole layer. Never changes the result.

    Returns
    -------
    CondensedUpdate

    Raises
    ------
    SriglError
        If a block has another shape, a number is not finite, or the budget leaves the active
        neurons no weight. Nothing is changed.
    ValueTypeError
        If `weight` is not a condensed weight, or a block is not an array of a value type.

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
    >>> settings = UpdateSettings(nnz_budget=4, drop_fraction=0.25)
    >>> update = update_condensed(weight, lambda start, stop: grad[start:stop], settings)
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
    return checked_condensed_update(
        srigl_condensed_update,
        weight,
        gradient_rows,
        settings,
        block_rows=getattr(weight, "shape", (1,))[0] if block_rows is None else block_rows,
    )


def srigl_condensed_update(
    weight: CondensedWeight,
    gradient_rows: GradientRows,
    settings: UpdateSettings,
    *,
    block_rows: int,
) -> CondensedUpdate:
    """Update one condensed layer; the arguments are checked.

    The steps are those of `srigl_core.reference.mask_update.srigl_update`.
    """

    def blocks() -> Blocks:
        for start in range(0, weight.shape[0], block_rows):
            yield start, np.asarray(gradient_rows(start, min(weight.shape[0], start + block_rows)))

    n_in = weight.shape[1]
    values, all_active = weight.values, np.ones(weight.values.shape, np.bool_)
    n_keep, n_prune = keep_and_prune(
        values.size, int(np.count_nonzero(values)), settings.drop_fraction
    )
    by_magnitude = largest(values, all_active, n_keep)
    by_gradient = _largest_salient(blocks(), weight, n_prune, settings.saliency_scope)
    salient_counts = _salient_counts(weight, by_magnitude, by_gradient, settings.saliency_scope)
    threshold = ablation_threshold(salient_counts, settings, n_in)
    survives = salient_counts >= threshold
    fan_in = new_fan_in(salient_counts, threshold, settings, n_in)
    kept = prune(values, all_active, survives[weight.active], n_keep, fan_in)
    new_weight, source = _grown(blocks(), weight, kept, survives, fan_in, settings.grown_init)
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
    blocks: Blocks, weight: CondensedWeight, n_prune: int, scope: str
) -> NDArray[np.int64]:
    """Return the flat positions of largest gradient, R, in order (SPEC 4.3): the first pass."""
    chosen = _Selection(n_prune)
    for start, scores in blocks:
        candidates = np.ones(scores.shape, np.bool_)
        if scope == "inactive":
            rows, columns, _ = _connections(weight, start, len(scores))
            candidates[rows, columns] = False
        chosen.add(scores, candidates, start * scores.shape[1])
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
    blocks: Blocks,
    weight: CondensedWeight,
    kept: NDArray[np.bool_],
    survives: NDArray[np.bool_],
    fan_in: int,
    grown_init: float,
) -> tuple[CondensedWeight, NDArray[np.int64]]:
    """Return the new weight, and where its values came from (SPEC 4.7, 4.8): the second pass."""
    active = np.flatnonzero(survives)
    indices = np.empty((active.size, fan_in), weight.indices.dtype)
    source = np.empty(indices.shape, np.int64)
    done = 0
    for start, scores in blocks:
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
    connections = Connections(indices, active, weight.shape)
    return CondensedWeight.from_connections(values, connections), source


def _connections(
    weight: CondensedWeight, start: int, n_rows: int
) -> tuple[NDArray[np.int64], NDArray[Any], slice]:
    """Return the connections of a block of rows.

    Returns
    -------
    tuple
        The row of each neuron within the block, (neurons, 1); its columns, (neurons, k); and the
        slice of ``values.ravel()`` with their values.
    """
    begin, end = np.searchsorted(weight.active, [start, start + n_rows])
    rows = weight.active[begin:end, None] - start
    entries = slice(begin * weight.fan_in, end * weight.fan_in)
    return rows, weight.indices[begin:end], entries


class _Selection:
    """A selection of the largest magnitudes, from numbers that are added in blocks, in order.

    Attributes
    ----------
    positions : ndarray of int64
        The positions that are chosen so far, ascending.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.positions = np.empty(0, np.int64)
        self._magnitudes: NDArray[Any] = np.empty(0, np.float32)

    def add(self, scores: NDArray[Any], candidates: NDArray[np.bool_], first: int) -> None:
        """Add a block whose first number has the position `first`."""
        magnitudes = np.abs(scores)
        if self.positions.size == self._count:
            # A later number that equals the smallest chosen one loses the tie.
            candidates &= magnitudes > self._magnitudes.min(initial=np.inf)
        local = np.flatnonzero(largest(magnitudes, candidates, self._count))
        positions = np.concatenate([self.positions, local + first])
        magnitudes = np.concatenate([self._magnitudes, magnitudes.reshape(-1)[local]])
        chosen = largest(magnitudes, np.ones(positions.size, np.bool_), self._count)
        self.positions, self._magnitudes = positions[chosen], magnitudes[chosen]
