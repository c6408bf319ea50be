"""The product with a weight, and the gradients of a condensed one, as CUDA kernels (SPEC 2, 6).

`products` has the launches, which all values on a mask share. One kernel arranges values in the
order of a launch. No kernel uses atomics, so that results are reproducible bit for bit. A call
allocates all its memory (`scratch`) before the first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from srigl_core._arrays.dtypes import accumulator_dtype
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core.backends.cupy_gpu.conversions import convert, launch_over, output_type
from srigl_core.backends.cupy_gpu.device import Device, check_not_capturing
from srigl_core.backends.cupy_gpu.launch_model import MOST_STREAM_ROWS
from srigl_core.backends.cupy_gpu.products import Epilogue, Products
from srigl_core.backends.cupy_gpu.scratch import Scratch
from srigl_core.backends.cupy_gpu.variants import CUDA_TYPES, VALUE_TYPES, Variant, position_type
from srigl_core.contract import ACTIVATIONS, MatmulGradients
from srigl_core.errors import SriglError

__all__ = ["GpuPrepared"]

_NO_ACTIVATION = ACTIVATIONS["none"].code, False
_DESCRIBED_BATCH = 256

_Launch = Callable[[], None]


class GpuPrepared:
    """A condensed or quantised weight in this backend's layouts.

    Parameters
    ----------
    weight : CondensedWeight or QuantizedWeight
        A quantised one has products only.
    device : Device
    products : Products or None
        The launches of the weight's mask, if there are any yet.
    values : device array, (at least nnz,), or None
        Numbers in place of the weight's. They may change, so each call arranges them anew.
    """

    def __init__(
        self,
        weight: CondensedWeight | QuantizedWeight,
        device: Device,
        products: Products | None = None,
        values: Any | None = None,
    ) -> None:
        self.weight = weight
        self._device = device
        self._home = device.number()
        self._products = products or Products(weight, device)
        self._may_change = values is not None
        self._is_quantized = isinstance(weight, QuantizedWeight)
        self._scale: Any = np.intp(0)  # a null pointer
        if isinstance(weight, QuantizedWeight):
            scale = np.ones(weight.shape[0], np.float32)
            scale[weight.active] = weight.scale
            self._scale = device.upload(scale)
        if values is None:
            values = device.upload(np.ascontiguousarray(weight.values).ravel())
            device.finish()
        self._values = values
        self._arranged: dict[Any, Any] = {}

    def with_values(self, weight: CondensedWeight) -> GpuPrepared:
        """Return this layout for other values; they share everything that depends on the mask."""
        return GpuPrepared(weight, self._device, self._products)

    def with_device_values(self, values: Any) -> GpuPrepared:
        """Return this layout for the numbers that `values`, on the device, has at each call."""
        values = self._device.contiguous(values)
        return GpuPrepared(self.weight, self._device, self._products, values)

    def describe(self) -> dict[str, object]:
        """Return kernels, layout, and bytes in addition to the weight's own."""
        model, dtype = self._products.model, self.weight.float_dtype
        launch = model.tile(_DESCRIBED_BATCH, dtype)
        dense = model.against_dense(dtype)
        kept = [self._values, *self._arranged.values()]
        if self._is_quantized:
            kept.append(self._scale)
        return {
            "kernel": f"stream up to batch {MOST_STREAM_ROWS}, tiles beyond",
            f"at batch {_DESCRIBED_BATCH}": str(launch),
            **({} if dense is None else {"dense on tensor cores": dense}),
            "layout": "condensed",
            "device": self._device.properties.name,
            "bytes": self._products.nbytes + sum(int(array.nbytes) for array in kept),
        }

    def matmul(
        self,
        x: Any,
        bias: Any | None,
        *,
        activation: str,
        compact: bool,
        out: Any,
        threads: int | None,
        workspace: Any | None = None,
    ) -> None:
        """Write the product to `out`; `threads` has no effect."""
        self._check_home()
        scratch = Scratch(self._device, workspace)
        epilogue = ACTIVATIONS[activation].code, compact
        launch = self._product(x, bias, out, epilogue, scratch)
        scratch.fill()
        launch()

    def backward(
        self,
        grad: Any,
        x: Any | None,
        *,
        out: MatmulGradients,
        threads: int | None,
        workspace: Any | None = None,
    ) -> None:
        """Write the gradients to `out`; `threads` has no effect."""
        self._check_home()
        scratch = Scratch(self._device, workspace)
        launches = self._gradients(grad, x, out, scratch)
        scratch.fill()
        for launch in launches:
            launch()

    def workspace_bytes(self, batch: int, dtype: np.dtype[Any]) -> int:
        """Return the most bytes of a product or its gradients, for arrays of `dtype` in C order."""
        nothing = self._device.empty((0,), np.uint8)
        forward, backward = (Scratch(self._device, nothing) for _ in range(2))
        self._outlined(batch, dtype, forward, backward)
        return max(forward.nbytes, backward.nbytes)

    def warm(self, batch: int, dtype: np.dtype[Any]) -> None:
        """Make layouts and load kernels, for products and gradients of arrays of `dtype`."""
        self._check_home()
        scratch = Scratch(self._device, self._device.empty((0,), np.uint8))
        self._outlined(batch, dtype, scratch, scratch)
        product_type = _wider(dtype, self._values.dtype)
        self._products.zeros(self.weight.shape[0], accumulator_dtype(product_type))
        products = [
            self._products.forward(batch, product_type, dtype, (0, c)) for c in (False, True)
        ]
        types = {dtype.name, product_type.name}
        kernels = set()
        if not self._is_quantized:
            products.append(self._products.input_gradient(batch, product_type, dtype))
            kernels = {*self._products.value_gradient(batch, product_type).variants}
            kernels.add(_sum_columns(dtype))
            types.add(self._values.dtype.name)
        for each in products:
            kernels |= {*each.variants, self._arrange(each.positions)}
        kernels |= {Variant("arrays.cu", f"convert<{CUDA_TYPES[name]}>") for name in types}
        for variant in kernels:
            self._device.load(variant)

    def _outlined(
        self, batch: int, dtype: np.dtype[Any], forward: Scratch, backward: Scratch
    ) -> None:
        """Prepare calls without launching them, for arrays of `dtype` in C order."""
        n_out, n_in = self.weight.shape
        x, grad = _outline((batch, n_in), dtype), _outline((batch, n_out), dtype)
        bias = _outline((n_out,), _wider(dtype, self._values.dtype))
        self._product(x, bias, grad, _NO_ACTIVATION, forward)
        if not self._is_quantized:
            gradients = MatmulGradients(x, _outline(self.weight.values.shape, dtype), bias)
            self._gradients(grad, x, gradients, backward)

    def _check_home(self) -> None:
        current = self._device.number()
        if current != self._home:
            raise SriglError(
                f"this plan's weight is on CUDA device {self._home}, but device {current} is "
                f"current; prepare a plan there"
            )

    def _product(
        self, x: Any, bias: Any | None, out: Any, epilogue: Epilogue, scratch: Scratch
    ) -> _Launch:
        dtype = _wider(x.dtype, self._values.dtype)
        sums = accumulator_dtype(dtype)
        product = self._products.forward(len(x), dtype, out.dtype, epilogue)
        x = scratch.converted(x, dtype)
        if bias is None:
            bias = self._products.zeros(self.weight.shape[0], sums)
        else:
            bias = scratch.converted(bias, sums)
        if self._is_quantized:
            dtype = self._values.dtype
        values = self._arranged_values(product.positions, dtype, scratch)
        return self._written(
            out, scratch, lambda result: product.launch(x, values, bias, self._scale, result)
        )

    def _gradients(
        self, grad: Any, x: Any | None, out: MatmulGradients, scratch: Scratch
    ) -> list[_Launch]:
        launches = []
        if out.x is not None:
            launches.append(self._input_gradient(grad, out.x, scratch))
        if out.values is not None and x is not None:
            launches.append(self._value_gradient(grad, x, out.values, scratch))
        if out.bias is not None:
            launches.append(self._bias_gradient(grad, out.bias, scratch))
        return launches

    def _input_gradient(self, grad: Any, out: Any, scratch: Scratch) -> _Launch:
        dtype = _wider(grad.dtype, self._values.dtype)
        product = self._products.input_gradient(len(grad), dtype, out.dtype)
        bias = self._products.zeros(self.weight.shape[1], accumulator_dtype(dtype))
        values = self._arranged_values(product.positions, dtype, scratch)
        grad = scratch.converted(grad, dtype)
        return self._written(
            out, scratch, lambda result: product.launch(grad, values, bias, self._scale, result)
        )

    def _value_gradient(self, grad: Any, x: Any, out: Any, scratch: Scratch) -> _Launch:
        dtype = _wider(_wider(grad.dtype, x.dtype), self._values.dtype)
        gradient = self._products.value_gradient(len(x), dtype)
        grad, x = scratch.converted(grad, dtype), scratch.converted(x, dtype)
        partial = scratch.empty(gradient.partial_shape, accumulator_dtype(dtype))
        return self._written(out, scratch, lambda result: gradient.launch(x, grad, partial, result))

    def _bias_gradient(self, grad: Any, out: Any, scratch: Scratch) -> _Launch:
        grad = scratch.converted(grad, grad.dtype)

        def launch(result: Any) -> None:
            batch, n_out = grad.shape
            self._device.launch(
                _sum_columns(grad.dtype),
                (-(-n_out // 32),),
                (32, 8),
                (grad, result, np.int64(batch), np.int64(n_out), output_type(result.dtype)),
            )

        return self._written(out, scratch, launch)

    def _written(self, out: Any, scratch: Scratch, launch: Callable[[Any], None]) -> _Launch:
        """Return a function that launches kernels and writes their result to `out`."""
        result = scratch.writable(out)

        def launch_all() -> None:
            launch(result)
            if result is not out:
                convert(self._device, result, out)

        return launch_all

    def _arranged_values(self, positions: Any, dtype: np.dtype[Any], scratch: Scratch) -> Any:
        """Return the values in a layout's order, converted to `dtype`.

        They are kept, unless they may change: then `scratch` arranges them for this call.
        """
        if self._may_change:
            values = scratch.empty((positions.size,), dtype)
            scratch.before_launch(lambda: self._launch_arrange(positions, values))
            return values
        key = (id(positions), dtype)
        if key not in self._arranged:
            check_not_capturing(self._device, "the order of the values")
            values = self._device.empty(positions.size, dtype)
            self._launch_arrange(positions, values)
            self._device.finish()
            self._arranged[key] = values
        return self._arranged[key]

    def _launch_arrange(self, positions: Any, values: Any) -> None:
        n = np.int64(positions.size)
        arguments = (self._values, positions, values, n, output_type(values.dtype))
        launch_over(self._device, self._arrange(positions), positions.size, arguments)

    def _arrange(self, positions: Any) -> Variant:
        types = f"{VALUE_TYPES[self._values.dtype.name]}, {position_type(positions.dtype)}"
        return Variant("arrays.cu", f"arrange<{types}>")


@functools.cache
def _sum_columns(dtype: np.dtype[Any]) -> Variant:
    return Variant("arrays.cu", f"sum_columns<{CUDA_TYPES[dtype.name]}>")


class _Outline(SimpleNamespace):
    """Shape, dtype and flags of an array in C order, without memory."""

    def __len__(self) -> int:
        return int(self.shape[0])


def _outline(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    return _Outline(shape=shape, dtype=dtype, flags=SimpleNamespace(c_contiguous=True))


def _wider(one: np.dtype[Any], other: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that represents the numbers of both."""
    if one == other:
        return one
    if one.itemsize == other.itemsize:  # float16 and bfloat16
        return np.dtype(np.float32)
    return max(one, other, key=lambda dtype: dtype.itemsize)
