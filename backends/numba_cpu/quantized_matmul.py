"""The two products with a quantised weight (SPEC 6).

The kernels of `condensed_matmul` sum the products with the weight's integers, and scale the sums
when they finish a row. Inputs that are quantised too are floats that hold integers. Their sums are
exact in any order: in float32 where no sum exceeds 2**24, else in float64. With AVX-512 VBMI and
VNNI `byte_products` sums them as integers.

A result of float64 has its activation in float64: in float32, small numbers would lose bits that
the error bound does not allow for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import accumulator_dtype
from srigl_core._format.weight import QuantizedWeight
from srigl_core.backends.numba_cpu.byte_products import ByteProducts
from srigl_core.backends.numba_cpu.calling import Call
from srigl_core.backends.numba_cpu.condensed_matmul import (
    CALL_NANOSECONDS,
    NumbaPrepared,
    rounded_into,
)
from srigl_core.backends.numba_cpu.processor import has_byte_products
from srigl_core.backends.numba_cpu.quantization import quantized_rows
from srigl_core.backends.numba_cpu.threads import is_small, pool
from srigl_core.contract import ACTIVATIONS, PreparedProduct
from srigl_core.reference.activations import activate

__all__ = ["prepare_quantized"]

Array = NDArray[Any]

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
EXACT_FAN_IN = 2**24 // 127**2
"""Largest fan-in for which float32 holds every sum."""


class _Scaled:
    """A product whose sums are scaled at the end of each row."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight, self._sums = weight, NumbaPrepared(weight)
        self._scale = np.zeros(weight.shape[0], np.float32)
        self._scale[weight.active] = weight.scale
        self._no_bias = _no_bias(weight)
        self._zeros = np.zeros(weight.shape[0], np.float32)

    def _inputs(self, x: Array, out: Array, threads: int | None) -> tuple[Array, tuple[Array, ...]]:
        """Return the inputs to sum, in the dtype of the sums, and the scales of the rows if any."""
        raise NotImplementedError

    def matmul(
        self,
        x: Array,
        bias: Array | None,
        *,
        activation: str,
        compact: bool,
        out: Array,
        threads: int | None,
    ) -> None:
        """Write the product to `out`."""
        inputs, row_scales = self._inputs(x, out, threads)
        dtype, columns = inputs.dtype, self.weight.active if compact else slice(None)
        bias_dtype = _FLOAT32 if row_scales else dtype
        offset = (self._no_bias if bias is None else bias)[columns]
        offset = np.require(offset, bias_dtype, ["C", "A"])
        code = (ACTIVATIONS[activation].code, self._scale[columns], offset, *row_scales)
        with rounded_into(out, dtype) as result:
            none = np.zeros(out.shape[1], dtype)
            self._sums.multiply(inputs, none, compact, result, code, threads)

    def nanoseconds(self, batch: int) -> float:
        """Estimate the single-threaded time of a product."""
        return self._sums.nanoseconds(batch)


class WeightOnlyProduct(_Scaled):
    """The product with inputs as they are."""

    def matmul_fast(
        self, x: Array, bias: Array | None, code: int, out: Array, threads: int | None
    ) -> None:
        """Write the product of plain arrays to `out`."""
        self._sums.matmul_fast(x, self._zeros, self._finish(bias, code), out, threads)

    def calls(self, x: Array, bias: Array | None, out: Array, code: int) -> Iterator[Call]:
        """Yield the kernels that `matmul_fast` calls on one thread, as `NumbaPrepared` does."""
        return self._sums.calls(x, self._zeros, out, self._finish(bias, code))

    def work(self, batch: int) -> float:
        """Estimate the nanoseconds of a product's sums on one thread."""
        return self._sums.work(batch)

    def _finish(self, bias: Array | None, code: int) -> tuple[Any, ...]:
        return code, self._scale, self._no_bias if bias is None else bias

    def _inputs(self, x: Array, out: Array, threads: int | None) -> tuple[Array, tuple[Array, ...]]:
        dtype = accumulator_dtype(x.dtype, self.weight.float_dtype)
        return np.require(x, dtype, ["C", "A"]), ()

    def describe(self) -> dict[str, object]:
        """Return kernels, layout, inputs, and bytes in addition to the weight's own."""
        return {**self._sums.describe(), "inputs": "float"}


class Int8Product(_Scaled):
    """The product with quantised inputs, as a product of floats."""

    def _inputs(self, x: Array, out: Array, threads: int | None) -> tuple[Array, tuple[Array, ...]]:
        with np.errstate(all="ignore"):
            x = np.require(x, np.float32, ["C", "A"])
        is_wide = self.weight.fan_in > EXACT_FAN_IN or out.dtype == np.float64
        dtype = _FLOAT64 if is_wide else _FLOAT32
        integers, row_scales = quantized_rows(x, dtype, threads)
        return integers, (row_scales,)

    def describe(self) -> dict[str, object]:
        """Return kernels, layout, inputs, and bytes in addition to the weight's own."""
        return {**self._sums.describe(), "inputs": "int8"}


class Int8Lookup:
    """The product with quantised inputs, by `byte_products`."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight, self._layout = weight, ByteProducts(weight)
        self._active = weight.active
        self._no_bias = _no_bias(weight)
        self._ready: dict[int, Any] = {}

    def matmul_fast(
        self, x: Array, bias: Array | None, code: int, out: Array, threads: int | None
    ) -> None:
        """Write the product of plain arrays to `out`."""
        layout, batch = self._layout, 1 if x.ndim == 1 else len(x)
        offset = self._no_bias if bias is None else bias
        arguments = (x, offset, self._active, out, code, *layout.arrays)
        if threads == 1 or is_small(threads, layout.nanoseconds(batch)):
            serial = self._ready.get(x.ndim) or self._make_ready(x.ndim, arguments)
            serial(layout.n_items(batch), arguments)
        else:
            self._share(threads, batch, arguments)

    def calls(self, x: Array, bias: Array | None, out: Array, code: int) -> Iterator[Call]:
        """Yield the kernel that `matmul_fast` calls on one thread, as `NumbaPrepared` does."""
        layout, offset = self._layout, self._no_bias if bias is None else bias
        arguments = (x, offset, self._active, out, code, *layout.arrays)
        yield layout.launch, layout.n_items(len(x)), arguments

    def work(self, batch: int) -> float:
        """Estimate the nanoseconds of a product's sums on one thread."""
        return self._layout.nanoseconds(batch)

    def _make_ready(self, rank: int, arguments: tuple[Any, ...]) -> Any:
        """Return the compiled kernel for inputs of this many axes."""
        self._ready[rank] = self._layout.launch.serial(arguments)
        return self._ready[rank]

    def _share(self, threads: int | None, batch: int, arguments: tuple[Any, ...]) -> None:
        """Compute on up to this many threads."""
        layout = self._layout
        with pool(threads, layout.nanoseconds(batch)) as n_threads:
            layout.launch(layout.n_items(batch), n_threads, arguments)

    def matmul(
        self,
        x: Array,
        bias: Array | None,
        *,
        activation: str,
        compact: bool,
        out: Array,
        threads: int | None,
    ) -> None:
        """Write the product to `out`."""
        offset = self._no_bias if bias is None else bias
        if compact:
            offset = offset[self._active]
        offset = np.require(offset, _FLOAT32, ["C", "A"])
        is_wide = out.dtype == np.float64
        code = ACTIVATIONS["none" if is_wide else activation].code
        with np.errstate(all="ignore"):
            inputs = np.require(x, np.float32, ["C", "A"])
            with rounded_into(out, _FLOAT32) as result:
                columns = np.arange(self.weight.n_active) if compact else self._active
                arguments = (inputs, offset, columns, result, code, *self._layout.arrays)
                self._share(threads, len(inputs), arguments)
            if is_wide:
                out[...] = activate(out, activation)

    def describe(self) -> dict[str, object]:
        """Return kernel, layout, inputs, and bytes in addition to the weight's own."""
        layout = self._layout
        return {
            "kernel": layout.name,
            "layout": "condensed",
            "padding": round(layout.padding, 3),
            "bytes": layout.nbytes,
            "inputs": "int8",
        }

    def nanoseconds(self, batch: int) -> float:
        """Estimate the single-threaded time of a product."""
        return CALL_NANOSECONDS + self.work(batch)


def _no_bias(weight: QuantizedWeight) -> Array:
    """Return the bias that leaves every sum as it is: -0.0, and 0 at ablated neurons."""
    bias = np.zeros(weight.shape[0], np.float32)
    bias[weight.active] = -0.0
    return bias


def prepare_quantized(weight: QuantizedWeight, inputs: str) -> PreparedProduct:
    """Return `weight` in the layout for a product with inputs of a kind."""
    if inputs == "float":
        return WeightOnlyProduct(weight)
    can_look_up = has_byte_products() and ByteProducts.can_hold(weight)
    return Int8Lookup(weight) if can_look_up else Int8Product(weight)
