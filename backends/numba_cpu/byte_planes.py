"""Small batches with AVX-512 VBMI: inputs looked up byte by byte, one neuron in each of 64 lanes.

The input is split into blocks of 64 numbers, in byte planes (`plane_lookup`). A step loads two
blocks. It looks up one of their 128 numbers for each lane, multiplies it by the lane's value, and
adds it to the lane's sum. `plane_schedule` chooses the two blocks of each step.

Layout, for a group of 64 neurons: `values` (steps, 64); `lookups` (steps, 16) of int32, four
indices of one byte each; `blocks` (steps + 1), numbers of blocks. A lane without a connection in a
step multiplies 0 by 0, whatever the input holds.

Two batch rows at a time share what a step loads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from srigl_core.backends.numba_cpu.calling import uncounted
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty, position_dtype
from srigl_core.backends.numba_cpu.plane_lookup import (
    BLOCK,
    INDEX_WORDS,
    look_up,
    place_of_lane,
    split,
    widen_pairs,
)
from srigl_core.backends.numba_cpu.plane_schedule import LANES, fewest_steps, scheduled
from srigl_core.backends.numba_cpu.results import deliverer
from srigl_core.backends.numba_cpu.row_layout import RowLayout, row_launcher
from srigl_core.backends.numba_cpu.scratch import registers, scratch
from srigl_core.backends.numba_cpu.simd import fma, load, store, zeros

__all__ = ["BytePlanes"]

STEP_NANOSECONDS = 3.3
PAIR_ROWS = 1.25
"""Two batch rows together take as long as this many single ones."""

MOST_BLOCKS = 1 << 16
PAIRS = LANES // 2


class BytePlanes(RowLayout):
    """Connections, scheduled for lookup in pairs of blocks."""

    name = "byte planes"

    def __init__(self, indices: Any, n_in: int) -> None:
        positions, lookups, blocks, ends = scheduled(indices, n_in, place_of_lane())
        super().__init__(
            positions,
            (lookups, blocks, ends),
            launch=_LAUNCH,
            n_groups=ends.size - 1,
            padding=positions.size / indices.size,
            most_rows=4,
            nanoseconds=STEP_NANOSECONDS * positions.size / LANES,
        )

    def arrange(self, bits: Any, dtype: Any) -> Any:
        """Return the values in order; bfloat16 in pairs, see `widen_pairs`."""
        values = super().arrange(bits, dtype)
        if values.dtype != np.int16:
            return values
        pairs = aligned_empty(values.size // 2, np.int32)
        pairs.view(np.int16).reshape(-1, 16, 2)[...] = values.reshape(-1, 2, 16).swapaxes(1, 2)
        return pairs

    def batch_nanoseconds(self, batch: int) -> float:
        """Return the estimated single-threaded time of a batch, whose rows go in pairs."""
        return (batch // 2 * PAIR_ROWS + batch % 2) * self.nanoseconds

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


def _load_weights(values, step):
    """Return the values of a step as 64 float32."""
    raise NotImplementedError  # Numba compiles one of the two below, by the dtype of `values`


@overload(_load_weights)
def _load_weights_of_type(values, step):
    return _load_pairs if values.dtype == types.int32 else _load_numbers


def _load_pairs(values, step):
    return widen_pairs(load(values, step * np.uint64(PAIRS), PAIRS))


def _load_numbers(values, step):
    return load(values, step * np.uint64(LANES), LANES)


@kernel()
def _load_block(planes, block, row):
    """Return the planes of a block; those of its batch row begin at `row`."""
    return load(planes, row + np.uint64(block) * np.uint64(BLOCK), BLOCK)


@kernel(inline=True)
def _sum_row(first, last, values, lookups, blocks, planes, like):
    """Return the sums of a group over steps `first` to `last`, whose blocks are `blocks`."""
    u = np.uint64
    total = zeros(like, LANES)
    low = _load_block(planes, blocks[0], u(0))
    for step in range(first, last):
        high = _load_block(planes, blocks[step - first + u(1)], u(0))
        index = load(lookups, step * u(INDEX_WORDS), INDEX_WORDS)
        weights = _load_weights(values, step)
        total = fma(weights, look_up(low, index, high), total)
        low = high
    return total


@kernel(inline=True)
def _sum_two_rows(first, last, values, lookups, blocks, planes, size, like):
    """Return the sums of a group for two batch rows, whose planes have `size` lanes each."""
    u = np.uint64
    a, b = zeros(like, LANES), zeros(like, LANES)
    low_a, low_b = _load_block(planes, blocks[0], u(0)), _load_block(planes, blocks[0], size)
    for step in range(first, last):
        block = blocks[step - first + u(1)]
        high_a, high_b = _load_block(planes, block, u(0)), _load_block(planes, block, size)
        index = load(lookups, step * u(INDEX_WORDS), INDEX_WORDS)
        weights = _load_weights(values, step)
        a = fma(weights, look_up(low_a, index, high_a), a)
        b = fma(weights, look_up(low_b, index, high_b), b)
        low_a, low_b = high_a, high_b
    return a, b


_deliver = deliverer(LANES)


@kernel()
def _sum_rows(groups, rows, values, arrays, x, n_in, columns, bias, out):
    u = np.uint64
    lookups, blocks, ends = arrays
    n_columns, row_size = bias.size, (n_in + BLOCK - 1) // BLOCK * BLOCK
    planes, spare = scratch(2 * row_size, lookups), registers(LANES, x)
    for row in range(rows[0], rows[1], 2):
        place, is_pair = row * n_columns, row + 1 < rows[1]
        _planes_of(x[row * n_in : (row + 1) * n_in], planes, u(0))
        if is_pair:
            _planes_of(x[(row + 1) * n_in : (row + 2) * n_in], planes, u(row_size))
        for group in range(groups[0], groups[1]):
            first, last, neuron = u(ends[group]), u(ends[group + 1]), group * LANES
            near = uncounted(blocks[ends[group] + group :])
            if is_pair:
                total, other = _sum_two_rows(
                    first, last, values, lookups, near, planes, u(row_size), x
                )
                _deliver(other, neuron, columns, bias, out, place + n_columns, spare)
            else:
                total = _sum_row(first, last, values, lookups, near, planes, x)
            _deliver(total, neuron, columns, bias, out, place, spare)


_LAUNCH = row_launcher(LANES, _sum_rows)
