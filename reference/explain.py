"""Say where somebody else's mask update departs from the definition, and recognise known slips.

Only the new mask is seen. The definition is run with one slip at a time until one gives that mask;
failing that, the first stage whose result can be read off the mask is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import as_mask
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._update import UpdateSettings, check_update_arrays
from srigl_core.errors import SriglError
from srigl_core.reference.known_slips import SLIPS, Problem, Steps, Trace
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
      expected  [(0, 0)] of 4 places, not in the other
      got       [(0, 1)] of 4 places, not in the first
    """
    w, g, m = check_update_arrays(weight, grad, mask)
    settings.check_fits(w.shape, w.dtype)
    got = as_mask(new_mask, mask.shape, "new_mask").reshape(w.shape)
    with honour_subnormals():
        return _explained(Problem(w, g, m, settings), got)


def _explained(problem: Problem, got: Mask) -> UpdateExplanation:
    update = srigl_update(problem.weight, problem.grad, problem.mask, problem.settings)
    if np.array_equal(update.mask, got):
        return UpdateExplanation(True)
    expected = Steps(problem).run()
    for name, steps in SLIPS.items():
        try:
            slipped = steps(problem).run()
        except (SriglError, ZeroDivisionError):
            continue
        if np.array_equal(slipped.grown, got):
            return _first_difference(expected, slipped, name)
    return _read_off(problem, expected, got)


def _first_difference(expected: Trace, slipped: Trace, name: str) -> UpdateExplanation:
    for stage, part in zip(STAGES, fields(Trace), strict=True):
        ours, theirs = getattr(expected, part.name), getattr(slipped, part.name)
        if not np.array_equal(ours, theirs):
            return _explanation(stage, ours, theirs, slip=name)
    raise AssertionError("a slip that gives another mask differs at some stage")


def _read_off(problem: Problem, expected: Trace, got: Mask) -> UpdateExplanation:
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
