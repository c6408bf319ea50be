"""The gradient of the values: one dot product along the batch for each connection (SPEC 2).

The tiles and the layout are those of `column_blocks`. A neuron's gradients of a tile stay in
registers while its connections of a block pass; four connections at a time are summed over their
lanes. A block's connections are one thread's, tile after tile, so that the order of a sum does not
depend on the number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import prange

from srigl_core.backends.numba_cpu.calling import Direct
from srigl_core.backends.numba_cpu.column_blocks import GROUP_ROWS, ColumnBlocks, stager
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.float_mode import honour_subnormals, restore_float_mode
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
        The forward product's, for tiles of at least `lanes`.
    grad : ndarray, (batch, n_active)
    x : ndarray, (batch, n_in)
    out : ndarray, (n_active, k)
        All of one type, in C order.
    lanes, n_threads : int
    """
    serial, parallel = _kernels(lanes, min(lanes, vector_bytes() // x.itemsize))
    layout = (blocks.block, blocks.positions, blocks.offsets, blocks.rows, blocks.counts)
    arrays = (*layout, blocks.visits, grad, x, out)
    if n_threads == 1:
        serial.code(blocks.types, arrays)(*arrays)
    else:
        parallel.code(blocks.types, (n_threads, *arrays))(n_threads, *arrays)


@functools.cache
def _kernels(lanes: int, part: int) -> tuple[Direct, Direct]:
    """Return the kernel for tiles of `lanes` batch rows, and its parallel twin.

    Products are added up to vectors of `part` lanes, a register of the machine.
    """
    width = np.uint64(lanes)
    u = np.uint64
    stage = stager(lanes)

    @kernel()
    def stage_tile(array, n_columns, t, begin, end, tile):
        """Stage a tile with zeros in the lanes past the last row: these are summed too."""
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
    def run(
        first, last, block, positions, offsets, rows, counts, visits, grads, x, n_in, sums, out
    ):
        n_rows = rows.shape[1]
        n_tiles = (x.size // n_in + lanes - 1) // lanes
        tile = scratch(min(block, n_in) * lanes, x)
        for b in range(first, last):
            begin, end = b * block, min((b + 1) * block, n_in)
            for t in range(n_tiles):
                stage_tile(x, n_in, t, begin, end, tile)
                for group in range(visits.shape[1] - 1):
                    low, high = group * GROUP_ROWS, min((group + 1) * GROUP_ROWS, n_rows)
                    visit(
                        offsets,
                        u(visits[b, group]),
                        rows[b, low:high],
                        counts[b, low:high],
                        tile,
                        grads,
                        u((t * n_rows + low) * lanes),
                        sums,
                        t == 0,
                    )
            for at in range(visits[b, 0], visits[b, visits.shape[1] - 1]):
                out[positions[at]] = sums[at]

    @kernel()
    def stage_grads(first, last, grad, n_rows, grads):
        size = n_rows * lanes
        for t in range(first, last):
            stage_tile(grad, n_rows, t, 0, n_rows, grads[t * size : (t + 1) * size])

    @kernel()
    def serial(block, positions, offsets, rows, counts, visits, grad, x, out):
        mode = honour_subnormals()
        n_rows, n_in = grad.shape[1], x.shape[1]
        n_tiles = (x.shape[0] + lanes - 1) // lanes
        grads, sums = scratch(n_tiles * n_rows * lanes, x), scratch(positions.size, x)
        stage_grads(0, n_tiles, flat(grad), n_rows, grads)
        line, result = flat(x), flat(out)
        run(
            0,
            rows.shape[0],
            block,
            positions,
            offsets,
            rows,
            counts,
            visits,
            grads,
            line,
            n_in,
            sums,
            result,
        )
        restore_float_mode(mode)

    @kernel(parallel=True)
    def parallel(n, block, positions, offsets, rows, counts, visits, grad, x, out):
        n_blocks, n_rows, n_in = rows.shape[0], grad.shape[1], x.shape[1]
        n_tiles = (x.shape[0] + lanes - 1) // lanes
        grads, sums = scratch(n_tiles * n_rows * lanes, x), scratch(positions.size, x)
        wide, line, result = flat(grad), flat(x), flat(out)
        for t in prange(n):
            mode = honour_subnormals()
            stage_grads(n_tiles * t // n, n_tiles * (t + 1) // n, wide, n_rows, grads)
            restore_float_mode(mode)
        for t in prange(n):
            mode = honour_subnormals()
            first, last = n_blocks * t // n, n_blocks * (t + 1) // n
            run(
                first,
                last,
                block,
                positions,
                offsets,
                rows,
                counts,
                visits,
                grads,
                line,
                n_in,
                sums,
                result,
            )
            restore_float_mode(mode)

    return Direct(serial), Direct(parallel)
