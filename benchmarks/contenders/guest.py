"""A kernel of somebody else's, through the public plan as ours is."""

from __future__ import annotations

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

__all__ = ["OPERATIONS", "contenders"]

OPERATIONS = {
    "forward": "condensed_matmul",
    "backward": "condensed_matmul_backward",
    "update": "update_mask",
}
"""What the cases call the operations."""


def contenders(backend: Backend) -> list[Contender]:
    """Return what a backend offers, of the family "guest"."""
    able = capabilities_of(backend)

    def unfit(case: Case) -> str:
        return "" if case.dtype in able.value_dtypes else f"does not take {case.dtype}"

    def with_bias_outside(problem: Problem) -> Bind:
        plan = problem.weight.plan(backend)
        return lambda batch: lambda: plan(batch.x) + problem.bias

    forward = product(backend) if able.bias else with_bias_outside
    made = [
        Contender(backend.name, "guest", "forward", forward, unfit=unfit),
        Contender(
            backend.name, "guest", "backward", gradients(backend), read=gradients_read, unfit=unfit
        ),
        Contender(backend.name, "guest", "update", update(backend), read=mask_read, unfit=unfit),
    ]
    return [one for one in made if OPERATIONS[one.operation] in able.operations]
