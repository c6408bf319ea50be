"""What a contender on a GPU is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.problems import Batch

if TYPE_CHECKING:  # it imports PyTorch
    from srigl_core.benchmarks.on_gpu.problems import DeviceProblem, Precision

__all__ = ["Bind", "Call", "DeviceContender", "always_fit", "gradients_read", "product_read"]

Call = Callable[[], Any]
Bind = Callable[[Batch], Call]


def product_read(result: Any) -> dict[str, Any]:
    """Return the product, (batch, n_out); a vector is one input's."""
    return {"y": result[None] if result.ndim == 1 else result}


def gradients_read(result: Any) -> dict[str, Any]:
    """Return both gradients; that of the weight may be of all its places."""
    dx, dvalues = result
    return {"dx": dx, "dvalues": dvalues}


def always_fit(case: Case) -> str:
    """Return no reason not to take part."""
    return ""


def _itself(problem: DeviceProblem) -> DeviceProblem:
    return problem


@dataclass(frozen=True, eq=False)
class DeviceContender:
    """One way to compute an operation on a GPU.

    Parameters
    ----------
    name : str
    family : str
        "ours", "dense" (float32), "tf32", "fp16", "bf16", "csr", "gather", "other", or "fewer
        neurons" with a type; ours is compared with the best of each.
    operation : {"forward", "backward", "update"}
    precision : Precision
        In which numbers it computes.
    prepare : callable of DeviceProblem
        What is done once for a weight, and not timed. Returns a function that takes a batch and
        returns the call to be timed, without arguments; that one makes new result arrays.
    read : callable of the call's result
        PyTorch's tensors by name, to be checked.
    problem : callable of DeviceProblem
        Returns the one that it solves, where that is another.
    around : callable
        Returns the context to call it in.
    unfit : callable of Case
        Why it does not take part, or "".
    """

    name: str
    family: str
    operation: str
    precision: Precision
    prepare: Callable[[DeviceProblem], Bind]
    read: Callable[[Any], Mapping[str, Any]] = product_read
    problem: Callable[[DeviceProblem], DeviceProblem] = _itself
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    unfit: Callable[[Case], str] = always_fit
