"""Dense products of a layer's active neurons alone, where some are ablated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender, unless_ablated
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["without_ablated_rows"]


def without_ablated_rows(dense: Contender, family: str = "active rows") -> Contender:
    """Return a dense product without the rows of ablated neurons, which get their bias.

    The result has all neurons, as the layer's next one expects it.
    """

    def prepare(problem: Problem) -> Bind:
        weight, inner = problem.weight, dense.prepare(problem.active_neurons())
        n_out, bias = weight.shape[0], problem.bias

        def bind(batch: Batch) -> Call:
            rows = len(batch.x)
            product = inner(batch)
            places = (np.arange(rows)[:, None] * n_out + weight.active).reshape(-1)

            def call() -> object:
                y = np.empty((rows, n_out), bias.dtype)
                y[:] = bias
                y.reshape(-1)[places] = np.asarray(product()).reshape(-1)
                return y

            return call

        return bind

    def unfit(case: Case) -> str:
        return unless_ablated(case) or dense.unfit(case)

    name = f"{dense.name}, ablated rows dropped"
    return replace(dense, name=name, family=family, prepare=prepare, unfit=unfit)
