"""A condensed ReLU network to deploy: one file, and its forward pass on any backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from srigl_core import (
    Backend,
    CondensedWeight,
    get_backend,
    list_backends,
    load_condensed,
    prepare,
    save_condensed,
)
from srigl_core.benchmarks.reproduce.datasets import Dataset
from srigl_core.benchmarks.reproduce.mlp import FloatArray, Masks, Mlp, activation_after


@dataclass(frozen=True, eq=False)
class CondensedMlp:
    """Condensed weights and biases by layer, and the scaling of the inputs."""

    weights: dict[str, CondensedWeight]
    biases: dict[str, FloatArray]
    mean: FloatArray
    scale: FloatArray

    @classmethod
    def from_masked(cls, network: Mlp, masks: Masks, data: Dataset) -> CondensedMlp:
        """Condense a masked dense network."""
        weights = network.weights.items()
        condensed = {
            name: CondensedWeight.from_dense(weight, masks[name]) for name, weight in weights
        }
        return cls(condensed, dict(network.biases), data.mean, data.scale)

    def save(self, path: Path) -> None:
        """Write all that predicting needs to one safetensors file."""
        biases = {f"{name}.bias": bias for name, bias in self.biases.items()}
        scaling = {"input.mean": self.mean, "input.scale": self.scale}
        activations = {name: activation_after(name) for name in self.weights}
        save_condensed(
            path,
            {**self.weights, **biases, **scaling},
            metadata={"activations": json.dumps(activations)},
        )

    @classmethod
    def load(cls, path: Path) -> CondensedMlp:
        """Read a network from its file."""
        tensors: dict[str, Any] = load_condensed(path)
        with safe_open(path, "np") as file:
            names = json.loads(file.metadata()["activations"])
        return cls(
            {name: tensors[name] for name in names},
            {name: tensors[f"{name}.bias"] for name in names},
            tensors["input.mean"],
            tensors["input.scale"],
        )

    def to_masked(self) -> Mlp:
        """Return the network with dense weights, for scaled inputs."""
        weights = {name: weight.to_dense() for name, weight in self.weights.items()}
        return Mlp(weights, dict(self.biases))

    def on(
        self, backend: Backend | None = None, *, threads: int | None = None
    ) -> Callable[[FloatArray], FloatArray]:
        """Return the forward pass, from scaled inputs to logits, with weights prepared."""
        plans = {
            name: prepare(weight, backend=backend, threads=threads)
            for name, weight in self.weights.items()
        }

        def forward(x: FloatArray) -> FloatArray:
            for name, plan in plans.items():
                x = plan(x, self.biases[name], activation=activation_after(name))
            return x

        return forward

    def nbytes(self, form: str) -> int:
        """Return the bytes of weights and biases, with "dense", "csr" or "condensed" weights."""
        total = sum(getattr(weight.memory_report(), form) for weight in self.weights.values())
        return int(total) + sum(bias.nbytes for bias in self.biases.values())


def cpu_backends() -> Sequence[Backend]:
    """Return every backend that can multiply NumPy arrays on this machine."""
    return [
        get_backend(status.name)
        for status in list_backends()
        if status.capabilities is not None
        and status.capabilities.device == "cpu"
        and "condensed_matmul" in status.capabilities.operations
    ]
