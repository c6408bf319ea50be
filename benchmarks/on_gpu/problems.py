"""The arrays of one layer on the device, and what every contender's result is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from srigl_core import CondensedWeight
from srigl_core._arrays.dtypes import round_to, value_dtype
from srigl_core.benchmarks.cases import Layer
from srigl_core.benchmarks.problems import Batch, Problem, WrongResultError

__all__ = [
    "BFLOAT16",
    "COPIES",
    "FLOAT16",
    "FLOAT32",
    "TF32",
    "DeviceProblem",
    "Precision",
]

COPIES = 4
"""Of the inputs, taken in turns, as in a network no call sees the last one's."""

_CHUNK = 1 << 26
"""Results compared at a time: half a gigabyte of float64."""

Tensor = Any


@dataclass(frozen=True)
class Precision:
    """In which numbers a contender computes, and so how far it may be off.

    Parameters
    ----------
    dtype : str
        Of weight, bias, inputs and result.
    of_products : float
        Relative error of a product, or of a part of a sum, beside that of float32.
    of_result : float
        Relative error of rounding the result.
    """

    dtype: str
    of_products: float = 0.0
    of_result: float = 0.0

    def added_up(self) -> Precision:
        """Return the same, for libraries that may keep parts of a sum in the result's type."""
        return replace(self, of_products=self.of_products + self.of_result)


FLOAT32 = Precision("float32")
TF32 = Precision("float32", of_products=2.0**-9)
"""Both factors cut to 11 bits, not even rounded."""

FLOAT16 = Precision("float16", of_result=2.0**-11)
BFLOAT16 = Precision("bfloat16", of_result=2.0**-8)


class DeviceProblem:
    """A layer's weight, bias and inputs on a device of PyTorch's, and the exact results.

    Parameters
    ----------
    layer : Layer
    device : str
        As PyTorch calls it.

    Attributes
    ----------
    weight : CondensedWeight
        On the host.
    """

    def __init__(self, layer: Layer, device: str) -> None:
        self.layer, self.device = layer, device
        shape = (layer.n_out, layer.n_in)
        self.weight: Any = layer.weight
        if self.weight is None:
            self.weight = CondensedWeight.random(
                shape, fan_in=layer.fan_in, n_active=layer.n_active, rng=0
            )
        dense = torch.zeros(shape, dtype=torch.float32, device=device)
        dense[self.rows, self.columns] = self._sent(self.weight.values.copy())
        generator = torch.Generator(device).manual_seed(12345)
        bias = torch.randn(layer.n_out, generator=generator, device=device)
        self._condensed: dict[str, CondensedWeight] = {"float32": self.weight}
        self._use(dense, bias, layer.fan_in, whole=self)

    def _use(self, dense: Tensor, bias: Tensor, terms: int, *, whole: DeviceProblem) -> None:
        self._dense, self._bias = {"float32": dense}, {"float32": bias}
        self._terms, self._whole = terms, whole

    def _other(self, dense: Tensor, bias: Tensor, terms: int) -> DeviceProblem:
        """Return a problem of another dense weight and the same inputs."""
        other = object.__new__(DeviceProblem)
        other.layer, other.device, other.weight = self.layer, self.device, self.weight
        other._use(dense, bias, terms, whole=self)
        return other

    def _sent(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @property
    def rows(self) -> Tensor:
        """Numbers of the active neurons, a column."""
        return self._sent(self.weight.active[:, None].copy())

    @property
    def columns(self) -> Tensor:
        """Column numbers of each active neuron's connections."""
        return self._sent(self.weight.indices.astype(np.int64))

    def dense(self, dtype: str) -> Tensor:
        """Return the masked dense weight, rounded to `dtype`."""
        return _rounded_in(self._dense, dtype)

    def bias(self, dtype: str) -> Tensor:
        """Return the bias, rounded to `dtype`."""
        return _rounded_in(self._bias, dtype)

    def whole_bias(self, dtype: str) -> Tensor:
        """Return that of all neurons, also where the results are those of the active ones."""
        return self._whole.bias(dtype)

    def condensed(self, dtype: str) -> CondensedWeight:
        """Return the condensed weight, rounded to `dtype`; the same object each time."""
        made = self._whole._condensed
        if dtype not in made:
            weight = self.weight
            values = round_to(weight.values, value_dtype(dtype))
            made[dtype] = CondensedWeight(values, weight.indices, weight.active, weight.shape)
        return made[dtype]

    def active_only(self) -> DeviceProblem:
        """Return the problem of the active neurons alone; for products."""
        active = self.rows[:, 0]
        return self._other(self.dense("float32")[active], self.bias("float32")[active], self._terms)

    def two_of_four(self) -> DeviceProblem:
        """Return a problem of another weight: of every two inputs one is connected.

        So of every four two are, which is what tensor cores ask for.
        """
        n_in, n_out = self.layer.n_in, self.layer.n_out
        generator = torch.Generator(self.device).manual_seed(54321)
        pairs = torch.randn((n_out, n_in // 2, 2), generator=generator, device=self.device)
        first = pairs[..., 0].abs() > pairs[..., 1].abs()
        pairs *= torch.stack((first, ~first), dim=2)
        dense = pairs.view(n_out, n_in) / (n_in / 2) ** 0.5
        return self._other(dense, self.bias("float32"), n_in // 2)

    def batches(self, size: int, *, grads: bool = False) -> list[Batch]:
        """Return `COPIES` inputs of `size` rows, with gradients if `grads`, in float32."""
        generator = torch.Generator(self.device).manual_seed(size)

        def drawn(width: int) -> Tensor:
            return torch.randn((size, width), generator=generator, device=self.device)

        layer = self.layer
        return [
            Batch(drawn(layer.n_in), drawn(layer.n_out) if grads else None, 0)
            for _ in range(COPIES)
        ]

    @cached_property
    def update(self) -> Problem:
        """The arrays of a mask update and its result, on the host."""
        return Problem(replace(self.layer, weight=self.weight), 1, "float32")

    @cached_property
    def update_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, gradient and mask of an update, on the device."""
        weight, grad, mask = self.update.update_inputs
        return self._sent(weight), self._sent(grad), self._sent(mask)

    def check(
        self,
        name: str,
        operation: str,
        got: Mapping[str, Tensor],
        batch: Batch,
        precision: Precision,
    ) -> None:
        """Raise WrongResultError if any number of a contender's results is not what it should be.

        Notes
        -----
        Held against float64, computed from the inputs as the contender was given them, that is
        rounded to its type. Entry by entry the bound is `of_result` of the magnitude, and of the
        sum of the products' magnitudes `of_products` and what float32 may lose in a sum of so many
        terms, in any order, with products cut and not rounded, as tensor cores do.
        """
        if operation == "update":
            self._check_mask(name, got["mask"])
        elif operation == "backward":
            self._check_gradients(name, got, batch, precision)
        else:
            self._check_product(name, got["y"], batch, precision)

    def _check_product(self, name: str, y: Tensor, batch: Batch, precision: Precision) -> None:
        dense, bias = self.dense(precision.dtype), self.bias(precision.dtype)
        x = _exactly(batch.x, precision.dtype)
        _check_shape(name, "y", y, (len(x), len(dense)))
        neurons = max(1, _CHUNK // len(x))
        for first in range(0, len(dense), neurons):
            part = slice(first, first + neurons)
            weight, offset = dense[part].double(), bias[part].double()
            exact = x @ weight.T + offset
            sizes = x.abs() @ weight.T.abs() + offset.abs()
            bound = _bound(exact, sizes, self._terms, precision)
            _compare(name, "y", y[:, part], exact, bound, first)

    def _check_gradients(
        self, name: str, got: Mapping[str, Tensor], batch: Batch, precision: Precision
    ) -> None:
        weight = _exactly(self.dense("float32"), precision.dtype)
        x, grad = (_exactly(part, precision.dtype) for part in (batch.x, batch.grad))
        places = self.rows, self.columns
        dvalues = got["dvalues"]
        if dvalues.shape == weight.shape:  # the gradient of the whole dense weight
            dvalues = dvalues[places]
        dvalues = dvalues.reshape(places[1].shape)
        most_terms = int((weight != 0).sum(0).max())
        for what, array, factors, terms in (
            ("dx", got["dx"], (grad, weight), most_terms),
            ("dvalues", dvalues, (grad.T, x), len(x)),
        ):
            exact, sizes = factors[0] @ factors[1], factors[0].abs() @ factors[1].abs()
            if what == "dvalues":
                exact, sizes = exact[places], sizes[places]
            _check_shape(name, what, array, tuple(exact.shape))
            _compare(name, what, array, exact, _bound(exact, sizes, terms, precision))

    def _check_mask(self, name: str, mask: Tensor) -> None:
        exact, _ = self.update.update_results["mask"]
        _check_shape(name, "mask", mask, exact.shape)
        exact = self._sent(exact)
        _compare(name, "mask", mask, exact, torch.zeros_like(exact))


def _rounded_in(kept: dict[str, Tensor], dtype: str) -> Tensor:
    if dtype not in kept:
        kept[dtype] = kept["float32"].to(getattr(torch, dtype))
    return kept[dtype]


def _exactly(array: Tensor, dtype: str) -> Tensor:
    """Return the numbers of `dtype` that `array` is rounded to, in float64."""
    return array.to(getattr(torch, dtype)).double()


def _bound(exact: Tensor, sizes: Tensor, terms: int, precision: Precision) -> Tensor:
    of_sums = 4 * (terms + 3) * 2.0**-24
    return precision.of_result * exact.abs() + (precision.of_products + of_sums) * sizes


def _check_shape(name: str, what: str, got: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(got.shape) != shape:
        raise WrongResultError(
            f"{name}: {what} has shape {tuple(got.shape)}, but should have {shape}"
        )


def _compare(
    name: str, what: str, got: Tensor, exact: Tensor, bound: Tensor, first_column: int = 0
) -> None:
    wrong = ~((got.double() - exact).abs() <= bound)
    if bool(wrong.any()):
        row, column = divmod(int(wrong.flatten().int().argmax()), wrong.shape[1])
        raise WrongResultError(
            f"{name}: {what} is wrong at {(row, first_column + column)}: "
            f"{got[row, column].item()!r}, but should be {exact[row, column].item()!r}"
        )
