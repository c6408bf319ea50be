"""The trained network as a file, and what every backend makes of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from srigl_core import (
    Backend,
    CondensedWeight,
    FileFormatError,
    get_backend,
    list_backends,
    load_condensed,
    prepare,
    save_condensed,
)
from srigl_core.demo.dataset import Digits
from srigl_core.demo.mlp import Mlp, activation_after

__all__ = ["Agreement", "CondensedMlp", "agreements", "cpu_backends"]

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class CondensedMlp:
    """A network of condensed weights.

    Parameters
    ----------
    weights : dict of str to CondensedWeight
        In network order.
    biases : dict of str to ndarray of float32
    """

    weights: dict[str, CondensedWeight]
    biases: dict[str, FloatArray]

    @classmethod
    def from_masked(cls, network: Mlp, masks: dict[str, NDArray[np.bool_]]) -> CondensedMlp:
        """Return the condensed form of a masked dense network."""
        return cls(
            {
                name: CondensedWeight.from_dense(weight, masks[name])
                for name, weight in network.weights.items()
            },
            dict(network.biases),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], names: list[str]) -> CondensedMlp:
        """Read the layers called `names`, in network order, as written by `save`.

        Raises
        ------
        FileFormatError
            If the file is damaged, or lacks a layer.
        """
        tensors = load_condensed(path)
        network = cls({}, {})
        for name in names:
            weight, bias = tensors.get(name), tensors.get(f"{name}.bias")
            if not isinstance(weight, CondensedWeight) or not isinstance(bias, np.ndarray):
                raise FileFormatError(f"{os.fspath(path)!r} lacks the layer {name!r} or its bias")
            network.weights[name], network.biases[name] = weight, bias
        return network

    def save(self, path: Path) -> None:
        """Write weights and biases to one safetensors file."""
        biases = {f"{name}.bias": bias for name, bias in self.biases.items()}
        save_condensed(path, {**self.weights, **biases})

    def on(
        self, backend: Backend, *, threads: int | None = None
    ) -> Callable[[FloatArray], FloatArray]:
        """Return the forward pass, from images to logits, laid out for `backend`."""
        plans = {
            name: prepare(weight, backend=backend, threads=threads)
            for name, weight in self.weights.items()
        }

        def forward(x: FloatArray) -> FloatArray:
            for name, plan in plans.items():
                x = plan(x, self.biases[name], activation=activation_after(name))
            return x

        return forward

    def to_masked(self) -> Mlp:
        """Return the same network with dense weights, zero where not active."""
        dense = {name: weight.to_dense() for name, weight in self.weights.items()}
        return Mlp(dense, dict(self.biases))

    def layer(self, name: str) -> CondensedMlp:
        """Return one layer alone."""
        return CondensedMlp({name: self.weights[name]}, {name: self.biases[name]})

    def nbytes(self, form: str) -> int:
        """Return the bytes of weights and biases, the weights "dense", "csr" or "condensed"."""
        total = sum(getattr(weight.memory_report(), form) for weight in self.weights.values())
        return int(total) + sum(bias.nbytes for bias in self.biases.values())


@dataclass(frozen=True)
class Agreement:
    """What a backend makes of the test images, next to the masked dense network.

    Parameters
    ----------
    backend : str
    accuracy : float
        On the test images, in [0, 1].
    n_same, n_images : int
        Images on which both predict the same digit, and images in all.
    largest_difference : float
        Between their logits.
    """

    backend: str
    accuracy: float
    n_same: int
    n_images: int
    largest_difference: float

    @property
    def agrees(self) -> bool:
        """Whether every prediction is the same."""
        return self.n_same == self.n_images


def cpu_backends() -> list[Backend]:
    """Return every backend that can run here on arrays of NumPy, the preferred one first."""
    return [
        get_backend(status.name)
        for status in list_backends()
        if status.capabilities is not None
        and status.capabilities.device == "cpu"
        and "condensed_matmul" in status.capabilities.operations
    ]


def agreements(condensed: CondensedMlp, masked: Mlp, data: Digits) -> list[Agreement]:
    """Run the test images through every available backend.

    Parameters
    ----------
    condensed : CondensedMlp
        As loaded.
    masked : Mlp
        As trained.
    data : Digits

    Returns
    -------
    list of Agreement
        One for each backend of `cpu_backends`.
    """
    expected = masked.forward(data.test_x)[-1]
    found = []
    for backend in cpu_backends():
        logits = condensed.on(backend)(data.test_x)
        predicted = np.argmax(logits, axis=1)
        found.append(
            Agreement(
                backend=backend.name,
                accuracy=float(np.mean(predicted == data.test_y)),
                n_same=int(np.count_nonzero(predicted == np.argmax(expected, axis=1))),
                n_images=data.test_y.size,
                largest_difference=float(np.abs(logits - expected).max()),
            )
        )
    return found
