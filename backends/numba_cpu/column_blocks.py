"""Batches: one row of the batch in each lane of a vector, one column block of x in the cache.

Layout: the inputs are split into blocks of columns, the sums into groups of rows. For each block
and each row of a group, the layout stores the row's connections in that block: `values`, and
`offsets` from the block's first column. Within a group the rows are sorted by their number of
connections, so that the processor can predict where a row ends. There is no padding: only connected
inputs are read.

Kernel: a tile of the batch has as many rows as a vector has lanes. A block of x is transposed into
a tile (columns, lanes) that stays in the cache. Each connection then multiplies one number by one
vector, which may be several registers. A row's partial sums are loaded before its connections in a
block, and stored after them. At very high sparsity a block has so many columns that its tile fills
half of the second-level cache: with smaller blocks, loading and storing sums would take longer.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import CompressedRows, aligned_empty, arranged
from srigl_core.backends.numba_cpu.processor import cache_bytes, vector_bytes
from srigl_core.backends.numba_cpu.results import (
    are_side_by_side,
    fill_ablated,
    finish_row,
    first_column,
)
from srigl_core.backends.numba_cpu.scratch import scratch
from srigl_core.backends.numba_cpu.simd import (
    add,
    flat,
    fma,
    load,
    load_four,
    load_quad,
    splat,
    splat_lane,
    store,
    transpose,
    zeros,
)

__all__ = ["GROUP_ROWS", "ColumnBlocks", "lanes_of", "stager", "widest_lanes"]

REGISTERS = 4
"""Vector registers that hold a row's sums in the widest kernel."""

GROUP_ROWS = 192
"""Rows that are sorted together: few enough to share among threads, enough to gain by sorting."""

CONNECTIONS_PER_VISIT = 8
"""Connections of a row in a block that make up for loading and storing its sums."""


_WIDEST_BYTES = REGISTERS * vector_bytes()


def widest_lanes(dtype: np.dtype[Any]) -> int:
    """Return the number of batch rows in a tile of the widest kernel."""
    return _WIDEST_BYTES // dtype.itemsize


def lanes_of(batch: int, dtype: np.dtype[Any]) -> int:
    """Return the lanes of a tile for up to `batch` rows: a power of two, at least 8."""
    lanes = 8
    while lanes < min(batch, widest_lanes(dtype)):
        lanes *= 2
    return lanes


class ColumnBlocks:
    """Connections in column blocks, for tiles of up to `lanes` batch rows.

    Parameters
    ----------
    connections : CompressedRows
    lanes : int
    dtype : numpy.dtype
        Dtype of the sums.
    """

    name = "column blocks"
    padding = 1.0

    def __init__(self, connections: CompressedRows, lanes: int, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self.n_inputs, n_rows = connections.n_inputs, connections.n_rows
        self.block = _block_columns(connections, lanes * dtype.itemsize)
        n_blocks = -(-self.n_inputs // self.block)
        starts, columns = connections.starts, connections.columns.astype(np.int64)
        row_of = np.repeat(np.arange(n_rows), np.diff(starts))
        visits = columns // self.block * n_rows + row_of
        counts = np.bincount(visits, minlength=n_blocks * n_rows).reshape(n_blocks, n_rows)
        begins = starts[:-1] + np.cumsum(counts, axis=0) - counts
        group_of = np.arange(n_rows) // GROUP_ROWS
        order = np.argsort(group_of * (counts.max() + 1) + counts, axis=1, kind="stable")
        counts = np.take_along_axis(counts, order, axis=1)
        begins = np.take_along_axis(begins, order, axis=1).ravel()
        ends = np.cumsum(counts)
        nth = np.arange(columns.size)
        place = nth + np.repeat(begins - (ends - counts.ravel()), counts.ravel())
        self.positions = connections.entries[place]
        self.offsets = aligned_empty(columns.size, np.uint8 if self.block <= 256 else np.uint16)
        self.offsets[:] = columns[place] % self.block
        self.rows = (order - group_of * GROUP_ROWS).astype(np.uint8)
        self.counts = counts.astype(np.uint16 if self.block <= 65535 else np.uint32)
        groups = np.minimum(np.arange(group_of[-1] + 2) * GROUP_ROWS, n_rows)
        before = np.concatenate([[0], ends])
        self.visits = before[np.arange(n_blocks)[:, None] * n_rows + groups]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that depend on the mask."""
        arrays = (self.positions, self.offsets, self.rows, self.counts, self.visits)
        return sum(array.nbytes for array in arrays)

    def arrange(self, bits: Any, dtype: Any) -> Any:
        """Return the values in this layout's order, converted to the dtype of the sums."""
        return arranged(bits, self.positions, dtype)

    def multiply(
        self,
        values: Any,
        x: Any,
        bias: Any,
        columns: Any,
        out: Any,
        code: int,
        *,
        first: int,
        tiles: int,
        lanes: int,
        n_threads: int,
    ) -> None:
        """Write the product of `tiles` tiles of `lanes` batch rows, from row `first` on, to `out`.

        The last tile may extend past the end of the batch.
        """
        runs = self._runs(lanes, tiles, n_threads)
        layout = (self.block, self.offsets, self.rows, self.counts, self.visits)
        arguments = (runs, first, *layout, values, x, bias, columns, out, code)
        _launcher(lanes)(tiles * runs, n_threads, arguments)

    def _runs(self, lanes: int, tiles: int, n_threads: int) -> int:
        """Return the number of parts that a tile's groups are split into.

        Parts are small enough for their sums to stay in the cache, and numerous enough for all
        threads to have work. Each part of a tile transposes x again.
        """
        bytes_of_sums = self.counts.shape[1] * lanes * self._dtype.itemsize
        runs = -(-bytes_of_sums // (cache_bytes()[1] // 4))
        while tiles * runs % n_threads and tiles * runs < 8 * n_threads:
            runs += 1
        return min(runs, int(self.visits.shape[1]) - 1)


def _block_columns(connections: CompressedRows, row_bytes: int) -> int:
    first_level, second_level = cache_bytes()
    wanted = CONNECTIONS_PER_VISIT / max(connections.density, 1e-9)
    most = max(16, min(second_level // 2 // row_bytes, 65536))
    block = min(max(first_level // row_bytes, wanted), most, connections.n_inputs)
    n_blocks = -(-connections.n_inputs // int(block))
    return -(-connections.n_inputs // (n_blocks * 16)) * 16


@functools.cache
def stager(lanes: int) -> Any:
    """Return the kernel that transposes a block of x into a tile of `lanes` batch rows."""
    square = min(lanes, 16)
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


@functools.cache
def _launcher(lanes: int) -> Launcher:
    """Return the kernel for tiles of `lanes` batch rows.

    An item is one of the `runs` parts of a tile.
    """
    square = min(lanes, 16)
    width = np.uint64(lanes)
    u = np.uint64
    stage = stager(lanes)

    @kernel()
    def visit(values, offsets, at, rows, counts, tile, sums, base, is_first):
        """Add the connections in one block to each row's sums."""
        bits = u(8 * offsets.itemsize)
        mask = (u(1) << bits) - u(1)
        for i in range(u(rows.size)):
            mine = base + u(rows[i]) * width
            total = zeros(sums, lanes) if is_first else load(sums, mine, lanes)
            other = zeros(sums, lanes)
            end = at + u(counts[i])
            while at + u(4) <= end:
                near, four = load_quad(offsets, at), load_four(values, at)
                x = load(tile, (near & mask) * width, lanes)
                total = fma(splat_lane(four, 0, lanes), x, total)
                x = load(tile, (near >> bits & mask) * width, lanes)
                other = fma(splat_lane(four, 1, lanes), x, other)
                near >>= bits + bits
                x = load(tile, (near & mask) * width, lanes)
                total = fma(splat_lane(four, 2, lanes), x, total)
                x = load(tile, (near >> bits & mask) * width, lanes)
                other = fma(splat_lane(four, 3, lanes), x, other)
                at += u(4)
            while at < end:
                x = load(tile, u(offsets[at]) * width, lanes)
                total = fma(splat(values[at], lanes), x, total)
                at += u(1)
            store(sums, mine, add(total, other))

    @kernel()
    def deliver(sums, rows, row, last_row, bias, columns, out, corner, code):
        """Transpose the sums of neurons ``rows`` into the result; add bias, apply activation."""
        first, last = rows
        n_columns = u(bias.size)
        begin = first_column(first, columns, bias.size)
        end = first_column(last, columns, bias.size)
        for lane in range(u(0), width, u(square)):
            top = row + lane
            if top > last_row:
                break
            height = min(u(square), last_row + u(1) - top)
            if columns.size != bias.size:
                start = np.int64(top * n_columns)
                fill_ablated(out, start, height, columns, first, last, bias)
            for neuron in range(u(first), u(last), u(square)):
                near = u(last) - neuron
                source = ((neuron - u(first)) * width + lane, width, near - u(1))
                transpose(sums, source, corner, u(0), u(square), square)
                whole = are_side_by_side(columns, np.int64(neuron), square)
                whole = whole and near >= u(square)
                for i in range(height):
                    place = (top + i) * n_columns
                    if whole:
                        column = u(columns[neuron])
                        total = load(corner, i * u(square), square)
                        total = add(total, load(bias, column, square))
                        store(out, place + column, total)
                    else:
                        for j in range(min(near, u(square))):
                            column = columns[neuron + j]
                            out[place + u(column)] = corner[i * u(square) + j] + bias[column]
            for i in range(height):
                finish_row(out, np.int64((top + i) * n_columns), begin, end, code)

    @kernel()
    def run(
        first_item,
        last_item,
        runs,
        first_row,
        block,
        offsets,
        rows,
        counts,
        visits,
        values,
        x,
        bias,
        columns,
        out,
        code,
    ):
        n_in, line, n_rows = x.shape[1], flat(x), columns.size
        n_blocks, n_groups = visits.shape[0], visits.shape[1] - 1
        last_row = u(x.shape[0] - 1)
        longest = (n_groups + runs - 1) // runs * GROUP_ROWS
        tile, sums = scratch(min(block, n_in) * lanes, line), scratch(longest * lanes, line)
        corner = scratch(square * square, line)
        for item in range(first_item, last_item):
            part = item % runs
            row = u(first_row + item // runs * lanes)
            last = min(row + width - u(1), last_row)
            begin_group, end_group = n_groups * part // runs, n_groups * (part + 1) // runs
            first_neuron = begin_group * GROUP_ROWS
            for b in range(n_blocks):
                begin, end = b * block, min((b + 1) * block, n_in)
                stage(line, u(n_in), row, last, u(begin), u(end), tile)
                for group in range(begin_group, end_group):
                    low, high = group * GROUP_ROWS, min((group + 1) * GROUP_ROWS, n_rows)
                    at, base = u(visits[b, group]), u((low - first_neuron) * lanes)
                    members, sizes = rows[b, low:high], counts[b, low:high]
                    visit(values, offsets, at, members, sizes, tile, sums, base, b == 0)
            neurons = (first_neuron, min(end_group * GROUP_ROWS, n_rows))
            deliver(sums, neurons, row, last, flat(bias), columns, flat(out), corner, code)
        return True

    return Launcher(run)
