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

from srigl_core.backends.numba_cpu.batch_tiles import stager
from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty
from srigl_core.backends.numba_cpu.lockstep import Lockstep
from srigl_core.backends.numba_cpu.processor import cache_bytes, vector_bytes
from srigl_core.backends.numba_cpu.scratch import scratch
from srigl_core.backends.numba_cpu.simd import (
    add,
    flat,
    fma,
    gather,
    load,
    splat,
    store,
    transpose,
    zeros,
)
from srigl_core.backends.numba_cpu.vector_tuples import load_each, multiply

__all__ = ["MOST_GATHERED", "gathered_gradient", "value_gradient"]

MOST_GATHERED = 2
"""Largest batch for which it is faster to gather the connected inputs than to transpose x."""

GATHERED_LANES = 16
"""Connections of a neuron that are computed at once from gathered inputs."""

MOST_TILES = 8
"""Tiles of a block of x that are computed together, if they fit in the second-level cache."""


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
    tile_bytes = layout.block * lanes * x.itemsize
    at_a_time = max(1, min(MOST_TILES, cache_bytes()[1] // 2 // tile_bytes))
    arguments = (*layout.arrays, layout.counts, layout.positions, at_a_time, grads, x, out)
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
    def visit(offsets, at, n, own, tiles, tile, sums, is_first):
        """Add a tile's products with the gradients `own` to the sums of `n` connections."""
        for place in range(u(0), n, u(at_once)):
            products = multiply(own, offsets, at + place, tiles, tile, part)
            if not is_first:
                products = add(products, load(sums, place, at_once))
            store(sums, place, products)

    @kernel()
    def deliver(sums, n, turned, starts, counts, is_first, out):
        """Move sums of neurons in lockstep to their places, or add them to what is there."""
        longest = u(turned.size // together)
        for first in range(u(0), n // u(together), u(together)):
            source = (first * u(together), u(together), u(together - 1))
            transpose(sums, source, turned, first, longest, together)
        for neuron in range(u(together)):
            start, own = u(starts[neuron]), neuron * longest
            if is_first:
                for i in range(u(counts[neuron])):
                    out[start + i] = turned[own + i]
            else:
                for i in range(u(counts[neuron])):
                    out[start + i] += turned[own + i]

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
        counts,
        positions,
        at_a_time,
        grads,
        x,
        out,
    ):
        n_in, line, result = x.shape[1], flat(x), flat(out)
        n_groups, n_rows = visits.shape[1] - 1, rows.shape[1]
        n_tiles = (x.shape[0] + lanes - 1) // lanes
        size = (block + 1) * lanes
        tiles = scratch(min(n_tiles, at_a_time) * size, line)
        most = (np.int64(steps.max()) * at_once // together + together) * together
        sums, turned = scratch(most, line), scratch(most, line)
        for b in range(first, last):
            begin, end = b * block, min((b + 1) * block, n_in)
            members = rows[b]
            for first_tile in range(0, n_tiles, at_a_time):
                last_tile = min(first_tile + at_a_time, n_tiles)
                for t in range(first_tile, last_tile):
                    near = (t - first_tile) * size
                    stage_tile(line, n_in, t, begin, end, tiles[near : near + size])
                for group in range(n_groups):
                    low, high = group * group_rows, min((group + 1) * group_rows, n_rows)
                    at = u(visits[b, group])
                    for row in range(low, high, together):
                        n = u(steps[b, row // together]) * u(at_once)
                        if n == u(0):
                            continue
                        for t in range(first_tile, last_tile):
                            base, tile = (t * n_rows + low) * lanes, (t - first_tile) * size
                            own = load_each(grads, u(base), members, u(row), together, lanes)
                            visit(offsets, at, n, own, tiles, u(tile), sums, t == first_tile)
                        starts = positions[at : at + u(together)]
                        own_counts = counts[b, row : row + together]
                        deliver(sums, n, turned, starts, own_counts, first_tile == 0, result)
                        at += n

    @kernel()
    def stage_grads(first, last, n_padded, grad, grads):
        n_rows, line = grad.shape[1], flat(grad)
        size = n_padded * lanes
        for t in range(first, last):
            stage_tile(line, n_rows, t, 0, n_rows, grads[t * size : (t + 1) * size])

    return Launcher(stage_grads), Launcher(run)


def gathered_gradient(indices: Any, grad: Any, x: Any, out: Any, *, n_threads: int) -> None:
    """Write the gradient of a batch of a few rows to `out`, without a layout.

    Parameters
    ----------
    indices : ndarray of uint16 or uint32, (n_active, k)
    grad, x, out : ndarray
    n_threads : int
        As for `value_gradient`.
    """
    _gather_launcher(len(indices), n_threads, (indices, grad, x, out))


@kernel()
def _gather(first, last, indices, grad, x, out):
    u, lanes = np.uint64, np.uint64(GATHERED_LANES)
    fan_in, n_in, n_active = u(indices.shape[1]), x.shape[1], grad.shape[1]
    line, columns, grads, result = flat(x), flat(indices), flat(grad), flat(out)
    for neuron in range(first, last):
        for b in range(x.shape[0]):
            at, end = u(neuron) * fan_in, u(neuron + 1) * fan_in
            row, own = line[b * n_in : (b + 1) * n_in], grads[b * n_active + neuron]
            while at + lanes <= end:
                total = load(result, at, GATHERED_LANES) if b else zeros(line, GATHERED_LANES)
                inputs = gather(row, columns, at, GATHERED_LANES)
                store(result, at, fma(splat(own, GATHERED_LANES), inputs, total))
                at += lanes
            while at < end:
                total_before = result[at] if b else line.dtype.type(0)
                result[at] = total_before + own * row[u(columns[at])]
                at += u(1)


_gather_launcher = Launcher(_gather)
