"""Lanes and grid of a batched product, by a model of the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["TileLaunch", "best_tile_launch"]

MOST_WARPS = 32
"""Of a block."""

FEWEST_WARPS = 4
MOST_SPLITS = 65_535
"""Of a grid's second axis."""

SHARED_BYTES_A_CYCLE = 128
"""What a multiprocessor reads from its shared memory."""

STAGED_BYTES_A_CYCLE = 24
"""What it gets from the second-level cache while all the others do the same."""

BLOCK_CYCLES = 1_500
"""About what a block takes to start, and to write its results."""

CONFLICTS = {8: 1.0, 4: 1.05, 2: 1.25, 1: 1.6}
"""Wavefronts for each that would do, by the lanes of a neuron: what ordering leaves."""

RESERVED_SHARED_BYTES = 1024
"""What each block has beside its own."""


@dataclass(frozen=True)
class TileLaunch:
    """How a batched product runs.

    Parameters
    ----------
    lanes : int
        To a neuron.
    tiles, splits : int
        The grid: of the batch, and of the neurons.
    warps : int
        Of a block.
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
    """Return the launch that a model of the device says is quickest.

    Parameters
    ----------
    batch, n_neurons, nnz : int
    size : int
        Batch rows of a lane: numbers in 16 bytes.
    options : tuple
        For each choice of lanes: lanes, inputs in a tile, tiles for all inputs.
    processors, processor_shared_bytes : int

    Notes
    -----
    A block stages its tile of x, and reads 16 bytes of it a lane for each connection of its
    neurons; multiprocessors take blocks in turns.
    """
    best = None
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
            if best is None or cycles < best[0]:
                best = cycles, TileLaunch(lanes, tiles, splits, warps)
    assert best is not None
    return best[1]


def _split_counts(groups: int) -> list[int]:
    most = min(groups, MOST_SPLITS)
    counts = {min(most, round(2 ** (i / 2))) for i in range(32)}
    return sorted(counts)
