"""Dense products in int8 of ONNX Runtime, as its ``quantize_dynamic`` makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.active_rows import without_ablated_rows
from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender
from srigl_core.benchmarks.contenders.dense_int8 import dense_int8, int8_weight, is_float32
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["contenders"]

_OF_INPUTS = 1 / 255
"""Inputs of a batch get 255 steps from the least to the largest."""


def contenders(device: str) -> list[Contender]:
    """Return the product, and with the active neurons alone."""
    made = dense_int8("ONNX Runtime int8", _product, of_inputs=_OF_INPUTS, unfit=_unfit)
    return [made, without_ablated_rows(made, "int8")]


def _product(problem: Problem) -> Bind:
    """Fuse quantisation, product, scaling and bias into one operator."""
    values, scale = int8_weight(problem)
    constants = {
        "weight": np.ascontiguousarray(values.T),
        "scale": scale,
        "zero_point": np.zeros(len(scale), np.int8),
        "bias": problem.bias,
    }
    model = _model(constants, problem.layer.n_in, len(scale))

    def bind(batch: Batch) -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = batch.threads or 1, 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = {"x": batch.x}
        return lambda: session.run(None, inputs)[0]

    return bind


def _model(constants: dict[str, Any], n_in: int, n_out: int) -> bytes:
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])]
        for name, size in (("x", n_in), ("y", n_out))
    )
    product = helper.make_node(
        "DynamicQuantizeMatMul", ["x", *constants], ["y"], domain="com.microsoft"
    )
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([product], "layer", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return bytes(model.SerializeToString())


def _unfit(case: Case) -> str:
    return is_float32(case) or ("cannot be held to AVX2" if case.is_avx2 else "")
