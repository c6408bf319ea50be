"""The arrays of one layer, and the check of every contender's result against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import srigl_core
from srigl_core import CondensedWeight, UpdateSettings
from srigl_core._arrays.dtypes import value_dtype
from srigl_core.benchmarks.arrays import Arrays
from srigl_core.benchmarks.cases import Layer
from srigl_core.contract import Backend
from srigl_core.errors import SriglError
from srigl_core.reference import update_mask

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "FULL",
    "RESULTS",
    "TF32",
    "Batch",
    "Precision",
    "Problem",
    "WrongResultError",
]

DROP_FRACTION = 0.3

RESULTS = {"forward": ("y",), "backward": ("dx", "dvalues"), "update": ("mask",)}
"""Names of the arrays that an operation returns."""

_PIECE = 1 << 25
"""Numbers of a result, or of a weight, that are compared at a time: a quarter of a gigabyte."""


class WrongResultError(SriglError):
    """A contender's result differs from the exact one by more than rounding explains."""


@dataclass(frozen=True)
class Precision:
    """The number types in which a contender computes, and the error that they allow."""

    values: str = ""  # dtype of the weight's values; "" is that of the case
    inputs: str = ""  # dtype of inputs, bias and result
    of_products: float = 0.0  # relative error of products and partial sums, besides the sum's own
    of_result: float = 0.0  # relative error from rounding the result
    of_inputs: float = 0.0  # error of an input, as a share of the batch's largest magnitude
    of_weights: float = 0.0  # error of a weight, as a share of its neuron's largest magnitude


FULL = Precision()
"""Everything in the dtype of the case."""

TF32 = Precision(of_products=2.0**-9)
"""Both factors are truncated to 11 bits."""

FLOAT16 = Precision("float16", "float16", of_result=2.0**-11)
BFLOAT16 = Precision("bfloat16", "bfloat16", of_result=2.0**-8)


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of one call, its threads (None on a GPU), and its number among equal sizes."""

    x: Any
    grad: Any
    threads: int | None = None
    number: int = 0


class _Exact(NamedTuple):
    """Some columns of an exact result, in float64."""

    name: str
    columns: slice
    numbers: Any
    sizes: Any  # sums of the magnitudes of the terms
    terms: int  # most terms in a sum


_ALL = slice(0, None)


class Problem:
    """A layer's condensed weight in NumPy, the arrays made of it, and the exact results.

    Another seed draws another random weight; the inputs stay the same.
    """

    def __init__(
        self, layer: Layer, arrays: Arrays, dtype: str = "float32", *, seed: int = 0
    ) -> None:
        self.layer, self.arrays, self.dtype, self.precision = layer, arrays, dtype, FULL
        weight = layer.weight
        if weight is None or seed:
            shape, k, n_active = (layer.n_out, layer.n_in), layer.fan_in, layer.n_active
            weight = CondensedWeight.random(
                shape, fan_in=k, n_active=n_active, dtype=dtype, rng=seed
            )
        self.weight = weight
        self._plans: dict[Any, srigl_core.Plan] = {}
        self._whole: Problem | None = None
        bias = arrays.normal((layer.n_out,), 12345)
        self._use(arrays.array(weight.to_dense()), bias, layer.fan_in)

    def _use(self, dense: Any, bias: Any, terms: int) -> None:
        self._terms = terms
        self._rounded = {("dense", self.dtype): dense, ("bias", self.dtype): self._cast(bias)}
        self._exact: dict[Any, Any] = {}  # also what depends on neither dtype

    def _other(self, dense: Any, bias: Any, terms: int) -> Problem:
        """Return a problem of another dense weight and the same inputs, for products only."""
        other = copy.copy(self)
        other._whole = self.whole
        other._use(dense, bias, terms)
        return other

    def at(self, precision: Precision) -> Problem:
        """Return this problem with weight, bias and inputs rounded to the types of `precision`."""
        if precision == self.precision:
            return self
        other = copy.copy(self)
        other.precision = precision
        return other

    @property
    def whole(self) -> Problem:
        """The problem of all neurons, from which this one was made."""
        return self._whole or self

    def first_neurons(self, share: float) -> Problem:
        """Return the problem of the first neurons, this share of all."""
        n = round(share * self.layer.n_out)
        return self._other(self.dense[:n], self.bias[:n], self._terms)

    def active_neurons(self) -> Problem:
        """Return the problem of the active neurons."""
        active = self.rows[:, 0]
        return self._other(self.dense[active], self.bias[active], self._terms)

    def two_of_four(self) -> Problem:
        """Return a problem in which one of every two inputs is connected, as 2:4 requires."""
        n_in, n_out = self.layer.n_in, self.layer.n_out
        pairs = self.arrays.normal((n_out, n_in // 2, 2), 54321)
        keeps_first = abs(pairs[..., 0]) > abs(pairs[..., 1])
        pairs[..., 0] *= keeps_first
        pairs[..., 1] *= ~keeps_first
        dense = pairs.reshape(n_out, n_in) / (n_in / 2) ** 0.5
        return self._other(dense, self.bias, n_in // 2)

    def _cast(self, array: Any, dtype: str = "") -> Any:
        return self.arrays.cast(array, dtype or self.dtype)

    def _made_once(self, name: str, dtype: str) -> Any:
        key = (name, dtype or self.dtype)
        if key not in self._rounded:
            self._rounded[key] = self._cast(self._rounded[name, self.dtype], dtype)
        return self._rounded[key]

    @property
    def dense(self) -> Any:
        """The masked dense weight."""
        return self._made_once("dense", self.precision.values)

    @property
    def bias(self) -> Any:
        """The bias."""
        return self._made_once("bias", self.precision.inputs)

    def as_input(self, array: Any) -> Any:
        """Return an array rounded to the type of inputs."""
        return self._cast(array, self.precision.inputs)

    def tensor(self, array: Any) -> Any:
        """Return an array as a PyTorch tensor."""
        return self.arrays.tensor(array)

    def for_backend(self, array: Any) -> Any:
        """Return an array as our backend takes it."""
        return self.arrays.for_backend(array)

    def quantized_plan(self, backend: str, inputs: str) -> srigl_core.QuantizedPlan:
        """Return a plan of the quantised weight for inputs that are "float" or "int8"."""
        return srigl_core.prepare(self.weight.quantize(), inputs=inputs, backend=backend)

    def plan(self, backend: str | Backend) -> srigl_core.Plan:
        """Return the plan of the condensed weight for a backend, made once."""
        dtype = self.precision.values or self.dtype
        key = (backend if isinstance(backend, str) else id(backend), dtype)
        if key not in self._plans:
            weight = self.weight
            if dtype != self.dtype:
                values = weight.values.astype(value_dtype(dtype))
                weight = CondensedWeight(values, weight.indices, weight.active, weight.shape)
            self._plans[key] = srigl_core.prepare(weight, backend=backend)
        return self._plans[key]

    @property
    def rows(self) -> Any:
        """Indices of the active neurons, as a column."""
        return self.arrays.array(self.weight.active[:, None].astype(np.int64))

    @property
    def columns(self) -> Any:
        """Column indices of the connections of each active neuron."""
        return self.arrays.array(self.weight.indices.astype(np.int64))

    def batch(
        self, size: int, number: int = 0, *, grad: bool = False, threads: int | None = None
    ) -> Batch:
        """Return the batch of this size and number (up to 3), with a gradient of y if `grad`."""

        def drawn(width: int, seed: int) -> Any:
            return self._cast(self.arrays.normal((size, width), 8 * size + seed))

        x = drawn(self.layer.n_in, 2 * number)
        return Batch(x, drawn(self.layer.n_out, 2 * number + 1) if grad else None, threads, number)

    @cached_property
    def update_inputs(self) -> tuple[Any, Any, Any]:
        """Dense weight, gradient and mask of an update, without ties: their order would differ."""
        rng = np.random.default_rng(54321)
        mask = self.weight.to_mask()
        weight, grad = (_distinct(mask.shape, rng) for _ in range(2))
        return np.where(mask, weight, np.float32(0)), grad, mask

    @property
    def update_settings(self) -> dict[str, Any]:
        """Settings of an update."""
        return {"nnz_budget": self.weight.nnz, "drop_fraction": DROP_FRACTION}

    def check(self, name: str, operation: str, result: Any, batch: Batch) -> None:
        """Raise WrongResultError unless every number of a contender's result agrees with float64.

        A product of a single row may be a vector, and the gradient of the values may be that of all
        entries of the weight. The exact results are computed from the numbers that the contender
        takes, after rounding to its types. The bound of each entry is ``precision.of_result`` times
        its magnitude, plus the sum of the magnitudes of its terms times ``precision.of_products``
        and the error of a sum in the accumulator: of as many terms, in any order, truncated and not
        rounded, as tensor cores do. Where inputs or weights are rounded to int8, their largest
        errors are added: half a step of the contender's own scale for each connection.
        """
        dtypes = (self.precision.values, self.precision.inputs)
        key = (operation, len(batch.x), batch.number, *dtypes)
        expected = self._exact.get(key)
        if expected is None:
            expected = self._expected(operation, batch)
            if operation != "forward" or len(batch.x) * len(self.dense) <= _PIECE:
                expected = self._exact[key] = list(expected)
        results = dict(
            zip(RESULTS[operation], result if operation == "backward" else (result,), strict=True)
        )
        for exact in expected:
            array = self.arrays.result(results[exact.name])
            if exact.name == "y" and array.ndim == 1:
                array = array[None]
            elif exact.name == "dvalues" and array.ndim == 1:
                array = array.reshape(-1, self.layer.fan_in)
            elif exact.name == "dvalues" and array.shape == self.dense.shape:
                array = array[self.rows, self.columns]
            self._compare(name, array, exact, batch)

    def _expected(self, operation: str, batch: Batch) -> Iterator[_Exact]:
        if operation == "update":
            mask = update_mask(*self.update_inputs, UpdateSettings(**self.update_settings)).mask
            yield _Exact("mask", _ALL, self._cast(self.arrays.array(mask), "float64"), 0.0, 0)
            return
        x = self._cast(self.as_input(batch.x), "float64")
        if operation == "backward":
            grad = self._cast(self.as_input(batch.grad), "float64")
            yield from self._exact_gradients(x, grad)
            return
        neurons = max(1, _PIECE // max(x.shape))
        for first in range(0, len(self.dense), neurons):
            part = slice(first, first + neurons)
            weight, bias = (self._cast(each[part], "float64") for each in (self.dense, self.bias))
            y, sizes = _product(x, weight.T)
            yield _Exact("y", part, y + bias, sizes + abs(bias), self._terms)

    def _rounding(self, exact: _Exact, batch: Batch) -> Any:
        """Return the largest error of each result from rounding inputs and weights to int8.

        An entry of the weight that is 0 stays 0.
        """
        of_inputs, of_weights = self.precision.of_inputs, self.precision.of_weights
        if not (of_inputs or of_weights):
            return 0.0
        key = ("rounding", len(batch.x), batch.number, exact.columns.start)
        if key not in self._exact:
            of_columns = self.dense[exact.columns]
            x, weight = (abs(self._cast(a, "float64")) for a in (batch.x, of_columns))
            connected = self._cast(weight != 0, "float64")
            of_x, of_w = x.max(), self.arrays.largest_of_rows(weight)
            self._exact[key] = (
                *(of_x * weight.sum(1), of_w * (x @ connected.T)),
                of_x * of_w * connected.sum(1),
            )
        by_x, by_weight, by_both = self._exact[key]
        return of_inputs * by_x + of_weights * by_weight + of_inputs * of_weights * by_both

    def _exact_gradients(self, x: Any, grad: Any) -> Iterator[_Exact]:
        weight = self._cast(self.dense, "float64")
        yield _Exact("dx", _ALL, *_product(grad, weight), int((weight != 0).sum(0).max()))
        connections = self.rows, self.columns
        dvalues, sizes = (each[connections] for each in _product(grad.T, x))
        yield _Exact("dvalues", _ALL, dvalues, sizes, len(x))

    def _compare(self, name: str, result: Any, exact: _Exact, batch: Batch) -> None:
        shape = tuple(exact.numbers.shape)
        if exact.name == "y":
            shape = (shape[0], len(self.dense))
        if tuple(result.shape) != shape:
            raise WrongResultError(
                f"{name}: {exact.name} has shape {tuple(result.shape)}, but should have {shape}"
            )
        precision = self.precision
        unit = 2.0**-53 if (precision.inputs or self.dtype) == "float64" else 2.0**-24
        of_sums = precision.of_products + 4 * (exact.terms + 3) * unit
        rounding = self._rounding(exact, batch)
        bound = precision.of_result * abs(exact.numbers) + rounding
        bound = bound + of_sums * (exact.sizes + rounding)
        part = result[:, exact.columns]
        wrong = ~(abs(self._cast(part, "float64") - exact.numbers) <= bound)
        if wrong.any():
            row, column = divmod(int((1 * wrong.reshape(-1)).argmax()), wrong.shape[1])
            raise WrongResultError(
                f"{name}: {exact.name} is wrong at {(row, exact.columns.start + column)}: "
                f"{part[row, column].item()!r}, but should be "
                f"{exact.numbers[row, column].item()!r}"
            )


def _product(a: Any, b: Any) -> tuple[Any, Any]:
    """Return a product, and the sums of the magnitudes of its terms."""
    return a @ b, abs(a) @ abs(b)


def _distinct(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return normally distributed numbers, no two of the same magnitude."""
    size = int(np.prod(shape))
    magnitudes = np.sort(np.abs(rng.standard_normal(size, np.float32)))
    steps = np.arange(size)
    bits = np.maximum.accumulate(magnitudes.view(np.int32) - steps) + steps
    distinct = bits.astype(np.int32).view(np.float32) * rng.choice([-1, 1], size)
    result: NDArray[np.float32] = rng.permutation(distinct.astype(np.float32)).reshape(shape)
    return result
