"""What a contender is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["Bind", "Call", "Contender", "gradients_read", "product_read"]

Call = Callable[[], Any]
Bind = Callable[[Batch], Call]
Read = Callable[[Any, Problem], Mapping[str, NDArray[Any]]]


def product_read(result: Any, problem: Problem) -> dict[str, NDArray[Any]]:
    """Return the product, (batch, n_out); a vector is one input's."""
    product = np.asarray(result)
    return {"y": product[None] if product.ndim == 1 else product}


def gradients_read(result: Any, problem: Problem) -> dict[str, NDArray[Any]]:
    """Return both gradients; one of the whole dense weight is reduced to the active places."""
    dx, dvalues = (np.asarray(part) for part in result)
    weight = problem.weight
    if dvalues.shape == weight.shape:
        dvalues = dvalues[weight.active[:, None], weight.indices.astype(np.intp)]
    return {"dx": dx, "dvalues": dvalues.reshape(weight.values.shape)}


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to compute an operation.

    Parameters
    ----------
    name : str
    family : {"ours", "guest", "dense", "csr", "gather", "fewer neurons", "other"}
        "dense" and "csr" are what ours is compared with: the best of each.
    operation : {"forward", "backward", "update"}
    prepare : callable of Problem
        What is done once for a weight, and not timed. Returns a function that takes a batch and
        returns the call to be timed, without arguments; that one makes new result arrays.
    read : callable of the call's result and a Problem
        Its arrays by name, to be checked.
    values : str
        Dtype of the weight's values if it is not the case's.
    share : float
        Of the neurons that it computes, the first ones.
    unfit : callable of Case
        Why it does not take part, or "".
    """

    name: str
    family: str
    operation: str
    prepare: Callable[[Problem], Bind]
    read: Read = product_read
    values: str = ""
    share: float = 1.0
    unfit: Callable[[Case], str] = lambda case: ""
