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

__all__ = [
    "LANE_NANOSECONDS",
    "MOVE_NANOSECONDS",
    "ROW_NANOSECONDS",
    "SQUARE",
    "lanes_of",
    "stager",
    "tile_for",
    "tile_parts",
    "tiles_nanoseconds",
    "widest_lanes",
]

SQUARE = LEAST_LANES = 8
"""Rows and columns of the squares in which tiles are transposed. Wider squares read from more rows
of x at a time than a set of the first-level cache has places, if the rows are some KiB apart."""

WIDEST_BYTES = 128
"""Bytes of a tile's row in the widest kernel; wider ones are never faster."""

ROW_NANOSECONDS = 0.1
LANE_NANOSECONDS = {64: 0.0237, 32: 0.0251, 16: 0.0608}[vector_bytes()]
"""Time of an input or output of a batch row; and by the bytes of a vector register, the time of
each connection and lane of a tile.

They choose between kernels for rows and for tiles. The latter were fitted by least squares to the
shortest times of batches of 8, 16 and 32 rows, in float32, with a layer of 3072 inputs and 768
neurons at 90% sparsity, on one core of a Zen 4 processor. Numba compiled for all its features, for
those of Haswell, and for none.
"""

MOVE_NANOSECONDS = 0.15
_TILE_NANOSECONDS = {
    64: {32: 0.193, 64: 0.225, 128: 0.414},
    32: {32: 0.197, 64: 0.349, 128: 0.637},
    16: {32: 0.499, 64: 0.986, 128: 1.959},
}[vector_bytes()]
"""They choose the tiles of a batch, and estimate the time of a product: the time of an input or
output of a batch row; and by the bytes of a vector register and of a tile's row, the time of a
connection.

They were measured like the constants above, and at 99% sparsity, on one core of a Zen 5 processor;
those of the smallest registers are of the Zen 4 processor.
"""


def widest_lanes(itemsize: int) -> int:
    """Return the number of batch rows in a tile of the widest kernel."""
    return WIDEST_BYTES // itemsize


def lanes_of(batch: int, itemsize: int) -> int:
    """Return the lanes of a tile for up to `batch` rows: a power of two, at least 8."""
    lanes = LEAST_LANES
    while lanes < min(batch, widest_lanes(itemsize)):
        lanes *= 2
    return lanes


@functools.lru_cache(maxsize=1024)
def tile_parts(batch: int, itemsize: int) -> tuple[tuple[int, int, int], ...]:
    """Divide a batch into tiles, as (first row, number of tiles, lanes), the widest ones first.

    The rest of a batch takes the tiles of different widths that hold it and take least time. The
    last one may extend past the end of the batch.
    """
    widest = widest_lanes(itemsize)
    whole, rest = divmod(batch, widest)
    widths = [widest >> i for i in range((widest // LEAST_LANES).bit_length())]
    choices = [
        [width for i, width in enumerate(widths) if chosen >> i & 1]
        for chosen in range(1 << len(widths))
    ]

    def time(tiles: list[int]) -> float:
        return sum(_TILE_NANOSECONDS[lanes * itemsize] for lanes in tiles)

    enough = [choice for choice in choices if sum(choice) >= rest]
    of_rest = min(enough, key=time)
    parts, first = [], 0
    for width in widths:
        n = of_rest.count(width) + (whole if width == widest else 0)
        if n:
            parts.append((first, n, width))
        first += n * width
    return tuple(parts)


def tiles_nanoseconds(batch: int, itemsize: int) -> float:
    """Return the estimated time of a connection in all tiles of a batch."""
    parts = tile_parts(batch, itemsize)
    return sum(n * _TILE_NANOSECONDS[lanes * itemsize] for _, n, lanes in parts)


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
    width = np.uint64(lanes)
    u = np.uint64

    @kernel()
    def stage(x, n_in, row, last_row, begin, end, tile):
        """Transpose columns `begin` to `end` of the batch rows from `row` on into the tile.

        Lanes past the last row repeat that row; their results are not stored.
        """
        whole = begin + (end - begin) // u(SQUARE) * u(SQUARE)
        for lane in range(u(0), width, u(SQUARE)):
            top = min(row + lane, last_row)
            for column in range(begin, whole, u(SQUARE)):
                source = (top * n_in + column, n_in, last_row - top)
                transpose(x, source, tile, (column - begin) * width + lane, width, SQUARE)
            for column in range(whole, end):
                for i in range(u(SQUARE)):
                    source_row = min(top + i, last_row)
                    tile[(column - begin) * width + lane + i] = x[source_row * n_in + column]

    return stage
