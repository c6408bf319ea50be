"""CSR products of SciPy, which has one thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from srigl_core import CondensedWeight
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender, gradients_read
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["contenders", "csr_matrix"]


def contenders(device: str) -> list[Contender]:
    """Return the product and the gradients."""
    return [
        Contender("SciPy CSR", "csr", "forward", _product),
        Contender(
            "SciPy CSR, dense dvalues",
            "csr",
            "backward",
            _gradients,
            gradients_read,
            unfit=_if_large,
        ),
    ]


def csr_matrix(weight: CondensedWeight) -> Any:
    """Return the weight as CSR with 32-bit indices, which suffice and take half the bytes."""
    csr = weight.to_csr()
    row_starts, columns = (part.astype(np.int32) for part in (csr.indptr, csr.indices))
    return scipy.sparse.csr_array((csr.data, columns, row_starts), shape=csr.shape)


def _product(problem: Problem) -> Bind:
    matrix, bias = csr_matrix(problem.weight), problem.bias()

    def bind(batch: Batch) -> Call:
        if len(batch.x) == 1:
            vector = batch.x[0]
            return lambda: matrix @ vector + bias
        return lambda: (matrix @ batch.x.T).T + bias

    return bind


def _gradients(problem: Problem) -> Bind:
    """Compute all entries of dvalues: SciPy has no product at the places of a sparse matrix."""
    transposed = csr_matrix(problem.weight).T.tocsr()
    rows, columns = problem.rows, problem.columns

    def bind(batch: Batch) -> Call:
        x, grad = batch.x, batch.grad
        return lambda: ((transposed @ grad.T).T, (grad.T @ x)[rows, columns])

    return bind


def _if_large(case: Case) -> str:
    work = case.batch * case.layer.n_in * case.layer.n_out
    return "takes seconds" if work > 1 << 33 else ""
