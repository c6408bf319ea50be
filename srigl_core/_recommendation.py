"""Recommend the condensed or a dense form of a layer, by a small model or by measuring."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from srigl_core._arrays.checks import check_flag, check_integer
from srigl_core._cost_model import ACTIVE_ROWS, DENSE, INT8, dense_nanoseconds
from srigl_core._format.weight import CondensedWeight, QuantizedWeight, check_condensed
from srigl_core._plan import Plan, QuantizedPlan, plan_of
from srigl_core.contract import Backend
from srigl_core.errors import SriglError

__all__ = ["Recommendation", "recommend"]

_CONDENSED = "condensed"
_MEASURED_SECONDS = 0.1
_BLOCKS = 4


@dataclass(frozen=True)
class Recommendation:
    """The fastest form of a layer at a batch size.

    Parameters
    ----------
    batch : int
    times : dict of str to float
        Nanoseconds of a product in each form: "condensed", "dense" (the masked weight), "dense
        without ablated rows" (the active neurons alone, if some are ablated) and "dense int8" (the
        same with weights and inputs rounded to int8).
    rounds_inputs : bool
        Whether the condensed product has int8 inputs.
    measured : bool
        True if this process measured the times, each with its default number of threads; dense int8
        is not measured. False if a model estimated them, for one thread.
    """

    batch: int
    times: Mapping[str, float]
    measured: bool
    rounds_inputs: bool = False

    @property
    def condensed(self) -> float:
        """Nanoseconds of the condensed product."""
        return self.times[_CONDENSED]

    @property
    def dense(self) -> float:
        """Nanoseconds of the masked dense product."""
        return self.times[DENSE]

    @property
    def speed_up(self) -> float:
        """How many times faster the condensed product is; below 1 the dense one is faster."""
        return self.dense / self.condensed

    @property
    def use(self) -> str:
        """The fastest form; "dense int8" only if the condensed product rounds inputs, too."""
        forms = [form for form in self.times if form != INT8 or self.rounds_inputs]
        return min(forms, key=lambda form: self.times[form])

    def __str__(self) -> str:
        source = "measured" if self.measured else "estimated, one thread"
        times = ", ".join(
            f"{form} {time / 1e3:,.1f} us ({time / self.condensed:.2f}x)"
            if form != _CONDENSED
            else f"{form} {time / 1e3:,.1f} us"
            for form, time in self.times.items()
        )
        is_int8 = self.use != INT8 and self.times.get(INT8, math.inf) < self.times[self.use]
        rounded = f"; {INT8} is faster, and rounds weights and inputs" if is_int8 else ""
        return f"{self.use} at batch {self.batch}: {times}{rounded} ({source})"


def recommend(
    weight: CondensedWeight | QuantizedWeight,
    *,
    batch: int,
    inputs: str = "float",
    backend: str | Backend | None = None,
    measure: bool = False,
) -> Recommendation:
    """Recommend the condensed or a dense form of a layer.

    Parameters
    ----------
    weight : CondensedWeight or QuantizedWeight
    batch : int
        Rows of x, at least 1.
    inputs : {"float", "int8"}
        As in `srigl_core.prepare`: "int8" is for quantised weights only.
    backend : str, Backend or None
        As in `srigl_core.get_backend`.
    measure : bool
        Time the forms of this layer, those of dense products with NumPy. That takes about 0.1 s,
        and memory for the dense weight. Otherwise a model estimates the times; it is fitted to
        measurements on one machine.

    Returns
    -------
    Recommendation

    Raises
    ------
    SriglError
        If the backend has no model of its speed; with ``measure=True`` it needs none. If `inputs`
        does not fit the weight.

    Examples
    --------
    >>> import srigl_core
    >>> weight = srigl_core.CondensedWeight.random((768, 3072), fan_in=307, rng=0)
    >>> advice = srigl_core.recommend(weight, batch=64, backend="numba")
    >>> advice.use
    'condensed'
    """
    if not isinstance(weight, QuantizedWeight):
        check_condensed(weight)
    batch = check_integer(batch, "batch", least=1)
    measure = check_flag(measure, "measure")
    plan: Plan | QuantizedPlan = plan_of(weight, backend, inputs)
    rounds_inputs = inputs == "int8"
    if measure:
        return Recommendation(batch, _measured(weight, batch, plan), True, rounds_inputs)
    estimate = plan.nanoseconds(batch)
    if estimate is None:
        raise SriglError(
            f"backend {plan.backend.name!r} has no model of its speed; pass measure=True"
        )
    times = {_CONDENSED: estimate, **dense_nanoseconds(weight, batch)}
    return Recommendation(batch, times, False, rounds_inputs)


def _measured(
    weight: CondensedWeight | QuantizedWeight, batch: int, plan: Callable[..., object]
) -> dict[str, float]:
    """Return the least of the forms' median times in several blocks of calls.

    A block has the calls of one form: two pools of threads that take turns wait for each other.
    The blocks of the forms take turns, so that a busy moment is not that of one form alone.
    """
    dense = weight.to_dense().astype(np.result_type(weight.float_dtype, np.float32)).T
    x = np.ones((batch, weight.shape[1]), dense.dtype)
    forms: dict[str, Callable[[], object]] = {_CONDENSED: lambda: plan(x), DENSE: lambda: x @ dense}
    if weight.n_active < weight.shape[0]:
        active, places = np.ascontiguousarray(dense[:, weight.active]), weight.active

        def without_ablated_rows() -> None:
            y = np.zeros((batch, weight.shape[0]), dense.dtype)
            y[:, places] = x @ active

        forms[ACTIVE_ROWS] = without_ablated_rows
    seconds = _MEASURED_SECONDS / (_BLOCKS * len(forms))
    medians: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(_BLOCKS):
        for name, form in forms.items():
            medians[name].append(_median_seconds(form, seconds))
    return {name: 1e9 * min(times) for name, times in medians.items()}


def _median_seconds(call: Callable[[], object], seconds: float) -> float:
    """Return the median time of calls during `seconds`, of three at least."""
    call()  # reads the memory that the calls before it have displaced
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
