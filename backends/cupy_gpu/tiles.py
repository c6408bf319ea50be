"""Connections packed for tiles of the batch in shared memory (`batch_tile.cuh`).

Each neuron has `lanes` lanes of a warp. A group is the 32 / lanes neurons of a warp, and a chunk is
four connections of each of them. The neurons of a group end together. With constant fan-in that
takes padding of fewer than four connections. If the inputs are split into segments, and for the
gradient of x, shorter neurons are padded with places of the tile's row of zeros.

A wavefront of shared memory serves eight lanes, with one quad of 16 bytes in each of eight banks.
With fewer than eight lanes for a neuron, several neurons share a wavefront. Each neuron's
connections are ordered so that the inputs of its neighbours, at the same step, are mostly in other
banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.backends.cupy_gpu.device import Device

__all__ = ["Tiles", "pack_tiles", "rows_of_tile", "smallest_positions"]

MOST_PLACES = 1 << 16
"""A place is 16 bits."""

MOST_NARROW_POSITIONS = np.iinfo(np.int32).max
"""Most values whose positions are kept in 32 bits."""

CHUNK = 4

WINDOW = 32
"""Neurons that are sorted by their degrees among themselves.

A larger window needs less padding. In a smaller one the results of a warp are nearer to each other
in memory, where eight columns of four bytes are written at once.
"""


@dataclass(frozen=True, eq=False)
class Tiles:
    """The packing of a mask, on the device.

    Parameters
    ----------
    lanes : int
        Lanes of each neuron.
    tile_rows, n_segments : int
        Number of inputs in a tile, and number of tiles for all inputs.
    groups : int
        Number of groups of neurons that have connections.
    places : device array of uint16, (chunks, 32 / lanes, 4)
    starts : device array of int64, (n_segments, groups + 1)
    columns : device array of int32, (n_neurons,)
        Column of the result for each neuron, sorted by degree in windows; neurons without
        connections are last.
    positions : device array of int32 or int64, (chunks * 32 / lanes * 4,)
        Position of each value in the condensed values, -1 for padding.
    """

    lanes: int
    tile_rows: int
    n_segments: int
    groups: int
    places: Any
    starts: Any
    columns: Any
    positions: Any

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the tile."""
        return 16 * self.lanes

    @property
    def shared_bytes(self) -> int:
        """Bytes of the tile, including its row of zeros."""
        return (self.tile_rows + 1) * self.row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that depend on the mask."""
        arrays = (self.places, self.starts, self.columns, self.positions)
        return sum(int(array.nbytes) for array in arrays)


def rows_of_tile(n_inputs: int, lanes: int, shared_bytes: int) -> tuple[int, int]:
    """Return the number of inputs in a tile, and the number of tiles for all inputs."""
    most = min(shared_bytes // (16 * lanes), MOST_PLACES // lanes) - 1
    n_segments = -(-n_inputs // most)
    return -(-n_inputs // n_segments), n_segments


def pack_tiles(
    device: Device,
    inputs: NDArray[Any],
    degrees: NDArray[np.int64],
    entries: NDArray[Any],
    columns: NDArray[np.int64],
    *,
    n_inputs: int,
    lanes: int,
    shared_bytes: int,
) -> Tiles:
    """Pack the connections of neurons, or of inputs for the gradient of x.

    Parameters
    ----------
    device : Device
    inputs : ndarray of int, (nnz,)
        The input of each connection, neuron by neuron.
    degrees : ndarray of int64, (n_rows,)
        Connections of each neuron.
    entries : ndarray of int, (nnz,)
        Position of each connection's value in the condensed values.
    columns : ndarray of int64, (n_neurons,)
        Column of the result for each neuron; neurons from `n_rows` on have no connections.
    n_inputs, lanes, shared_bytes : int

    Returns
    -------
    Tiles
    """
    tile_rows, n_segments = rows_of_tile(n_inputs, lanes, shared_bytes)
    members, classes = 32 // lanes, 8 // lanes
    window = np.arange(degrees.size) // WINDOW
    by_degree = np.lexsort((-degrees, window, degrees == 0))
    rank = np.empty_like(by_degree)
    rank[by_degree] = np.arange(rank.size)
    n_connected = int(np.count_nonzero(degrees))
    groups = -(-n_connected // members)

    inputs = inputs.astype(np.int64)
    segment, row = np.divmod(inputs, tile_rows)
    lists = segment * (groups * members) + np.repeat(rank, degrees)
    order, nth = _ordered(lists, row, classes, members)
    lists, row = lists[order], row[order]
    lengths = np.bincount(lists, minlength=n_segments * groups * members)
    longest = lengths.reshape(n_segments, groups, members).max(axis=2)
    chunks = -(-longest // CHUNK)
    ends = np.cumsum(chunks).reshape(chunks.shape)
    starts = np.hstack([ends - chunks, ends[:, -1:]])
    first = (ends - chunks).ravel()[lists // members]
    at = ((first + nth // CHUNK) * members + lists % members) * CHUNK + nth % CHUNK
    size = int(ends[-1, -1]) * members * CHUNK
    places = np.full(size, tile_rows * lanes, np.uint16)
    places[at] = row * lanes + row // classes % lanes
    positions = np.full(size, -1, np.int64)
    positions[at] = entries[order]
    columns = np.concatenate([columns[: rank.size][by_degree], columns[rank.size :]])
    return Tiles(
        lanes=lanes,
        tile_rows=tile_rows,
        n_segments=n_segments,
        groups=groups,
        places=device.upload(places),
        starts=device.upload(starts),
        columns=device.upload(columns.astype(np.int32)),
        positions=device.upload(smallest_positions(positions, inputs.size)),
    )


def smallest_positions(positions: NDArray[np.int64], nnz: int) -> NDArray[Any]:
    """Return positions in `nnz` values in 32 bits, if these suffice."""
    return positions.astype(np.int32) if nnz <= MOST_NARROW_POSITIONS else positions


def _ordered(
    lists: NDArray[np.int64], row: NDArray[np.int64], classes: int, members: int
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Return the order of the connections, list by list, and the number of each in its list.

    At step j a neuron takes an input of bank ``(j + its number) % classes``, as long as it has one.
    """
    bank = row % classes
    order = np.argsort(lists * classes + bank, kind="stable")
    turn = _numbered((lists * classes + bank)[order]) * classes
    wanted = turn + (bank[order] - lists[order] % members) % classes
    order = order[np.lexsort((wanted, lists[order]))]
    return order, _numbered(lists[order])


def _numbered(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many equal keys precede each key; the keys are sorted."""
    new = np.concatenate([[True], keys[1:] != keys[:-1]])
    begins = np.flatnonzero(new)
    return np.arange(keys.size) - np.repeat(begins, np.diff(np.append(begins, keys.size)))
