"""Hypothesis strategies for the problems that kernels are tried on (extra ``test``).

Examples shrink to one neuron with one connection. The argument `capabilities` of a strategy
restricts its examples to what a kernel declares. A `dtype` is "float32", "float64", "float16" or
"bfloat16".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._format.weight import CondensedWeight
from srigl_core.testing.kernel_capabilities import EVERYTHING, LAYOUTS, KernelCapabilities
from srigl_core.testing.problem_arrays import (
    MAGNITUDES,
    UPDATE_MAGNITUDES,
    any_mask,
    combinable_dtypes,
    laid_out,
    random_numbers,
)
from srigl_core.testing.problem_sizes import SMALL
from srigl_core.testing.problem_sources import DataSource
from srigl_core.testing.product_problems import (
    SPECIAL_NUMBERS,
    MatmulProblem,
    matmul_problem,
    random_inputs,
)
from srigl_core.testing.update_problems import UpdateProblem, update_problem

__all__ = [
    "HypothesisSource",
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


class HypothesisSource(DataSource):
    """Integers drawn by Hypothesis.

    Parameters
    ----------
    draw : callable
        The argument `draw` of a composite strategy.
    """

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        super().__init__(lambda least, most: int(draw(st.integers(least, most))))


@st.composite
def problems(
    draw: st.DrawFn,
    build: Callable[[DataSource, KernelCapabilities], Problem],
    capabilities: KernelCapabilities = EVERYTHING,
) -> Problem:
    """Draw a problem from `build`, such as a law's."""
    return build(HypothesisSource(draw), capabilities)


def matmul_problems(
    capabilities: KernelCapabilities = EVERYTHING,
) -> st.SearchStrategy[MatmulProblem]:
    """Return a strategy for products and gradients: any shape, dtype, magnitude and layout."""
    return problems(matmul_problem, _quick(capabilities))


def update_problems(
    capabilities: KernelCapabilities = EVERYTHING,
) -> st.SearchStrategy[UpdateProblem]:
    """Return a strategy for mask updates: tie-rich and distinct numbers, any mask and settings."""
    return problems(update_problem, _quick(capabilities))


def _quick(capabilities: KernelCapabilities) -> KernelCapabilities:
    """Return capabilities for which a problem is built in a hundredth of a second."""
    return replace(capabilities, largest_problem=min(400_000, capabilities.largest_problem))


def value_dtypes(capabilities: KernelCapabilities = EVERYTHING) -> st.SearchStrategy[np.dtype[Any]]:
    """Return a strategy for the value types, float32 first."""
    return st.sampled_from(combinable_dtypes(capabilities))


def condensed_weights(
    capabilities: KernelCapabilities = EVERYTHING,
) -> st.SearchStrategy[CondensedWeight]:
    """Return a strategy for weights: one neuron or many, any fan-in, ablation, both index types."""
    return matmul_problems(capabilities).map(lambda problem: problem.weight)


@st.composite
def inputs(
    draw: st.DrawFn, weight: CondensedWeight, capabilities: KernelCapabilities = EVERYTHING
) -> NDArray[Any]:
    """Draw inputs of a weight, (..., n_in): any batch, magnitude and strides.

    Some hold zeros of both signs, subnormal or huge numbers, terms of a neuron that nearly cancel,
    NaN or infinity.
    """
    source = HypothesisSource(draw)
    dtype = source.sampled_from(combinable_dtypes(capabilities, weight.dtype))
    rng = source.rng()
    batch = source.integer(1, SMALL)
    lead = source.sampled_from(((batch,), (), (2, batch), (0,)))
    magnitude = source.sampled_from(MAGNITUDES)
    x = random_inputs(rng, weight, lead, dtype, magnitude)
    if source.sampled_from((False, True)):
        special = source.sampled_from(list(SPECIAL_NUMBERS.values()))
        x = np.where(rng.random(x.shape) < 0.1, rng.choice(special, x.shape), x).astype(dtype)
    layouts = [each for each in LAYOUTS if each in capabilities.layouts]
    return laid_out(x, source.sampled_from(layouts))


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw a mask, (n_out, n_in): constant fan-in with any ablation, or rows that differ."""
    source = HypothesisSource(draw)
    return any_mask(source.rng(), shape, constant_fan_in=source.sampled_from((True, False)))


@st.composite
def gradients(draw: st.DrawFn, shape: tuple[int, int], dtype: str = "float32") -> NDArray[Any]:
    """Draw a dense gradient, (n_out, n_in); many have ties and zeros."""
    source = HypothesisSource(draw)
    magnitude = source.sampled_from(UPDATE_MAGNITUDES)
    return random_numbers(source.rng(), shape, value_dtype(dtype), magnitude)
