"""Choose lanes and grid of a batched product, by a model of the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["TileLaunch", "best_tile_launch"]

MOST_WARPS = 32
"""Most warps of a block."""

FEWEST_WARPS = 4
MOST_SPLITS = 65_535
"""Most blocks along a grid's second axis."""

SHARED_BYTES_A_CYCLE = 128
"""Bytes that a multiprocessor reads from its shared memory."""

STAGED_BYTES_A_CYCLE = 24
"""Bytes that a multiprocessor reads from the second-level cache while all others do the same."""

BLOCK_CYCLES = 1_500
"""Estimated time for a block to start and to write its results."""

CONFLICTS = {8: 1.0, 4: 1.05, 2: 1.25, 1: 1.6}
"""Wavefronts relative to the ideal, by the lanes of a neuron: bank conflicts after ordering."""

RESERVED_SHARED_BYTES = 1024
"""Shared memory that the driver reserves for each block."""


@dataclass(frozen=True)
class TileLaunch:
    """The launch of a batched product.

    Parameters
    ----------
    lanes : int
        Lanes of each neuron.
    tiles, splits : int
        The grid: tiles of the batch, splits of the neurons.
    warps : int
        Warps of each block.
    """

    lanes: int
    tiles: int
    splits: int
    warps: int


@functools.lru_cache(maxsize=256)
def best_tile_launch(
    batch: int,
    n_neurons: int,
    nnz: int,
    size: int,
    options: tuple[tuple[int, int, int], ...],
    processors: int,
    processor_shared_bytes: int,
) -> TileLaunch:
    """Return the fastest launch by a model of the device.

    Parameters
    ----------
    batch, n_neurons, nnz : int
    size : int
        Batch rows of a lane: the numbers in 16 bytes.
    options : tuple
        For each choice of lanes: lanes, inputs in a tile, number of tiles for all inputs.
    processors, processor_shared_bytes : int

    Notes
    -----
    A block stages its tile of x. For each connection of its neurons, each lane reads 16 bytes of
    the tile. The multiprocessors run the blocks in rounds.
    """
    launches = []
    for lanes, tile_rows, n_segments in options:
        tiles = -(-batch // (lanes * size))
        row_bytes = 16 * lanes
        shared_bytes = (tile_rows + 1) * row_bytes
        resident = max(1, processor_shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES))
        groups = -(-n_neurons * lanes // 32)
        for splits in _split_counts(groups):
            per_split = -(-groups // splits)
            passes = -(-per_split // MOST_WARPS) if n_segments > 1 else 1
            staged = passes * n_segments * tile_rows * row_bytes / STAGED_BYTES_A_CYCLE
            read = nnz / splits * row_bytes * CONFLICTS[lanes] / SHARED_BYTES_A_CYCLE
            rounds = -(-tiles * splits // (processors * resident))
            cycles = rounds * resident * (staged + read + BLOCK_CYCLES / resident)
            cycles = max(cycles, staged + read + BLOCK_CYCLES)
            warps = min(MOST_WARPS, max(FEWEST_WARPS, per_split))
            launches.append((cycles, TileLaunch(lanes, tiles, splits, warps)))
    return min(launches, key=lambda launch: launch[0])[1]


def _split_counts(groups: int) -> list[int]:
    most = min(groups, MOST_SPLITS)
    counts = {min(most, round(2 ** (i / 2))) for i in range(32)}
    return sorted(counts)
