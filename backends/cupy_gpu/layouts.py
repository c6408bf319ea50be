"""The layouts of a mask on the device, made when a kernel first needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from srigl_core._format.packed_weight import PackedWeight
from srigl_core.backends.cupy_gpu.device import Device, check_not_capturing
from srigl_core.backends.cupy_gpu.tiles import CHUNK, Tiles, pack_tiles, smallest_positions

__all__ = ["Layouts", "Stream"]


@dataclass(frozen=True, eq=False)
class Stream:
    """The packing for the stream product, on the device.

    Parameters
    ----------
    steps : int
        Steps of a neuron's lanes, in each of which a lane has four connections.
    indices : device array of uint16 or uint32, (slices, steps, 32, 4)
        The order of `stream_product.cu`. Padding is never multiplied.
    columns : device array of int32, (n_out,)
        Column of the result for each neuron; neurons without connections are last.
    positions : device array of int32 or int64, (slices * steps * 32 * 4,)
        Position of each value in the condensed values, -1 for padding.
    """

    steps: int
    indices: Any
    columns: Any
    positions: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that depend on the mask."""
        return sum(int(array.nbytes) for array in (self.indices, self.columns, self.positions))


class Layouts:
    """The packings of one mask, which all values on the mask share.

    Each packing is made on the host at first use. If two threads make it at once, the first one is
    kept.
    """

    def __init__(self, weight: PackedWeight, device: Device, block_shared_bytes: int) -> None:
        self._device, self._block_shared_bytes = device, block_shared_bytes
        self._shape, self._fan_in, self._nnz = weight.shape, weight.fan_in, weight.nnz
        self._indices, self._active = weight.indices, weight.active
        self._columns = np.concatenate([weight.active, weight.ablated])
        self._made: dict[Any, Tiles | Stream] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all packings made so far."""
        return sum(layout.nbytes for layout in self._made.values())

    def tiles(self, lanes: int, *, of_columns: bool = False) -> Tiles:
        """Return the packing with `lanes` lanes for each neuron, or for each input."""
        pack = self._pack_columns if of_columns else self._pack_neurons
        tiles: Tiles = self._kept(("tiles", lanes, of_columns), lambda: pack(lanes))
        return tiles

    def stream(self, lanes: int, *, staged: bool) -> Stream:
        """Return the packing for the stream product, with x in shared memory or not."""
        key = "stream", lanes, staged
        stream: Stream = self._kept(key, lambda: self._pack_stream(lanes, staged))
        return stream

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            check_not_capturing(self._device, "a layout of the mask")
            made = make()
            self._device.finish()
            self._made.setdefault(key, made)
        return self._made[key]

    def _pack_neurons(self, lanes: int) -> Tiles:
        return pack_tiles(
            self._device,
            self._indices.ravel(),
            np.full(len(self._active), self._fan_in),
            np.arange(self._nnz),
            self._columns,
            n_inputs=self._shape[1],
            lanes=lanes,
            shared_bytes=self._block_shared_bytes,
        )

    def _pack_columns(self, lanes: int) -> Tiles:
        inputs = self._indices.ravel()
        entries = np.argsort(inputs, kind="stable")
        return pack_tiles(
            self._device,
            self._active[entries // self._fan_in],
            np.bincount(inputs, minlength=self._shape[1]),
            entries,
            np.arange(self._shape[1]),
            n_inputs=self._shape[0],
            lanes=lanes,
            shared_bytes=self._block_shared_bytes,
        )

    def _pack_stream(self, lanes: int, staged: bool) -> Stream:
        members, steps = 32 // lanes, -(-self._fan_in // (CHUNK * lanes))
        slices = -(-len(self._active) // members)

        def packed(numbers: NDArray[Any], padding: int, dtype: DTypeLike) -> NDArray[Any]:
            whole = np.full((slices * members, steps * lanes * CHUNK), padding, dtype)
            whole[: len(numbers), : self._fan_in] = numbers
            by_slice = whole.reshape(slices, members, steps, lanes, CHUNK)
            return np.ascontiguousarray(by_slice.swapaxes(1, 2))

        numbers = np.arange(self._nnz).reshape(self._indices.shape)
        positions = packed(numbers, -1, np.int64).ravel()
        return Stream(
            steps,
            self._device.upload(packed(self._indices, 0, np.uint16 if staged else np.uint32)),
            self._device.upload(self._columns.astype(np.int32)),
            self._device.upload(smallest_positions(positions, self._nnz)),
        )
