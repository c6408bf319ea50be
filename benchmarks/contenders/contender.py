"""A contender: one way to compute an operation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.problems import FULL, Batch, Precision, Problem
from srigl_core.benchmarks.timing import Call, Context

__all__ = [
    "Bind",
    "Call",
    "Contender",
    "unless",
    "unless_ablated",
    "unless_compiled",
    "unless_long",
]

_MOST_WORK = 1 << 28

Bind = Callable[[Batch], Call]
Unfit = Callable[[Case], str]


def unless(fits: Callable[[Case], bool], reason: str) -> Unfit:
    """Return a function that leaves out the cases that do not fit, for this reason."""
    return lambda case: "" if fits(case) else reason


unless_ablated = unless(lambda case: case.layer.is_ablated, "no neuron is ablated")
unless_compiled = unless(
    lambda case: case.compiled, "compiles for each shape; measured in a few cases only"
)
unless_long = unless(lambda case: case.batch * case.layer.nnz <= _MOST_WORK, "takes seconds")


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to compute an operation.

    `prepare` does what is done once for a problem's weight, which is not timed. It returns a
    function that takes a batch and returns the call to be timed. The call takes no arguments, and
    returns new arrays: the product, a pair of the gradients of x and of the values, or the mask.

    Ours is compared with the best contender of each family: "external" (the kernel that the user
    names), "dense" (in the dtype of the case), "int8", "tf32", "fp16", "bf16", "active rows" (dense
    products of the neurons that are not ablated), "csr", "csr, x transposed", "gather", "fewer
    neurons" (which compute less), "other".
    """

    name: str
    family: str
    operation: str
    prepare: Callable[[Problem], Bind]
    takes: Callable[[Problem, Any], Any] = lambda problem, array: array  # converts inputs, untimed
    precision: Precision = FULL
    problem: Callable[[Problem], Problem] = lambda problem: problem  # to solve instead
    around: Context = nullcontext  # in which it is called
    unfit: Unfit = lambda case: ""  # why a case is left out

    def bind(self, problem: Problem) -> Bind:
        """Prepare the weight of a problem; return what takes a batch of the whole problem."""
        prepared = self.prepare(problem)

        def taken(array: Any) -> Any:
            return None if array is None else self.takes(problem, problem.as_input(array))

        return lambda batch: prepared(replace(batch, x=taken(batch.x), grad=taken(batch.grad)))
