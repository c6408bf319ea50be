"""CSR products by SciPy, which has one thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from srigl_core import CondensedWeight
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import (
    Bind,
    Call,
    Contender,
    gradients_read,
)
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["contenders", "csr_matrix"]


def contenders() -> list[Contender]:
    """Return the product and the gradients."""
    return [
        Contender("SciPy CSR", "csr", "forward", _product),
        Contender(
            "SciPy CSR, dense dvalues",
            "csr",
            "backward",
            _gradients,
            read=gradients_read,
            unfit=_if_large,
        ),
    ]


def csr_matrix(weight: CondensedWeight) -> Any:
    """Return the weight as CSR with numbers of 32 bits, which are enough, and half to read."""
    found = weight.to_csr()
    row_starts, columns = (part.astype(np.int32) for part in (found.indptr, found.indices))
    return scipy.sparse.csr_array((found.data, columns, row_starts), shape=found.shape)


def _product(problem: Problem) -> Bind:
    matrix, bias = csr_matrix(problem.weight), problem.bias

    def bind(batch: Batch) -> Call:
        if len(batch.x) == 1:
            vector = batch.x[0]
            return lambda: matrix @ vector + bias
        return lambda: (matrix @ batch.x.T).T + bias

    return bind


def _gradients(problem: Problem) -> Bind:
    """SciPy has no product of two dense matrices at given places: all are computed, some taken."""
    weight = problem.weight
    transposed = csr_matrix(weight).T.tocsr()
    rows, columns = weight.active[:, None], weight.indices.astype(np.intp)

    def bind(batch: Batch) -> Call:
        x, grad = batch.x, batch.grad
        return lambda: ((transposed @ grad.T).T, (grad.T @ x)[rows, columns])

    return bind


def _if_large(case: Case) -> str:
    work = case.batch * case.layer.n_in * case.layer.n_out
    return "takes seconds" if work > 1 << 33 else ""
