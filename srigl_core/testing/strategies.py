"""The problems of `srigl_core.testing.problems` as Hypothesis strategies (extra ``test``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from hypothesis import strategies as st

from srigl_core.testing.problems import (
    Chooser,
    MatmulProblem,
    UpdateProblem,
    matmul_problem,
    update_problem,
)

__all__ = ["matmul_problems", "problems", "update_problems"]

Option = TypeVar("Option")
Problem = TypeVar("Problem")


class _DrawnChooser:
    """Choices drawn by Hypothesis."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, least: int, most: int) -> int:
        return self._draw(st.integers(least, most))

    def pick(self, options: Sequence[Option]) -> Option:
        return self._draw(st.sampled_from(options))

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self._draw(st.integers(0, 2**32 - 1)))


def problems(build: Callable[[Chooser], Problem]) -> st.SearchStrategy[Problem]:
    """Return the strategy of the problems that `build` makes of a chooser."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Problem:
        return build(_DrawnChooser(draw))

    return drawn()


def matmul_problems() -> st.SearchStrategy[MatmulProblem]:
    """Return products and gradients: shapes, dtypes, magnitudes and memory layouts of all kinds."""
    return problems(matmul_problem)


def update_problems() -> st.SearchStrategy[UpdateProblem]:
    """Return mask updates: tie-rich and distinct numbers, constant fan-in masks and others."""
    return problems(update_problem)
