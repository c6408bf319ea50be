"""CSR products of cuSPARSE, through CuPy."""

from __future__ import annotations

from cupyx.scipy.sparse import csr_matrix as device_csr_matrix

from srigl_core.benchmarks.contenders.contender import Bind, Contender
from srigl_core.benchmarks.contenders.scipy_csr import csr_matrix, csr_product
from srigl_core.benchmarks.problems import Problem

__all__ = ["contenders"]


def contenders(device: str) -> list[Contender]:
    """Return the product."""
    return [Contender("cupyx CSR", "csr", "forward", _product, Problem.for_backend)]


def _product(problem: Problem) -> Bind:
    matrix = device_csr_matrix(csr_matrix(problem.weight))
    matrix.has_canonical_format = True  # otherwise each product asks, and waits for the device
    return csr_product(matrix, problem.for_backend(problem.bias))
