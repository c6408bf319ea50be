"""CSR products by cuSPARSE, through CuPy."""

from __future__ import annotations

import cupy
import torch
from cupyx.scipy.sparse import csr_matrix as device_csr_matrix

from srigl_core.benchmarks.contenders.scipy_csr import csr_matrix
from srigl_core.benchmarks.on_gpu.contenders.contender import Bind, Call, DeviceContender
from srigl_core.benchmarks.on_gpu.problems import FLOAT32, DeviceProblem
from srigl_core.benchmarks.problems import Batch

__all__ = ["contenders"]


def contenders(device: str) -> list[DeviceContender]:
    """Return the product."""
    return [
        DeviceContender(
            "cupyx CSR",
            "csr",
            "forward",
            FLOAT32,
            _product,
            read=lambda result: {"y": torch.from_dlpack(result)},
        )
    ]


def _product(problem: DeviceProblem) -> Bind:
    matrix = device_csr_matrix(csr_matrix(problem.weight))
    matrix.has_canonical_format = True  # ask no more: that would wait for the device
    bias = cupy.from_dlpack(problem.bias("float32"))

    def bind(batch: Batch) -> Call:
        x = cupy.from_dlpack(batch.x)
        if len(x) == 1:
            vector = x[0]
            return lambda: (matrix @ vector + bias)[None]

        def product() -> cupy.ndarray:
            y = (matrix @ x.T).T
            y += bias
            return y

        return product

    return bind
