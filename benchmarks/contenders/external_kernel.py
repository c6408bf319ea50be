"""An external kernel, one that the user names, through the public plan as ours is."""

from __future__ import annotations

from srigl_core._arrays.dtypes import index_dtype
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import Bind, Contender
from srigl_core.benchmarks.contenders.ours import gradients, product, update
from srigl_core.benchmarks.problems import Problem
from srigl_core.contract import Backend
from srigl_core.testing.kernel_capabilities import capabilities_of

__all__ = ["contenders", "takes"]

_OPERATIONS = {
    "forward": "condensed_matmul",
    "backward": "condensed_matmul_backward",
    "update": "update_mask",
}
"""Operations of the contract, by the names that cases use."""


def contenders(backend: Backend) -> list[Contender]:
    """Return the operations that a backend offers, as contenders of the family "external"."""
    capabilities = capabilities_of(backend)

    def with_bias_outside(problem: Problem) -> Bind:
        plan, bias = problem.plan(backend), problem.bias
        return lambda batch: lambda: plan(batch.x) + bias

    prepared = {
        "forward": product(backend) if capabilities.bias else with_bias_outside,
        "backward": gradients(backend),
        "update": update(backend),
    }
    return [
        Contender(backend.name, "external", operation, prepare)
        for operation, prepare in prepared.items()
        if _OPERATIONS[operation] in capabilities.operations
    ]


def takes(backend: Backend, case: Case) -> bool:
    """Return whether a backend declares that it computes a case."""
    capabilities, layer = capabilities_of(backend), case.layer
    return (
        _OPERATIONS[case.operation] in capabilities.operations
        and case.dtype in capabilities.value_dtypes
        and (
            case.operation == "update" or index_dtype(layer.n_in).name in capabilities.index_dtypes
        )
        and (capabilities.ablation or not layer.is_ablated)
    )
