"""A ReLU network in plain NumPy: dense arrays, whose inactive weights are zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from srigl_core.reference import sparse_init

__all__ = ["Mlp", "activation_after", "layer_shapes"]

FloatArray = NDArray[np.float32]


def layer_shapes(widths: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return names and weight shapes, (n_out, n_in), of the layers between `widths`.

    Examples
    --------
    >>> layer_shapes((64, 512, 10))
    {'hidden1': (512, 64), 'output': (10, 512)}
    """
    n_hidden = len(widths) - 2
    names = [f"hidden{i + 1}" for i in range(n_hidden)] + ["output"]
    return {name: (widths[i + 1], widths[i]) for i, name in enumerate(names)}


def activation_after(layer: str) -> str | None:
    """Return the activation of a layer called as in `layer_shapes`."""
    return None if layer == "output" else "relu"


@dataclass(eq=False)
class Mlp:
    """Weights and biases by layer, in network order; also the form of their gradients.

    Parameters
    ----------
    weights : dict of str to ndarray of float32, (n_out, n_in)
    biases : dict of str to ndarray of float32, (n_out,)
    """

    weights: dict[str, FloatArray]
    biases: dict[str, FloatArray]

    @classmethod
    def initialised(cls, masks: Mapping[str, NDArray[np.bool_]], rng: np.random.Generator) -> Mlp:
        """Return a network for `masks`, each neuron's weights scaled by its own fan-in."""
        return cls(
            {name: sparse_init(mask, "kaiming_normal", rng=rng) for name, mask in masks.items()},
            {name: np.zeros(mask.shape[0], np.float32) for name, mask in masks.items()},
        )

    def forward(self, x: FloatArray) -> list[FloatArray]:
        """Return the input of every layer, and last the logits."""
        inputs = [x]
        for name, weight in self.weights.items():
            z = inputs[-1] @ weight.T
            z += self.biases[name]
            inputs.append(np.maximum(z, 0, out=z) if activation_after(name) else z)
        return inputs

    def gradients(self, x: FloatArray, labels: NDArray[np.int64]) -> Mlp:
        """Return the gradients of the mean cross-entropy: dense ones, inactive weights included."""
        inputs = self.forward(x)
        grad = _softmax(inputs.pop())
        grad[np.arange(labels.size), labels] -= 1
        grad /= labels.size
        found = Mlp({}, {})
        for name, weight in reversed(self.weights.items()):
            entered = inputs.pop()
            found.weights[name] = grad.T @ entered
            found.biases[name] = grad.sum(axis=0)
            if inputs:
                grad = grad @ weight
                grad *= entered > 0
        return found

    def predict(self, x: FloatArray) -> NDArray[np.int64]:
        """Return the class of each row of `x`."""
        classes: NDArray[np.int64] = np.argmax(self.forward(x)[-1], axis=1)
        return classes


def _softmax(logits: FloatArray) -> FloatArray:
    shares: FloatArray = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares
