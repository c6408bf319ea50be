"""Explain how a mask update computed elsewhere differs from the definition.

Only the new mask is known. The definition is run with one known deviation at a time until one gives
that mask. If none does, the explanation names the first stage that visibly differs in the mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import as_mask
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._update import UpdateSettings, check_settings, check_update_arrays
from srigl_core.errors import SriglError
from srigl_core.reference.known_deviations import DEVIATIONS, Problem, Steps, Trace
from srigl_core.reference.mask_update import prune, srigl_update

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
    """Comparison of a mask with the definition's. It is true if they are equal, and can be printed.

    Parameters
    ----------
    matches : bool
    stage : str or None
        The first of `STAGES` that differs.
    known_deviation : str or None
        The known deviation that gives exactly this mask.
    rows : ndarray of int64
        Rows where the stage's result differs, ascending.
    positions : ndarray of int64, (n, 2)
        Row and column of each position where the stage's result differs; empty if that has no
        positions.
    expected, got : object
        The stage's result by the definition, and the one that the mask implies.
    """

    matches: bool
    stage: str | None = None
    known_deviation: str | None = None
    rows: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    positions: Rows = field(default_factory=lambda: np.empty((0, 2), np.int64))
    expected: object = None
    got: object = None

    def __bool__(self) -> bool:
        return self.matches

    def __str__(self) -> str:
        if self.matches:
            return "the mask is the definition's"
        cause = f", {self.known_deviation}" if self.known_deviation else ""
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
    settings: UpdateSettings,
) -> UpdateExplanation:
    """Compare `new_mask`, computed elsewhere, with the definition's.

    Parameters
    ----------
    weight, grad, mask
        The arguments of the update, as in `update_mask`.
    new_mask : ndarray of bool, shape of `weight`
        The mask to explain.
    settings : UpdateSettings

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
    >>> settings = UpdateSettings(nnz_budget=4, drop_fraction=0.25)
    >>> print(explain_update(weight, grad, mask, mask, settings))
    first difference at stage 'grown', as if gradients were ranked with their sign
      rows      [0]
      positions [(0, 0), (0, 1)]
      expected  [(0, 0)], only in this set of 4
      got       [(0, 1)], only in this set of 4
    """
    w, g, m = check_update_arrays(weight, grad, mask)
    check_settings(settings).check_fits(w.shape, w.dtype)
    got = as_mask(new_mask, mask.shape, "new_mask").reshape(w.shape)
    with honour_subnormals():
        return _explained(Problem(w, g, m, settings), got)


def _explained(problem: Problem, got: Mask) -> UpdateExplanation:
    update = srigl_update(problem.weight, problem.grad, problem.mask, problem.settings)
    if np.array_equal(update.mask, got):
        return UpdateExplanation(True)
    expected = Steps(problem).run()
    for name, steps in DEVIATIONS.items():
        try:
            deviating = steps(problem).run()
        except (SriglError, ZeroDivisionError):
            continue
        if np.array_equal(deviating.grown, got):
            return _first_difference(expected, deviating, name)
    return _read_off(problem, expected, got)


def _first_difference(expected: Trace, deviating: Trace, name: str) -> UpdateExplanation:
    results = [
        [getattr(trace, stage.name) for stage in fields(Trace)] for trace in (expected, deviating)
    ]
    stage, ours, theirs = next(
        (stage, ours, theirs)
        for stage, ours, theirs in zip(STAGES, *results, strict=True)
        if not np.array_equal(ours, theirs)
    )
    return _explanation(stage, ours, theirs, name)


def _read_off(problem: Problem, expected: Trace, got: Mask) -> UpdateExplanation:
    """Name the first stage that visibly differs in the mask."""
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
            _sorted_boolean(problem, expected, got),
        )
    return _explanation("grown", expected.grown & ~expected.kept, got & ~expected.kept)


def _about_ablation(expected: Trace, ablated: Mask) -> UpdateExplanation:
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


def _sorted_boolean(problem: Problem, expected: Trace, got: Mask) -> str | None:
    """Recognise over-full rows that kept the right number of weights, but not the largest."""
    n_keep, n_in = expected.counts[0], problem.mask.shape[1]
    eligible = prune(problem.weight, problem.mask, ~expected.ablated, n_keep, n_in)
    overfull = np.count_nonzero(eligible, axis=1) > expected.fan_in
    differs = (expected.grown != got).any(axis=1)
    if (differs <= overfull).all() and not (got & ~eligible)[differs].any():
        return "as the released code: boolean sort, over-full rows keep any k (decision O1)"
    return None


def _explanation(
    stage: str, ours: Any, theirs: Any, known_deviation: str | None = None
) -> UpdateExplanation:
    if not isinstance(ours, np.ndarray):
        return UpdateExplanation(False, stage, known_deviation, expected=ours, got=theirs)
    differs = ours != theirs
    rows = np.flatnonzero(differs.reshape(differs.shape[0], -1).any(axis=1))
    if differs.ndim == 2:
        return UpdateExplanation(
            False,
            stage,
            known_deviation,
            rows,
            np.argwhere(differs),
            f"{_places(ours & differs)}, only in this set of {np.count_nonzero(ours)}",
            f"{_places(theirs & differs)}, only in this set of {np.count_nonzero(theirs)}",
        )
    if ours.dtype == np.bool_:
        what, values = "rows", [np.flatnonzero(ours), np.flatnonzero(theirs)]
    else:
        what, values = "counts", [ours[rows], theirs[rows]]
    return UpdateExplanation(
        False,
        stage,
        known_deviation,
        rows,
        expected=f"{what} {_listed(values[0].tolist())}",
        got=f"{what} {_listed(values[1].tolist())}",
    )


def _places(mask: Mask) -> str:
    return _listed([tuple(place) for place in np.argwhere(mask).tolist()])


def _listed(items: list[Any], most: int = 8) -> str:
    more = f", ... ({len(items)} in all)" if len(items) > most else ""
    return f"[{', '.join(str(item) for item in items[:most])}{more}]"
