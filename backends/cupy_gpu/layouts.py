"""The layouts of a mask on the device, made when a kernel first needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from srigl_core._format.weight import CondensedWeight
from srigl_core.backends.cupy_gpu.device import Device
from srigl_core.backends.cupy_gpu.tiles import Tiles, pack_tiles

__all__ = ["Layouts", "Stream"]

PACK = 8
"""Connections that a lane of the stream product processes at a time."""


@dataclass(frozen=True, eq=False)
class Stream:
    """The packing for the stream product, on the device.

    Parameters
    ----------
    packs : int
        Packs of eight connections for each neuron.
    indices : device array of uint16 or uint32, (n_active, 8 * packs)
    columns : device array of int32, (n_out,)
        Column of the result for each neuron; neurons without connections are last.
    positions : device array of int64, (n_active * 8 * packs,)
        Position of each value in the condensed values, -1 for padding.
    """

    packs: int
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

    def __init__(self, weight: CondensedWeight, device: Device) -> None:
        self._device = device
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

    def stream(self, *, staged: bool) -> Stream:
        """Return the packing for the stream product, with x in shared memory or not."""
        stream: Stream = self._kept(("stream", staged), lambda: self._pack_stream(staged))
        return stream

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
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
            shared_bytes=self._device.properties.block_shared_bytes,
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
            shared_bytes=self._device.properties.block_shared_bytes,
        )

    def _pack_stream(self, staged: bool) -> Stream:
        packs = -(-self._fan_in // PACK)
        shape = (len(self._active), packs * PACK)
        indices = np.full(shape, self._shape[1], np.uint16 if staged else np.uint32)
        indices[:, : self._fan_in] = self._indices
        positions = np.full(shape, -1, np.int64)
        positions[:, : self._fan_in] = np.arange(self._nnz).reshape(-1, self._fan_in)
        return Stream(
            packs,
            self._device.upload(indices),
            self._device.upload(self._columns.astype(np.int32)),
            self._device.upload(positions.ravel()),
        )
