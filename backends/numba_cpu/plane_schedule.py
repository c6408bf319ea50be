"""Which two blocks of the input each step of a lookup uses, and what each lane takes from them.

A lookup has 64 slots. In `byte_planes` a lane, which sums a neuron, has one of them; in
`byte_products` it has four.

A greedy schedule, made once for a mask. The first block of a step is the second of the step before,
so that each step loads one. Beside it comes a block with a long backlog in some lane, which serves
many of the slots for which the first one has nothing; lanes that lag behind have more weight. A
slot takes a connection from the block where its lane's backlog is longer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty
from srigl_core.backends.numba_cpu.plane_lookup import BLOCK, PADDING

__all__ = ["LANES", "fewest_steps", "scheduled"]

LANES = BLOCK
"""Neurons in a group, one in each lane of a lookup."""

MOST_URGENCY = 24
"""Weight of the lanes that have most connections left; one less for each connection fewer."""

SERVED = 16
"""Score of a slot that a block serves, beside the scores of `_need`."""


def fewest_steps(indices: Any) -> int:
    """Return a lower bound of the steps: a lane needs k, and each step loads one more block."""
    n_rows, fan_in = indices.shape
    n_blocks = np.unique(indices[:LANES] // BLOCK).size
    return int(-(-n_rows // LANES) * max(fan_in, n_blocks - 1))


def scheduled(indices: Any, n_in: int, octet_places: Any, slots: int = 1, fresh: int = 1) -> Any:
    """Return the steps of all groups of neurons, one in each lane of `slots` slots.

    Parameters
    ----------
    indices : ndarray of uint16 or uint32, (n_active, k)
    n_in : int
    octet_places : ndarray of int64, (64,)
        Place of each slot's index among the 64 bytes of a step.
    slots : int
        Divides 64.
    fresh : int
        Blocks that a step loads: 1, beside the last one of the step before, or 2.

    Returns
    -------
    positions : ndarray of int32, (steps * 64,)
        Position among the condensed values of what each slot multiplies, negative for padding.
    lookups : ndarray of int32, (steps * 16,)
        The index of each slot, four to a number: 0 to 63 in the first block, 64 to 127 in the
        second, `PADDING` for none.
    blocks : ndarray of uint16, (steps + groups,), or (steps * 2,)
        Step s of group g looks up in the blocks ``blocks[s + g]`` and ``blocks[s + g + 1]``; with
        two fresh blocks in ``blocks[2 * s]`` and ``blocks[2 * s + 1]``.
    ends : ndarray of int64, (groups + 1,)
        Group g has the steps ``range(ends[g], ends[g + 1])``.
    """
    n_groups, fan_in = -(-len(indices) * slots // BLOCK), -(-indices.shape[1] // slots)
    n_blocks = -(-n_in // BLOCK)
    ends = np.zeros(n_groups + 1, np.int64)
    most_steps = n_groups * (2 * fan_in + 16)
    group, arrays = 0, _arrays(most_steps, n_groups, fresh)
    while True:
        group = _schedule(indices, n_blocks, group, octet_places, (slots, fresh), *arrays, ends)
        if group == n_groups:
            break
        # These masks need more steps than most: go on with twice the memory.
        most_steps *= 2
        arrays = _copies(arrays, _arrays(most_steps, n_groups, fresh))
    positions, octets, blocks = _copies(arrays, _arrays(int(ends[-1]), n_groups, fresh))
    return positions, octets.view(np.int32), blocks, ends


def _arrays(steps: int, n_groups: int, fresh: int) -> tuple[Any, Any, Any]:
    octets, blocks = aligned_empty(steps * BLOCK, np.uint8), steps * fresh + n_groups * (2 - fresh)
    return np.empty(steps * BLOCK, np.int32), octets, np.empty(blocks, np.uint16)


def _copies(sources: tuple[Any, ...], targets: tuple[Any, ...]) -> Any:
    for source, target in zip(sources, targets, strict=True):
        size = min(source.size, target.size)
        target[:size] = source[:size]
    return targets


@kernel()
def _schedule(indices, n_blocks, first_group, places, sizes, positions, octets, blocks, ends):
    """Schedule groups from `first_group` on; return the first that no longer fits, or their number.

    `ends` receives the number of steps up to the end of each group.
    """
    # Each block with connections of the group gets a place.
    place_of, block_of = np.full(n_blocks, -1), np.empty(n_blocks, np.int64)
    slots, fresh = sizes
    lanes, kept = BLOCK // slots, 2 - fresh
    backlog = np.empty((lanes, n_blocks), np.float32)
    nearest = np.empty((lanes, n_blocks), np.int32)
    for group in range(first_group, ends.size - 1):
        first, row = ends[group], group * lanes
        n_places = _count_backlog(indices, row, place_of, block_of, backlog, nearest)
        steps = _schedule_group(
            indices,
            row,
            positions[first * BLOCK :],
            octets[first * BLOCK :],
            blocks[first * fresh + group * kept : blocks.size - (ends.size - 2 - group) * kept],
            block_of[:n_places],
            backlog,
            nearest,
            places,
            sizes,
        )
        if steps < 0:
            return group
        ends[group + 1] = first + steps
        for place in range(n_places):
            place_of[block_of[place]] = -1
    return ends.size - 1


@kernel()
def _count_backlog(indices, row, place_of, block_of, backlog, nearest):
    """Count each lane's connections in each block, note the first, and return the number of places.

    The counts are float32: Numba would widen small integers, and only narrow types vectorise well.
    """
    n_places = 0
    for lane in range(min(len(backlog), indices.shape[0] - row)):
        for j in range(indices.shape[1]):
            block = np.int64(indices[row + lane, j]) // BLOCK
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
def _schedule_group(
    indices, row, positions, octets, blocks, block_of, backlog, nearest, places, sizes
):
    """Schedule the steps of a group; return their number, or -1 if there is no space for them."""
    slots, fresh = sizes
    n_lanes, fan_in = min(len(backlog), indices.shape[0] - row), indices.shape[1]
    need, scores = np.empty(block_of.size, np.float32), np.empty(block_of.size, np.float32)
    for place in range(need.size):
        need[place] = _need(backlog, place, slots)
    missing = np.zeros(len(backlog), np.int32)
    missing[:n_lanes] = fan_in
    left, step, second = fan_in * n_lanes, 0, _first_maximum(need)
    while left > 0:
        if step * fresh + 2 > blocks.size:
            return -1
        first = second if fresh == 1 else _first_maximum(need)
        second = _best_partner(backlog, need, first, missing, slots, scores)
        blocks[step * fresh], blocks[step * fresh + 1] = block_of[first], block_of[second]
        for slot in range(BLOCK):
            lane, at, octet = slot // slots, step * BLOCK + slot, step * BLOCK + places[slot]
            from_first = backlog[lane, first] >= backlog[lane, second]
            place = first if from_first else second
            if backlog[lane, place] == 0:
                positions[at], octets[octet] = -1, PADDING
                continue
            j = nearest[lane, place]
            number = np.int64(indices[row + lane, j]) - block_of[place] * BLOCK
            octets[octet] = number if from_first else number + BLOCK
            positions[at] = (row + lane) * fan_in + j
            nearest[lane, place] += 1
            backlog[lane, place] -= 1
            missing[lane] -= 1
            left -= 1
        need[first] = _need(backlog, first, slots)
        need[second] = _need(backlog, second, slots)
        step += 1
    return step


@kernel()
def _need(backlog, place, slots):
    """Return a score that orders blocks by their longest backlog, and by the slots they serve."""
    deepest, served = np.float32(0), np.float32(0)
    for lane in range(len(backlog)):
        deepest = max(deepest, backlog[lane, place])
        served += min(backlog[lane, place], np.float32(slots))
    return deepest * np.float32(BLOCK) + 2 * served


@kernel()
def _best_partner(backlog, need, first, missing, slots, scores):
    """Return the block that helps most beside block `first`."""
    most = missing.max()
    for place in range(scores.size):
        scores[place] = need[place]
    for lane in range(len(backlog)):
        free = np.float32(slots) - backlog[lane, first]
        if missing[lane] > 0 and free > 0:
            urgency = np.float32(SERVED * max(MOST_URGENCY - (most - missing[lane]), 1))
            waiting = backlog[lane, : scores.size]
            for place in range(scores.size):
                scores[place] += urgency * min(waiting[place], free)
    scores[first] = -1
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
