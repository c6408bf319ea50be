"""CSR products of cuSPARSE, through CuPy."""

from __future__ import annotations

import cupy
from cupyx.scipy.sparse import csr_matrix as device_csr_matrix

from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender
from srigl_core.benchmarks.contenders.scipy_csr import csr_matrix
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["contenders"]


def contenders(device: str) -> list[Contender]:
    """Return the product."""
    return [Contender("cupyx CSR", "csr", "forward", _product)]


def _product(problem: Problem) -> Bind:
    matrix = device_csr_matrix(csr_matrix(problem.weight))
    matrix.has_canonical_format = True  # otherwise each product asks, and waits for the device
    bias = problem.arrays.for_backend(problem.bias())

    def bind(batch: Batch) -> Call:
        x = problem.arrays.for_backend(batch.x)
        if len(x) == 1:
            vector = x[0]
            return lambda: matrix @ vector + bias

        def product() -> cupy.ndarray:
            y = (matrix @ x.T).T
            y += bias
            return y

        return product

    return bind
