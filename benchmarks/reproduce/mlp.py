"""A ReLU network in NumPy: masked dense weights, and gradients of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from srigl_core.reference import sparse_init

__all__ = ["FloatArray", "Masks", "Mlp", "activation_after", "layer_shapes"]

FloatArray = NDArray[np.float32]
Masks = Mapping[str, NDArray[np.bool_]]


def layer_shapes(widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
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
