"""What dense products in int8 have in common: the weight, its rounding, and the cases."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.benchmarks.contenders.contender import Contender, unless
from srigl_core.benchmarks.problems import Precision, Problem

__all__ = ["OF_WEIGHTS", "dense_int8", "int8_weight", "is_float32"]

OF_WEIGHTS = 1 / 254
"""Half a step, as a share of a neuron's largest weight, which is 127 steps."""

is_float32 = unless(lambda case: case.dtype == "float32", "float32 is rounded to int8")


def dense_int8(name: str, prepare: Any, *, of_inputs: float, **options: Any) -> Contender:
    """Return a forward product of the family "int8".

    Parameters
    ----------
    name : str
    prepare : callable
    of_inputs : float
        The largest error of an input, as a share of the batch's largest magnitude.
    **options : object
        Other fields of `Contender`.
    """
    precision = Precision(of_inputs=of_inputs, of_weights=OF_WEIGHTS)
    fields = {"unfit": is_float32, "precision": precision, **options}
    return Contender(name, "int8", "forward", prepare, **fields)


def int8_weight(problem: Problem) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return the masked dense weight in int8 (SPEC 6), and the scale of each neuron.

    They have a row for each neuron of the problem: all of the layer, or the active ones.
    """
    weight = problem.weight.quantize()
    values = np.zeros((weight.n_active, weight.shape[1]), np.int8)
    np.put_along_axis(values, weight.indices.astype(np.int64), weight.values, axis=1)
    if len(problem.bias) == weight.n_active:
        return values, weight.scale
    whole, scale = np.zeros(weight.shape, np.int8), np.ones(weight.shape[0], np.float32)
    whole[weight.active], scale[weight.active] = values, weight.scale
    return whole, scale
