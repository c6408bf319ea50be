"""Our kernels through the public plan, with the allocation of the result included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import srigl_core
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import (
    Bind,
    Call,
    Contender,
    unless,
    unless_ablated,
    unless_long,
)
from srigl_core.benchmarks.contenders.dense_int8 import OF_WEIGHTS, is_float32
from srigl_core.benchmarks.problems import BFLOAT16, FLOAT16, FULL, Batch, Precision, Problem
from srigl_core.benchmarks.results import OURS
from srigl_core.contract import Backend

__all__ = ["contenders", "gpu_contenders", "gradients", "product", "update"]

_INT8 = {
    "int8 weights": ("float", Precision(of_weights=OF_WEIGHTS)),
    "int8 weights and inputs": ("int8", Precision(of_weights=OF_WEIGHTS, of_inputs=1 / 254)),
}
"""Our products in int8: which inputs they take, and half a step of what is rounded."""

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
    is_narrow = unless(lambda case: case.narrow, "16-bit values are measured in a few cases only")
    return [
        Contender(ours, "ours", "forward", product("numba")),
        Contender("srigl scipy", "other", "forward", product("scipy"), unfit=_if_not_for_scipy),
        Contender(ours, "ours", "backward", gradients("numba")),
        Contender(ours, "ours", "update", update("numba")),
        Contender(
            "srigl reference", "other", "update", update("reference"), unfit=_if_slow_for_reference
        ),
        *(
            Contender(
                f"{ours}, {dtype} values",
                "ours",
                "forward",
                product("numba"),
                precision=Precision(values=dtype),
                unfit=is_narrow,
            )
            for dtype in ("bfloat16", "float16")
        ),
        *(
            Contender(
                f"{ours}, {name}",
                "ours",
                "forward",
                _quantized_product("numba", inputs),
                precision=precision,
                unfit=is_float32,
            )
            for name, (inputs, precision) in _INT8.items()
        ),
    ]


def gpu_contenders(backend: str) -> list[Contender]:
    """Return what is measured of a GPU backend."""
    ours = OURS["gpu"]
    made = []
    for precision in (FULL, FLOAT16, BFLOAT16):
        dtype = precision.values
        name, unfit = f"{ours} {dtype}".strip(), _if_long_to_pack(dtype)
        forward = Contender(
            name, "ours", "forward", product(backend), precision=precision, unfit=unfit
        )
        made += [forward, replace(forward, operation="backward", prepare=gradients(backend))]
    made += [
        Contender(
            f"{ours}, active neurons only",
            "ours",
            "forward",
            product(backend, compact=True),
            problem=Problem.active_neurons,
            unfit=unless_ablated,
        ),
        Contender(
            f"{ours}, int8 weights",
            "ours",
            "forward",
            _quantized_product(backend, "float"),
            precision=_INT8["int8 weights"][1],
            unfit=is_float32,
        ),
        Contender(ours, "ours", "update", update(backend)),
    ]
    return [replace(each, takes=Problem.for_backend) for each in made]


def product(backend: str | Backend, *, compact: bool = False) -> Callable[[Problem], Bind]:
    """Return a function that prepares products by a backend."""

    def prepare(problem: Problem) -> Bind:
        plan, bias = problem.plan(backend), problem.for_backend(problem.whole.bias)

        def bind(batch: Batch) -> Call:
            x, threads = batch.x, batch.threads
            if compact:
                return lambda: plan(x, bias, compact=True, threads=threads)
            return lambda: plan(x, bias, threads=threads)

        return bind

    return prepare


def _quantized_product(backend: str, inputs: str) -> Callable[[Problem], Bind]:
    def prepare(problem: Problem) -> Bind:
        plan = problem.quantized_plan(backend, inputs)
        bias = problem.for_backend(problem.whole.bias)
        return lambda batch: lambda: plan(batch.x, bias, threads=batch.threads)

    return prepare


def gradients(backend: str | Backend) -> Callable[[Problem], Bind]:
    """Return a function that prepares gradients by a backend."""

    def prepare(problem: Problem) -> Bind:
        plan = problem.plan(backend)

        def bind(batch: Batch) -> Call:
            def call() -> tuple[object, object]:
                result = plan.backward(
                    batch.grad, batch.x, wrt=("x", "values"), threads=batch.threads
                )
                return result.x, result.values

            return call

        return bind

    return prepare


def update(backend: str | Backend) -> Callable[[Problem], Bind]:
    """Return a function that prepares mask updates by a backend."""

    def prepare(problem: Problem) -> Bind:
        settings = {**problem.update_settings, "backend": backend}
        inputs = [problem.for_backend(problem.arrays.array(each)) for each in problem.update_inputs]
        return lambda batch: (
            lambda: srigl_core.update_mask(*inputs, **settings, threads=batch.threads).mask
        )

    return prepare


def _if_not_for_scipy(case: Case) -> str:
    if case.threads > 1 or case.cold:
        return "measured with hot caches, on one thread"
    return unless_long(case)


def _if_slow_for_reference(case: Case) -> str:
    if case.threads > 1:
        return "has one thread"
    is_large = case.layer.n_in * case.layer.n_out > _SLOWEST_REFERENCE
    return "takes seconds" if is_large else ""


def _if_long_to_pack(dtype: str) -> Callable[[Case], str]:
    def is_quick(case: Case) -> bool:
        nnz = case.layer.nnz
        return case.batch <= _STREAMED_BATCH or nnz <= _MOST_PACKED.get(dtype, nnz)

    return unless(is_quick, "packing this many connections again takes long; float32 is measured")
