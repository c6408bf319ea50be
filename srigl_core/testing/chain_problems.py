"""Chains of layers: the product of `matmul_problem`, with more layers behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import accumulator_dtype, result_dtype
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core.contract import ACTIVATIONS
from srigl_core.testing.bounds import float_limits
from srigl_core.testing.kernel_capabilities import EVERYTHING, KernelCapabilities
from srigl_core.testing.problem_arrays import combinable_dtypes, laid_out, random_numbers
from srigl_core.testing.problem_sources import DataSource
from srigl_core.testing.product_problems import MatmulProblem, matmul_problem, random_weight

__all__ = ["ChainProblem", "LayerOfChain", "chain_problem"]

_MOST_NUMBERS = 100_000
"""Of a layer's result, about: the first layer's may be more."""


@dataclass(frozen=True, eq=False)
class LayerOfChain:
    """A layer behind the first.

    Parameters
    ----------
    weight : CondensedWeight or QuantizedWeight
    bias : ndarray, (n_out,), or None
    activation : str
    inputs : str
        One of `srigl_core.contract.QUANTIZED_INPUTS`.
    """

    weight: CondensedWeight | QuantizedWeight
    bias: NDArray[Any] | None
    activation: str
    inputs: str = "float"


@dataclass(frozen=True, eq=False)
class ChainProblem(MatmulProblem):
    """A chain of layers.

    Parameters
    ----------
    weight, x, bias, activation
        Those of the first layer, as in `MatmulProblem`; there is no use for `grad`.
    inputs : str or None
        With a str, the first layer's weight is quantised, and takes inputs of this kind.
    out_dtype, out_layout
        Those of an `out` for the last layer.
    others : tuple of LayerOfChain
        The layers behind the first.
    """

    inputs: str | None = None
    others: tuple[LayerOfChain, ...] = ()

    @property
    def layers(self) -> list[LayerOfChain]:
        """All layers."""
        first = LayerOfChain(self.weight, self.bias, self.activation)
        if self.inputs is not None:
            first = replace(first, weight=self.weight.quantize(), inputs=self.inputs)
        return [first, *self.others]


def chain_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> ChainProblem:
    """Build a chain: the input, and mostly all layers, of types that one native call takes."""
    first = matmul_problem(source, capabilities)
    n_others = source.sampled_from((1, 2, 2, 0, 4))
    is_plain = source.sampled_from((True, True, True, False))
    size = source.sampled_from((40, 40, 300))
    kinds = sorted(capabilities.quantized_inputs)
    if "quantized_matmul" not in capabilities.operations:
        kinds = []
    rng = source.rng()
    x = first.x
    if is_plain:
        dtype = accumulator_dtype(first.weight.dtype)
        most = float_limits(dtype).largest
        x = np.ascontiguousarray(np.clip(x, -most, most) if x.dtype == np.float64 else x)
        x = x.astype(dtype)
    others: list[LayerOfChain] = []
    inputs, values_dtype = None, first.weight.dtype
    if kinds and values_dtype != np.float64 and rng.random() < 0.3:
        inputs, values_dtype = str(rng.choice(kinds)), np.dtype(np.float32)
    dtype, n_in = result_dtype(x.dtype, values_dtype), first.weight.shape[0]
    most = max(2, min(size, _MOST_NUMBERS // max(1, x.size // x.shape[-1])))
    for _ in range(n_others):
        dtypes = combinable_dtypes(capabilities, dtype)
        if is_plain:
            dtypes = [each for each in dtypes if accumulator_dtype(each) == x.dtype]
        values_dtype = dtypes[rng.integers(len(dtypes))]
        layer = _layer(rng, n_in, most, values_dtype, dtype, capabilities)
        if kinds and rng.random() < 0.3 and isinstance(layer.weight, CondensedWeight):
            layer = replace(layer, weight=layer.weight.quantize(), inputs=str(rng.choice(kinds)))
        others.append(layer)
        dtype, n_in = result_dtype(dtype, layer.weight.float_dtype), layer.weight.shape[0]
    return ChainProblem(**{**vars(first), "x": x}, inputs=inputs, others=tuple(others))


def _layer(
    rng: np.random.Generator,
    n_in: int,
    most: int,
    values_dtype: np.dtype[Any],
    input_dtype: np.dtype[Any],
    capabilities: KernelCapabilities,
) -> LayerOfChain:
    """Draw a layer of up to `most` neurons, mostly of numbers that do not overflow."""
    n_out = int(rng.integers(1, most, endpoint=True))
    n_active = n_out
    if capabilities.ablation and rng.random() < 0.4:
        n_active = int(rng.integers(1, n_out, endpoint=True))
    fan_in = int(rng.integers(1, min(n_in, 40), endpoint=True))
    magnitude = str(rng.choice(["normal", "normal", "integers", "zeros", "spread"]))
    weight = random_weight(rng, (n_out, n_in), fan_in, n_active, values_dtype, magnitude)
    bias = None
    if capabilities.bias and rng.random() < 0.7:
        bias_dtype = np.dtype(rng.choice(["float32", "float64", "float32"]))
        if rng.random() < 0.5:
            bias_dtype = result_dtype(input_dtype, values_dtype)
        layout = str(rng.choice(["C", "every second", "offset by a byte"]))
        bias = laid_out(random_numbers(rng, (n_out,), bias_dtype, "normal"), layout)
    activations = [name for name in ACTIVATIONS if name in capabilities.activations]
    return LayerOfChain(weight, bias, str(rng.choice(activations)))
