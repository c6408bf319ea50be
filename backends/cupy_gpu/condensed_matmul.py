"""The product with a condensed weight, and its gradients, as CUDA kernels (SPEC 2).

Which kernel a product uses depends on the batch, and on the device:

- up to eight rows: `stream_product.cu`, which reads the weight once;
- beyond, and for the gradient of x by the connections the other way round: `tile_product.cu`,
  whose lanes and grid are those that a model of the device says are quickest;
- `value_gradient.cu` for the gradient of the values.

Layouts are made when first used, once for a mask, on the host; other values on the same mask are
put in order by one kernel. No kernel uses atomics: the same bits each time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from srigl_core.backends.cupy_gpu.conversions import converted, launch_over, output_type
from srigl_core.backends.cupy_gpu.device import Device, fitting_blocks
from srigl_core.backends.cupy_gpu.tiles import Tiles, pack_tiles, rows_of_tile
from srigl_core.backends.cupy_gpu.variants import (
    CUDA_TYPES,
    STREAM_ROWS,
    TILE_LANES,
    Variant,
    stream_product,
    tile_product,
)
from srigl_core.condensed_weight import CondensedWeight
from srigl_core.contract import ACTIVATIONS, MatmulGradients
from srigl_core.errors import SriglError
from srigl_core.value_types import accumulator_dtype, value_dtype

__all__ = ["GpuPrepared"]

MOST_STREAM_ROWS = STREAM_ROWS[-1]
PACK = 8
"""Connections that a lane of the stream product takes at a time."""

STREAM_THREADS = 256
MOST_WARPS = 32
MOST_SPLITS = 65_535
GRADIENT_LANES = 4
MOST_BATCH_SPLITS = 16

SHARED_BYTES_A_CYCLE = 128
"""What a multiprocessor reads from its shared memory."""

STAGED_BYTES_A_CYCLE = 24
"""What it gets from the second-level cache while all the others do the same."""

BLOCK_CYCLES = 1_500
"""About what a block takes to start, and to write its results."""

CONFLICTS = {8: 1.0, 4: 1.05, 2: 1.25, 1: 1.6}
"""Wavefronts for each that would do, by the lanes of a neuron: what ordering leaves."""


@dataclass(frozen=True)
class TileLaunch:
    """How a batched product runs.

    Parameters
    ----------
    lanes : int
        To a neuron.
    tiles, splits : int
        The grid: of the batch, and of the neurons.
    warps : int
        Of a block.
    """

    lanes: int
    tiles: int
    splits: int
    warps: int


class _Layouts:
    """What depends on the mask only, and is shared by all values on it."""

    def __init__(self, weight: CondensedWeight, device: Device) -> None:
        self.device = device
        self.shape, self.fan_in, self.nnz = weight.shape, weight.fan_in, weight.nnz
        self._indices, self._active = weight.indices, weight.active
        ablated = np.setdiff1d(np.arange(self.shape[0]), weight.active, assume_unique=True)
        self._columns = np.concatenate([weight.active, ablated])
        self.n_active = weight.n_active
        self._made: dict[Any, Any] = {}

    def tiles(self, lanes: int, *, of_columns: bool = False) -> Tiles:
        """Return the packing for `lanes` lanes to a neuron, or to an input."""
        key = ("tiles", lanes, of_columns)
        made: Tiles | None = self._made.get(key)
        if made is None:
            pack = self._pack_columns if of_columns else self._pack_neurons
            made = self._made.setdefault(key, pack(lanes))
        return made

    def _pack_neurons(self, lanes: int) -> Tiles:
        return pack_tiles(
            self.device,
            self._indices.ravel(),
            np.full(self.n_active, self.fan_in),
            np.arange(self.nnz),
            self._columns,
            n_inputs=self.shape[1],
            lanes=lanes,
            shared_bytes=self.device.properties.block_shared_bytes,
        )

    def _pack_columns(self, lanes: int) -> Tiles:
        inputs = self._indices.ravel()
        entries = np.argsort(inputs, kind="stable")
        return pack_tiles(
            self.device,
            self._active[entries // self.fan_in],
            np.bincount(inputs, minlength=self.shape[1]),
            entries,
            np.arange(self.shape[1]),
            n_inputs=self.shape[0],
            lanes=lanes,
            shared_bytes=self.device.properties.block_shared_bytes,
        )

    def stream(self, *, staged: bool) -> Stream:
        """Return the packing for the stream product."""
        key = ("stream", staged)
        made: Stream | None = self._made.get(key)
        if made is None:
            made = self._made.setdefault(key, self._pack_stream(staged))
        return made

    def _pack_stream(self, staged: bool) -> Stream:
        padded = -(-self.fan_in // PACK) * PACK
        indices = np.full(
            (self.n_active, padded), self.shape[1], np.uint16 if staged else np.uint32
        )
        indices[:, : self.fan_in] = self._indices
        positions = np.full((self.n_active, padded), -1, np.int64)
        positions[:, : self.fan_in] = np.arange(self.nnz).reshape(self.n_active, -1)
        return Stream(
            padded // PACK,
            self.device.upload(indices),
            self.device.upload(self._columns.astype(np.int32)),
            self.device.upload(positions.ravel()),
        )

    @property
    def nbytes(self) -> int:
        return sum(layout.nbytes for layout in self._made.values())


@dataclass(frozen=True, eq=False)
class Stream:
    """The packing for the stream product, on the device.

    Parameters
    ----------
    packs : int
        Of a neuron, each of eight connections.
    indices : device array of uint16 or uint32, (n_active, 8 * packs)
    columns : device array of int32, (n_out,)
    positions : device array of int64, (n_active * 8 * packs,)
    """

    packs: int
    indices: Any
    columns: Any
    positions: Any

    @property
    def nbytes(self) -> int:
        """Bytes of what depends on the mask."""
        return sum(int(array.nbytes) for array in (self.indices, self.columns, self.positions))


class GpuPrepared:
    """A condensed weight in this backend's layouts."""

    def __init__(
        self, weight: CondensedWeight, device: Device, layouts: _Layouts | None = None
    ) -> None:
        self.weight = weight
        self._device = device
        self._home = device.number()
        self._layouts = layouts or _Layouts(weight, device)
        self._values = device.upload(np.ascontiguousarray(weight.values).ravel())
        self._arranged: dict[Any, Any] = {}
        self._zeros: dict[Any, Any] = {}

    def with_values(self, weight: CondensedWeight) -> GpuPrepared:
        """Return the same for other values, sharing all that depends on the mask."""
        return GpuPrepared(weight, self._device, self._layouts)

    def describe(self) -> dict[str, object]:
        """Return kernels, layout and bytes beside the weight's own."""
        name = self.weight.dtype.name
        launch = self._tile_launch(256, name)
        tile_rows, n_segments = self._tile_shape(launch.lanes)
        return {
            "kernel": f"stream up to batch {MOST_STREAM_ROWS}, tiles beyond",
            "at batch 256": (
                f"{launch.tiles} x {launch.splits} blocks of {launch.warps} warps, "
                f"{launch.lanes} lanes to a neuron, {n_segments} tiles of {tile_rows} inputs"
            ),
            "layout": "condensed",
            "device": self._device.properties.name,
            "bytes": self._layouts.nbytes + sum(int(a.nbytes) for a in self._arranged.values()),
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
    ) -> None:
        """Write the product to `out`; `threads` means nothing here."""
        self._check_home()
        kind = _common(x, self.weight)
        x = converted(self._device, x, kind)
        bias = self._bias(bias, kind)
        result = out if out.flags.c_contiguous else self._device.empty(out.shape, out.dtype)
        epilogue = (ACTIVATIONS.index(activation), compact)
        if len(x) <= MOST_STREAM_ROWS:
            self._stream(x, bias, result, epilogue, kind)
        else:
            self._tile(x, bias, result, epilogue, kind)
        if result is not out:
            out[...] = result

    def _check_home(self) -> None:
        current = self._device.number()
        if current != self._home:
            raise SriglError(
                f"this plan's weight is on CUDA device {self._home}, but device {current} is "
                f"current; prepare a plan there"
            )

    def _stream(
        self, x: Any, bias: Any, out: Any, epilogue: tuple[int, bool], kind: np.dtype[Any]
    ) -> None:
        properties, layouts = self._device.properties, self._layouts
        batch, n_in = x.shape
        rows = next(rows for rows in STREAM_ROWS if batch <= rows)
        shared_bytes = (n_in + 1) * rows * kind.itemsize
        staged = shared_bytes <= properties.block_shared_bytes and n_in < 1 << 16
        shared_bytes *= staged
        stream = layouts.stream(staged=staged)
        activation, compact = epilogue
        n_neurons = layouts.n_active if compact else self.weight.shape[0]
        lanes = _stream_lanes(stream.packs, n_neurons, properties.processors)
        blocks = min(
            -(-n_neurons * lanes // STREAM_THREADS),
            fitting_blocks(properties, shared_bytes, STREAM_THREADS),
        )
        self._device.launch(
            stream_product(kind.name, rows, staged=staged),
            (blocks,),
            (STREAM_THREADS,),
            (
                x,
                np.int32(batch),
                np.int64(n_in),
                self._arrange(stream.positions, kind),
                stream.indices,
                np.int32(stream.packs),
                stream.columns,
                bias,
                out,
                np.int64(out.shape[1]),
                output_type(out.dtype),
                np.int32(activation),
                np.int32(compact),
                np.int32(lanes),
                np.int64(layouts.n_active),
                np.int64(n_neurons),
            ),
            shared_bytes,
        )

    def _tile(
        self,
        x: Any,
        bias: Any,
        out: Any,
        epilogue: tuple[int, bool],
        kind: np.dtype[Any],
        *,
        of_columns: bool = False,
    ) -> None:
        activation, compact = epilogue
        launch = self._tile_launch(len(x), kind.name, of_columns=of_columns)
        tiles = self._layouts.tiles(launch.lanes, of_columns=of_columns)
        self._device.launch(
            tile_product(kind.name, launch.lanes),
            (launch.tiles, launch.splits),
            (32 * launch.warps,),
            (
                x,
                np.int64(len(x)),
                np.int64(x.shape[1]),
                self._arrange(tiles.positions, kind),
                tiles.places,
                tiles.starts,
                tiles.columns,
                bias,
                out,
                np.int64(out.shape[1]),
                output_type(out.dtype),
                np.int32(activation),
                np.int32(compact),
                np.int32(tiles.n_segments),
                np.int32(tiles.tile_rows),
                np.int32(tiles.groups),
                np.int32(out.shape[1]),
            ),
            tiles.shared_bytes,
        )

    def _tile_shape(self, lanes: int, *, of_columns: bool = False) -> tuple[int, int]:
        n_inputs = self.weight.shape[0 if of_columns else 1]
        return rows_of_tile(n_inputs, lanes, self._device.properties.block_shared_bytes)

    def _tile_launch(self, batch: int, dtype: str, *, of_columns: bool = False) -> TileLaunch:
        n_neurons = self.weight.shape[1 if of_columns else 0]
        options = []
        for lanes in TILE_LANES:
            tile_rows, n_segments = self._tile_shape(lanes, of_columns=of_columns)
            options.append((lanes, tile_rows, n_segments))
        return best_tile_launch(
            batch,
            n_neurons,
            self.weight.nnz,
            16 // value_dtype(dtype).itemsize,
            tuple(options),
            self._device.properties.processors,
            self._device.properties.processor_shared_bytes,
        )

    def backward(
        self, grad: Any, x: Any | None, *, out: MatmulGradients, threads: int | None
    ) -> None:
        """Write the gradients to `out`; `threads` means nothing here."""
        self._check_home()
        if out.x is not None:
            self._input_gradient(grad, out.x)
        if out.values is not None and x is not None:
            self._value_gradient(grad, x, out.values)
        if out.bias is not None:
            self._bias_gradient(grad, out.bias)

    def _input_gradient(self, grad: Any, out: Any) -> None:
        kind = _common(grad, self.weight)
        result = out if out.flags.c_contiguous else self._device.empty(out.shape, out.dtype)
        bias = self._nought(out.shape[1], accumulator_dtype(kind))
        grad = converted(self._device, grad, kind)
        self._tile(grad, bias, result, (0, False), kind, of_columns=True)
        if result is not out:
            out[...] = result

    def _value_gradient(self, grad: Any, x: Any, out: Any) -> None:
        kind = _wider(_wider(grad.dtype, x.dtype), self.weight.dtype)
        grad, x = converted(self._device, grad, kind), converted(self._device, x, kind)
        sums = accumulator_dtype(kind)
        tiles = self._layouts.tiles(GRADIENT_LANES)
        n_values = int(tiles.positions.size)
        batch_tiles = -(-len(x) // (GRADIENT_LANES * (16 // kind.itemsize)))
        splits = min(batch_tiles, MOST_BATCH_SPLITS)
        processors = self._device.properties.processors
        parts = min(tiles.groups, max(1, 2 * processors // (splits * tiles.n_segments)))
        warps = min(MOST_WARPS, -(-tiles.groups // parts))
        partial = self._device.empty((splits, n_values), sums)
        self._device.launch(
            Variant("value_gradient.cu", f"sum_products<{CUDA_TYPES[kind.name]}>"),
            (splits, parts, min(tiles.n_segments, MOST_SPLITS)),
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
                np.int32(self._layouts.n_active),
            ),
            tiles.shared_bytes,
        )
        result = out if out.flags.c_contiguous else self._device.empty(out.shape, out.dtype)
        launch_over(
            self._device,
            Variant("value_gradient.cu", f"add_splits<{CUDA_TYPES[sums.name]}>"),
            n_values,
            (
                partial,
                tiles.positions,
                np.int64(n_values),
                np.int32(splits),
                result,
                output_type(out.dtype),
            ),
        )
        if result is not out:
            out[...] = result

    def _bias_gradient(self, grad: Any, out: Any) -> None:
        grad = self._device.contiguous(grad)
        result = out if out.flags.c_contiguous else self._device.empty(out.shape, out.dtype)
        batch, n_out = grad.shape
        self._device.launch(
            Variant("arrays.cu", f"sum_columns<{CUDA_TYPES[grad.dtype.name]}>"),
            (-(-n_out // 32),),
            (32, 8),
            (grad, result, np.int64(batch), np.int64(n_out), output_type(out.dtype)),
        )
        if result is not out:
            out[...] = result

    def _arrange(self, positions: Any, kind: np.dtype[Any]) -> Any:
        """Return the values in a layout's order, as numbers of `kind`."""
        key = (id(positions), kind.name)
        values = self._arranged.get(key)
        if values is None:
            values = self._device.empty(positions.size, kind)
            variant = Variant("arrays.cu", f"arrange<{CUDA_TYPES[self.weight.dtype.name]}>")
            n = np.int64(positions.size)
            arguments = (self._values, positions, values, n, output_type(kind))
            launch_over(self._device, variant, positions.size, arguments)
            self._arranged[key] = values
        return values

    def _bias(self, bias: Any | None, kind: np.dtype[Any]) -> Any:
        sums = accumulator_dtype(kind)
        if bias is None:
            return self._nought(self.weight.shape[0], sums)
        return converted(self._device, bias, sums)

    def _nought(self, size: int, kind: np.dtype[Any]) -> Any:
        key = (size, kind.name)
        if key not in self._zeros:
            self._zeros[key] = self._device.zeros(size, kind)
        return self._zeros[key]


def _common(x: Any, weight: CondensedWeight) -> np.dtype[Any]:
    return _wider(x.dtype, weight.dtype)


def _wider(one: np.dtype[Any], other: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that holds the numbers of both."""
    if one == other:
        return one
    if one.itemsize == other.itemsize:  # float16 and bfloat16
        return np.dtype(np.float32)
    return max(one, other, key=lambda dtype: dtype.itemsize)


def _stream_lanes(packs: int, n_neurons: int, processors: int) -> int:
    """Return how many lanes share a neuron: few waste little, many keep the device busy."""

    def cost(lanes: int) -> float:
        wasted = -(-packs // lanes) * lanes / packs
        idle = max(1.0, 1024 * processors / (n_neurons * lanes))
        return wasted * idle

    return min((1, 2, 4, 8, 16, 32), key=cost)


@functools.lru_cache(maxsize=256)
def best_tile_launch(
    batch: int,
    n_neurons: int,
    nnz: int,
    size: int,
    options: tuple[tuple[int, int, int], ...],
    processors: int,
    processor_shared_bytes: int,
) -> TileLaunch:
    """Return the launch that a model of the device says is quickest.

    Parameters
    ----------
    batch, n_neurons, nnz : int
    size : int
        Batch rows of a lane: numbers in 16 bytes.
    options : tuple
        For each choice of lanes: lanes, inputs in a tile, tiles for all inputs.
    processors, processor_shared_bytes : int

    Notes
    -----
    A block stages its tile of x, and reads 16 bytes of it a lane for each connection of its
    neurons; multiprocessors take blocks in turns.
    """
    best = None
    for lanes, tile_rows, n_segments in options:
        tiles = -(-batch // (lanes * size))
        row_bytes = 16 * lanes
        shared_bytes = (tile_rows + 1) * row_bytes
        resident = max(1, processor_shared_bytes // (shared_bytes + 1024))
        groups = -(-n_neurons * lanes // 32)
        for splits in _split_counts(groups):
            per_split = -(-groups // splits)
            passes = -(-per_split // MOST_WARPS) if n_segments > 1 else 1
            staged = passes * n_segments * tile_rows * row_bytes / STAGED_BYTES_A_CYCLE
            read = nnz / splits * row_bytes * CONFLICTS[lanes] / SHARED_BYTES_A_CYCLE
            rounds = -(-tiles * splits // (processors * resident))
            cycles = rounds * resident * (staged + read + BLOCK_CYCLES / resident)
            cycles = max(cycles, staged + read + BLOCK_CYCLES)
            warps = min(MOST_WARPS, max(4, per_split))
            if best is None or cycles < best[0]:
                best = cycles, TileLaunch(lanes, tiles, splits, warps)
    assert best is not None
    return best[1]


def _split_counts(groups: int) -> list[int]:
    most = min(groups, MOST_SPLITS)
    counts = {min(most, round(2 ** (i / 2))) for i in range(32)}
    return sorted(counts)
