"""Tiles of a batch: x transposed, so that one instruction computes with several batch rows.

A tile has a block of columns of x, and a power of two of batch rows, its lanes. It stays in the
cache while the connections to these columns are computed.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.processor import vector_bytes
from srigl_core.backends.numba_cpu.scratch import scratch
from srigl_core.backends.numba_cpu.simd import transpose

__all__ = ["LEAST_LANES", "lanes_of", "square_of", "stager", "tile_for", "widest_lanes"]

LEAST_LANES = 8
WIDEST_BYTES = 128
"""Bytes of a tile's row in the widest kernel; wider ones are never faster."""


def widest_lanes(dtype: np.dtype[Any]) -> int:
    """Return the number of batch rows in a tile of the widest kernel."""
    return WIDEST_BYTES // dtype.itemsize


def lanes_of(batch: int, dtype: np.dtype[Any]) -> int:
    """Return the lanes of a tile for up to `batch` rows: a power of two, at least 8."""
    lanes = LEAST_LANES
    while lanes < min(batch, widest_lanes(dtype)):
        lanes *= 2
    return lanes


def square_of(lanes: int) -> int:
    """Return the rows of the squares in which tiles of `lanes` batch rows are transposed."""
    return min(lanes, max(8, vector_bytes() // 4))


@kernel()
def tile_for(n_columns, lanes, like):
    """Return memory for a tile of `n_columns` columns and a column of zeros behind them.

    Padding of the connections points to that column.
    """
    tile = scratch((n_columns + 1) * lanes, like)
    tile[n_columns * lanes :] = 0
    return tile


@functools.cache
def stager(lanes: int) -> Any:
    """Return the kernel that transposes a block of x into a tile of `lanes` batch rows."""
    square = square_of(lanes)
    width = np.uint64(lanes)
    u = np.uint64

    @kernel()
    def stage(x, n_in, row, last_row, begin, end, tile):
        """Transpose columns `begin` to `end` of the batch rows from `row` on into the tile.

        Lanes past the last row repeat that row; their results are not stored.
        """
        whole = begin + (end - begin) // u(square) * u(square)
        for lane in range(u(0), width, u(square)):
            top = min(row + lane, last_row)
            for column in range(begin, whole, u(square)):
                source = (top * n_in + column, n_in, last_row - top)
                transpose(x, source, tile, (column - begin) * width + lane, width, square)
            for column in range(whole, end):
                for i in range(u(square)):
                    source_row = min(top + i, last_row)
                    tile[(column - begin) * width + lane + i] = x[source_row * n_in + column]

    return stage
