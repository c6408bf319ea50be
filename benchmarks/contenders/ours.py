"""Our kernels through the public plan, with the allocation of the result included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import srigl_core
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import (
    Bind,
    Call,
    Contender,
    unless_ablated,
)
from srigl_core.benchmarks.problems import (
    BFLOAT16,
    FLOAT16,
    FULL,
    Batch,
    Precision,
    Problem,
)
from srigl_core.benchmarks.results import OURS
from srigl_core.contract import Backend

__all__ = [
    "contenders",
    "gpu_contenders",
    "gradients",
    "plan_gradients_read",
    "product",
    "update",
    "update_read",
]

_MOST_WORK_FOR_SCIPY = 1 << 28
_SLOWEST_REFERENCE = 1 << 23
"""Entries of the largest weight that the reference updates here; more takes it seconds."""

_STREAMED_BATCH = 8
"""Up to this batch, the weight is not packed for tiles."""

_MOST_PACKED = {"float16": 1 << 25, "bfloat16": 1 << 22}
"""Most connections to pack in these types: packing takes the host long, and float32 is measured."""


def contenders(device: str) -> list[Contender]:
    """Return the fast backend with all its value types, and the backends it is compared with."""
    if device == "gpu":
        return gpu_contenders("cupy")
    srigl_core.get_backend("numba")
    ours = OURS["cpu"]
    made = [
        Contender(ours, "ours", "forward", product("numba")),
        Contender("srigl scipy", "other", "forward", product("scipy"), unfit=_if_not_for_scipy),
        Contender(ours, "ours", "backward", gradients("numba"), plan_gradients_read),
        Contender(ours, "ours", "update", update("numba"), update_read),
    ]
    reference = replace(made[-1], name="srigl reference", family="other")
    made.append(replace(reference, prepare=update("reference"), unfit=_if_slow_for_reference))
    for dtype in ("bfloat16", "float16"):
        name, precision = f"{ours}, {dtype} values", Precision(values=dtype)
        narrow = Contender(name, "ours", "forward", product("numba", precision))
        made.append(replace(narrow, precision=precision, unfit=_unless_narrow))
    return made


def gpu_contenders(backend: str) -> list[Contender]:
    """Return what is measured of a GPU backend."""
    ours = OURS["gpu"]
    made = []
    for precision in (FULL, FLOAT16, BFLOAT16):
        dtype = precision.values
        name = f"{ours} {dtype}".strip()
        forward = Contender(name, "ours", "forward", product(backend, precision))
        backward = Contender(name, "ours", "backward", gradients(backend, precision))
        made += [
            replace(each, precision=precision, unfit=_if_long_to_pack(dtype))
            for each in (forward, replace(backward, read=plan_gradients_read))
        ]
    return [
        *made,
        Contender(
            f"{ours}, active neurons only",
            "ours",
            "forward",
            product(backend, compact=True),
            problem=Problem.active_neurons,
            unfit=unless_ablated,
        ),
        Contender(ours, "ours", "update", update(backend), update_read),
    ]


def product(
    backend: str | Backend, precision: Precision = FULL, *, compact: bool = False
) -> Callable[[Problem], Bind]:
    """Return a function that prepares products by a backend."""

    def prepare(problem: Problem) -> Bind:
        plan = problem.plan(backend, precision.values)
        bias = problem.arrays.for_backend(problem.whole.bias(precision.inputs))

        def bind(batch: Batch) -> Call:
            x, threads = _inputs(problem, batch.x, precision), batch.threads
            if compact:
                return lambda: plan(x, bias, compact=True, threads=threads)
            return lambda: plan(x, bias, threads=threads)

        return bind

    return prepare


def gradients(backend: str | Backend, precision: Precision = FULL) -> Callable[[Problem], Bind]:
    """Return a function that prepares gradients by a backend."""

    def prepare(problem: Problem) -> Bind:
        plan = problem.plan(backend, precision.values)

        def bind(batch: Batch) -> Call:
            x, grad = (_inputs(problem, part, precision) for part in (batch.x, batch.grad))
            wrt, threads = ("x", "values"), batch.threads
            return lambda: plan.backward(grad, x, wrt=wrt, threads=threads)

        return bind

    return prepare


def update(backend: str | Backend) -> Callable[[Problem], Bind]:
    """Return a function that prepares mask updates by a backend."""

    def prepare(problem: Problem) -> Bind:
        arrays, settings = problem.arrays, problem.update_settings
        inputs = [arrays.for_backend(arrays.array(each)) for each in problem.update_inputs]

        def bind(batch: Batch) -> Call:
            n = batch.threads
            return lambda: srigl_core.update_mask(*inputs, **settings, backend=backend, threads=n)

        return bind

    return prepare


def plan_gradients_read(result: Any) -> dict[str, Any]:
    """Return the gradients of `Plan.backward` by name."""
    return {"dx": result.x, "dvalues": result.values}


def update_read(result: Any) -> dict[str, Any]:
    """Return the mask of `update_mask` by name."""
    return {"mask": result.mask}


def _inputs(problem: Problem, array: Any, precision: Precision) -> Any:
    return problem.arrays.for_backend(problem.cast(array, precision.inputs))


def _unless_narrow(case: Case) -> str:
    return "" if case.narrow else "16-bit values are measured in a few cases only"


def _if_not_for_scipy(case: Case) -> str:
    if case.threads > 1 or case.cold:
        return "measured with hot caches, on one thread"
    return "takes seconds" if case.batch * case.layer.nnz > _MOST_WORK_FOR_SCIPY else ""


def _if_slow_for_reference(case: Case) -> str:
    if case.threads > 1:
        return "has one thread"
    is_large = case.layer.n_in * case.layer.n_out > _SLOWEST_REFERENCE
    return "takes seconds" if is_large else ""


def _if_long_to_pack(dtype: str) -> Callable[[Case], str]:
    def unfit(case: Case) -> str:
        nnz = case.layer.nnz
        if case.batch <= _STREAMED_BATCH or nnz <= _MOST_PACKED.get(dtype, nnz):
            return ""
        return "packing this many connections again takes long; float32 is measured"

    return unfit
