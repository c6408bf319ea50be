"""Sources of the integers that problems are built from.

A problem is a function of the integers that its builder draws. They come from a seeded generator
(`SeededSource`), from Hypothesis (`srigl_core.testing.strategies.HypothesisSource`), which shrinks
a failure by drawing smaller ones, or from an earlier problem (`RecordedSource`). The first option
of every list is the simplest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from srigl_core.errors import SriglError
from srigl_core.testing.problem_sizes import LARGEST_SIZE, ROUND, SMALL, Schedule

__all__ = ["DataSource", "RecordedSource", "SeededSource"]

Option = TypeVar("Option")


_KINDS = 16
"""One in as many draws of sizes takes large ones."""


class DataSource:
    """A source of integers; `drawn` are those drawn so far, for a `RecordedSource`.

    Parameters
    ----------
    draw : callable of two ints
        ``draw(least, most)`` returns an integer within ``least..most``.
    """

    def __init__(self, draw: Callable[[int, int], int]) -> None:
        self._draw = draw
        self.drawn: list[int] = []

    def integer(self, least: int, most: int) -> int:
        """Draw an integer within ``least..most``."""
        self.drawn.append(self._draw(least, most))
        return self.drawn[-1]

    def sampled_from(self, options: Sequence[Option]) -> Option:
        """Draw the index of an option; return that option."""
        return options[self.integer(0, len(options) - 1)]

    def sizes(
        self, most: Sequence[int], scheduled: Callable[[Schedule], Sequence[int]]
    ) -> list[int]:
        """Draw sizes of 1 to `most`; those of a run's problems follow a schedule."""
        limit = LARGEST_SIZE if self.integer(0, _KINDS - 1) == 0 else SMALL
        return [self.integer(1, min(each, limit)) for each in most]

    def first_round(self) -> bool:
        """Whether this is one of the first `ROUND` problems of a run.

        In these, a large problem is such that it shows a bug of its size for certain.
        """
        return bool(self.integer(0, 1))

    def rng(self) -> np.random.Generator:
        """Draw the seed of a generator, for a problem's many numbers."""
        return np.random.default_rng(self.integer(0, 2**32 - 1))


class SeededSource(DataSource):
    """Integers of a seeded generator, the same on every machine.

    Parameters
    ----------
    *seed : int
        The last is the number of the problem in a run, which has the others as its seed. Together
        the problems of a run have every class of sizes (`srigl_core.testing.problem_sizes`), and as
        many problems as a list has options have each of them once.
    """

    def __init__(self, *seed: int) -> None:
        rng = np.random.default_rng(seed)
        super().__init__(lambda least, most: int(rng.integers(least, most, endpoint=True)))
        self._schedule = Schedule(seed[:-1], seed[-1])

    def sampled_from(self, options: Sequence[Option]) -> Option:
        """Return the next option in an order that is drawn anew after the last one."""
        self.drawn.append(self._schedule.option(len(self.drawn), len(options)))
        return options[self.drawn[-1]]

    def first_round(self) -> bool:
        """Whether the problem's number is less than `ROUND`."""
        self.drawn.append(int(self._schedule.number < ROUND))
        return bool(self.drawn[-1])

    def sizes(
        self, most: Sequence[int], scheduled: Callable[[Schedule], Sequence[int]]
    ) -> list[int]:
        """Return the sizes of this problem's place in its run."""
        sizes = list(scheduled(self._schedule))
        self.drawn += [0, *sizes]
        return sizes


class RecordedSource(DataSource):
    """The integers that an earlier problem was built from, the `drawn` of its source."""

    def __init__(self, integers: Sequence[int]) -> None:
        remaining = iter(integers)

        def draw(least: int, most: int) -> int:
            recorded = next(remaining, None)
            if recorded is None:
                raise SriglError(
                    "the integers end before the problem is complete; they were drawn for a "
                    "kernel of other capabilities, or by another version"
                )
            return min(max(recorded, least), most)

        super().__init__(draw)
