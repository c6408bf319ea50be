"""The product with a condensed weight, and its gradients, as CUDA kernels (SPEC 2).

The kernel of a product depends on the batch and the device:

- up to eight rows: `stream_product.cu`, which reads the weight once;
- larger batches: `tile_product.cu`, with the lanes and the grid that `tile_launch` chooses. It also
  computes the gradient of x, with the connections transposed;
- `value_gradient.cu` for the gradient of the values.

One kernel arranges other values on the same mask in a layout's order. No kernel uses atomics, so
that results are reproducible bit for bit. A call allocates all its memory (`scratch`) before the
first launch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from srigl_core._arrays.dtypes import accumulator_dtype
from srigl_core._format.weight import CondensedWeight
from srigl_core.backends.cupy_gpu.conversions import THREADS, convert, launch_over, output_type
from srigl_core.backends.cupy_gpu.device import Device, fitting_blocks
from srigl_core.backends.cupy_gpu.layouts import Layouts
from srigl_core.backends.cupy_gpu.scratch import Scratch
from srigl_core.backends.cupy_gpu.tile_launch import MOST_WARPS, TileLaunch, best_tile_launch
from srigl_core.backends.cupy_gpu.tiles import rows_of_tile
from srigl_core.backends.cupy_gpu.variants import (
    CUDA_TYPES,
    STREAM_ROWS,
    TILE_LANES,
    Variant,
    stream_product,
    tile_product,
)
from srigl_core.contract import ACTIVATIONS, MatmulGradients
from srigl_core.errors import SriglError

__all__ = ["GpuPrepared"]

MOST_STREAM_ROWS = STREAM_ROWS[-1]
GRADIENT_LANES = 4
MOST_BATCH_SPLITS = 16
MOST_SEGMENT_BLOCKS = 65_535
"""Most blocks along a grid's third axis."""

_NO_ACTIVATION = ACTIVATIONS["none"].code, False
_DESCRIBED_BATCH = 256

_Launch = Callable[[], None]
_Epilogue = tuple[int, bool]
"""The code of the activation, and whether the result leaves out ablated neurons."""


class GpuPrepared:
    """A condensed weight in this backend's layouts."""

    def __init__(
        self, weight: CondensedWeight, device: Device, layouts: Layouts | None = None
    ) -> None:
        self.weight = weight
        self._device = device
        self._home = device.number()
        self._layouts = layouts or Layouts(weight, device)
        self._values = device.upload(np.ascontiguousarray(weight.values).ravel())
        device.finish()
        self._arranged: dict[Any, Any] = {}
        self._zeros: dict[Any, Any] = {}

    def with_values(self, weight: CondensedWeight) -> GpuPrepared:
        """Return this layout for other values; they share everything that depends on the mask."""
        return GpuPrepared(weight, self._device, self._layouts)

    def describe(self) -> dict[str, object]:
        """Return kernels, layout, and bytes in addition to the weight's own."""
        launch = self._tile_launch(_DESCRIBED_BATCH, self.weight.dtype)
        tile_rows, n_segments = self._tile_shape(launch.lanes)
        kept = (self._values, *self._arranged.values(), *self._zeros.values())
        return {
            "kernel": f"stream up to batch {MOST_STREAM_ROWS}, tiles beyond",
            f"at batch {_DESCRIBED_BATCH}": (
                f"{launch.tiles} x {launch.splits} blocks of {launch.warps} warps, "
                f"{launch.lanes} lanes to a neuron, {n_segments} tiles of {tile_rows} inputs"
            ),
            "layout": "condensed",
            "device": self._device.properties.name,
            "bytes": self._layouts.nbytes + sum(int(array.nbytes) for array in kept),
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
        n_out, n_in = self.weight.shape
        x, grad = _outline((batch, n_in), dtype), _outline((batch, n_out), dtype)
        bias = _outline((n_out,), _wider(dtype, self.weight.dtype))
        gradients = MatmulGradients(x, _outline(self.weight.values.shape, dtype), bias)
        nothing = self._device.empty((0,), np.uint8)
        forward, backward = (Scratch(self._device, nothing) for _ in range(2))
        self._product(x, bias, grad, _NO_ACTIVATION, forward)
        self._gradients(grad, x, gradients, backward)
        return max(forward.nbytes, backward.nbytes)

    def _check_home(self) -> None:
        current = self._device.number()
        if current != self._home:
            raise SriglError(
                f"this plan's weight is on CUDA device {self._home}, but device {current} is "
                f"current; prepare a plan there"
            )

    def _product(
        self, x: Any, bias: Any | None, out: Any, epilogue: _Epilogue, scratch: Scratch
    ) -> _Launch:
        dtype = _wider(x.dtype, self.weight.dtype)
        sums = accumulator_dtype(dtype)
        x = scratch.converted(x, dtype)
        if bias is None:
            bias = self._cached_zeros(self.weight.shape[0], sums)
        else:
            bias = scratch.converted(bias, sums)
        multiply = self._stream if out.shape[0] <= MOST_STREAM_ROWS else self._tile
        return self._written(
            out, scratch, lambda result: multiply(x, bias, result, epilogue, dtype)
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
        dtype = _wider(grad.dtype, self.weight.dtype)
        bias = self._cached_zeros(self.weight.shape[1], accumulator_dtype(dtype))
        grad = scratch.converted(grad, dtype)

        def launch(result: Any) -> None:
            self._tile(grad, bias, result, _NO_ACTIVATION, dtype, of_columns=True)

        return self._written(out, scratch, launch)

    def _value_gradient(self, grad: Any, x: Any, out: Any, scratch: Scratch) -> _Launch:
        dtype = _wider(_wider(grad.dtype, x.dtype), self.weight.dtype)
        sums = accumulator_dtype(dtype)
        tiles = self._layouts.tiles(GRADIENT_LANES)
        n_values = int(tiles.positions.size)
        batch_tiles = -(-x.shape[0] // (GRADIENT_LANES * (16 // dtype.itemsize)))
        splits = min(batch_tiles, MOST_BATCH_SPLITS)
        grad, x = scratch.converted(grad, dtype), scratch.converted(x, dtype)
        partial = scratch.empty((splits, n_values), sums)

        def launch(result: Any) -> None:
            blocks_wanted = 2 * self._device.properties.processors
            parts = min(tiles.groups, max(1, blocks_wanted // (splits * tiles.n_segments)))
            warps = min(MOST_WARPS, -(-tiles.groups // parts))
            self._device.launch(
                Variant("value_gradient.cu", f"sum_products<{CUDA_TYPES[dtype.name]}>"),
                (splits, parts, min(tiles.n_segments, MOST_SEGMENT_BLOCKS)),
                (32 * warps,),
                (
                    x,
                    np.int64(len(x)),
                    np.int64(x.shape[1]),
                    grad,
                    np.int64(grad.shape[1]),
                    tiles.places,
                    tiles.starts,
                    tiles.columns,
                    partial,
                    np.int64(n_values),
                    np.int32(tiles.n_segments),
                    np.int32(tiles.tile_rows),
                    np.int32(tiles.groups),
                    np.int32(self.weight.n_active),
                ),
                tiles.shared_bytes,
            )
            add = Variant("value_gradient.cu", f"add_splits<{CUDA_TYPES[sums.name]}>")
            n, n_splits = np.int64(n_values), np.int32(splits)
            arguments = (partial, tiles.positions, n, n_splits, result, output_type(result.dtype))
            launch_over(self._device, add, n_values, arguments)

        return self._written(out, scratch, launch)

    def _bias_gradient(self, grad: Any, out: Any, scratch: Scratch) -> _Launch:
        grad = scratch.converted(grad, grad.dtype)

        def launch(result: Any) -> None:
            batch, n_out = grad.shape
            self._device.launch(
                Variant("arrays.cu", f"sum_columns<{CUDA_TYPES[grad.dtype.name]}>"),
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

    def _stream(
        self, x: Any, bias: Any, out: Any, epilogue: _Epilogue, dtype: np.dtype[Any]
    ) -> None:
        properties = self._device.properties
        batch, n_in = x.shape
        rows = next(rows for rows in STREAM_ROWS if batch <= rows)
        shared_bytes = (n_in + 1) * rows * dtype.itemsize
        staged = shared_bytes <= properties.block_shared_bytes and n_in < 1 << 16
        shared_bytes *= staged
        stream = self._layouts.stream(staged=staged)
        activation, compact = epilogue
        n_neurons = out.shape[1]
        lanes = _stream_lanes(stream.packs, n_neurons, properties.processors)
        blocks = min(
            -(-n_neurons * lanes // THREADS), fitting_blocks(properties, shared_bytes, THREADS)
        )
        self._device.launch(
            stream_product(dtype.name, rows, staged=staged),
            (blocks,),
            (THREADS,),
            (
                x,
                np.int32(batch),
                np.int64(n_in),
                self._arrange(stream.positions, dtype),
                stream.indices,
                np.int32(stream.packs),
                stream.columns,
                bias,
                out,
                np.int64(n_neurons),
                output_type(out.dtype),
                np.int32(activation),
                np.int32(compact),
                np.int32(lanes),
                np.int64(self.weight.n_active),
                np.int64(n_neurons),
            ),
            shared_bytes,
        )

    def _tile(
        self,
        x: Any,
        bias: Any,
        out: Any,
        epilogue: _Epilogue,
        dtype: np.dtype[Any],
        *,
        of_columns: bool = False,
    ) -> None:
        activation, compact = epilogue
        batch, n_neurons = out.shape
        launch = self._tile_launch(batch, dtype, of_columns=of_columns)
        tiles = self._layouts.tiles(launch.lanes, of_columns=of_columns)
        self._device.launch(
            tile_product(dtype.name, launch.lanes),
            (launch.tiles, launch.splits),
            (32 * launch.warps,),
            (
                x,
                np.int64(batch),
                np.int64(x.shape[1]),
                self._arrange(tiles.positions, dtype),
                tiles.places,
                tiles.starts,
                tiles.columns,
                bias,
                out,
                np.int64(n_neurons),
                output_type(out.dtype),
                np.int32(activation),
                np.int32(compact),
                np.int32(tiles.n_segments),
                np.int32(tiles.tile_rows),
                np.int32(tiles.groups),
                np.int32(n_neurons),
            ),
            tiles.shared_bytes,
        )

    def _tile_shape(self, lanes: int, *, of_columns: bool = False) -> tuple[int, int]:
        n_inputs = self.weight.shape[0 if of_columns else 1]
        return rows_of_tile(n_inputs, lanes, self._device.properties.block_shared_bytes)

    def _tile_launch(
        self, batch: int, dtype: np.dtype[Any], *, of_columns: bool = False
    ) -> TileLaunch:
        properties = self._device.properties
        return best_tile_launch(
            batch,
            self.weight.shape[1 if of_columns else 0],
            self.weight.nnz,
            16 // dtype.itemsize,
            tuple((n, *self._tile_shape(n, of_columns=of_columns)) for n in TILE_LANES),
            properties.processors,
            properties.processor_shared_bytes,
        )

    def _arrange(self, positions: Any, dtype: np.dtype[Any]) -> Any:
        """Return the values in a layout's order, converted to `dtype`."""
        key = (id(positions), dtype.name)
        if key not in self._arranged:
            values = self._device.empty(positions.size, dtype)
            variant = Variant("arrays.cu", f"arrange<{CUDA_TYPES[self.weight.dtype.name]}>")
            n = np.int64(positions.size)
            arguments = (self._values, positions, values, n, output_type(dtype))
            launch_over(self._device, variant, positions.size, arguments)
            self._device.finish()
            self._arranged[key] = values
        return self._arranged[key]

    def _cached_zeros(self, size: int, dtype: np.dtype[Any]) -> Any:
        key = (size, dtype.name)
        if key not in self._zeros:
            zeros = self._device.zeros(size, dtype)
            self._device.finish()
            self._zeros[key] = zeros
        return self._zeros[key]


def _outline(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return an object with shape, dtype and flags of an array in C order, without memory."""
    return SimpleNamespace(shape=shape, dtype=dtype, flags=SimpleNamespace(c_contiguous=True))


def _wider(one: np.dtype[Any], other: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that represents the numbers of both."""
    if one == other:
        return one
    if one.itemsize == other.itemsize:  # float16 and bfloat16
        return np.dtype(np.float32)
    return max(one, other, key=lambda dtype: dtype.itemsize)


def _stream_lanes(packs: int, n_neurons: int, processors: int) -> int:
    """Return the lanes of each neuron: fewer waste less, more keep the device busy."""

    def cost(lanes: int) -> float:
        wasted = -(-packs // lanes) * lanes / packs
        idle = max(1.0, 1024 * processors / (n_neurons * lanes))
        return wasted * idle

    return min((1, 2, 4, 8, 16, 32), key=cost)
