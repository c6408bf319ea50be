"""Small batches with AVX-512 VBMI: inputs looked up byte by byte, one neuron in each of 64 lanes.

The input is split into blocks of 64 numbers, in byte planes (`plane_lookup`). A step loads two
blocks. It looks up one of their 128 numbers for each lane, multiplies it by the lane's value, and
adds it to the lane's sum. `plane_schedule` chooses the two blocks of each step.

Layout, for a group of 64 neurons: `values` (steps, 64); `lookups` (steps, 16) of int32, four
indices of one byte each; `blocks` (steps, 2), numbers of blocks. A lane without a connection in a
step multiplies 0 by 0, whatever the input holds.

Two batch rows at a time share what a step loads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.calling import uncounted
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import position_dtype
from srigl_core.backends.numba_cpu.plane_lookup import BLOCK, INDEX_WORDS, look_up, split
from srigl_core.backends.numba_cpu.plane_schedule import LANES, fewest_steps, scheduled
from srigl_core.backends.numba_cpu.results import deliver_sums
from srigl_core.backends.numba_cpu.row_layout import RowLayout, row_launcher
from srigl_core.backends.numba_cpu.scratch import scratch
from srigl_core.backends.numba_cpu.simd import fma, load, store, zeros

__all__ = ["BytePlanes"]

STEP_NANOSECONDS = 3.3
MOST_BLOCKS = 1 << 16


class BytePlanes(RowLayout):
    """Connections, scheduled for lookup in pairs of blocks."""

    name = "byte planes"

    def __init__(self, indices: Any, n_in: int) -> None:
        positions, lookups, blocks, ends = scheduled(indices, n_in)
        super().__init__(
            positions,
            (lookups, blocks, ends),
            launch=_LAUNCH,
            n_groups=ends.size - 1,
            padding=positions.size / indices.size,
            most_rows=4,
            nanoseconds=STEP_NANOSECONDS * positions.size / LANES,
        )

    @staticmethod
    def can_beat(nanoseconds: float, indices: Any, n_in: int, dtype: Any) -> bool:
        """Whether a batch row may take less time, and this layout can hold the mask.

        It is for sums in float32.
        """
        fits = n_in <= BLOCK * MOST_BLOCKS and position_dtype(indices.size) == np.int32
        if not fits or dtype != np.float32:
            return False
        return STEP_NANOSECONDS * fewest_steps(indices) < nanoseconds


@kernel()
def _planes_of(x, planes, at):
    """Write the planes of the numbers `x` to ``planes[at:]``, the last block filled up with 0."""
    whole = x.size // BLOCK * BLOCK
    for i in range(np.uint64(0), np.uint64(whole), np.uint64(BLOCK)):
        store(planes, at + i, split(load(x, i, BLOCK)))
    if whole < x.size:
        rest = np.zeros(BLOCK, x.dtype)
        for i in range(whole, x.size):
            rest[i - whole] = x[i]
        store(planes, at + np.uint64(whole), split(load(rest, np.uint64(0), BLOCK)))


@kernel()
def _places(blocks, step):
    """Return where the two blocks of a step begin."""
    low, high = blocks[step + step], blocks[step + step + np.uint64(1)]
    return np.uint64(low) * np.uint64(BLOCK), np.uint64(high) * np.uint64(BLOCK)


@kernel()
def _sum_row(first, last, values, lookups, blocks, planes, like):
    """Return the sums of a group over steps `first` to `last`."""
    total = zeros(like, LANES)
    for step in range(first, last):
        low, high = _places(blocks, step)
        index = load(lookups, step * np.uint64(INDEX_WORDS), INDEX_WORDS)
        x = look_up(load(planes, low, BLOCK), index, load(planes, high, BLOCK))
        total = fma(load(values, step * np.uint64(LANES), LANES), x, total)
    return total


@kernel()
def _sum_two_rows(first, last, values, lookups, blocks, planes, row_size, like):
    """Return the sums of a group for two batch rows, whose planes are `row_size` lanes apart."""
    total, other = zeros(like, LANES), zeros(like, LANES)
    for step in range(first, last):
        low, high = _places(blocks, step)
        index = load(lookups, step * np.uint64(INDEX_WORDS), INDEX_WORDS)
        weights = load(values, step * np.uint64(LANES), LANES)
        x = look_up(load(planes, low, BLOCK), index, load(planes, high, BLOCK))
        total = fma(weights, x, total)
        low, high = low + row_size, high + row_size
        x = look_up(load(planes, low, BLOCK), index, load(planes, high, BLOCK))
        other = fma(weights, x, other)
    return total, other


@kernel()
def _sum_rows(groups, rows, values, arrays, x, n_in, columns, bias, out):
    u = np.uint64
    lookups, blocks, ends = arrays
    n_columns, row_size = bias.size, (n_in + BLOCK - 1) // BLOCK * BLOCK
    planes, spare = uncounted(scratch(2 * row_size, lookups)), uncounted(scratch(LANES, x))
    for row in range(rows[0], rows[1], 2):
        place, is_pair = row * n_columns, row + 1 < rows[1]
        _planes_of(x[row * n_in : (row + 1) * n_in], planes, u(0))
        if is_pair:
            _planes_of(x[(row + 1) * n_in : (row + 2) * n_in], planes, u(row_size))
        for group in range(groups[0], groups[1]):
            first, last, neuron = u(ends[group]), u(ends[group + 1]), group * LANES
            if is_pair:
                total, other = _sum_two_rows(
                    first, last, values, lookups, blocks, planes, u(row_size), x
                )
                deliver_sums(other, LANES, neuron, columns, bias, out, place + n_columns, spare)
            else:
                total = _sum_row(first, last, values, lookups, blocks, planes, x)
            deliver_sums(total, LANES, neuron, columns, bias, out, place, spare)


_LAUNCH = row_launcher(LANES, _sum_rows)
