"""Ours: the public plan on ordinary arrays of NumPy, result included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

import srigl_core
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender
from srigl_core.benchmarks.problems import Batch, Problem
from srigl_core.benchmarks.results import OURS
from srigl_core.contract import Backend

__all__ = ["contenders", "gradients", "gradients_read", "mask_read", "product", "update"]

_MOST_WORK_FOR_SCIPY = 1 << 28
_SLOWEST_REFERENCE = 1 << 23
"""Places in the largest weight that the reference updates here; more take it seconds."""


def contenders() -> list[Contender]:
    """Return the fast backend with all its value types, and the two that it is compared with."""
    srigl_core.get_backend("numba")
    return [
        Contender(OURS, "ours", "forward", product("numba")),
        *(
            Contender(
                f"{OURS}, {dtype} values",
                "ours",
                "forward",
                product("numba"),
                values=dtype,
                unfit=_if_narrow_is_not_asked,
            )
            for dtype in ("bfloat16", "float16")
        ),
        Contender("srigl scipy", "other", "forward", product("scipy"), unfit=_if_not_for_scipy),
        Contender(OURS, "ours", "backward", gradients("numba"), read=gradients_read),
        Contender(OURS, "ours", "update", update("numba"), read=mask_read),
        Contender(
            "srigl reference",
            "other",
            "update",
            update("reference"),
            read=mask_read,
            unfit=_if_large,
        ),
    ]


def product(backend: str | Backend) -> Callable[[Problem], Bind]:
    """Return what prepares a plan of that backend."""

    def prepare(problem: Problem) -> Bind:
        plan = srigl_core.prepare(problem.weight, backend=backend)
        bias = problem.bias
        return lambda batch: lambda: plan(batch.x, bias, threads=batch.threads)

    return prepare


def gradients(backend: str | Backend) -> Callable[[Problem], Bind]:
    """Return what prepares a plan of that backend, for the gradients."""

    def prepare(problem: Problem) -> Bind:
        plan = srigl_core.prepare(problem.weight, backend=backend)
        wrt = ("x", "values")
        return lambda batch: (
            lambda: plan.backward(batch.grad, batch.x, wrt=wrt, threads=batch.threads)
        )

    return prepare


def gradients_read(result: Any, problem: Problem) -> dict[str, NDArray[Any]]:
    """Return both gradients."""
    return {"dx": result.x, "dvalues": result.values}


def update(backend: str | Backend) -> Callable[[Problem], Bind]:
    """Return what prepares mask updates by that backend."""

    def prepare(problem: Problem) -> Bind:
        arrays, settings = problem.update_inputs, problem.update_settings

        def bind(batch: Batch) -> Call:
            n = batch.threads
            return lambda: srigl_core.update_mask(*arrays, **settings, backend=backend, threads=n)

        return bind

    return prepare


def mask_read(result: Any, problem: Problem) -> dict[str, NDArray[Any]]:
    """Return the new mask."""
    return {"mask": result.mask}


def _if_narrow_is_not_asked(case: Case) -> str:
    return "" if case.narrow else "only where 16-bit values are asked for"


def _if_not_for_scipy(case: Case) -> str:
    if case.threads > 1 or case.cold:
        return "measured hot, on one thread"
    work = case.batch * case.layer.n_active * case.layer.fan_in
    return "takes seconds" if work > _MOST_WORK_FOR_SCIPY else ""


def _if_large(case: Case) -> str:
    if case.threads > 1:
        return "has one thread"
    large = case.layer.n_in * case.layer.n_out > _SLOWEST_REFERENCE
    return "takes seconds" if large else ""
