"""A contender: one way to compute an operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.problems import FULL, Batch, Precision, Problem
from srigl_core.benchmarks.timing import Context

__all__ = [
    "Bind",
    "Call",
    "Contender",
    "gradients_read",
    "product_read",
    "unless_ablated",
    "unless_compiled",
]

Call = Callable[[], Any]
Bind = Callable[[Batch], Call]
Read = Callable[[Any], Mapping[str, Any]]


def product_read(result: Any) -> dict[str, Any]:
    """Return the product by its name; a vector is the product of one input."""
    return {"y": result}


def gradients_read(result: Any) -> dict[str, Any]:
    """Return a pair of gradients by name; that of the weight may be of all its entries."""
    dx, dvalues = result
    return {"dx": dx, "dvalues": dvalues}


def unless_ablated(case: Case) -> str:
    """Leave out layers without ablated neurons."""
    return "" if case.layer.is_ablated else "no neuron is ablated"


def unless_compiled(case: Case) -> str:
    """Leave out cases that are not measured with contenders compiled for the shape."""
    return "" if case.compiled else "compiles for each shape; measured in a few cases only"


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to compute an operation.

    Parameters
    ----------
    name : str
    family : str
        "ours", "external" (the kernel that the user names), "dense" (in the dtype of the case),
        "tf32", "fp16", "bf16", "csr", "gather", "fewer neurons", "other". Ours is compared with
        the best contender of each family.
    operation : {"forward", "backward", "update"}
    prepare : callable
        Does what is done once for a problem's weight, which is not timed. Returns a function that
        takes a batch and returns the call to be timed. The call takes no arguments and makes new
        result arrays.
    read : callable
        Returns the arrays of the call's result by name: "y", "dx" and "dvalues", or "mask".
    precision : Precision
    problem : callable
        Returns the problem to solve, where that differs.
    around : callable
        Returns the context in which it is called.
    unfit : callable
        Returns why a case is left out, or "".
    """

    name: str
    family: str
    operation: str
    prepare: Callable[[Problem], Bind]
    read: Read = product_read
    precision: Precision = FULL
    problem: Callable[[Problem], Problem] = lambda problem: problem
    around: Context = nullcontext
    unfit: Callable[[Case], str] = lambda case: ""
