"""int8 weights times int8 inputs, with AVX-512 VBMI and VNNI: inputs looked up, four to a lane.

A row of x is quantised to bytes, each an integer plus 128, in blocks of 64. A step has two blocks.
One instruction looks up one of their 128 bytes for each of 64 slots. Another multiplies it by the
slot's weight, and adds the products of four slots to the lane of their neuron, as int32. At the end
128 times the sum of a neuron's weights is taken away. `plane_schedule` chooses the two blocks of
each step. If neurons have no more connections than there are blocks, a step loads both of them, and
any two may meet, which takes half as many steps.

Layout, for a group of 16 neurons: `words` (steps, 2, 64) has the lookups of each step, one byte
each, and its weights of int8, 0 in a slot without a connection. `blocks` has numbers of blocks:
(steps + 1), or (2 * steps). `factors` (2, neurons) has -128 times the sums of the weights, and the
scales as the bits of int32. Parts that are read together share an array, since each takes time to
pass.

Up to eight batch rows at a time share what a step loads. Their blocks lie side by side.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from srigl_core._format.weight import QuantizedWeight
from srigl_core.backends.numba_cpu.calling import Launcher, uncounted
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty, arranged, position_dtype
from srigl_core.backends.numba_cpu.plane_lookup import BLOCK, INDEX_WORDS, add_products
from srigl_core.backends.numba_cpu.plane_schedule import scheduled
from srigl_core.backends.numba_cpu.quantization import int8_product, row_scales, write_octets
from srigl_core.backends.numba_cpu.results import are_side_by_side, deliverer
from srigl_core.backends.numba_cpu.row_layout import row_launcher
from srigl_core.backends.numba_cpu.scratch import registers, scratch
from srigl_core.backends.numba_cpu.simd import add, load, store, zeros

__all__ = ["ByteProducts"]

SLOTS = 4
LANES = BLOCK // SLOTS
"""Neurons in a group."""

MOST_ROWS = 8
"""Batch rows at a time. Their sums and blocks take half of the registers."""

STEP_WORDS = 2 * INDEX_WORDS
MOST_BLOCKS = 1 << 16
STEP_NANOSECONDS = {1: (0.77, 0.2), 2: (0.9, 0.28)}
"""By the blocks that a step loads: the time of loading its weights, and of computing it for a batch
row, on one core of a Zen 5 processor."""

INPUT_NANOSECONDS = 0.08
"""Time of quantising an input."""


class ByteProducts:
    """A quantised weight, scheduled for lookup in pairs of blocks.

    The arguments of `launch` are ``(x, bias, columns, out, code, *arrays)``, as those of the
    layouts in `row_layout`. Its values do not change, so that their positions are not kept.
    """

    name = "byte products"

    def __init__(self, weight: QuantizedWeight) -> None:
        n_neurons, self._n_in = weight.n_active, weight.shape[1]
        n_blocks = -(-self._n_in // BLOCK)
        self._fresh = fresh = 2 if weight.fan_in <= n_blocks else 1
        steps = scheduled(weight.indices, self._n_in, np.arange(BLOCK), SLOTS, fresh)
        positions, lookups, blocks, ends = steps
        values = arranged(weight.values, positions, weight.values.dtype)
        self._n_groups: int = ends.size - 1
        self._n_steps: int = positions.size // BLOCK
        words = aligned_empty(self._n_steps * STEP_WORDS, np.int32)
        parts = words.reshape(-1, 2, INDEX_WORDS)
        parts[:, 0] = lookups.reshape(-1, INDEX_WORDS)
        parts[:, 1] = values.view(np.int32).reshape(-1, INDEX_WORDS)
        factors = np.zeros((2, self._n_groups * LANES), np.int32)
        factors[0, :n_neurons] = weight.values.sum(axis=1, dtype=np.int64) * -128
        factors[1, :n_neurons] = weight.scale.view(np.int32)
        self.arrays = (words, blocks, ends, factors.ravel())
        self.launch = _launcher(fresh)
        self.padding: float = positions.size / weight.nnz

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays)

    def n_items(self, batch: int) -> int:
        """Return the number of items that threads share."""
        return self._n_groups * -(-batch // MOST_ROWS)

    def nanoseconds(self, batch: int) -> float:
        """Return the estimated single-threaded time of a batch."""
        loading, computing = STEP_NANOSECONDS[self._fresh]
        step = loading * -(-batch // MOST_ROWS) + computing * batch
        return step * self._n_steps + INPUT_NANOSECONDS * self._n_in * batch

    @staticmethod
    def can_hold(weight: QuantizedWeight) -> bool:
        """Whether the numbers of blocks and positions fit their types."""
        is_small = position_dtype(weight.nnz) == np.int32
        return is_small and weight.shape[1] <= BLOCK * MOST_BLOCKS


@kernel()
def _quantize(x, first, last, n_in, octets, n_rows, scales):
    """Write the bytes of batch rows, of which `n_rows` lie side by side, and the rows' scales."""
    for row in range(first, last):
        line = x[row * n_in : (row + 1) * n_in]
        r, scales[row - first] = row_scales(line)
        if scales[row - first] == scales[row - first]:  # no NaN
            write_octets(line, r, octets.view(np.uint8), (row - first) * BLOCK, n_rows * BLOCK)


@functools.cache
def _summer(n_rows: int, fresh: int) -> Any:
    """Return the kernel that sums up to `n_rows` batch rows, and loads `fresh` blocks in a step."""
    width = n_rows * LANES
    u = np.uint64

    @kernel()
    def sum_rows(groups, rows, words, arrays, columns, bias, out, octets, scales, sums):
        """Sum two steps at a time, with sums of their own, which do not wait for each other."""
        words, octets, sums, scales = uncounted((words, octets, sums, scales))
        columns, bias, out = uncounted((columns, bias, out))
        blocks, ends, factors = uncounted(arrays)
        corrections, scale = factors, factors[factors.size // 2 :].view(np.float32)
        for group in range(groups[0], groups[1]):
            step, last = u(ends[group]), u(ends[group + 1])
            at = step * u(fresh) + u(group) * u(2 - fresh)
            even, odd = zeros(octets, width), zeros(octets, width)
            low = load(octets, u(blocks[at]) * u(width), width)
            while step < last:
                if fresh == 2:
                    low = load(octets, u(blocks[at]) * u(width), width)
                high = load(octets, u(blocks[at + u(1)]) * u(width), width)
                at += u(fresh)
                index = load(words, step * u(STEP_WORDS), INDEX_WORDS)
                weights = load(words, step * u(STEP_WORDS) + u(INDEX_WORDS), INDEX_WORDS)
                total = add_products(even, low, index, high, weights)
                even, odd, low = odd, total, high
                step += u(1)
            store(sums, u(0), add(even, odd))
            first = u(group * LANES)
            own = load(corrections, first, LANES), load(scale, first, LANES)
            _deliver(sums, scales, group * LANES, own, rows, columns, bias, out)

    return sum_rows


_deliver_row = deliverer(LANES)


@kernel(inline=True)
def _deliver(sums, scales, neuron, factors, rows, columns, bias, out):
    """Scale the sums of a group, add the bias, and write them to the result."""
    u = np.uint64
    correction, own = factors
    n_columns, n_rows = u(bias.size), u(rows[1] - rows[0])
    start = u(rows[0]) * n_columns
    if are_side_by_side(columns, neuron, LANES):
        start += u(columns[neuron])
        offset = load(bias, u(columns[neuron]), LANES)
        for i in range(n_rows):
            acc = add(load(sums, i * u(LANES), LANES), correction)
            store(out, start + i * n_columns, add(int8_product(acc, own, scales[i]), offset))
    else:
        spare = registers(LANES, scales)
        for i in range(n_rows):
            acc = add(load(sums, i * u(LANES), LANES), correction)
            product, place = int8_product(acc, own, scales[i]), np.int64(start + i * n_columns)
            _deliver_row(product, neuron, columns, bias, out, place, spare)


@functools.cache
def _launcher(fresh: int) -> Launcher:
    """Return the kernel whose steps load `fresh` blocks."""
    one_row, two_rows, four_rows, eight_rows = (_summer(n, fresh) for n in (1, 2, 4, MOST_ROWS))

    @kernel()
    def sum_rows(groups, rows, words, arrays, x, n_in, columns, bias, out):
        n_rows, n_blocks = rows[1] - rows[0], (n_in + BLOCK - 1) // BLOCK
        width = MOST_ROWS if n_rows > 4 else 4 if n_rows > 2 else n_rows
        octets, sums = scratch(n_blocks * width * LANES, words), scratch(MOST_ROWS * LANES, words)
        scales = scratch(MOST_ROWS, x)
        _quantize(x, rows[0], rows[1], n_in, octets, width, scales)
        if width == 1:
            one_row(groups, rows, words, arrays, columns, bias, out, octets, scales, sums)
        elif width == 2:
            two_rows(groups, rows, words, arrays, columns, bias, out, octets, scales, sums)
        elif width == 4:
            four_rows(groups, rows, words, arrays, columns, bias, out, octets, scales, sums)
        else:
            eight_rows(groups, rows, words, arrays, columns, bias, out, octets, scales, sums)

    return row_launcher(LANES, sum_rows, MOST_ROWS)
