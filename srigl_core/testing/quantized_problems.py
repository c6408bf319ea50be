"""Products with quantised weights: those of `matmul_problem`, with their weights quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from srigl_core._arrays.dtypes import result_dtype
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._product_spec import INT8_FAN_IN
from srigl_core.contract import QUANTIZED_INPUTS
from srigl_core.testing.bounds import float_limits
from srigl_core.testing.kernel_capabilities import EVERYTHING, KernelCapabilities
from srigl_core.testing.problem_sources import DataSource
from srigl_core.testing.product_problems import MatmulProblem, matmul_problem

__all__ = ["QuantizedProblem", "int8_problem", "quantized_problem", "weight_only_problem"]

FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, eq=False)
class QuantizedProblem(MatmulProblem):
    """A product with a quantised weight.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
        Before it is quantised.
    inputs : {"float", "int8"}
    x, grad, bias, activation, out_dtype, out_layout, layout, grad_layout, bias_layout
        As in `MatmulProblem`; there is no use for `grad`.
    """

    inputs: str = "float"

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight that a kernel gets."""
        return self.weight.quantize()

    @property
    def result_dtype(self) -> np.dtype[Any]:
        """Dtype of the product."""
        return result_dtype(self.x.dtype, FLOAT32)


def quantized_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> QuantizedProblem:
    """Build a product with inputs of any declared kind."""
    kinds = [kind for kind in QUANTIZED_INPUTS if kind in capabilities.quantized_inputs]
    return _drawn(source, capabilities, kinds)


def weight_only_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> QuantizedProblem:
    """Build a product with inputs as they are."""
    return _drawn(source, capabilities, ["float"])


def int8_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> QuantizedProblem:
    """Build a product with quantised inputs."""
    return _drawn(source, capabilities, ["int8"])


def _drawn(
    source: DataSource, capabilities: KernelCapabilities, kinds: Sequence[str]
) -> QuantizedProblem:
    parts = vars(matmul_problem(source, capabilities))
    inputs = source.sampled_from(kinds)
    # A number that float32 does not hold cannot be quantised.
    weight, most = parts["weight"], float_limits(FLOAT32).largest
    if weight.dtype == np.float64:
        weight = weight.with_values(np.clip(weight.values, -most, most))
    if inputs == "int8" and weight.fan_in > INT8_FAN_IN:
        values, indices = weight.values[:, :INT8_FAN_IN], weight.indices[:, :INT8_FAN_IN]
        weight = CondensedWeight(values, indices, weight.active, weight.shape)
    return QuantizedProblem(**{**parts, "weight": weight, "inputs": inputs})
