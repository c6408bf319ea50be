"""Recommend the condensed or the dense form of a layer, by a small model or by measuring."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from srigl_core._arrays.checks import check_flag, check_integer
from srigl_core._cost_model import dense_nanoseconds
from srigl_core._format.weight import CondensedWeight, check_condensed
from srigl_core._plan import plan_of
from srigl_core.contract import Backend
from srigl_core.errors import SriglError

__all__ = ["Recommendation", "recommend"]

_MEASURED_SECONDS = 0.05


@dataclass(frozen=True)
class Recommendation:
    """The faster form of a layer at a batch size.

    Parameters
    ----------
    batch : int
    condensed, dense : float
        Nanoseconds that a product takes.
    measured : bool
        True if this process measured both times, each with its default number of threads. False
        if a model estimated them, for one thread.
    """

    batch: int
    condensed: float
    dense: float
    measured: bool

    @property
    def speed_up(self) -> float:
        """How many times faster the condensed product is; below 1 the dense one is faster."""
        return self.dense / self.condensed

    @property
    def use(self) -> str:
        """The faster form: "condensed" or "dense"."""
        return "condensed" if self.speed_up >= 1 else "dense"

    def __str__(self) -> str:
        source = "measured" if self.measured else "estimated, one thread"
        return (
            f"{self.use} at batch {self.batch}: condensed {self.condensed / 1e3:,.1f} us, dense "
            f"{self.dense / 1e3:,.1f} us, {self.speed_up:.2f}x ({source})"
        )


def recommend(
    weight: CondensedWeight,
    *,
    batch: int,
    backend: str | Backend | None = None,
    measure: bool = False,
) -> Recommendation:
    """Recommend the condensed or the dense form of a layer.

    Parameters
    ----------
    weight : CondensedWeight
    batch : int
        Rows of x, at least 1.
    backend : str, Backend or None
        As in `srigl_core.get_backend`.
    measure : bool
        Time both forms of this layer. That takes about 0.1 s, and memory for the dense weight.
        Otherwise a model estimates the times; it is fitted to measurements on one machine.

    Returns
    -------
    Recommendation

    Raises
    ------
    SriglError
        If the backend has no model of its speed; with ``measure=True`` it needs none.

    Examples
    --------
    >>> import srigl_core
    >>> weight = srigl_core.CondensedWeight.random((768, 3072), fan_in=307, rng=0)
    >>> advice = srigl_core.recommend(weight, batch=64, backend="numba")
    >>> advice.use
    'condensed'
    """
    check_condensed(weight)
    batch = check_integer(batch, "batch", least=1)
    measure = check_flag(measure, "measure")
    plan = plan_of(weight, backend)
    if measure:
        condensed, dense = _measured(weight, batch, plan)
    else:
        estimate = plan.nanoseconds(batch)
        if estimate is None:
            raise SriglError(
                f"backend {plan.backend.name!r} has no model of its speed; pass measure=True"
            )
        condensed, dense = estimate, dense_nanoseconds(weight, batch)
    return Recommendation(batch, condensed, dense, measure)


def _measured(
    weight: CondensedWeight, batch: int, plan: Callable[..., object]
) -> tuple[float, float]:
    """Time both alternately, so that a disturbance affects both, and return the medians."""
    dense = weight.to_dense().astype(np.result_type(weight.dtype, np.float32)).T
    x = np.ones((batch, weight.shape[1]), dense.dtype)
    contenders: tuple[Callable[[], object], ...] = (lambda: plan(x), lambda: x @ dense)
    for contender in contenders:
        contender()
    samples: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + _MEASURED_SECONDS
    while time.perf_counter() < end or len(samples[0]) < 3:
        for contender, times in zip(contenders, samples, strict=True):
            start = time.perf_counter()
            contender()
            times.append(time.perf_counter() - start)
    return 1e9 * statistics.median(samples[0]), 1e9 * statistics.median(samples[1])
