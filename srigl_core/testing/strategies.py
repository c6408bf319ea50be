"""Hypothesis strategies for what kernels are tried on (extra ``test``).

All shrink to one neuron of one connection. Their argument `able` is what a kernel takes on: what
goes beyond that is not drawn. Value types are "float32", "float64", "float16" and "bfloat16".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._format.weight import CondensedWeight
from srigl_core.testing.kernel_capabilities import KernelCapabilities
from srigl_core.testing.problems import (
    BATCHES,
    EVERYTHING,
    LAYOUTS,
    MAGNITUDES,
    UPDATE_MAGNITUDES,
    Chooser,
    MatmulProblem,
    UpdateProblem,
    any_mask,
    laid_out,
    matmul_problem,
    random_inputs,
    random_numbers,
    update_problem,
)

__all__ = [
    "DrawnChooser",
    "condensed_weights",
    "gradients",
    "inputs",
    "masks",
    "matmul_problems",
    "problems",
    "update_problems",
    "value_dtypes",
]

Problem = TypeVar("Problem")


class DrawnChooser(Chooser):
    """Choices drawn by Hypothesis.

    Parameters
    ----------
    draw : callable
        What a composite strategy is given.
    """

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        super().__init__()
        self._draw = draw

    def _choose(self, least: int, most: int) -> int:
        return int(self._draw(st.integers(least, most)))


def problems(
    build: Callable[[Chooser, KernelCapabilities], Problem], able: KernelCapabilities = EVERYTHING
) -> st.SearchStrategy[Problem]:
    """Return the strategy of the problems that `build` makes.

    Parameters
    ----------
    build : callable
        Takes a `Chooser` and capabilities, as a law's ``build``.
    able : KernelCapabilities
    """

    @st.composite
    def drawn(draw: st.DrawFn) -> Problem:
        return build(DrawnChooser(draw), able)

    return drawn()


def matmul_problems(able: KernelCapabilities = EVERYTHING) -> st.SearchStrategy[MatmulProblem]:
    """Return products and gradients: shapes, dtypes, magnitudes and memory layouts of all kinds.

    Parameters
    ----------
    able : KernelCapabilities
    """
    return problems(matmul_problem, able)


def update_problems(able: KernelCapabilities = EVERYTHING) -> st.SearchStrategy[UpdateProblem]:
    """Return mask updates: tie-rich and distinct numbers, constant fan-in masks and others.

    Parameters
    ----------
    able : KernelCapabilities
    """
    return problems(update_problem, able)


def value_dtypes(able: KernelCapabilities = EVERYTHING) -> st.SearchStrategy[np.dtype[Any]]:
    """Return the value types, float32 first.

    Parameters
    ----------
    able : KernelCapabilities
    """
    order = ("float32", "float64", "float16", "bfloat16")
    return st.sampled_from([value_dtype(name) for name in order if name in able.value_dtypes])


def condensed_weights(
    able: KernelCapabilities = EVERYTHING,
) -> st.SearchStrategy[CondensedWeight]:
    """Return weights: a single neuron and many, k = 1 and k = n_in, ablation, both index types.

    Parameters
    ----------
    able : KernelCapabilities
    """
    return matmul_problems(able).map(lambda problem: problem.weight)


@st.composite
def inputs(
    draw: st.DrawFn, weight: CondensedWeight, able: KernelCapabilities = EVERYTHING
) -> NDArray[Any]:
    """Return inputs of a weight, (..., n_in), of any strides, batches and magnitudes.

    Among them are zeros of both signs, subnormal and huge numbers, terms of a neuron that nearly
    cancel, NaN and infinity.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
    able : KernelCapabilities
    """
    dtype = draw(value_dtypes(able).filter(lambda kind: _combine(kind, weight.dtype)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead, magnitude = draw(st.sampled_from(BATCHES)), draw(st.sampled_from(MAGNITUDES))
    x = random_inputs(rng, weight, lead, dtype, magnitude)
    if draw(st.booleans()):
        x[rng.random(x.shape) < 0.1] = draw(st.sampled_from((np.nan, np.inf, -np.inf)))
    return laid_out(x, draw(st.sampled_from(LAYOUTS)) if able.strides else "C")


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return masks, ndarrays of bool: of constant fan-in, with ablation, and others.

    Parameters
    ----------
    shape : tuple of int
        (n_out, n_in).
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return any_mask(rng, shape, constant_fan_in=draw(st.sampled_from((True, False))))


@st.composite
def gradients(draw: st.DrawFn, shape: tuple[int, int], dtype: str = "float32") -> NDArray[Any]:
    """Return dense gradients: many of them with ties and zeros.

    Parameters
    ----------
    shape : tuple of int
        (n_out, n_in).
    dtype : str
        A value type.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_numbers(rng, shape, value_dtype(dtype), draw(st.sampled_from(UPDATE_MAGNITUDES)))


def _combine(one: np.dtype[Any], other: np.dtype[Any]) -> bool:
    return {one.name, other.name} != {"float16", "bfloat16"}
