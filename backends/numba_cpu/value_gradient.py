"""The gradient of the values: one dot product along the batch for each connection (SPEC 2).

The tiles and the layout are those of `column_blocks`. A neuron's gradients of a tile stay in
registers during its connections of a block, four of which are summed over their lanes at a time.
One thread computes all tiles of a block in order, so that the order of a sum does not depend on the
number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.column_blocks import GROUP_ROWS, ColumnBlocks, stager
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty
from srigl_core.backends.numba_cpu.processor import vector_bytes
from srigl_core.backends.numba_cpu.scratch import scratch
from srigl_core.backends.numba_cpu.simd import (
    add,
    first_lane,
    flat,
    fold_product,
    load,
    load_four,
    load_quad,
    store,
    sum_each,
)

__all__ = ["value_gradient"]


def value_gradient(
    blocks: ColumnBlocks, grad: Any, x: Any, out: Any, *, lanes: int, n_threads: int
) -> None:
    """Write the gradient to `out`.

    Parameters
    ----------
    blocks : ColumnBlocks
        Layout of the forward product, for tiles of at least `lanes` rows.
    grad : ndarray, (batch, n_active)
    x : ndarray, (batch, n_in)
    out : ndarray, (n_active, k)
        The three arrays have one dtype, and are in C order.
    lanes, n_threads : int
    """
    stage_grads, sum_products = _launchers(lanes, min(lanes, vector_bytes() // x.itemsize))
    n_tiles = -(-len(x) // lanes)
    grads = aligned_empty(n_tiles * lanes * grad.shape[1], grad.dtype)
    stage_grads(n_tiles, n_threads, (grad, grads))
    sums = aligned_empty(out.size, out.dtype)
    layout = (blocks.block, blocks.positions, blocks.offsets, blocks.rows, blocks.counts)
    sum_products(len(blocks.rows), n_threads, (*layout, blocks.visits, grads, x, sums, out))


@functools.cache
def _launchers(lanes: int, part: int) -> tuple[Launcher, Launcher]:
    """Return the kernel that transposes gradients into tiles, and the kernel that sums products.

    Tiles have `lanes` batch rows. The items of the first kernel are tiles, those of the second are
    blocks of columns. Products are reduced to vectors of `part` lanes, one register of the machine.
    """
    width = np.uint64(lanes)
    u = np.uint64
    stage = stager(lanes)

    @kernel()
    def stage_tile(array, n_columns, t, begin, end, tile):
        """Stage a tile with zeros in the lanes past the last row, which are summed too."""
        last_row = u(array.size // n_columns - 1)
        row = u(t * lanes)
        stage(array, u(n_columns), row, last_row, u(begin), u(end), tile)
        for lane in range(last_row + u(1) - row, width):
            for column in range(u(end - begin)):
                tile[column * width + lane] = 0

    @kernel()
    def visit(offsets, at, rows, counts, tile, grads, base, sums, is_first):
        """Add a tile's products to the sums of each row's connections in one block."""
        bits = u(8 * offsets.itemsize)
        mask = (u(1) << bits) - u(1)
        for i in range(u(rows.size)):
            grad = load(grads, base + u(rows[i]) * width, lanes)
            end = at + u(counts[i])
            while at + u(4) <= end:
                near = load_quad(offsets, at)
                a = fold_product(grad, load(tile, (near & mask) * width, lanes), part)
                b = fold_product(grad, load(tile, (near >> bits & mask) * width, lanes), part)
                near >>= bits + bits
                c = fold_product(grad, load(tile, (near & mask) * width, lanes), part)
                d = fold_product(grad, load(tile, (near >> bits & mask) * width, lanes), part)
                four = sum_each(a, b, c, d)
                store(sums, at, four if is_first else add(four, load_four(sums, at)))
                at += u(4)
            while at < end:
                a = fold_product(grad, load(tile, u(offsets[at]) * width, lanes), part)
                total = first_lane(sum_each(a, a, a, a))
                sums[at] = total if is_first else total + sums[at]
                at += u(1)

    @kernel()
    def run(first, last, block, positions, offsets, rows, counts, visits, grads, x, sums, out):
        n_in, line, result = x.shape[1], flat(x), flat(out)
        n_groups, n_rows = visits.shape[1] - 1, rows.shape[1]
        n_tiles = (x.shape[0] + lanes - 1) // lanes
        tile = scratch(min(block, n_in) * lanes, line)
        for b in range(first, last):
            begin, end = b * block, min((b + 1) * block, n_in)
            for t in range(n_tiles):
                stage_tile(line, n_in, t, begin, end, tile)
                for group in range(n_groups):
                    low, high = group * GROUP_ROWS, min((group + 1) * GROUP_ROWS, n_rows)
                    at, base = u(visits[b, group]), u((t * n_rows + low) * lanes)
                    members, sizes = rows[b, low:high], counts[b, low:high]
                    visit(offsets, at, members, sizes, tile, grads, base, sums, t == 0)
            for place in range(visits[b, 0], visits[b, n_groups]):
                result[positions[place]] = sums[place]
        return True

    @kernel()
    def stage_grads(first, last, grad, grads):
        n_rows, line = grad.shape[1], flat(grad)
        size = n_rows * lanes
        for t in range(first, last):
            stage_tile(line, n_rows, t, 0, n_rows, grads[t * size : (t + 1) * size])
        return True

    return Launcher(stage_grads), Launcher(run)
