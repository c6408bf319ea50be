"""Dense products in int8 of OpenVINO, with a fixed range of the inputs."""

from __future__ import annotations

import numpy as np
import openvino
from openvino import opset13 as operations

from srigl_core.backends.numba_cpu.processor import target_features
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.active_rows import without_ablated_rows
from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender
from srigl_core.benchmarks.contenders.dense_int8 import dense_int8, int8_weight, is_float32
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["contenders"]

_STEPS = 254
_OF_INPUTS = 1 / _STEPS
"""Half of the steps from minus the largest magnitude to the largest."""

_EXACT_SUMS = {"avx512vnni", "avxvnni", "dotprod"}
"""Features of processors with instructions that add products in 32 bits."""


def contenders(device: str) -> list[Contender]:
    """Return the product, and with the active neurons alone.

    The range of the inputs is that of the batch, measured beforehand, as by a calibration that
    misses nothing. The result is OpenVINO's own, which the next call overwrites.
    """
    name = "OpenVINO int8, range known"
    made = dense_int8(name, _product, of_inputs=_OF_INPUTS, unfit=_unfit)
    return [made, without_ablated_rows(made, "int8")]


def _product(problem: Problem) -> Bind:
    values, scale = int8_weight(problem)
    core = openvino.Core()

    def bind(batch: Batch) -> Call:
        x = operations.parameter(list(batch.x.shape), openvino.Type.f32)
        largest = np.abs(batch.x).max()
        limits = [operations.constant(limit) for limit in (-largest, largest) * 2]
        rounded = operations.fake_quantize(x, *limits, _STEPS + 1)
        weight = operations.multiply(
            operations.convert(operations.constant(values), openvino.Type.f32),
            operations.constant(scale[:, None]),
        )
        product = operations.matmul(rounded, weight, False, True)
        y = operations.add(product, operations.constant(problem.bias[None]))
        settings = {
            "INFERENCE_NUM_THREADS": batch.threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = core.compile_model(openvino.Model([y], [x], "layer"), "CPU", settings)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(batch.x, shared_memory=True))

        def call() -> object:
            request.infer()
            return request.get_output_tensor().data

        return call

    return bind


def _unfit(case: Case) -> str:
    saturates = not _EXACT_SUMS & target_features()
    return is_float32(case) or ("its 16-bit sums saturate without VNNI" if saturates else "")
