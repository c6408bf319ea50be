"""Small batches with AVX-512: inputs looked up in registers, one neuron in each of 16 lanes.

The input is split into blocks of 16 numbers. A step loads two blocks. One instruction looks up one
of their 32 numbers for each lane, which the step multiplies and adds. That takes three vector loads
for 16 connections; the plain loop needs 32 scalar loads. A greedy schedule, made once for a mask,
chooses the blocks of each step: first the block with the longest backlog in some lane, then the
block that serves most beside it. Lanes that lag behind have more weight.

Layout, for a group of 16 neurons: `values` (steps, 16); `blocks` (steps, 2), the start of each
block; `words` (steps / 6, 16) of int32, six lookup indices of 5 bits each. A lane without a
connection in a step multiplies 0 by some number of the block. If that is NaN or infinite, the
lane's sum is wrong, and the kernel reports it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.calling import Launcher, uncounted
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty, position_dtype
from srigl_core.backends.numba_cpu.results import (
    are_side_by_side,
    fill_ablated,
    finish_row,
    first_column,
    scatter_sums,
)
from srigl_core.backends.numba_cpu.row_layout import RowLayout
from srigl_core.backends.numba_cpu.scratch import scratch
from srigl_core.backends.numba_cpu.simd import (
    add,
    flat,
    fma,
    is_finite,
    load,
    load_quad,
    look_up_pair,
    shift_right,
    store,
    zeros,
)

__all__ = ["RegisterLookup"]

LANES = 16
STEPS_PER_WORD = 6
MOST_INPUTS = 1 << 16
MOST_URGENCY = 25


class RegisterLookup(RowLayout):
    """Connections, scheduled for lookup in pairs of blocks."""

    name = "register lookup"
    most_rows = 3

    def __init__(self, indices: Any, n_in: int) -> None:
        n_rows, fan_in = indices.shape
        n_groups = -(-n_rows // LANES)
        # The last block ends where the input ends, since a load must not read beyond it.
        starts = np.minimum(np.arange(-(-n_in // LANES)) * LANES, n_in - LANES)
        most_steps = n_groups * (LANES * fan_in + STEPS_PER_WORD)
        positions = np.empty(most_steps * LANES, np.int32)
        words = np.empty(most_steps // STEPS_PER_WORD * LANES + LANES, np.int32)
        blocks = np.empty(most_steps * 2, np.uint16)
        ends = np.zeros(n_groups + 1, np.int64)
        _schedule(indices, starts, positions, words, blocks, ends)
        steps = int(ends[-1])
        kept = aligned_empty(steps // STEPS_PER_WORD * LANES, np.int32)
        kept[:] = words[: kept.size]
        super().__init__(
            positions[: steps * LANES].copy(),
            (kept, blocks[: steps * 2].copy(), ends),
            n_items=n_groups,
            padding=steps * LANES / indices.size,
            nanoseconds=1.2 * steps,
        )

    @staticmethod
    def takes(nnz: int, n_in: int, dtype: Any) -> bool:
        """Whether this layout can hold `nnz` values on `n_in` inputs, for sums in `dtype`."""
        fits = LANES <= n_in <= MOST_INPUTS and position_dtype(nnz) == np.int32
        return fits and bool(dtype == np.float32)


@kernel()
def _add_step(values, at, low, high, word, x, total):
    inputs = look_up_pair(load(x, low, LANES), word, load(x, high, LANES))
    return fma(load(values, at, LANES), inputs, total)


@kernel()
def _sum_group(first, last, values, words, blocks, x):
    """Return the sums of 16 neurons over steps `first` to `last`, in passes of six steps."""
    u = np.uint64
    start, width = u(0xFFFF), u(16)
    even, odd = zeros(x, LANES), zeros(x, LANES)
    for step in range(u(first), u(last), u(STEPS_PER_WORD)):
        at = step * u(LANES)
        word = load(words, step // u(STEPS_PER_WORD) * u(LANES), LANES)
        for half in range(u(0), u(STEPS_PER_WORD), u(2)):
            four = load_quad(blocks, (step + half) * u(2))
            low, high = four & start, four >> width & start
            even = _add_step(values, at, low, high, word, x, even)
            word = shift_right(word, u(5))
            low, high = four >> (width + width) & start, four >> (width + width + width)
            odd = _add_step(values, at + u(LANES), low, high, word, x, odd)
            word = shift_right(word, u(5))
            at += u(2 * LANES)
    return add(even, odd)


@kernel()
def _compute(first, last, values, words, blocks, ends, x, bias, columns, out, code):
    n_in, rows, offset, result = x.shape[x.ndim - 1], flat(x), flat(bias), flat(out)
    n_neurons, n_columns = columns.size, offset.size
    low, high = min(first * LANES, n_neurons), min(last * LANES, n_neurons)
    begin, end = first_column(low, columns, n_columns), first_column(high, columns, n_columns)
    # Loads across two cache lines take twice as long; an aligned copy of the input costs less.
    spare = scratch(LANES + n_in, rows)
    inputs = uncounted(spare[LANES:])
    is_good = True
    if n_neurons != n_columns:
        fill_ablated(result, 0, rows.size // n_in, columns, low, high, offset)
    for b in range(rows.size // n_in):
        row = b * n_columns
        _copy(rows[b * n_in : (b + 1) * n_in], inputs)
        for group in range(first, last):
            total = _sum_group(ends[group], ends[group + 1], values, words, blocks, inputs)
            is_good &= is_finite(total)
            neuron = group * LANES
            if are_side_by_side(columns, neuron, LANES):
                column = columns[neuron]
                total = add(total, load(offset, np.uint64(column), LANES))
                store(result, np.uint64(row + column), total)
            else:
                scatter_sums(total, LANES, neuron, columns, offset, result, row, spare)
        finish_row(result, row, begin, end, code)
    return is_good


@kernel()
def _copy(source, target):
    """Copy whole vectors; an assignment to a slice would copy one number at a time."""
    whole = source.size // LANES * LANES
    for i in range(np.uint64(0), np.uint64(whole), np.uint64(LANES)):
        store(target, i, load(source, i, LANES))
    for i in range(whole, source.size):
        target[i] = source[i]


RegisterLookup.launch = Launcher(_compute)


@kernel()
def _schedule(indices, starts, positions, words, blocks, ends):
    """Schedule the steps of every group, and write to `ends` where each group ends."""
    n_blocks = starts.size
    # Each block with connections of the group gets a place.
    place_of, block_of = np.full(n_blocks, -1), np.empty(n_blocks, np.int64)
    backlog = np.empty((LANES, n_blocks), np.float32)
    nearest = np.empty((LANES, n_blocks), np.int32)
    for group in range(ends.size - 1):
        first = ends[group]
        row = group * LANES
        n_places = _count_backlog(indices, row, place_of, block_of, backlog, nearest)
        steps = _schedule_group(
            indices,
            row,
            starts,
            positions[first * LANES :],
            words[first // STEPS_PER_WORD * LANES :],
            blocks[2 * first :],
            block_of[:n_places],
            backlog,
            nearest,
        )
        ends[group + 1] = first + steps
        for place in range(n_places):
            place_of[block_of[place]] = -1


@kernel()
def _count_backlog(indices, row, place_of, block_of, backlog, nearest):
    """Count each lane's connections in each block, note the first, and return the number of places.

    The counts are float32: Numba would widen small integers, and only narrow types vectorise well.
    """
    last_block = place_of.size - 1
    n_places = 0
    for lane in range(min(LANES, indices.shape[0] - row)):
        for j in range(indices.shape[1]):
            block = min(np.int64(indices[row + lane, j]) // LANES, last_block)
            place = place_of[block]
            if place < 0:
                place = place_of[block] = n_places
                block_of[place] = block
                backlog[:, place] = 0
                n_places += 1
            if backlog[lane, place] == 0:
                nearest[lane, place] = j
            backlog[lane, place] += 1
    return n_places


@kernel()
def _schedule_group(indices, row, starts, positions, words, blocks, block_of, backlog, nearest):
    n_lanes, fan_in = min(LANES, indices.shape[0] - row), indices.shape[1]
    need, scores = np.empty(block_of.size, np.float32), np.empty(block_of.size, np.float32)
    for place in range(need.size):
        need[place] = _need(backlog, place)
    missing = np.zeros(LANES, np.int32)
    missing[:n_lanes] = fan_in
    total, step = fan_in * n_lanes, 0
    while total > 0:
        first = _first_maximum(need)
        second = _best_partner(backlog, first, missing, scores)
        first, second = min(first, second), max(first, second)
        low, high = starts[block_of[first]], starts[block_of[second]]
        blocks[2 * step], blocks[2 * step + 1] = low, high
        word, shift = step // STEPS_PER_WORD * LANES, step % STEPS_PER_WORD * 5
        for lane in range(LANES):
            if shift == 0:
                words[word + lane] = 0
            positions[step * LANES + lane] = -1
            from_low = backlog[lane, first] >= backlog[lane, second]
            place = first if from_low else second
            if backlog[lane, place] == 0:
                continue
            j = nearest[lane, place]
            number = np.int64(indices[row + lane, j]) - (low if from_low else high - LANES)
            words[word + lane] |= np.int32(number << shift)
            positions[step * LANES + lane] = (row + lane) * fan_in + j
            nearest[lane, place] += 1
            backlog[lane, place] -= 1
            missing[lane] -= 1
            total -= 1
        need[first], need[second] = _need(backlog, first), _need(backlog, second)
        step += 1
    while step % STEPS_PER_WORD:
        blocks[2 * step], blocks[2 * step + 1] = 0, 0
        for lane in range(LANES):
            positions[step * LANES + lane] = -1
        step += 1
    return step


@kernel()
def _need(backlog, place):
    """Return a score that orders blocks by their longest backlog, then by lanes with a backlog."""
    deepest, lanes = np.float32(0), np.float32(0)
    for lane in range(LANES):
        deepest = max(deepest, backlog[lane, place])
        lanes += np.float32(backlog[lane, place] > 0)
    return deepest * np.float32(LANES + 1) + lanes


@kernel()
def _best_partner(backlog, first, missing, scores):
    """Return the block that serves most beside block `first`.

    A block scores in each lane where its backlog is longer than that of `first`. Lanes where
    `first` has none score highest, and lanes that lag behind score more.
    """
    nothing = np.float32(0)
    most = missing.max()
    scores[:] = 0
    for lane in range(LANES):
        beside = backlog[lane, first]
        urgency = np.float32(max(MOST_URGENCY - (most - missing[lane]), 1))
        deeper, served = 2 * urgency, nothing
        if beside == 0:
            served = 16 * urgency
        waiting = backlog[lane, : scores.size]
        for place in range(scores.size):
            more = waiting[place] - beside
            gain = more * np.float32(deeper) + np.float32(served)
            scores[place] += gain if more > 0 else nothing
    return _first_maximum(scores)


@kernel()
def _first_maximum(numbers):
    """Return the position of the first maximum; two simple loops are faster than one."""
    most = numbers[0]
    for number in numbers:
        most = max(most, number)
    place = 0
    while numbers[place] != most:
        place += 1
    return place
