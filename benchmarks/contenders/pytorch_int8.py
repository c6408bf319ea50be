"""Dense products in int8 of PyTorch, as ``torch.ao``'s dynamically quantised linear layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from srigl_core.benchmarks.contenders.active_rows import without_ablated_rows
from srigl_core.benchmarks.contenders.contender import Bind, Contender
from srigl_core.benchmarks.contenders.dense_int8 import dense_int8, int8_weight
from srigl_core.benchmarks.problems import Problem

__all__ = ["contenders"]

_OF_INPUTS = 1 / 127
"""Inputs of a batch get 127 steps from the least to the largest, the default of these layers."""

_ENGINES = ("fbgemm", "onednn")
"""On x86; the engine named x86 takes one of them."""


def contenders(device: str) -> list[Contender]:
    """Return the product of each engine of this build, and with the active neurons alone."""
    torch.set_grad_enabled(False)
    supported = torch.backends.quantized.supported_engines
    engines = [engine for engine in _ENGINES if engine in supported] or ["qnnpack"]
    made = [
        dense_int8(
            f"torch int8, {engine}", _product(engine), of_inputs=_OF_INPUTS, takes=Problem.tensor
        )
        for engine in engines
        if engine in supported
    ]
    return [*made, *(without_ablated_rows(each, "int8") for each in made)]


def _product(engine: str) -> Callable[[Problem], Bind]:
    def prepare(problem: Problem) -> Bind:
        packed = _packed(problem, engine)
        linear = torch.ops.quantized.linear_dynamic
        return lambda batch: lambda: linear(batch.x, packed, True)

    return prepare


def _packed(problem: Problem, engine: str) -> Any:
    values, scale = int8_weight(problem)
    scales, zeros = torch.tensor(scale, dtype=torch.float64), torch.zeros(len(scale), dtype=int)
    quantized = torch.backends.quantized
    before, quantized.engine = quantized.engine, engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is on its way to another package
            weight = torch._make_per_channel_quantized_tensor(
                torch.from_numpy(values), scales, zeros, 0
            )
            return torch.ops.quantized.linear_prepack(weight, torch.from_numpy(problem.bias))
    finally:
        quantized.engine = before
