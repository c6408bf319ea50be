"""Say where somebody else's mask update departs from the definition, and recognise known slips.

Only the new mask is seen. The definition is run with one slip at a time until one gives that mask;
failing that, the first stage whose result can be read off the mask is named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core.array_checks import as_mask
from srigl_core.errors import SriglError
from srigl_core.float_mode import honour_subnormals
from srigl_core.mask_update import UpdateSettings, check_update_arrays
from srigl_core.reference.mask_update import (
    ablation_threshold,
    grow,
    largest_salient,
    prune,
    prune_counts,
    srigl_update,
)
from srigl_core.reference.ranking import largest

__all__ = ["STAGES", "UpdateExplanation", "explain_update"]

Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]

STAGES = (
    "counts",
    "K",
    "R",
    "salient counts",
    "threshold",
    "ablated rows",
    "fan-in",
    "kept",
    "grown",
)
"""The stages of an update, in order; K and R are the salient sets of SPEC 4.3."""


@dataclass(frozen=True, eq=False)
class UpdateExplanation:
    """How a mask compares with the definition's; true where they are the same, printable.

    Parameters
    ----------
    matches : bool
    stage : str or None
        The first of `STAGES` that differs.
    slip : str or None
        The known slip that gives exactly this mask.
    rows : ndarray of int64
        Rows in which the stage differs, ascending.
    positions : ndarray of int64, (n, 2)
        Row and column of each place in which the stage differs; empty for a stage that has none.
    expected, got : object
        The stage's result by the definition, and what the mask implies.
    """

    matches: bool
    stage: str | None = None
    slip: str | None = None
    rows: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    positions: Rows = field(default_factory=lambda: np.empty((0, 2), np.int64))
    expected: object = None
    got: object = None

    def __bool__(self) -> bool:
        return self.matches

    def __str__(self) -> str:
        if self.matches:
            return "the mask is the definition's"
        cause = f", {self.slip}" if self.slip else ""
        text = f"first difference at stage {self.stage!r}{cause}"
        if self.rows.size:
            text += f"\n  rows      {_listed(self.rows.tolist())}"
        if self.positions.size:
            text += f"\n  positions {_listed([tuple(p) for p in self.positions.tolist()])}"
        return text + f"\n  expected  {self.expected}\n  got       {self.got}"


def explain_update(
    weight: ArrayLike,
    grad: ArrayLike,
    mask: Mask,
    new_mask: Mask,
    *,
    nnz_budget: int,
    drop_fraction: float,
    gamma_sal: float | None = 0.3,
    min_salient: int | None = None,
    saliency_scope: str = "inactive",
    grown_init: float = 0.0,
) -> UpdateExplanation:
    """Compare `new_mask`, computed elsewhere, with the definition's.

    Parameters
    ----------
    weight, grad, mask
        The update's input, as in `update_mask`.
    new_mask : ndarray of bool, shape of `weight`
        The mask to be explained.
    nnz_budget, drop_fraction, gamma_sal, min_salient, saliency_scope, grown_init
        As in `update_mask`.

    Returns
    -------
    UpdateExplanation

    Raises
    ------
    SriglError
        As in `update_mask`.

    Examples
    --------
    >>> import numpy as np
    >>> weight = np.array([[0.0, 0.1, -0.9], [0.5, 0.0, 0.4]])
    >>> grad = np.array([[-3.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
    >>> mask = weight != 0
    >>> print(explain_update(weight, grad, mask, mask, nnz_budget=4, drop_fraction=0.25))
    first difference at stage 'grown', as if gradients were ranked with their sign
      rows      [0]
      positions [(0, 0), (0, 1)]
      expected  [(0, 0)] of 4 places, not in the other
      got       [(0, 1)] of 4 places, not in the first
    """
    settings = UpdateSettings(
        nnz_budget, drop_fraction, gamma_sal, min_salient, saliency_scope, grown_init
    )
    w, g, m = check_update_arrays(weight, grad, mask)
    settings.check_fits(w.shape)
    got = as_mask(new_mask, mask.shape, "new_mask").reshape(w.shape)
    with honour_subnormals():
        return _explained(_Problem(w, g, m, settings), got)


def _explained(problem: _Problem, got: Mask) -> UpdateExplanation:
    update = srigl_update(problem.weight, problem.grad, problem.mask, problem.settings)
    if np.array_equal(update.mask, got):
        return UpdateExplanation(True)
    expected = _Steps(problem).run()
    for name, steps in _SLIPS.items():
        try:
            slipped = steps(problem).run()
        except (SriglError, ZeroDivisionError):
            continue
        if np.array_equal(slipped.grown, got):
            return _first_difference(expected, slipped, name)
    return _read_off(problem, expected, got)


@dataclass(frozen=True, eq=False)
class _Problem:
    weight: NDArray[Any]
    grad: NDArray[Any]
    mask: Mask
    settings: UpdateSettings


@dataclass(frozen=True, eq=False)
class _Trace:
    """The result of every stage, in the order of `STAGES`."""

    counts: tuple[int, int]
    by_magnitude: Mask
    by_gradient: Mask
    salient_counts: Rows
    threshold: int
    ablated: Mask
    fan_in: int
    kept: Mask
    grown: Mask


class _Steps:
    """The definition's steps; a slip overrides one of them."""

    def __init__(self, problem: _Problem) -> None:
        self.weight, self.grad, self.mask = problem.weight, problem.grad, problem.mask
        self.settings = problem.settings
        self.n_out, self.n_in = problem.mask.shape

    def run(self) -> _Trace:
        n_keep, n_prune = self.counts()
        by_magnitude = largest(self.weight, self.mask, n_keep)
        by_gradient = self.by_gradient(n_keep, n_prune)
        salient = self.salient_counts(by_magnitude, by_gradient)
        threshold = self.threshold(salient)
        survives = self.survives(salient, threshold)
        fan_in = self.fan_in(salient, threshold, survives)
        kept = self.kept(survives, n_keep, fan_in)
        return _Trace(
            (n_keep, n_prune),
            by_magnitude,
            by_gradient,
            salient,
            threshold,
            ~survives,
            fan_in,
            kept,
            self.grown(kept, survives, fan_in),
        )

    def counts(self) -> tuple[int, int]:
        return prune_counts(self.weight, self.mask, self.settings.drop_fraction)

    def by_gradient(self, n_keep: int, n_prune: int) -> Mask:
        return largest_salient(self.grad, self.mask, n_prune, self.settings.saliency_scope)

    def salient_counts(self, by_magnitude: Mask, by_gradient: Mask) -> Rows:
        counts: Rows = np.count_nonzero(by_magnitude | by_gradient, axis=1)
        return counts

    def threshold(self, salient: Rows) -> int:
        return ablation_threshold(salient, self.settings, self.n_in)

    def survives(self, salient: Rows, threshold: int) -> Mask:
        return salient >= threshold

    def fan_in(self, salient: Rows, threshold: int, survives: Mask) -> int:
        return self.settings.nnz_budget // int(np.count_nonzero(survives))

    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        return prune(self.weight, self.mask, survives, n_keep, fan_in)

    def grown(self, kept: Mask, survives: Mask, fan_in: int) -> Mask:
        return grow(self.grad, kept, survives, fan_in)

    def salient_share(self) -> float | None:
        """gamma_sal times the fan-in with no neuron ablated, before it becomes a count."""
        gamma_sal = self.settings.gamma_sal
        return None if gamma_sal is None else gamma_sal * (self.settings.nnz_budget // self.n_out)

    def clamped(self, threshold: int, salient: Rows) -> int:
        """Return `threshold`, lowered as SPEC 4.4 does."""
        settings = replace(self.settings, gamma_sal=None, min_salient=threshold)
        return ablation_threshold(salient, settings, self.n_in)


class _RoundedCounts(_Steps):
    def counts(self) -> tuple[int, int]:
        n_weights = int(np.count_nonzero(self.mask))
        n_prune = round(n_weights * self.settings.drop_fraction)
        n_keep = min(n_weights - n_prune, int(np.count_nonzero(self.mask & (self.weight != 0))))
        return n_keep, n_weights - n_keep


class _OtherScope(_Steps):
    def by_gradient(self, n_keep: int, n_prune: int) -> Mask:
        other = "all" if self.settings.saliency_scope == "inactive" else "inactive"
        return largest_salient(self.grad, self.mask, n_prune, other)


class _KeepCountForGradients(_Steps):
    def by_gradient(self, n_keep: int, n_prune: int) -> Mask:
        return largest_salient(self.grad, self.mask, n_keep, "all")


class _MagnitudeOnly(_Steps):
    def salient_counts(self, by_magnitude: Mask, by_gradient: Mask) -> Rows:
        counts: Rows = np.count_nonzero(by_magnitude, axis=1)
        return counts


class _NoClamp(_Steps):
    def threshold(self, salient: Rows) -> int:
        share = self.salient_share()
        return max(1, int(share)) if share is not None else self.settings.min_salient or 0


class _ThresholdRoundedUp(_Steps):
    def threshold(self, salient: Rows) -> int:
        share = self.salient_share()
        if share is None:
            return super().threshold(salient)
        return self.clamped(math.ceil(share), salient)


class _GammaOneIsACount(_Steps):
    def threshold(self, salient: Rows) -> int:
        if self.settings.gamma_sal != 1:
            return super().threshold(salient)
        return self.clamped(1, salient)


class _NothingAblated(_Steps):
    def survives(self, salient: Rows, threshold: int) -> Mask:
        return np.ones(self.n_out, np.bool_)


class _ThresholdItselfAblated(_Steps):
    def survives(self, salient: Rows, threshold: int) -> Mask:
        return salient > threshold


class _AblatedForGood(_Steps):
    def survives(self, salient: Rows, threshold: int) -> Mask:
        return (salient >= threshold) & self.mask.any(axis=1)


class _NotRedistributed(_Steps):
    def fan_in(self, salient: Rows, threshold: int, survives: Mask) -> int:
        return self.settings.nnz_budget // len(self.mask)


class _TruncatedBudget(_Steps):
    def fan_in(self, salient: Rows, threshold: int, survives: Mask) -> int:
        return (self.settings.nnz_budget - 1) // int(np.count_nonzero(survives))


class _FirstOfRowKept(_Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        kept = prune(self.weight, self.mask, survives, n_keep, self.n_in)
        return kept & (np.cumsum(kept, axis=1) <= fan_in)


class _LastOfRowKept(_Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        kept = prune(self.weight, self.mask, survives, n_keep, self.n_in)
        return kept & (np.cumsum(kept[:, ::-1], axis=1)[:, ::-1] <= fan_in)


class _KeptBeforeAblation(_Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        everywhere = prune(self.weight, self.mask, np.ones(self.n_out, np.bool_), n_keep, self.n_in)
        kept = everywhere & survives[:, None]
        for row in np.flatnonzero(np.count_nonzero(kept, axis=1) > fan_in):
            kept[row] = largest(self.weight[row], kept[row], fan_in)
        return kept


class _InactiveZerosKept(_Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        rows = np.broadcast_to(survives[:, None], self.mask.shape)
        kept = largest(np.where(self.mask, self.weight, 0), rows, n_keep)
        for row in np.flatnonzero(np.count_nonzero(kept, axis=1) > fan_in):
            kept[row] = largest(self.weight[row], kept[row], fan_in)
        return kept


class _SignedWeights(_Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        return prune(_signed_ranks(self.weight), self.mask, survives, n_keep, fan_in)


class _SignedGradients(_Steps):
    def grown(self, kept: Mask, survives: Mask, fan_in: int) -> Mask:
        return grow(_signed_ranks(self.grad), kept, survives, fan_in)


class _PrunedNotRegrown(_Steps):
    def grown(self, kept: Mask, survives: Mask, fan_in: int) -> Mask:
        new_mask = kept.copy()
        for row in np.flatnonzero(survives):
            missing = fan_in - int(np.count_nonzero(kept[row]))
            new_mask[row] |= largest(self.grad[row], ~kept[row] & ~self.mask[row], missing)
        return new_mask


class _GrownByMagnitude(_Steps):
    def grown(self, kept: Mask, survives: Mask, fan_in: int) -> Mask:
        return grow(self.weight, kept, survives, fan_in)


class _TiesToHighestIndex(_Steps):
    def run(self) -> _Trace:
        turned = _Problem(
            self.weight[::-1, ::-1], self.grad[::-1, ::-1], self.mask[::-1, ::-1], self.settings
        )
        trace = _Steps(turned).run()
        back: dict[str, Any] = {
            stage.name: value[(slice(None, None, -1),) * value.ndim]
            for stage in fields(trace)
            if isinstance(value := getattr(trace, stage.name), np.ndarray)
        }
        return replace(trace, **back)


_SLIPS: dict[str, type[_Steps]] = {
    "as if n_prune were rounded to nearest": _RoundedCounts,
    "as the other saliency_scope gives (decision O3)": _OtherScope,
    "as sparsimony: n_keep gradients are salient instead of n_prune (decision S5)": (
        _KeepCountForGradients
    ),
    "as if only weights were salient": _MagnitudeOnly,
    "as sparsimony: the threshold is not clamped (decision S6)": _NoClamp,
    "as if the threshold were rounded up": _ThresholdRoundedUp,
    "as the released code: gamma_sal=1.0 is a count of one (decision O12)": _GammaOneIsACount,
    "as if no neuron were ablated": _NothingAblated,
    "as if rows with exactly the threshold were ablated": _ThresholdItselfAblated,
    "as sparsimony: ablated neurons never revive (decision S3)": _AblatedForGood,
    "as sparsimony: the budget of ablated rows is not redistributed (decision S3)": (
        _NotRedistributed
    ),
    "as the released code: the budget is truncated to one weight less (decision O13)": (
        _TruncatedBudget
    ),
    "as the released code: boolean sort, over-full rows keep their first (decision O1)": (
        _FirstOfRowKept
    ),
    "as the released code: boolean sort, over-full rows keep their last (decision O1)": (
        _LastOfRowKept
    ),
    "as if weights of ablated rows used up the weights to keep": _KeptBeforeAblation,
    "as the released code: inactive zeros count as kept (decision O2)": _InactiveZerosKept,
    "as if weights were ranked with their sign": _SignedWeights,
    "as if gradients were ranked with their sign": _SignedGradients,
    "as if a position just pruned could not be regrown (decision O4)": _PrunedNotRegrown,
    "as if rows were filled by magnitude, so that nothing is pruned": _GrownByMagnitude,
    "as if ties went to the highest index (decision O5)": _TiesToHighestIndex,
}


def _signed_ranks(scores: NDArray[Any]) -> NDArray[np.int64]:
    """Return positive numbers in the order of `scores`, equal where they are equal."""
    ranks = np.unique(scores.astype(np.float64), return_inverse=True)[1]
    return ranks.reshape(scores.shape) + 1


def _first_difference(expected: _Trace, slipped: _Trace, name: str) -> UpdateExplanation:
    for stage, part in zip(STAGES, fields(_Trace), strict=True):
        ours, theirs = getattr(expected, part.name), getattr(slipped, part.name)
        if not np.array_equal(ours, theirs):
            return _explanation(stage, ours, theirs, slip=name)
    raise AssertionError("a slip that gives another mask differs at some stage")


def _read_off(problem: _Problem, expected: _Trace, got: Mask) -> UpdateExplanation:
    """Name the first stage whose result can be seen in the mask and differs."""
    active: Mask = np.any(got, axis=1)
    if not np.array_equal(~active, expected.ablated):
        return _about_ablation(expected, ~active)
    row_counts = np.count_nonzero(got, axis=1)
    odd = np.flatnonzero(active & (row_counts != expected.fan_in))
    if odd.size:
        return UpdateExplanation(
            False,
            "fan-in",
            rows=odd,
            expected=expected.fan_in,
            got=f"{_listed(sorted(set(row_counts[odd].tolist())))} in {odd.size} rows",
        )
    stay = problem.mask & got
    if (expected.kept & ~stay).any():
        return _explanation(
            "kept",
            expected.kept,
            stay & ~(expected.grown & ~expected.kept),
            slip=_sorted_boolean(problem, expected, got),
        )
    return _explanation("grown", expected.grown & ~expected.kept, got & ~expected.kept)


def _about_ablation(expected: _Trace, ablated: Mask) -> UpdateExplanation:
    counts = expected.salient_counts
    rows = np.flatnonzero(ablated != expected.ablated)
    most_ablated = int(counts[ablated].max(initial=-1))
    if ablated.all() or most_ablated < counts[~ablated].min():
        most = "" if ablated.all() else f" and at most {counts[~ablated].min()}"
        return UpdateExplanation(
            False,
            "threshold",
            rows=rows,
            expected=expected.threshold,
            got=f"a threshold of at least {most_ablated + 1}{most}",
        )
    return UpdateExplanation(
        False,
        "salient counts",
        rows=rows,
        expected=f"counts {_listed(counts[rows].tolist())}, threshold {expected.threshold}",
        got="ablated rows that no threshold on these counts gives",
    )


def _sorted_boolean(problem: _Problem, expected: _Trace, got: Mask) -> str | None:
    """Recognise over-full rows that kept as many weights as they may, but not the largest."""
    n_keep, n_in = expected.counts[0], problem.mask.shape[1]
    eligible = prune(problem.weight, problem.mask, ~expected.ablated, n_keep, n_in)
    overfull = np.count_nonzero(eligible, axis=1) > expected.fan_in
    differs = (expected.grown != got).any(axis=1)
    if (differs <= overfull).all() and not (got & ~eligible)[differs].any():
        return "as the released code: boolean sort, over-full rows keep any k (decision O1)"
    return None


def _explanation(
    stage: str, ours: Any, theirs: Any, *, slip: str | None = None
) -> UpdateExplanation:
    if not isinstance(ours, np.ndarray):
        return UpdateExplanation(False, stage, slip, expected=ours, got=theirs)
    differs = ours != theirs
    rows = np.flatnonzero(differs.reshape(differs.shape[0], -1).any(axis=1))
    if differs.ndim == 2:
        return UpdateExplanation(
            False,
            stage,
            slip,
            rows,
            np.argwhere(differs),
            f"{_places(ours & differs)} of {np.count_nonzero(ours)} places, not in the other",
            f"{_places(theirs & differs)} of {np.count_nonzero(theirs)} places, not in the first",
        )
    kind = "rows " if ours.dtype == np.bool_ else "counts "
    if ours.dtype == np.bool_:
        values = [np.flatnonzero(ours).tolist(), np.flatnonzero(theirs).tolist()]
    else:
        values = [ours[rows].tolist(), theirs[rows].tolist()]
    return UpdateExplanation(
        False,
        stage,
        slip,
        rows,
        expected=kind + _listed(values[0]),
        got=kind + _listed(values[1]),
    )


def _places(mask: Mask) -> str:
    return _listed([tuple(place) for place in np.argwhere(mask).tolist()])


def _listed(items: list[Any], most: int = 8) -> str:
    more = f", ... ({len(items)} in all)" if len(items) > most else ""
    return f"[{', '.join(str(item) for item in items[:most])}{more}]"
