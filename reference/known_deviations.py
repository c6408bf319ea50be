"""Known deviations of other mask updates, each as the definition with one step replaced."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._update import UpdateSettings
from srigl_core.reference.mask_update import (
    ablation_threshold,
    grow,
    largest_salient,
    prune,
    prune_counts,
)
from srigl_core.reference.ranking import largest

__all__ = ["DEVIATIONS", "Problem", "Steps", "Trace"]

Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """The checked arguments of an update."""

    weight: NDArray[Any]
    grad: NDArray[Any]
    mask: Mask
    settings: UpdateSettings


@dataclass(frozen=True, eq=False)
class Trace:
    """The result of every stage, in the order of `srigl_core.reference.explain.STAGES`."""

    counts: tuple[int, int]
    by_magnitude: Mask
    by_gradient: Mask
    salient_counts: Rows
    threshold: int
    ablated: Mask
    fan_in: int
    kept: Mask
    grown: Mask


class Steps:
    """The definition's steps; a deviation overrides one of them."""

    def __init__(self, problem: Problem) -> None:
        self.weight, self.grad, self.mask = problem.weight, problem.grad, problem.mask
        self.settings = problem.settings
        self.n_out, self.n_in = problem.mask.shape

    def run(self) -> Trace:
        """Return the result of every stage."""
        n_keep, n_prune = self.counts()
        by_magnitude = largest(self.weight, self.mask, n_keep)
        by_gradient = self.by_gradient(n_keep, n_prune)
        salient = self.salient_counts(by_magnitude, by_gradient)
        threshold = self.threshold(salient)
        survives = self.survives(salient, threshold)
        fan_in = self.fan_in(salient, threshold, survives)
        kept = self.kept(survives, n_keep, fan_in)
        return Trace(
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
        """Return n_keep and n_prune (SPEC 4.2)."""
        return prune_counts(self.weight, self.mask, self.settings.drop_fraction)

    def by_gradient(self, n_keep: int, n_prune: int) -> Mask:
        """Return R (SPEC 4.3)."""
        return largest_salient(self.grad, self.mask, n_prune, self.settings.saliency_scope)

    def salient_counts(self, by_magnitude: Mask, by_gradient: Mask) -> Rows:
        """Return c (SPEC 4.3)."""
        counts: Rows = np.count_nonzero(by_magnitude | by_gradient, axis=1)
        return counts

    def threshold(self, salient: Rows) -> int:
        """Return t, clamped (SPEC 4.4)."""
        return ablation_threshold(salient, self.settings, self.n_in)

    def survives(self, salient: Rows, threshold: int) -> Mask:
        """Return which rows are not ablated (SPEC 4.4)."""
        return salient >= threshold

    def fan_in(self, salient: Rows, threshold: int, survives: Mask) -> int:
        """Return k (SPEC 4.5)."""
        return self.settings.nnz_budget // int(np.count_nonzero(survives))

    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        """Return the weights kept (SPEC 4.6)."""
        return prune(self.weight, self.mask, survives, n_keep, fan_in)

    def grown(self, kept: Mask, survives: Mask, fan_in: int) -> Mask:
        """Return the new mask (SPEC 4.7)."""
        return grow(self.grad, kept, survives, fan_in)

    def salient_share(self) -> float | None:
        """Return gamma_sal times the fan-in with no neuron ablated, before rounding."""
        gamma_sal = self.settings.gamma_sal
        return None if gamma_sal is None else gamma_sal * (self.settings.nnz_budget // self.n_out)

    def clamped(self, threshold: int, salient: Rows) -> int:
        """Return `threshold`, lowered as SPEC 4.4 does."""
        settings = replace(self.settings, gamma_sal=None, min_salient=threshold)
        return ablation_threshold(salient, settings, self.n_in)


class _RoundedCounts(Steps):
    def counts(self) -> tuple[int, int]:
        n_weights = int(np.count_nonzero(self.mask))
        n_prune = round(n_weights * self.settings.drop_fraction)
        n_keep = min(n_weights - n_prune, int(np.count_nonzero(self.mask & (self.weight != 0))))
        return n_keep, n_weights - n_keep


class _OtherScope(Steps):
    def by_gradient(self, n_keep: int, n_prune: int) -> Mask:
        other = "all" if self.settings.saliency_scope == "inactive" else "inactive"
        return largest_salient(self.grad, self.mask, n_prune, other)


class _KeepCountForGradients(Steps):
    def by_gradient(self, n_keep: int, n_prune: int) -> Mask:
        return largest_salient(self.grad, self.mask, n_keep, "all")


class _MagnitudeOnly(Steps):
    def salient_counts(self, by_magnitude: Mask, by_gradient: Mask) -> Rows:
        counts: Rows = np.count_nonzero(by_magnitude, axis=1)
        return counts


class _NoClamp(Steps):
    def threshold(self, salient: Rows) -> int:
        share = self.salient_share()
        return max(1, int(share)) if share is not None else self.settings.min_salient or 0


class _ThresholdRoundedUp(Steps):
    def threshold(self, salient: Rows) -> int:
        share = self.salient_share()
        if share is None:
            return super().threshold(salient)
        return self.clamped(math.ceil(share), salient)


class _GammaOneIsACount(Steps):
    def threshold(self, salient: Rows) -> int:
        if self.settings.gamma_sal != 1:
            return super().threshold(salient)
        return self.clamped(1, salient)


class _NothingAblated(Steps):
    def survives(self, salient: Rows, threshold: int) -> Mask:
        return np.ones(self.n_out, np.bool_)


class _ThresholdItselfAblated(Steps):
    def survives(self, salient: Rows, threshold: int) -> Mask:
        return salient > threshold


class _AblatedForGood(Steps):
    def survives(self, salient: Rows, threshold: int) -> Mask:
        return (salient >= threshold) & self.mask.any(axis=1)


class _NotRedistributed(Steps):
    def fan_in(self, salient: Rows, threshold: int, survives: Mask) -> int:
        return self.settings.nnz_budget // len(self.mask)


class _TruncatedBudget(Steps):
    def fan_in(self, salient: Rows, threshold: int, survives: Mask) -> int:
        return (self.settings.nnz_budget - 1) // int(np.count_nonzero(survives))


class _FirstOfRowKept(Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        kept = prune(self.weight, self.mask, survives, n_keep, self.n_in)
        return kept & (np.cumsum(kept, axis=1) <= fan_in)


class _LastOfRowKept(Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        kept = prune(self.weight, self.mask, survives, n_keep, self.n_in)
        return kept & (np.cumsum(kept[:, ::-1], axis=1)[:, ::-1] <= fan_in)


class _KeptBeforeAblation(Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        everywhere = prune(self.weight, self.mask, np.ones(self.n_out, np.bool_), n_keep, self.n_in)
        return prune(self.weight, everywhere, survives, everywhere.size, fan_in)


class _InactiveZerosKept(Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        rows = np.broadcast_to(survives[:, None], self.mask.shape)
        kept = largest(np.where(self.mask, self.weight, 0), rows, n_keep)
        for row in np.flatnonzero(np.count_nonzero(kept, axis=1) > fan_in):
            kept[row] = largest(self.weight[row], kept[row], fan_in)
        return kept


class _SignedWeights(Steps):
    def kept(self, survives: Mask, n_keep: int, fan_in: int) -> Mask:
        return prune(_signed_ranks(self.weight), self.mask, survives, n_keep, fan_in)


class _SignedGradients(Steps):
    def grown(self, kept: Mask, survives: Mask, fan_in: int) -> Mask:
        return grow(_signed_ranks(self.grad), kept, survives, fan_in)


class _PrunedNotRegrown(Steps):
    def grown(self, kept: Mask, survives: Mask, fan_in: int) -> Mask:
        new_mask = kept.copy()
        for row in np.flatnonzero(survives):
            missing = fan_in - int(np.count_nonzero(kept[row]))
            new_mask[row] |= largest(self.grad[row], ~kept[row] & ~self.mask[row], missing)
        return new_mask


class _GrownByMagnitude(Steps):
    def grown(self, kept: Mask, survives: Mask, fan_in: int) -> Mask:
        return grow(self.weight, kept, survives, fan_in)


class _TiesToHighestIndex(Steps):
    def run(self) -> Trace:
        turned = Problem(
            self.weight[::-1, ::-1], self.grad[::-1, ::-1], self.mask[::-1, ::-1], self.settings
        )
        trace = Steps(turned).run()
        back: dict[str, Any] = {
            stage.name: value[(slice(None, None, -1),) * value.ndim]
            for stage in fields(trace)
            if isinstance(value := getattr(trace, stage.name), np.ndarray)
        }
        return replace(trace, **back)


DEVIATIONS: dict[str, type[Steps]] = {
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
    """Return positive integers that are ordered, and equal, as the scores are."""
    ranks = np.unique(scores.astype(np.float64), return_inverse=True)[1]
    return ranks.reshape(scores.shape) + 1
