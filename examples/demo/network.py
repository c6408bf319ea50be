"""A ReLU network: with dense weights to train, and with condensed weights to deploy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core import (
    Backend,
    CondensedWeight,
    get_backend,
    list_backends,
    load_condensed,
    prepare,
    save_condensed,
)
from srigl_core.reference import sparse_init

FloatArray = NDArray[np.float32]
Masks = Mapping[str, NDArray[np.bool_]]


def layer_shapes(widths: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return the weight shape (n_out, n_in) of each layer: hidden1, hidden2, ..., output."""
    names = [f"hidden{i}" for i in range(1, len(widths) - 1)] + ["output"]
    return {name: (widths[i + 1], widths[i]) for i, name in enumerate(names)}


def activation_after(layer: str) -> str | None:
    """Return the activation of a layer."""
    return None if layer == "output" else "relu"


@dataclass(frozen=True, eq=False)
class Mlp:
    """Dense weights, zero where inactive, and biases by layer; gradients have the same form."""

    weights: dict[str, FloatArray]
    biases: dict[str, FloatArray]

    @classmethod
    def initialised(cls, masks: Masks, rng: np.random.Generator) -> Mlp:
        """Draw the weights of a network, scaled by the fan-in of each neuron."""
        return cls(
            {name: sparse_init(mask, "kaiming_normal", rng=rng) for name, mask in masks.items()},
            {name: np.zeros(mask.shape[0], np.float32) for name, mask in masks.items()},
        )

    def forward(self, x: FloatArray) -> list[FloatArray]:
        """Return the input of every layer, and the logits last."""
        inputs = [x]
        for name, weight in self.weights.items():
            z = inputs[-1] @ weight.T
            z += self.biases[name]
            inputs.append(np.maximum(z, 0, out=z) if activation_after(name) else z)
        return inputs

    def gradients(self, x: FloatArray, labels: NDArray[np.int64]) -> Mlp:
        """Return the dense gradients of the mean cross-entropy, inactive weights included."""
        inputs = self.forward(x)
        logits = inputs.pop()
        grad = np.exp(logits - logits.max(axis=1, keepdims=True))
        grad /= grad.sum(axis=1, keepdims=True)
        grad[np.arange(labels.size), labels] -= 1
        grad /= labels.size
        gradients = Mlp({}, {})
        for name, weight in reversed(self.weights.items()):
            layer_input = inputs.pop()
            gradients.weights[name] = grad.T @ layer_input
            gradients.biases[name] = grad.sum(axis=0)
            if inputs:
                grad = grad @ weight
                grad *= layer_input > 0
        return gradients


@dataclass(frozen=True, eq=False)
class CondensedMlp:
    """Condensed weights and biases by layer."""

    weights: dict[str, CondensedWeight]
    biases: dict[str, FloatArray]

    @classmethod
    def from_masked(cls, network: Mlp, masks: Masks) -> CondensedMlp:
        """Condense a masked dense network."""
        weights = network.weights.items()
        condensed = {
            name: CondensedWeight.from_dense(weight, masks[name]) for name, weight in weights
        }
        return cls(condensed, dict(network.biases))

    def save(self, path: Path) -> None:
        """Write weights and biases to one safetensors file."""
        biases = {f"{name}.bias": bias for name, bias in self.biases.items()}
        save_condensed(path, {**self.weights, **biases})

    @classmethod
    def load(cls, path: Path, names: Sequence[str]) -> CondensedMlp:
        """Read the layers `names`, in network order."""
        tensors: dict[str, Any] = load_condensed(path)
        return cls(
            {name: tensors[name] for name in names},
            {name: tensors[f"{name}.bias"] for name in names},
        )

    def to_masked(self) -> Mlp:
        """Return the network with dense weights."""
        weights = {name: weight.to_dense() for name, weight in self.weights.items()}
        return Mlp(weights, dict(self.biases))

    def layer(self, name: str) -> CondensedMlp:
        """Return a network of one layer."""
        return CondensedMlp({name: self.weights[name]}, {name: self.biases[name]})

    def on(
        self, backend: Backend, *, threads: int | None = None
    ) -> Callable[[FloatArray], FloatArray]:
        """Return the forward pass, from images to logits, with weights prepared for `backend`."""
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


def cpu_backends() -> list[Backend]:
    """Return every backend that can multiply NumPy arrays on this machine."""
    return [
        get_backend(status.name)
        for status in list_backends()
        if status.capabilities is not None
        and status.capabilities.device == "cpu"
        and "condensed_matmul" in status.capabilities.operations
    ]
