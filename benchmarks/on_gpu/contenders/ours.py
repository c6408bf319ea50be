"""Ours: the public plan on CuPy's arrays, result included.

CuPy's, since they cost the host least: a tensor of another library is borrowed through DLPack at
each call, and its stream asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import srigl_core
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.on_gpu.contenders.contender import Bind, Call, DeviceContender
from srigl_core.benchmarks.on_gpu.problems import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    DeviceProblem,
    Precision,
)
from srigl_core.benchmarks.problems import Batch
from srigl_core.benchmarks.results import OURS_ON_GPU

__all__ = ["ArrayKind", "contenders", "contenders_of_backend", "cupy_arrays"]

_STREAMED_BATCH = 8
"""Up to this the weight is not packed for tiles."""

_MOST_PACKED = {"float16": 1 << 25, "bfloat16": 1 << 22}
"""Connections; packing more takes the host long, and float32 shows how it goes."""


@dataclass(frozen=True)
class ArrayKind:
    """How a backend's arrays and PyTorch's tensors of the same memory become each other.

    Parameters
    ----------
    of_tensor, as_tensor : callable
    """

    of_tensor: Callable[[Any], Any]
    as_tensor: Callable[[Any], Any]


def contenders(device: str) -> list[DeviceContender]:
    """Return the GPU backend with all its value types."""
    return contenders_of_backend("cupy", cupy_arrays())


def contenders_of_backend(backend: str, arrays: ArrayKind) -> list[DeviceContender]:
    """Return what is measured of a backend, on its kind of arrays."""
    found = []
    for precision in (FLOAT32, FLOAT16, BFLOAT16):
        kind = precision.dtype
        name = OURS_ON_GPU if precision is FLOAT32 else f"{OURS_ON_GPU} {kind}"
        product, gradients = (
            make(backend, arrays, precision) for make in (_prepare_product, _prepare_gradients)
        )
        read = _product_reader(arrays)
        unfit = _unless_packed_soon(kind)
        found += [
            DeviceContender(name, "ours", "forward", precision, product, read=read, unfit=unfit),
            DeviceContender(
                name,
                "ours",
                "backward",
                precision,
                gradients,
                read=_gradients_reader(arrays),
                unfit=unfit,
            ),
        ]
    compact = _prepare_product(backend, arrays, FLOAT32, compact=True)
    return [
        *found,
        DeviceContender(
            f"{OURS_ON_GPU}, active neurons only",
            "ours",
            "forward",
            FLOAT32,
            compact,
            read=_product_reader(arrays),
            problem=DeviceProblem.active_only,
            unfit=_unless_ablated,
        ),
        DeviceContender(
            OURS_ON_GPU,
            "ours",
            "update",
            FLOAT32,
            _prepare_update(backend, arrays),
            read=lambda update: {"mask": arrays.as_tensor(update.mask)},
        ),
    ]


def cupy_arrays() -> ArrayKind:
    """Return how CuPy's arrays and PyTorch's tensors become each other, without a copy.

    Neither library lends the other its bfloat16 numbers: they pass as integers.
    """
    import cupy
    import ml_dtypes

    def of_tensor(tensor: Any) -> Any:
        if tensor.dtype == torch.bfloat16:
            return cupy.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
        if tensor.dtype == torch.bool:
            return cupy.from_dlpack(tensor.view(torch.uint8)).view(np.bool_)
        return cupy.from_dlpack(tensor)

    def as_tensor(array: Any) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype == np.bool_:
            return torch.from_dlpack(array.view(np.uint8)).view(torch.bool)
        return torch.from_dlpack(array)

    return ArrayKind(of_tensor, as_tensor)


def _prepare_product(
    backend: str, arrays: ArrayKind, precision: Precision, *, compact: bool = False
) -> Callable[[DeviceProblem], Bind]:
    def prepare(problem: DeviceProblem) -> Bind:
        plan = problem.condensed(precision.dtype).plan(backend)
        bias = arrays.of_tensor(problem.whole_bias(precision.dtype))

        def bind(batch: Batch) -> Call:
            x = _given(arrays, batch.x, precision)
            if compact:
                return lambda: plan(x, bias, compact=True)
            return lambda: plan(x, bias)

        return bind

    return prepare


def _prepare_gradients(
    backend: str, arrays: ArrayKind, precision: Precision
) -> Callable[[DeviceProblem], Bind]:
    def prepare(problem: DeviceProblem) -> Bind:
        plan = problem.condensed(precision.dtype).plan(backend)
        wrt = ("x", "values")

        def bind(batch: Batch) -> Call:
            x, grad = (_given(arrays, part, precision) for part in (batch.x, batch.grad))
            return lambda: plan.backward(grad, x, wrt=wrt)

        return bind

    return prepare


def _prepare_update(backend: str, arrays: ArrayKind) -> Callable[[DeviceProblem], Bind]:
    def prepare(problem: DeviceProblem) -> Bind:
        given = tuple(arrays.of_tensor(tensor) for tensor in problem.update_tensors)
        settings = problem.update.update_settings
        return lambda batch: lambda: srigl_core.update_mask(*given, **settings, backend=backend)

    return prepare


def _given(arrays: ArrayKind, tensor: Any, precision: Precision) -> Any:
    return arrays.of_tensor(tensor.to(getattr(torch, precision.dtype)))


def _product_reader(arrays: ArrayKind) -> Callable[[Any], dict[str, Any]]:
    return lambda result: {"y": arrays.as_tensor(result)}


def _gradients_reader(arrays: ArrayKind) -> Callable[[Any], dict[str, Any]]:
    return lambda result: {
        "dx": arrays.as_tensor(result.x),
        "dvalues": arrays.as_tensor(result.values),
    }


def _unless_packed_soon(dtype: str) -> Callable[[Case], str]:
    def unfit(case: Case) -> str:
        nnz = case.layer.n_active * case.layer.fan_in
        if case.batch <= _STREAMED_BATCH or nnz <= _MOST_PACKED.get(dtype, nnz):
            return ""
        return "packing so many connections once more takes long; float32 is measured"

    return unfit


def _unless_ablated(case: Case) -> str:
    return "" if case.layer.n_active < case.layer.n_out else "no neuron is ablated"
