"""Dense products of NumPy, that is of the BLAS it was built with."""

from __future__ import annotations

import numpy as np

from srigl_core.benchmarks.contenders.active_rows import without_ablated_rows
from srigl_core.benchmarks.contenders.contender import Bind, Contender
from srigl_core.benchmarks.problems import Problem

__all__ = ["contenders"]


def contenders(device: str) -> list[Contender]:
    """Return the product in both layouts, since neither is always faster, and the gradients."""
    transposed = Contender("NumPy x @ V, V = W.T stored", "dense", "forward", _product_transposed)
    return [
        Contender("NumPy x @ W.T", "dense", "forward", _product),
        transposed,
        without_ablated_rows(transposed),
        Contender("NumPy dense", "dense", "backward", _gradients),
    ]


def _product(problem: Problem) -> Bind:
    weight, bias = problem.dense, problem.bias
    return lambda batch: lambda: batch.x @ weight.T + bias


def _product_transposed(problem: Problem) -> Bind:
    transposed, bias = np.ascontiguousarray(problem.dense.T), problem.bias
    return lambda batch: lambda: batch.x @ transposed + bias


def _gradients(problem: Problem) -> Bind:
    weight = problem.dense
    return lambda batch: lambda: (batch.grad @ weight, batch.grad.T @ batch.x)
