"""A kernel of somebody else's, through the public plan as ours is."""

from __future__ import annotations

from srigl_core._arrays.dtypes import index_dtype
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import Bind, Contender
from srigl_core.benchmarks.contenders.ours import (
    gradients,
    gradients_read,
    mask_read,
    product,
    update,
)
from srigl_core.benchmarks.problems import Problem
from srigl_core.contract import Backend
from srigl_core.testing.kernel_capabilities import capabilities_of

__all__ = ["contenders", "takes"]

_OPERATIONS = {
    "forward": "condensed_matmul",
    "backward": "condensed_matmul_backward",
    "update": "update_mask",
}
"""What the cases call the operations."""


def contenders(backend: Backend) -> list[Contender]:
    """Return what a backend offers, of the family "guest"."""
    able = capabilities_of(backend)

    def with_bias_outside(problem: Problem) -> Bind:
        plan = problem.weight.plan(backend)
        return lambda batch: lambda: plan(batch.x) + problem.bias

    forward = product(backend) if able.bias else with_bias_outside
    made = [
        Contender(backend.name, "guest", "forward", forward),
        Contender(backend.name, "guest", "backward", gradients(backend), read=gradients_read),
        Contender(backend.name, "guest", "update", update(backend), read=mask_read),
    ]
    return [one for one in made if _OPERATIONS[one.operation] in able.operations]


def takes(backend: Backend, case: Case) -> bool:
    """Return whether a backend declares that it takes on a case."""
    able, layer = capabilities_of(backend), case.layer
    return (
        _OPERATIONS[case.operation] in able.operations
        and case.dtype in able.value_dtypes
        and (case.operation == "update" or index_dtype(layer.n_in).name in able.index_dtypes)
        and (able.ablation or layer.n_active == layer.n_out)
    )
