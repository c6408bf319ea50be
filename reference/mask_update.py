"""The SRigL mask update of one layer, as the paper defines it (SPEC 4; paper sec. 3).

Read `srigl_update` first: one call for each step, in the paper's order.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import as_mask
from srigl_core._update import MaskUpdate, UpdateSettings, checked_update
from srigl_core.errors import SriglError
from srigl_core.reference.ranking import largest

__all__ = [
    "ablation_threshold",
    "grow",
    "keep_and_prune",
    "largest_salient",
    "make_update",
    "new_fan_in",
    "prune",
    "prune_counts",
    "remap_state",
    "srigl_update",
    "update_mask",
]

Mask = NDArray[np.bool_]
State = TypeVar("State")


def update_mask(
    weight: ArrayLike, grad: ArrayLike, mask: Mask, settings: UpdateSettings
) -> MaskUpdate:
    """Return the SRigL update of one layer's mask.

    Parameters
    ----------
    weight : array, (n_out, n_in) or (out, in, kh, kw)
        The dense weight after the optimiser's step; float16, bfloat16, float32 or float64.
    grad : array, same shape
        The dense gradient G of that step, the mean over the window.
    mask : ndarray of bool, same shape
        Any mask; it need not be constant fan-in.
    settings : UpdateSettings

    Returns
    -------
    MaskUpdate
        New arrays, in the weight's shape.

    Raises
    ------
    SriglError
        If a setting is out of range, shapes differ, `grad` or an active weight is not finite, or
        the budget leaves the active neurons no weight. Nothing is changed.
    ValueTypeError
        If a dtype is not supported.

    Notes
    -----
    SPEC 4. Ties go to the lowest flat index ``r * n_in + c``, and -0.0 equals 0.0. Cost
    O(N log N) for N = n_out * n_in.

    Examples
    --------
    One weight of four is pruned (0.1, in row 0), and one position is grown where the gradient is
    largest (column 0 of row 0):

    >>> import numpy as np
    >>> weight = np.array([[0.0, 0.1, -0.9], [0.5, 0.0, 0.4]])
    >>> grad = np.array([[-3.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
    >>> mask = np.array([[False, True, True], [True, False, True]])
    >>> settings = UpdateSettings(nnz_budget=4, drop_fraction=0.25)
    >>> update = update_mask(weight, grad, mask, settings)
    >>> update.mask
    array([[ True, False,  True],
           [ True, False,  True]])
    >>> update.weight
    array([[ 0. ,  0. , -0.9],
           [ 0.5,  0. ,  0.4]])
    """
    return checked_update(srigl_update, weight, grad, mask, settings)


def srigl_update(
    weight: NDArray[Any], grad: NDArray[Any], mask: Mask, settings: UpdateSettings
) -> MaskUpdate:
    """Update one layer; the arguments are checked and two-dimensional."""
    n_keep, n_prune = prune_counts(weight, mask, settings.drop_fraction)
    by_magnitude = largest(weight, mask, n_keep)
    by_gradient = largest_salient(grad, mask, n_prune, settings.saliency_scope)
    salient_counts = np.count_nonzero(by_magnitude | by_gradient, axis=1)
    threshold = ablation_threshold(salient_counts, settings, mask.shape[1])
    survives = salient_counts >= threshold
    fan_in = new_fan_in(salient_counts, threshold, settings, mask.shape[1])
    kept = prune(weight, mask, survives, n_keep, fan_in)
    new_mask = grow(grad, kept, survives, fan_in)
    return make_update(
        weight,
        mask,
        new_mask,
        grown_init=settings.grown_init,
        fan_in=fan_in,
        threshold=threshold,
        salient_counts=salient_counts,
    )


def prune_counts(weight: NDArray[Any], mask: Mask, drop_fraction: float) -> tuple[int, int]:
    """Return how many active weights to keep and how many to prune (SPEC 4.2).

    Weights that are exactly zero are pruned first, whatever the drop fraction.
    """
    n_nonzero = int(np.count_nonzero(mask & (weight != 0)))
    return keep_and_prune(int(np.count_nonzero(mask)), n_nonzero, drop_fraction)


def keep_and_prune(n_weights: int, n_nonzero: int, drop_fraction: float) -> tuple[int, int]:
    """Return `prune_counts` for `n_weights` active weights, `n_nonzero` of them not zero."""
    n_prune = int(np.floor(n_weights * drop_fraction))
    n_keep = min(n_weights - n_prune, n_nonzero)
    return n_keep, n_weights - n_keep


def largest_salient(grad: NDArray[Any], mask: Mask, n_prune: int, scope: str) -> Mask:
    """Mark the `n_prune` positions of largest gradient, R, within the scope (SPEC 4.3)."""
    candidates = ~mask if scope == "inactive" else np.ones_like(mask)
    return largest(grad, candidates, n_prune)


def ablation_threshold(
    salient_counts: NDArray[np.int64], settings: UpdateSettings, n_in: int
) -> int:
    """Return the number of salient weights below which a row is ablated (SPEC 4.4).

    The threshold is lowered where it would leave so few rows that their fan-in would exceed `n_in`.
    Rows with exactly the threshold survive, so that a threshold of 0 ablates nothing.
    """
    n_out = salient_counts.size
    fewest_rows = settings.nnz_budget // n_in
    if fewest_rows >= n_out:
        return 0
    clamp = int(np.sort(salient_counts)[::-1][fewest_rows])
    return min(_wanted_threshold(settings, settings.nnz_budget // n_out), clamp)


def _wanted_threshold(settings: UpdateSettings, fan_in: int) -> int:
    """Return the threshold before the clamp, for the fan-in with no neuron ablated."""
    if settings.min_salient is not None:
        return settings.min_salient
    if settings.gamma_sal is not None:
        return max(1, int(np.floor(settings.gamma_sal * fan_in)))
    return 0


def new_fan_in(
    salient_counts: NDArray[np.int64], threshold: int, settings: UpdateSettings, n_in: int
) -> int:
    """Return the budget's share of each surviving row (SPEC 4.5)."""
    n_active = int(np.count_nonzero(salient_counts >= threshold))
    fan_in = settings.nnz_budget // n_active
    if fan_in == 0:
        raise SriglError(
            f"nnz_budget={settings.nnz_budget} leaves each of the {n_active} active neurons (of "
            f"{salient_counts.size}) less than one weight; the smallest budget that works here is "
            f"{_smallest_budget(salient_counts, settings, n_in)}"
        )
    return fan_in


def _smallest_budget(salient_counts: NDArray[np.int64], settings: UpdateSettings, n_in: int) -> int:
    """Return the smallest budget that gives every surviving row a weight; n_out always does."""
    n_out = salient_counts.size
    ascending = np.sort(salient_counts)
    budgets = np.arange(1, n_out + 1)
    clamps = ascending[::-1][np.minimum(budgets // n_in, n_out - 1)]
    wanted = min(_wanted_threshold(settings, 0), n_in)
    n_active = n_out - np.searchsorted(ascending, np.minimum(wanted, clamps))
    return int(budgets[budgets >= n_active][0])


def prune(weight: NDArray[Any], mask: Mask, survives: Mask, n_keep: int, fan_in: int) -> Mask:
    """Mark the largest weights of the surviving rows, at most `fan_in` a row (SPEC 4.6)."""
    candidates = mask & survives[:, None] & (weight != 0)
    kept = largest(weight, candidates, n_keep)
    for row in np.flatnonzero(np.count_nonzero(kept, axis=1) > fan_in):
        kept[row] = largest(weight[row], kept[row], fan_in)
    return kept


def grow(grad: NDArray[Any], kept: Mask, survives: Mask, fan_in: int) -> Mask:
    """Fill each surviving row up to `fan_in` where the gradient is largest (SPEC 4.7).

    A position that was just pruned may be grown again.
    """
    new_mask = kept.copy()
    for row in np.flatnonzero(survives):
        missing = fan_in - int(np.count_nonzero(kept[row]))
        new_mask[row] |= largest(grad[row], ~kept[row], missing)
    return new_mask


def make_update(
    weight: NDArray[Any],
    mask: Mask,
    new_mask: Mask,
    *,
    grown_init: float = 0.0,
    fan_in: int | None = None,
    threshold: int = 0,
    salient_counts: NDArray[np.int64] | None = None,
) -> MaskUpdate:
    """Return the new weight and the counts for a new mask (SPEC 4.8)."""
    grown = new_mask & ~mask
    new_weight = np.where(mask & new_mask, weight, weight.dtype.type(0))
    new_weight[grown] = grown_init
    active, was_active = new_mask.any(axis=1), mask.any(axis=1)
    return MaskUpdate(
        mask=new_mask,
        weight=new_weight,
        ablated=np.flatnonzero(~active),
        revived=np.flatnonzero(active & ~was_active),
        fan_in=fan_in,
        n_pruned=int(np.count_nonzero(mask & ~new_mask)),
        n_grown=int(np.count_nonzero(grown)),
        threshold=threshold,
        salient_counts=np.empty(0, np.int64) if salient_counts is None else salient_counts,
    )


def remap_state(state: State, mask: Mask, new_mask: Mask) -> State:
    """Return optimiser state with zeros where a weight is newly active or inactive (SPEC 4.8).

    Parameters
    ----------
    state : array, scalar, None, or dict, list or tuple of such
        Arrays of the mask's shape are remapped; everything else, such as a step count, is
        returned as it is.
    mask, new_mask : ndarray of bool
        Before and after the update, same shape.

    Returns
    -------
    same type as `state`
        New containers and new arrays; `state` is not changed. A subclass of dict becomes a dict.

    Raises
    ------
    SriglError
        If the masks differ in shape.
    ValueTypeError
        If one is not an array of bool.
    """
    mask = as_mask(mask, None)
    new_mask = as_mask(new_mask, mask.shape, "new_mask")
    remapped: State = _remapped(state, mask & new_mask)
    return remapped


def _remapped(state: Any, stays: Mask) -> Any:
    if isinstance(state, dict):
        return {name: _remapped(part, stays) for name, part in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(_remapped(part, stays) for part in state))
    if isinstance(state, list | tuple):
        return type(state)(_remapped(part, stays) for part in state)
    if isinstance(state, np.ndarray) and state.shape == stays.shape:
        return np.where(stays, state, np.zeros((), state.dtype))
    return state
