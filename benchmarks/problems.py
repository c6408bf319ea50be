"""The arrays of one layer, and what every contender's result is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core import CondensedWeight
from srigl_core._arrays.dtypes import round_to, value_dtype
from srigl_core.benchmarks.cases import Layer
from srigl_core.errors import SriglError
from srigl_core.reference import update_mask

__all__ = ["Batch", "Problem", "WrongResultError", "check"]

Array = NDArray[Any]

DROP_FRACTION = 0.3


class WrongResultError(SriglError):
    """A contender computed something else than the reference."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of one case: NumPy's arrays, or on a GPU PyTorch's tensors, with 0 threads."""

    x: Any
    grad: Any
    threads: int


class Problem:
    """A layer's weight, bias and inputs, and the exact results in float64.

    Parameters
    ----------
    layer : Layer
    largest_batch : int
    dtype : str
        Of the values, the bias and the inputs.
    seed : int
        Another one gives another weight of the same numbers, with the same inputs.

    Attributes
    ----------
    weight : CondensedWeight
    dense : ndarray, (n_out, n_in)
    bias : ndarray, (n_out,)
    """

    def __init__(self, layer: Layer, largest_batch: int, dtype: str, *, seed: int = 0) -> None:
        self.layer, self.dtype = layer, np.dtype(dtype)
        shape = (layer.n_out, layer.n_in)
        weight = layer.weight
        if weight is None or seed:
            weight = CondensedWeight.random(
                shape, fan_in=layer.fan_in, n_active=layer.n_active, dtype=dtype, rng=seed
            )
        self.weight = weight
        rng = np.random.default_rng(12345)
        self.bias = rng.standard_normal(layer.n_out).astype(self.dtype)
        self._x = rng.standard_normal((largest_batch, layer.n_in), np.float32).astype(self.dtype)
        grad = rng.standard_normal((largest_batch, layer.n_out), np.float32)
        self._grad = grad.astype(self.dtype)

    @cached_property
    def dense(self) -> Array:
        """The masked dense weight."""
        return self.weight.to_dense()

    def narrowed(self, dtype: str) -> Problem:
        """Return the problem with the weight's values rounded to `dtype`, and all else as it is."""
        other = object.__new__(Problem)
        other.layer, other.dtype, other.bias = self.layer, self.dtype, self.bias
        other._x, other._grad = self._x, self._grad
        weight = self.weight
        values = round_to(weight.values, value_dtype(dtype))
        other.weight = CondensedWeight(values, weight.indices, weight.active, weight.shape)
        return other

    def cut(self, share: float) -> Problem:
        """Return the problem of the first neurons, that share of all; for products alone."""
        rows = round(share * self.layer.n_out)
        other = object.__new__(Problem)
        other.layer, other.dtype, other.weight = self.layer, self.dtype, self.weight
        other._x, other._grad = self._x, self._grad
        other.bias, other.dense = self.bias[:rows], self.dense[:rows]
        other.forward_results = {
            name: (exact[:, :rows], bound[:, :rows])
            for name, (exact, bound) in self.forward_results.items()
        }
        return other

    def batch(self, size: int, threads: int) -> Batch:
        """Return the first `size` inputs."""
        return Batch(self._x[:size], self._grad[:size], threads)

    @cached_property
    def update_inputs(self) -> tuple[Array, Array, NDArray[np.bool_]]:
        """The dense weight, gradient and mask of an update; no two magnitudes are the same.

        So there are no ties, and an implementation with another order among them agrees.
        """
        rng = np.random.default_rng(54321)
        mask = self.weight.to_mask()
        weight, grad = (_distinct(mask.shape, rng) for _ in range(2))
        return np.where(mask, weight, np.float32(0)), grad, mask

    @property
    def update_settings(self) -> dict[str, Any]:
        """The settings of an update."""
        return {"nnz_budget": self.weight.nnz, "drop_fraction": DROP_FRACTION}

    @cached_property
    def forward_results(self) -> dict[str, tuple[Array, Array]]:
        """The product of the largest batch, and how far rounding may take one from it."""
        x, dense = self._x.astype(np.float64), self.dense.astype(np.float64)
        bias = self.bias.astype(np.float64)
        sizes = _norms(x, 1)[:, None] * _norms(dense, 1)[None] + np.abs(bias)
        return {"y": (x @ dense.T + bias, self._roundoff(self.layer.fan_in) * sizes)}

    def backward_results(self, size: int) -> dict[str, tuple[Array, Array]]:
        """Return the gradients of the first `size` inputs, and what rounding may do to them."""
        x, grad = self._x[:size].astype(np.float64), self._grad[:size].astype(np.float64)
        dense, weight = self.dense.astype(np.float64), self.weight
        rows, columns = weight.active[:, None], weight.indices.astype(np.intp)
        dx_sizes = _norms(grad, 1)[:, None] * _norms(dense, 0)[None]
        dvalues_sizes = _norms(grad, 0)[rows] * _norms(x, 0)[columns]
        most_terms = int(np.count_nonzero(dense, axis=0).max())
        return {
            "dx": (grad @ dense, self._roundoff(most_terms) * dx_sizes),
            "dvalues": ((grad.T @ x)[rows, columns], self._roundoff(size) * dvalues_sizes),
        }

    @cached_property
    def update_results(self) -> dict[str, tuple[Array, Array]]:
        """The reference's mask; no other will do."""
        mask = update_mask(*self.update_inputs, **self.update_settings).mask
        return {"mask": (mask.astype(np.float64), np.zeros((1, 1)))}

    def results(self, operation: str, size: int) -> dict[str, tuple[Array, Array]]:
        """Return what an operation gives on the first `size` inputs, by name, with its bound."""
        if operation == "update":
            return self.update_results
        if operation == "backward":
            return self.backward_results(size)
        return {
            name: (exact[:size], bound[:size])
            for name, (exact, bound) in self.forward_results.items()
        }

    def _roundoff(self, terms: int) -> float:
        """Return the relative error of a sum of so many products, in any order, and twice that.

        Relative to the norms of the two factors, which is more than the sum of magnitudes.
        """
        unit = 2.0**-53 if self.dtype == np.float64 else 2.0**-24
        return 2 * (terms + 2) * unit


def check(name: str, got: Mapping[str, Array], expected: Mapping[str, tuple[Array, Array]]) -> None:
    """Raise WrongResultError if a contender's arrays are not what they should be."""
    for what, (exact, bound) in expected.items():
        array = np.asarray(got[what])
        if array.shape != exact.shape:
            raise WrongResultError(
                f"{name}: {what} has shape {array.shape}, but should have {exact.shape}"
            )
        error = np.abs(array - exact)
        if not (error <= bound).all():
            at = tuple(int(i) for i in np.argwhere(~(error <= bound))[0])
            raise WrongResultError(
                f"{name}: {what} is wrong at {at}: {array[at]!r}, but should be {exact[at]!r}"
            )


def _norms(array: Array, axis: int) -> Array:
    norms: Array = np.sqrt(np.einsum("ij,ij->i" if axis == 1 else "ij,ij->j", array, array))
    return norms


def _distinct(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return normal numbers of which no two have the same magnitude."""
    size = int(np.prod(shape))
    magnitudes = np.sort(np.abs(rng.standard_normal(size, np.float32)))
    steps = np.arange(size)
    bits = np.maximum.accumulate(magnitudes.view(np.int32) - steps) + steps
    distinct = bits.astype(np.int32).view(np.float32) * rng.choice([-1, 1], size)
    result: NDArray[np.float32] = rng.permutation(distinct.astype(np.float32)).reshape(shape)
    return result
