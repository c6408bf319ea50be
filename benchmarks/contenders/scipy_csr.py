"""CSR products of SciPy, which has one thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from srigl_core import CondensedWeight
from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender, unless
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["contenders", "csr_matrix", "csr_product"]


def contenders(device: str) -> list[Contender]:
    """Return the product and the gradients."""
    is_quick = unless(
        lambda case: case.batch * case.layer.n_in * case.layer.n_out <= 1 << 33, "takes seconds"
    )
    name = "SciPy CSR, dense dvalues"
    return [
        Contender("SciPy CSR", "csr", "forward", _product),
        Contender(name, "csr", "backward", _gradients, unfit=is_quick),
    ]


def csr_matrix(weight: CondensedWeight) -> Any:
    """Return the weight as CSR with 32-bit indices, which suffice and take half the bytes."""
    csr = weight.to_csr()
    row_starts, columns = (part.astype(np.int32) for part in (csr.indptr, csr.indices))
    return scipy.sparse.csr_array((csr.data, columns, row_starts), shape=csr.shape)


def csr_product(matrix: Any, bias: Any) -> Bind:
    """Return the products with a CSR matrix of SciPy or CuPy."""

    def bind(batch: Batch) -> Call:
        if len(batch.x) == 1:
            vector = batch.x[0]
            return lambda: matrix @ vector + bias
        return lambda: (matrix @ batch.x.T).T + bias

    return bind


def _product(problem: Problem) -> Bind:
    return csr_product(csr_matrix(problem.weight), problem.bias)


def _gradients(problem: Problem) -> Bind:
    """Compute all entries of dvalues: SciPy has no product at the places of a sparse matrix."""
    transposed = csr_matrix(problem.weight).T.tocsr()
    at = problem.rows, problem.columns
    return lambda batch: lambda: ((transposed @ batch.grad.T).T, (batch.grad.T @ batch.x)[at])
