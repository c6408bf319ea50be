"""Batches of five rows and more: one batch row in each lane, a few neurons in lockstep (SPEC 2).

Layout: the inputs are split into blocks of columns, the sums into groups of rows. For each block,
the rows of a group are sorted by their number of connections in it, and taken a few at a time.
These have one connection each in a step: `values`, and `offsets` of the columns' rows in the tile.
Rows with fewer connections than the others are padded with the value 0 and the offset of a row of
zeros behind the block, which is exact whatever x holds.

Kernel: a block of x is transposed into a tile (columns, lanes) that stays in the cache. Each
connection multiplies one number by one vector, which may be several registers. Each row has a sum
of its own, so that the additions of a step do not wait for each other. Sums are loaded before a
row's connections in a block, and stored after them. At very high sparsity a block has so many
columns that its tile fills half of the second-level cache: with smaller blocks, loading and storing
sums would take longer.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.batch_tiles import SQUARE, stager, tile_for
from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import CompressedRows, aligned_empty, arranged
from srigl_core.backends.numba_cpu.processor import cache_bytes, vector_bytes, vector_registers
from srigl_core.backends.numba_cpu.results import (
    are_side_by_side,
    fill_ablated,
    finish_row,
    first_column,
)
from srigl_core.backends.numba_cpu.scratch import scratch
from srigl_core.backends.numba_cpu.simd import add, flat, load, store, transpose
from srigl_core.backends.numba_cpu.vector_tuples import (
    UNIT,
    accumulate,
    load_each,
    store_each,
    zeros_each,
)

__all__ = ["Lockstep", "neurons_in_lockstep"]

MOST_NEURONS = 8
"""Neurons in lockstep: more would share nothing, and need more padding."""

GROUP_ROWS = (192, 1024)
"""Least and most rows that are sorted together: few, to share them among threads; many, to pad
little."""

NARROW_BYTES = 32
"""A tile with rows of up to this size fills half of the first-level cache, and a wider one three
quarters: a kernel needs the rest for values and offsets, which a narrow tile reads faster."""

MOST_OFFSET = 65535

CONNECTIONS_PER_VISIT = 8
"""Connections of a row in a block that make up for loading and storing its sums."""


def neurons_in_lockstep(lanes: int, itemsize: int) -> int:
    """Return the neurons whose sums, of `lanes` lanes each, fill half of the registers."""
    registers = max(1, lanes * itemsize // vector_bytes())
    return min(MOST_NEURONS, max(1, vector_registers() // 2 // registers))


class Lockstep:
    """Connections for tiles of `lanes` batch rows.

    Parameters
    ----------
    connections : CompressedRows
    lanes : int
    dtype : numpy.dtype
        Dtype of the sums.
    """

    def __init__(self, connections: CompressedRows, lanes: int, dtype: np.dtype[Any]) -> None:
        self.lanes = lanes
        row_bytes = lanes * dtype.itemsize
        self.together = together = neurons_in_lockstep(lanes, dtype.itemsize)
        self.block = _block_columns(connections, row_bytes)
        self.group = _group_rows(connections.n_rows, together)
        counts, order = _sorted_counts(connections, self.block, self.group, together)
        n_blocks, n_padded = order.shape
        tuples = (n_blocks, n_padded // together)
        at_once = max(4, together)  # connections of a step
        longest = np.take_along_axis(counts, order, axis=1).reshape(*tuples, together).max(axis=2)
        self.steps = -(-longest * together // at_once)
        ends = np.cumsum(self.steps) * at_once
        firsts = np.concatenate([[0], ends])
        starts = np.empty_like(order)
        lane_of = np.arange(n_padded) % together
        within = firsts[:-1].reshape(tuples).repeat(together, axis=1) + lane_of
        np.put_along_axis(starts, order, within, axis=1)
        self.positions = np.full(firsts[-1], -1, connections.entries.dtype)
        self.offsets = aligned_empty(firsts[-1], np.uint16)
        self.offsets[:] = self.block * row_bytes // UNIT
        _place(
            (connections.starts, connections.columns, connections.entries),
            (self.block, together, row_bytes // UNIT),
            starts,
            self.positions,
            self.offsets,
        )
        self.steps = self.steps.astype(np.uint16)
        self.counts = np.take_along_axis(counts, order, axis=1).astype(np.uint16)
        self.rows = (order % self.group).astype(np.uint16)
        n_groups = -(-n_padded // self.group)
        edges = np.minimum(np.arange(n_groups + 1) * self.group, n_padded) // together
        self.visits = firsts[np.arange(n_blocks)[:, None] * tuples[1] + edges]
        self.arrays = (self.block, self.group, self.offsets, self.rows, self.steps, self.visits)
        self.launch = _launcher(lanes, together)
        self._most_runs: int = n_groups
        self.least_runs: int = min(-(-n_padded * row_bytes // (cache_bytes()[1] // 4)), n_groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that depend on the mask."""
        arrays = (self.positions, self.offsets, self.rows, self.steps, self.counts, self.visits)
        return sum(array.nbytes for array in arrays)

    def arrange(self, bits: Any, dtype: Any) -> Any:
        """Return the values in this layout's order, for sums in `dtype`.

        Narrow values are widened by the kernel that sums float32.
        """
        stays = bits.itemsize <= 2 and dtype == np.float32
        return arranged(bits, self.positions, bits.dtype if stays else dtype)

    def runs(self, tiles: int, n_threads: int) -> int:
        """Return the number of parts that a tile's groups are split into.

        Parts are small enough for their sums to stay in the cache, and numerous enough for all
        threads to have work. Each part of a tile transposes x again.
        """
        runs = self.least_runs
        while tiles * runs % n_threads and tiles * runs < 8 * n_threads:
            runs += 1
        return min(runs, self._most_runs)


def _block_columns(connections: CompressedRows, row_bytes: int) -> int:
    first_level, second_level = cache_bytes()
    in_cache = int(first_level * (1 / 2 if row_bytes <= NARROW_BYTES else 3 / 4)) // row_bytes
    wanted = CONNECTIONS_PER_VISIT / max(connections.density, 1e-9)
    most = max(min(second_level // 2, UNIT * MOST_OFFSET) // row_bytes - 1, SQUARE)
    block = min(max(in_cache, wanted), most // SQUARE * SQUARE, connections.n_inputs)
    n_blocks = -(-connections.n_inputs // int(block))
    return -(-connections.n_inputs // (n_blocks * SQUARE)) * SQUARE


def _group_rows(n_rows: int, together: int) -> int:
    least, most = GROUP_ROWS
    return -(-min(max(n_rows // 4, least), most) // together) * together


def _sorted_counts(
    connections: CompressedRows, block: int, group: int, together: int
) -> tuple[Any, Any]:
    """Return each row's connections in each block, and the order of the rows in their groups.

    Rows without connections are appended, so that the number of rows is a multiple of `together`.
    """
    n_blocks = -(-connections.n_inputs // block)
    n_padded = -(-connections.n_rows // together) * together
    counts = np.zeros((n_blocks, n_padded), np.int64)
    _count(connections.starts, connections.columns, block, counts)
    group_of = np.arange(n_padded) // group
    keys = group_of * (counts.max() + 1) + counts
    return counts, np.argsort(keys, axis=1, kind="stable")


@kernel()
def _count(starts, columns, block, counts):
    """Count the connections of each row in each block; `counts` has zeros."""
    for row in range(starts.size - 1):
        b, end = 0, block
        for i in range(starts[row], starts[row + 1]):
            while columns[i] >= end:
                b, end = b + 1, end + block
            counts[b, row] += 1


@kernel()
def _place(rows, sizes, starts, positions, offsets):
    """Write position and offset of each connection to its place in the layout.

    The first connection of a row in a block is at ``starts[block, row]``, the next one is as many
    places further as there are neurons in lockstep.
    """
    (firsts, columns, entries), (block, together, units) = rows, sizes
    for row in range(firsts.size - 1):
        b, begin, at = 0, 0, starts[0, row]
        for i in range(firsts[row], firsts[row + 1]):
            while columns[i] >= begin + block:
                b, begin = b + 1, begin + block
                at = starts[b, row]
            positions[at], offsets[at] = entries[i], (columns[i] - begin) * units
            at += together


@functools.cache
def _launcher(lanes: int, together: int) -> Launcher:
    """Return the kernel for tiles of `lanes` batch rows and `together` neurons in lockstep.

    An item is one of the `runs` parts of a tile.
    """
    at_once = max(4, together)
    width = np.uint64(lanes)
    u = np.uint64
    stage = stager(lanes)

    @kernel()
    def visit(values, offsets, at, rows, steps, tile, sums, base, is_first):
        """Add the connections in one block to each row's sums."""
        for i in range(u(steps.size)):
            own = i * u(together)
            if is_first:
                totals = zeros_each(sums, together, lanes)
            else:
                totals = load_each(sums, base, rows, own, together, lanes)
            end = at + u(steps[i]) * u(at_once)
            while at < end:
                totals = accumulate(totals, values, offsets, at, tile)
                at += u(at_once)
            store_each(sums, base, rows, own, totals)

    @kernel()
    def deliver(sums, rows, row, last_row, bias, columns, out, corner, code):
        """Transpose the sums of neurons ``rows`` into the result; add bias, apply activation."""
        first, last = rows
        n_columns = u(bias.size)
        begin = first_column(first, columns, bias.size)
        end = first_column(last, columns, bias.size)
        for lane in range(u(0), width, u(SQUARE)):
            top = row + lane
            if top > last_row:
                break
            height = min(u(SQUARE), last_row + u(1) - top)
            if columns.size != bias.size:
                start = np.int64(top * n_columns)
                fill_ablated(out, start, height, columns, first, last, bias)
            for neuron in range(u(first), u(last), u(SQUARE)):
                near = u(last) - neuron
                source = ((neuron - u(first)) * width + lane, width, near - u(1))
                transpose(sums, source, corner, u(0), u(SQUARE), SQUARE)
                whole = are_side_by_side(columns, np.int64(neuron), SQUARE)
                whole = whole and near >= u(SQUARE)
                for i in range(height):
                    place = (top + i) * n_columns
                    if whole:
                        column = u(columns[neuron])
                        total = load(corner, i * u(SQUARE), SQUARE)
                        total = add(total, load(bias, column, SQUARE))
                        store(out, place + column, total)
                    else:
                        for j in range(min(near, u(SQUARE))):
                            column = columns[neuron + j]
                            out[place + u(column)] = corner[i * u(SQUARE) + j] + bias[column]
            for i in range(height):
                finish_row(out, np.int64((top + i) * n_columns), begin, end, code)

    @kernel()
    def run(
        first_item,
        last_item,
        runs,
        first_row,
        block,
        group_rows,
        offsets,
        rows,
        steps,
        visits,
        values,
        x,
        bias,
        columns,
        out,
        code,
    ):
        n_in, line = x.shape[1], flat(x)
        n_blocks, n_groups = visits.shape[0], visits.shape[1] - 1
        last_row = u(x.shape[0] - 1)
        longest = (n_groups + runs - 1) // runs * group_rows
        tile, sums = tile_for(block, lanes, line), scratch(longest * lanes, line)
        corner = scratch(SQUARE * SQUARE, line)
        for item in range(first_item, last_item):
            part = item % runs
            row = u(first_row + item // runs * lanes)
            last = min(row + width - u(1), last_row)
            begin_group, end_group = n_groups * part // runs, n_groups * (part + 1) // runs
            first_neuron = begin_group * group_rows
            for b in range(n_blocks):
                begin, end = b * block, min((b + 1) * block, n_in)
                stage(line, u(n_in), row, last, u(begin), u(end), tile)
                for group in range(begin_group, end_group):
                    low, high = group * group_rows, min((group + 1) * group_rows, rows.shape[1])
                    at, base = u(visits[b, group]), u((low - first_neuron) * lanes)
                    members, sizes = rows[b, low:high], steps[b, low // together : high // together]
                    visit(values, offsets, at, members, sizes, tile, sums, base, b == 0)
            neurons = (first_neuron, min(end_group * group_rows, columns.size))
            deliver(sums, neurons, row, last, flat(bias), columns, flat(out), corner, code)

    return Launcher(run)
