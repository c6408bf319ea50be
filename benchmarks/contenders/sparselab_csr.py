"""Products of sparselab's CSR, whose rows have room for connections that grow."""

from __future__ import annotations

import sparselab

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import Bind, Contender, unless, unless_long
from srigl_core.benchmarks.problems import Problem

__all__ = ["contenders"]


def contenders(device: str) -> list[Contender]:
    """Return the product."""
    is_float32 = unless(lambda case: case.dtype == "float32", "has float32 only")

    def unfit(case: Case) -> str:
        return is_float32(case) or unless_long(case)

    return [Contender("sparselab", "csr", "forward", _product, Problem.tensor, unfit=unfit)]


def _product(problem: Problem) -> Bind:
    """Transpose x with each call, as its linear layer does."""
    matrix = sparselab.PaddedCSR.from_dense(problem.tensor(problem.dense))
    bias = problem.tensor(problem.bias)
    return lambda batch: lambda: sparselab.spmm(matrix, batch.x.t().contiguous()).t() + bias
