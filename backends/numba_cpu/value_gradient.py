"""The gradient of the values: one dot product along the batch for each connection (SPEC 2).

The tiles and the layout are those of `lockstep`. The gradients of a tile stay in registers, for a
few neurons, during their connections of a block. The products of a step are summed over their lanes
together. One thread computes all tiles of a block in order, so that the order of a sum does not
depend on the number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.batch_tiles import stager, tile_for
from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty
from srigl_core.backends.numba_cpu.lockstep import Lockstep
from srigl_core.backends.numba_cpu.processor import vector_bytes
from srigl_core.backends.numba_cpu.simd import add, flat, load, store
from srigl_core.backends.numba_cpu.vector_tuples import load_each, multiply

__all__ = ["value_gradient"]


def value_gradient(layout: Lockstep, grad: Any, x: Any, out: Any, *, n_threads: int) -> None:
    """Write the gradient to `out`.

    Parameters
    ----------
    layout : Lockstep
        Layout of the forward product.
    grad : ndarray, (batch, n_active)
    x : ndarray, (batch, n_in)
    out : ndarray, (n_active, k)
        The three arrays have one dtype, and are in C order.
    n_threads : int
    """
    lanes, n_padded = layout.lanes, layout.rows.shape[1]
    part = min(lanes, vector_bytes() // x.itemsize)
    stage_grads, sum_products = _launchers(lanes, layout.together, part)
    n_tiles = -(-len(x) // lanes)
    grads = aligned_empty(n_tiles * lanes * n_padded, grad.dtype)
    stage_grads(n_tiles, n_threads, (n_padded, grad, grads))
    sums = aligned_empty(layout.positions.size, out.dtype)
    arguments = (*layout.arrays, layout.positions, grads, x, sums, out)
    sum_products(len(layout.rows), n_threads, arguments)


@functools.cache
def _launchers(lanes: int, together: int, part: int) -> tuple[Launcher, Launcher]:
    """Return the kernel that transposes gradients into tiles, and the kernel that sums products.

    Tiles have `lanes` batch rows. The items of the first kernel are tiles, those of the second are
    blocks of columns. `together` neurons are computed in lockstep, and products are reduced to
    vectors of `part` lanes, one register of the machine.
    """
    width = np.uint64(lanes)
    at_once = max(4, together)
    u = np.uint64
    stage = stager(lanes)

    @kernel()
    def stage_tile(array, n_columns, t, begin, end, tile):
        """Stage a tile with zeros in the lanes past the last row, which are summed too."""
        last_row = u(array.size // n_columns - 1)
        row = u(t * lanes)
        stage(array, u(n_columns), row, last_row, u(begin), u(end), tile)
        for column in range(u(end - begin)):
            for lane in range(last_row + u(1) - row, width):
                tile[column * width + lane] = 0

    @kernel()
    def visit(offsets, at, rows, steps, tile, grads, base, sums, is_first):
        """Add a tile's products to the sums of each row's connections in one block."""
        for i in range(u(steps.size)):
            own = load_each(grads, base, rows, i * u(together), together, lanes)
            end = at + u(steps[i]) * u(at_once)
            while at < end:
                products = multiply(own, offsets, at, tile, part)
                if not is_first:
                    products = add(products, load(sums, at, at_once))
                store(sums, at, products)
                at += u(at_once)

    @kernel()
    def run(
        first,
        last,
        block,
        group_rows,
        offsets,
        rows,
        steps,
        visits,
        positions,
        grads,
        x,
        sums,
        out,
    ):
        n_in, line, result = x.shape[1], flat(x), flat(out)
        n_groups, n_rows = visits.shape[1] - 1, rows.shape[1]
        n_tiles = (x.shape[0] + lanes - 1) // lanes
        tile = tile_for(block, lanes, line)
        for b in range(first, last):
            begin, end = b * block, min((b + 1) * block, n_in)
            for t in range(n_tiles):
                stage_tile(line, n_in, t, begin, end, tile)
                for group in range(n_groups):
                    low, high = group * group_rows, min((group + 1) * group_rows, n_rows)
                    at, base = u(visits[b, group]), u((t * n_rows + low) * lanes)
                    members, sizes = rows[b, low:high], steps[b, low // together : high // together]
                    visit(offsets, at, members, sizes, tile, grads, base, sums, t == 0)
            for place in range(visits[b, 0], visits[b, n_groups]):
                if positions[place] >= 0:
                    result[positions[place]] = sums[place]
        return True

    @kernel()
    def stage_grads(first, last, n_padded, grad, grads):
        n_rows, line = grad.shape[1], flat(grad)
        size = n_padded * lanes
        for t in range(first, last):
            stage_tile(line, n_rows, t, 0, n_rows, grads[t * size : (t + 1) * size])
        return True

    return Launcher(stage_grads), Launcher(run)
