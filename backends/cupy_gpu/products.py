"""The launches of the products of one mask, and of their gradients.

All values on the mask share them. The kernel of a product depends on the batch and the device:

- up to eight rows: `stream_product.cu`, which reads the weight once;
- larger batches: `tile_product.cu`, with the lanes and the grid that `launch_model` chooses. It
  also computes the gradient of x, with the connections transposed;
- `value_gradient.cu` for the gradient of the values.

Everything about a launch that does not change from call to call is made once, and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from srigl_core._arrays.dtypes import accumulator_dtype
from srigl_core._format.packed_weight import PackedWeight
from srigl_core._format.weight import QuantizedWeight
from srigl_core.backends.cupy_gpu.conversions import launch_over, output_type
from srigl_core.backends.cupy_gpu.device import Device, check_not_capturing
from srigl_core.backends.cupy_gpu.launch_model import (
    GRADIENT_LANES,
    STREAM_THREADS,
    LaunchModel,
    StreamLaunch,
    TileLaunch,
)
from srigl_core.backends.cupy_gpu.layouts import Layouts
from srigl_core.backends.cupy_gpu.variants import (
    CUDA_TYPES,
    Variant,
    position_type,
    stream_product,
    tile_product,
)

__all__ = ["Epilogue", "Product", "Products", "ValueGradient"]

MOST_SEGMENT_BLOCKS = 65_535
"""Most blocks along a grid's third axis."""

MOST_KEPT = 256
"""Launches that are kept for one mask; programs use few batches."""

Epilogue = tuple[int, bool]
"""The code of the activation, and whether the result leaves out ablated neurons."""


@dataclass(frozen=True, eq=False)
class Product:
    """The launch of a product.

    Parameters
    ----------
    positions : device array
        The order in which the kernel reads the values.
    variants : tuple of Variant
        The kernels.
    launch : callable
        Takes x, values, bias, scale and result; the scale is a null pointer unless the values are
        quantised.
    """

    positions: Any
    variants: tuple[Variant, ...]
    launch: Callable[[Any, Any, Any, Any, Any], None]


@dataclass(frozen=True, eq=False)
class ValueGradient:
    """The launches of the gradient of the values.

    Parameters
    ----------
    partial_shape : tuple of int
        Shape of a temporary array of the accumulator's type.
    variants : tuple of Variant
        The kernels.
    launch : callable
        Takes x, grad, the temporary array and the result.
    """

    partial_shape: tuple[int, int]
    variants: tuple[Variant, ...]
    launch: Callable[[Any, Any, Any, Any], None]


class Products:
    """The products of one mask on a device.

    Parameters
    ----------
    weight : CondensedWeight or QuantizedWeight
        Its values are not used.
    device : Device

    Attributes
    ----------
    model : LaunchModel
        Chooses the launches.
    """

    def __init__(self, weight: PackedWeight, device: Device) -> None:
        self._is_quantized = isinstance(weight, QuantizedWeight)
        size, properties = (*weight.shape, weight.n_active, weight.fan_in), device.properties
        self.model = LaunchModel(properties, *size, self._is_quantized)
        self._layouts = Layouts(weight, device, properties.block_shared_bytes)
        self._device = device
        self._zeros: dict[Any, Any] = {}
        self._kept: dict[Any, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._layouts.nbytes + sum(int(zeros.nbytes) for zeros in self._zeros.values())

    def forward(
        self, batch: int, dtype: np.dtype[Any], out_dtype: np.dtype[Any], epilogue: Epilogue
    ) -> Product:
        """Return the launch of the product.

        Parameters
        ----------
        batch : int
        dtype : dtype
            Of x and the values.
        out_dtype : dtype
            Of the result.
        epilogue : tuple
        """

        def make() -> Product:
            chosen = self.model.forward(batch, dtype)
            if isinstance(chosen, StreamLaunch):
                return self._streamed(chosen, batch, dtype, out_dtype, epilogue)
            return self._tiled(chosen, batch, dtype, out_dtype, epilogue)

        product: Product = self._keep(("forward", batch, dtype, out_dtype, epilogue), make)
        return product

    def input_gradient(self, batch: int, dtype: np.dtype[Any], out_dtype: np.dtype[Any]) -> Product:
        """Return the launch of the gradient of x; the arguments are those of `forward`."""

        def make() -> Product:
            chosen = self.model.tile(batch, dtype, of_columns=True)
            epilogue = 0, False
            return self._tiled(chosen, batch, dtype, out_dtype, epilogue, of_columns=True)

        product: Product = self._keep(("input gradient", batch, dtype, out_dtype), make)
        return product

    def value_gradient(self, batch: int, dtype: np.dtype[Any]) -> ValueGradient:
        """Return the launches of the gradient of the values, of x and grad of `dtype`."""
        key = "value gradient", batch, dtype
        gradient: ValueGradient = self._keep(key, lambda: self._value_gradient(batch, dtype))
        return gradient

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Any:
        """Return zeros, for products without a bias."""
        key = size, dtype
        if key not in self._zeros:
            check_not_capturing(self._device, "the bias of zeros")
            zeros = self._device.zeros(size, dtype)
            self._device.finish()
            self._zeros[key] = zeros
        return self._zeros[key]

    def _keep(self, key: Any, make: Callable[[], Any]) -> Any:
        made = self._kept.get(key)
        if made is None:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            made = self._kept.setdefault(key, make())
        return made

    def _streamed(
        self,
        chosen: StreamLaunch,
        batch: int,
        dtype: np.dtype[Any],
        out_dtype: np.dtype[Any],
        epilogue: Epilogue,
    ) -> Product:
        device, model, (activation, compact) = self._device, self.model, epilogue
        n_neurons = model.n_active if compact else model.n_out
        staged, shared_bytes = chosen.shared_bytes > 0, chosen.shared_bytes
        stream = self._layouts.stream(chosen.lanes, staged=staged)
        kind = dtype.name, chosen.rows
        variant = stream_product(*kind, staged=staged, quantized=self._is_quantized)
        fitting = device.fitting_blocks(variant, STREAM_THREADS, shared_bytes)
        grid = (min(-(-n_neurons * chosen.lanes // STREAM_THREADS), fitting),)
        given = np.int32(batch), np.int64(model.n_in)
        packed = stream.indices, np.int32(model.fan_in), np.int32(stream.steps), stream.columns
        rest = (
            np.int64(n_neurons),
            output_type(out_dtype),
            np.int32(activation),
            np.int32(compact),
            np.int32(chosen.lanes),
            np.int64(model.n_active),
            np.int64(n_neurons),
        )

        def launch(x: Any, values: Any, bias: Any, scale: Any, out: Any) -> None:
            arguments = (x, *given, values, *packed, bias, scale, out, *rest)
            device.launch(variant, grid, (STREAM_THREADS,), arguments, shared_bytes)

        return Product(stream.positions, (variant,), launch)

    def _tiled(
        self,
        chosen: TileLaunch,
        batch: int,
        dtype: np.dtype[Any],
        out_dtype: np.dtype[Any],
        epilogue: Epilogue,
        *,
        of_columns: bool = False,
    ) -> Product:
        device, model, (activation, compact) = self._device, self.model, epilogue
        n_inputs, n_neurons = model.n_in, model.n_active if compact else model.n_out
        if of_columns:
            n_inputs, n_neurons = model.n_out, model.n_in
        tiles = self._layouts.tiles(chosen.lanes, of_columns=of_columns)
        variant = tile_product(dtype.name, chosen.lanes, quantized=self._is_quantized)
        grid, block = (chosen.tiles, chosen.splits), (32 * chosen.warps,)
        shared_bytes = tiles.shared_bytes
        given = np.int64(batch), np.int64(n_inputs)
        packed = tiles.places, tiles.starts, tiles.columns
        rest = (
            np.int64(n_neurons),
            output_type(out_dtype),
            np.int32(activation),
            np.int32(compact),
            np.int32(tiles.n_segments),
            np.int32(tiles.tile_rows),
            np.int32(tiles.groups),
            np.int32(n_neurons),
        )

        def launch(x: Any, values: Any, bias: Any, scale: Any, out: Any) -> None:
            arguments = (x, *given, values, *packed, bias, scale, out, *rest)
            device.launch(variant, grid, block, arguments, shared_bytes)

        return Product(tiles.positions, (variant,), launch)

    def _value_gradient(self, batch: int, dtype: np.dtype[Any]) -> ValueGradient:
        device, model, sums = self._device, self.model, accumulator_dtype(dtype)
        tiles = self._layouts.tiles(GRADIENT_LANES)
        n_values = int(tiles.positions.size)
        chosen = model.gradient(batch, dtype)
        splits, block = chosen.splits, (32 * chosen.warps,)
        shared_bytes = tiles.shared_bytes
        grid = splits, chosen.parts, min(tiles.n_segments, MOST_SEGMENT_BLOCKS)
        multiply = Variant("value_gradient.cu", f"sum_products<{CUDA_TYPES[dtype.name]}>")
        types = f"{CUDA_TYPES[sums.name]}, {position_type(tiles.positions.dtype)}"
        add = Variant("value_gradient.cu", f"add_splits<{types}>")
        shape_of_x, n_columns = (np.int64(batch), np.int64(model.n_in)), np.int64(model.n_out)
        packed = tiles.places, tiles.starts, tiles.columns
        numbers = tiles.n_segments, tiles.tile_rows, tiles.groups, model.n_active
        rest = (np.int64(n_values), *map(np.int32, numbers))
        to_add = tiles.positions, np.int64(n_values), np.int32(splits)

        def launch(x: Any, grad: Any, partial: Any, out: Any) -> None:
            arguments = (x, *shape_of_x, grad, n_columns, *packed, partial, *rest)
            device.launch(multiply, grid, block, arguments, shared_bytes)
            launch_over(device, add, n_values, (partial, *to_add, out, output_type(out.dtype)))

        return ValueGradient((splits, n_values), (multiply, add), launch)
