"""When masks are updated, and how much is pruned (SPEC 4 and 4.1; Evci et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from srigl_core._arrays.checks import check_integer, check_real
from srigl_core.errors import SriglError

__all__ = ["UpdateSchedule"]


@dataclass(frozen=True)
class UpdateSchedule:
    """Updates every `delta_t` steps until `t_end`, pruning less and less.

    Parameters
    ----------
    t_end : int
        The step from which there are no more updates; 0 means none. Steps count from 1. The paper
        uses 75% of training; see `for_training`.
    delta_t : int
        Number of steps from one update to the next.
    alpha : float
        Drop fraction at the start, in [0, 1].

    Raises
    ------
    SriglError
        If a setting is out of its range.

    Examples
    --------
    >>> schedule = UpdateSchedule.for_training(1000)
    >>> schedule.t_end, schedule.delta_t, schedule.n_updates
    (750, 7, 107)
    >>> schedule.is_due(700), schedule.is_due(770)
    (True, False)
    >>> round(schedule.drop_fraction(375), 6)
    0.15
    """

    t_end: int
    delta_t: int = 100
    alpha: float = 0.3

    def __post_init__(self) -> None:
        # NumPy's numbers would round or overflow when multiplied by others; Python's do not.
        object.__setattr__(self, "t_end", check_integer(self.t_end, "t_end", least=0))
        object.__setattr__(self, "delta_t", check_integer(self.delta_t, "delta_t", least=1))
        alpha = check_real(self.alpha, "alpha")
        if not 0 <= alpha <= 1:
            raise SriglError(f"alpha={self.alpha!r} must be in [0, 1], a share of the weights")
        object.__setattr__(self, "alpha", alpha)

    @classmethod
    def for_training(
        cls, total_steps: int, *, delta_t: int | None = None, alpha: float = 0.3
    ) -> UpdateSchedule:
        """Return the schedule that ends at 75% of `total_steps`, rounded down.

        Parameters
        ----------
        total_steps : int
            Number of training steps, at least 1.
        delta_t : int or None
            None is 1% of the steps with updates, but between 5 and 100 (SPEC 4): grown weights
            start at 0, so an update at every step would prune them again.
        alpha : float
        """
        t_end = 3 * check_integer(total_steps, "total_steps", least=1) // 4
        return cls(t_end, min(100, max(5, t_end // 100)) if delta_t is None else delta_t, alpha)

    @property
    def n_updates(self) -> int:
        """Number of updates in the whole of training."""
        return max(0, self.t_end - 1) // self.delta_t

    def n_updates_until(self, step: int) -> int:
        """Return the number of updates in the first `step` steps."""
        return min(self.n_updates, max(0, step) // self.delta_t)

    def is_due(self, step: int) -> bool:
        """Whether the masks are updated at `step`."""
        return step > 0 and step % self.delta_t == 0 and step < self.t_end

    def next_due(self, step: int) -> int | None:
        """Return the first step at or after `step` that is due, or None if there is none."""
        due = max(1, -(-step // self.delta_t)) * self.delta_t
        return due if due < self.t_end else None

    def drop_fraction(self, step: int) -> float:
        """Return zeta, ``alpha / 2 * (1 + cos(pi * step / t_end))``; 0 without updates."""
        if not self.t_end:
            return 0.0
        return self.alpha / 2 * (1 + math.cos(math.pi * step / self.t_end))
