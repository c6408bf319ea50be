"""Choose lanes and grid of each kernel, by a model of the device.

All functions depend on the device's properties alone, so that the choice for a device, and the time
that the model predicts for it, can be computed without it. The constants are estimates from machine
code and published latencies until a device has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from srigl_core.backends.cupy_gpu.device import DeviceProperties
from srigl_core.backends.cupy_gpu.tiles import CHUNK, rows_of_tile
from srigl_core.backends.cupy_gpu.variants import STREAM_ROWS, TILE_LANES

__all__ = [
    "Counts",
    "GradientLaunch",
    "LaunchModel",
    "StreamLaunch",
    "TileLaunch",
    "bank_factor",
    "padded_connections",
    "resident_blocks",
]

WARPS = (16, 24, 32)
"""Warps of a block that stages a tile: many, since the loads of few warps are too few in flight;
and a multiple of the lanes of a neuron, as staging requires."""

STREAM_THREADS = 256
STREAM_LANES = (1, 2, 4, 8, 16, 32)
STEPS_AHEAD = 2
"""Steps of the stream product that are loaded ahead: `kAhead`."""

MOST_STREAM_ROWS = STREAM_ROWS[-1]
MOST_STAGED_INPUTS = 1 << 16
"""Most inputs whose numbers are 16 bits."""

GRADIENT_LANES = 4
MOST_BATCH_SPLITS = 32
"""Most splits of the batch in the gradient of the values; each has a sum for each value."""

MOST_SPLITS = 65_535
"""Most blocks along a grid's second axis."""

REGISTERS = 64
"""Registers of a thread, at most, of the kernels that stage tiles; twice as many for float64."""

MOST_FLOAT64_WARPS = 16

PROCESSOR_REGISTERS = 65_536
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the driver reserves for each block."""

SHARED_BYTES_A_CYCLE = 128
"""Bytes that a multiprocessor reads from its shared memory."""

WARP_LOAD_BYTES = 32 * 16
SHARED_EFFICIENCY = 0.88
"""Share of that rate that a loop of loads and multiply-adds reaches."""

STAGED_BYTES_A_CYCLE = 24
"""Bytes that a multiprocessor reads from the second-level cache while all others do the same."""

TRIP_CYCLES = 430
"""Latency of loads from the second-level cache, that is of a trip through a loop of loads."""

SHUFFLE_CYCLES = 30
BLOCK_CYCLES = 1_500
"""Estimated time for a block to start and to write its results."""

LOADS_AHEAD = 16
"""Loads of a thread that are in flight while it stages: `kQuadsAhead` and `inputs_ahead`."""

BANK_CONFLICTS = {8: 0.0, 4: 0.55, 2: 2.9, 1: 7.5}
"""By the lanes of a neuron: the conflicts that the order of the connections leaves (`tiles.py`)."""

LARGEST_OF_MEMBERS = {32: 2.07, 16: 1.77, 8: 1.42, 4: 1.03}
"""Expected largest of so many normal numbers, in standard deviations."""

ISSUE_CYCLES = {"float16": 5.75, "bfloat16": 7.06, "float32": 2.22, "float64": 2.22}
"""Cycles in which a multiprocessor issues the instructions for one load of 16 bytes of a warp."""

GRADIENT_ISSUE_CYCLES = 3.5
"""The same for the gradient of the values, which exchanges sums."""

TENSOR_MULTIPLY_ADDS = {70: 512, 75: 512, 80: 1024, 86: 512, 89: 512, 90: 2048, 100: 4096, 120: 512}
"""By the architecture: multiply-adds in 16 bits of a multiprocessor's tensor cores in a cycle; half
as many on GeForce cards."""

BFLOAT16_ARCHITECTURE = 80
"""The oldest whose tensor cores take bfloat16."""

TENSOR_SHARE = 0.6
"""Share of that rate that a dense product of one layer is estimated to reach."""

DENSE_CYCLES = 5_000
"""Estimated time of a dense product with hardly any multiply-adds."""

COMPARED_BATCHES = tuple(1 << i for i in range(12))

GATHER_CONFLICTS = {4: 3.5, 8: 3.1, 16: 2.6}
"""Wavefronts relative to the ideal, by the bytes of a lane: random inputs in the stream product."""


def bank_factor(lanes: int, fan_in: float) -> float:
    """Return the wavefronts of a warp's loads relative to those without bank conflicts.

    Longer lists of connections leave the order more choice.
    """
    return 1 + BANK_CONFLICTS[lanes] / math.sqrt(max(1.0, fan_in))


def padded_connections(fan_in: float, n_inputs: int, n_segments: int, lanes: int) -> float:
    """Return the expected connections of a neuron, with the padding that its warp makes of them.

    In each segment of the inputs all neurons of a warp have as many chunks as the one that has the
    most connections there. The inputs of a neuron are taken to be random.
    """
    if n_segments == 1:
        return CHUNK * math.ceil(fan_in / CHUNK)
    mean = fan_in / n_segments
    variance = mean * (1 - 1 / n_segments) * max(0.0, 1 - fan_in / n_inputs)
    most = mean + LARGEST_OF_MEMBERS[32 // lanes] * math.sqrt(variance)
    return n_segments * (most + (CHUNK - 1) / 2)


def resident_blocks(
    properties: DeviceProperties, threads: int, shared_bytes: int, registers: int = REGISTERS
) -> int:
    """Return how many blocks run on a multiprocessor at once, at least one."""
    of_threads = min(properties.processor_threads, PROCESSOR_REGISTERS // registers) // threads
    of_memory = properties.processor_shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES)
    return max(1, min(of_threads, of_memory))


@dataclass(frozen=True)
class Counts:
    """What the kernels of a launch do, in numbers that the test harness counts, too.

    Parameters
    ----------
    launches : int
    barriers : int
        That a block passes, at most.
    trips : int
        Of a thread, at most, through loops whose loads are in flight together, to stage inputs.
    loads : int
        Of a thread, at most: numbers of x, and of the result's gradient, that it loads.
    multiply_adds : int
        Of a thread. Where inputs are cut into segments, it is an estimate, since padding depends
        on the mask.
    """

    launches: int
    barriers: int
    trips: int
    loads: int
    multiply_adds: int


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
    cycles : float
        The predicted time.
    """

    lanes: int
    tiles: int
    splits: int
    warps: int
    cycles: float

    def __str__(self) -> str:
        return (
            f"{self.tiles} x {self.splits} blocks of {self.warps} warps, "
            f"{_counted(self.lanes, 'lane')} to a neuron"
        )


@dataclass(frozen=True)
class GradientLaunch:
    """The launch of the gradient of the values.

    Parameters
    ----------
    splits, parts : int
        The grid: splits of the batch, splits of the neurons.
    warps : int
        Warps of each block.
    cycles : float
        The predicted time.
    """

    splits: int
    parts: int
    warps: int
    cycles: float

    def __str__(self) -> str:
        return f"{self.splits} x {self.parts} blocks of {self.warps} warps"


@dataclass(frozen=True)
class StreamLaunch:
    """The launch of a product of few rows.

    Parameters
    ----------
    lanes : int
        Lanes of each neuron.
    rows : int
        Rows that the kernel has sums for.
    shared_bytes : int
        Of the staged inputs; 0 if they do not fit, and are read in place.
    cycles : float
        The predicted time, if the weight is in the second-level cache.
    """

    lanes: int
    rows: int
    shared_bytes: int
    cycles: float

    def __str__(self) -> str:
        return (
            f"{_counted(self.rows, 'row')}, {'staged' if self.shared_bytes else 'in place'}, "
            f"{_counted(self.lanes, 'lane')} to a neuron"
        )


@dataclass(frozen=True)
class LaunchModel:
    """The launches for a mask of this size on a device.

    Parameters
    ----------
    properties : DeviceProperties
    n_out, n_in : int
    n_active, fan_in : int
    is_quantized : bool
        Whether a value is a byte. Otherwise values have the type of x.
    """

    properties: DeviceProperties
    n_out: int
    n_in: int
    n_active: int
    fan_in: int
    is_quantized: bool = False

    @property
    def nnz(self) -> int:
        """Number of connections."""
        return self.n_active * self.fan_in

    def forward(self, batch: int, dtype: np.dtype[Any]) -> StreamLaunch | TileLaunch:
        """Return the launch of the product of inputs of `dtype`."""
        if batch <= MOST_STREAM_ROWS:
            return self.stream(batch, dtype)
        return self.tile(batch, dtype)

    def dense(self, batch: int, dtype: np.dtype[Any]) -> float | None:
        """Return the predicted cycles of the dense product on tensor cores.

        None if the device has none for 16-bit numbers of `dtype`.
        """
        properties, n_inputs = self.properties, self.n_out + batch
        oldest = BFLOAT16_ARCHITECTURE if dtype.name == "bfloat16" else 0
        rates = [rate for a, rate in TENSOR_MULTIPLY_ADDS.items() if a <= properties.architecture]
        if dtype.itemsize != 2 or not rates or properties.architecture < oldest:
            return None
        summed = self.n_out * self.n_in * batch / (rates[-1] * TENSOR_SHARE)
        moved = n_inputs * self.n_in + batch * self.n_out
        read = moved * dtype.itemsize / STAGED_BYTES_A_CYCLE
        return DENSE_CYCLES + max(summed, read) / properties.processors

    def against_dense(self, dtype: np.dtype[Any]) -> str | None:
        """Return at which batches dense tensor cores are predicted to be faster, in words.

        None where there are no tensor cores for `dtype`.
        """
        faster = []
        for batch in COMPARED_BATCHES:
            dense = self.dense(batch, dtype)
            if dense is None:
                return None
            if dense < self.forward(batch, dtype).cycles:
                faster.append(batch)
        if not faster:
            return f"predicted slower up to batch {COMPARED_BATCHES[-1]}"
        first, last = faster[0], faster[-1]
        if last < COMPARED_BATCHES[-1]:
            return f"predicted faster at batch {first} to {last}"
        return f"predicted faster from batch {first} on"

    def tile(self, batch: int, dtype: np.dtype[Any], *, of_columns: bool = False) -> TileLaunch:
        """Return the fastest launch of a batched product, or of the gradient of x.

        A block stages its tile of x. For each connection of its neurons, each lane reads 16 bytes
        of the tile. The multiprocessors run the blocks in rounds; the blocks that one runs at once
        share its memories.
        """
        n_neurons = self.n_in if of_columns else self.n_out
        launches = []
        for lanes in TILE_LANES:
            tile_rows, n_segments = self._tile_shape(lanes, of_columns=of_columns)
            tiles = -(-batch * dtype.itemsize // (16 * lanes))
            groups = -(-n_neurons * lanes // 32)
            reads = self._read_cycles(lanes, ISSUE_CYCLES[dtype.name], of_columns=of_columns)
            for splits, warps in self._grids(groups, tiles, dtype):
                blocks, per_split = tiles * splits, -(-groups // splits)
                resident = self._resident(blocks, warps, 16 * lanes * (tile_rows + 1), dtype)
                passes = -(-per_split // warps) if n_segments > 1 else 1
                staged = _stage_cycles(lanes, tile_rows, dtype.itemsize, warps, resident)
                summed = resident * reads * per_split / groups
                cycles = passes * n_segments * staged + summed + BLOCK_CYCLES
                cycles *= -(-blocks // (self.properties.processors * resident))
                launches.append(TileLaunch(lanes, tiles, splits, warps, cycles))
        return min(launches, key=lambda launch: launch.cycles)

    def gradient(self, batch: int, dtype: np.dtype[Any]) -> GradientLaunch:
        """Return the fastest launch of the gradient of the values.

        A block stages each tile of its split of the batch. If the neurons are split, several blocks
        stage the same tile. If the batch is, the sums of more splits are written, read and added.
        """
        lanes, processors = GRADIENT_LANES, self.properties.processors
        tile_rows, n_segments = self._tile_shape(lanes)
        batch_tiles = -(-batch * dtype.itemsize // (16 * lanes))
        groups = -(-self.n_active * lanes // 32)
        sums_bytes = max(4, dtype.itemsize) * self.nnz
        reads = self._read_cycles(lanes, GRADIENT_ISSUE_CYCLES)
        reads = max(reads, 2 * sums_bytes / STAGED_BYTES_A_CYCLE)  # sums of the tile before, too
        launches = []
        for splits in _counts(min(batch_tiles, MOST_BATCH_SPLITS)):
            added = (splits + 1) * sums_bytes / STAGED_BYTES_A_CYCLE / processors
            for parts, warps in self._grids(groups, splits * n_segments, dtype):
                blocks = splits * parts * n_segments
                resident = self._resident(blocks, warps, 16 * lanes * (tile_rows + 1), dtype)
                staged = _stage_cycles(lanes, tile_rows, dtype.itemsize, warps, resident)
                summed = resident * reads * -(-groups // parts) / groups / n_segments
                cycles = -(-batch_tiles // splits) * (staged + summed) + BLOCK_CYCLES
                cycles *= -(-blocks // (processors * resident))
                cycles += added + BLOCK_CYCLES
                launches.append(GradientLaunch(splits, parts, warps, cycles))
        return min(launches, key=lambda launch: launch.cycles)

    def stream(self, batch: int, dtype: np.dtype[Any]) -> StreamLaunch:
        """Return the fastest launch of a product of up to eight rows.

        A warp waits for the loads of each two steps but the first ones, which it loads before x is
        staged. The weight comes from the second-level cache, the inputs from random banks.
        """
        processors = self.properties.processors
        rows = next(rows for rows in STREAM_ROWS if batch <= rows)
        row_bytes = rows * dtype.itemsize
        shared_bytes = self.n_in * row_bytes
        if shared_bytes > self.properties.block_shared_bytes or self.n_in > MOST_STAGED_INPUTS:
            shared_bytes = 0
        fitting = resident_blocks(self.properties, STREAM_THREADS, shared_bytes)
        trips = -(-self.n_in // (STREAM_THREADS * LOADS_AHEAD // rows))
        bytes_read = (1 if self.is_quantized else dtype.itemsize) + (2 if shared_bytes else 4)
        bytes_gathered = max(4, row_bytes) * GATHER_CONFLICTS[min(16, max(4, row_bytes))]
        launches = []
        for lanes in STREAM_LANES:
            slices = -(-self.n_active * lanes // 32)
            resident = min(fitting, -(-slices * 32 // (STREAM_THREADS * processors)))
            slices_a_warp = -(-slices * 32 // (processors * resident * STREAM_THREADS))
            steps = -(-self.fan_in // (CHUNK * lanes))
            staged = max(trips * TRIP_CYCLES, resident * shared_bytes / STAGED_BYTES_A_CYCLE)
            connections = slices * steps * 32 * CHUNK / processors
            waits = slices_a_warp * -(-steps // STEPS_AHEAD) - 1
            cycles = max(
                waits * TRIP_CYCLES,
                connections * bytes_read / STAGED_BYTES_A_CYCLE,
                connections * bytes_gathered / SHARED_BYTES_A_CYCLE,
            )
            exchanged = slices_a_warp * math.log2(lanes) * SHUFFLE_CYCLES
            cycles += exchanged + BLOCK_CYCLES + (staged if shared_bytes else 0)
            launches.append(StreamLaunch(lanes, rows, shared_bytes, cycles))
        return min(launches, key=lambda launch: launch.cycles)

    def counts(
        self,
        launch: StreamLaunch | TileLaunch | GradientLaunch,
        batch: int,
        dtype: np.dtype[Any],
        *,
        of_columns: bool = False,
    ) -> Counts:
        """Return what a launch of this model does."""
        if isinstance(launch, StreamLaunch):
            return self._stream_counts(launch, batch)
        if isinstance(launch, GradientLaunch):
            return self._gradient_counts(launch, batch, dtype)
        return self._tile_counts(launch, dtype, of_columns=of_columns)

    def _tile_counts(self, launch: TileLaunch, dtype: np.dtype[Any], *, of_columns: bool) -> Counts:
        n_neurons, n_inputs = (self.n_in, self.n_out) if of_columns else (self.n_out, self.n_in)
        tile_rows, n_segments = self._tile_shape(launch.lanes, of_columns=of_columns)
        passes = _passes(n_neurons, launch.lanes, launch.splits, launch.warps)
        stagings = passes if n_segments > 1 else 1
        shape = n_inputs, tile_rows, n_segments
        trips, loads = _staged(*shape, launch.warps, launch.lanes, dtype.itemsize)
        barriers = 2 * passes * n_segments if n_segments > 1 else 1
        connections = round(self._padded(launch.lanes, of_columns=of_columns))
        multiply_adds = passes * connections * 16 // dtype.itemsize
        return Counts(1, barriers, stagings * trips, stagings * loads, multiply_adds)

    def _gradient_counts(self, launch: GradientLaunch, batch: int, dtype: np.dtype[Any]) -> Counts:
        lanes, size = GRADIENT_LANES, 16 // dtype.itemsize
        tile_rows, n_segments = self._tile_shape(lanes)
        batch_tiles = -(-batch // (lanes * size))
        tiles = -(-batch_tiles // launch.splits)
        passes = _passes(self.n_active, lanes, launch.parts, launch.warps)
        n_rows = min(self.n_in, tile_rows)
        trips, loads = _staged(n_rows, tile_rows, 1, launch.warps, lanes, dtype.itemsize)
        loads += passes * size  # of the result's gradient
        multiply_adds = passes * round(self._padded(lanes) / n_segments) * size
        return Counts(2, 2 * tiles, tiles * trips, tiles * loads, tiles * multiply_adds)

    def _stream_counts(self, launch: StreamLaunch, batch: int) -> Counts:
        lanes, rows, processors = launch.lanes, launch.rows, self.properties.processors
        fitting = resident_blocks(self.properties, STREAM_THREADS, launch.shared_bytes)
        blocks = min(-(-self.n_active * lanes // STREAM_THREADS), processors * fitting)
        slices = _passes(self.n_active, lanes, blocks, STREAM_THREADS // 32)
        steps = -(-self.fan_in // (CHUNK * lanes))
        last = min(CHUNK, self.fan_in - (steps - 1) * lanes * CHUNK)
        connections = slices * ((steps - 1) * CHUNK + last)
        if not launch.shared_bytes:
            return Counts(1, 0, 0, connections * batch, connections * batch)
        trips = -(-self.n_in // (STREAM_THREADS * LOADS_AHEAD // rows))
        loads = trips * LOADS_AHEAD // rows * batch
        return Counts(1, 1, trips, loads, connections * rows)

    def _tile_shape(self, lanes: int, *, of_columns: bool = False) -> tuple[int, int]:
        n_inputs = self.n_out if of_columns else self.n_in
        return rows_of_tile(n_inputs, lanes, self.properties.block_shared_bytes)

    def _resident(self, blocks: int, warps: int, shared_bytes: int, dtype: np.dtype[Any]) -> int:
        """Return how many blocks of a grid a multiprocessor runs at once."""
        registers = 2 * REGISTERS if dtype.itemsize == 8 else REGISTERS
        fitting = resident_blocks(self.properties, 32 * warps, shared_bytes, registers)
        return min(fitting, -(-blocks // self.properties.processors))

    def _read_cycles(self, lanes: int, issue_cycles: float, *, of_columns: bool = False) -> float:
        """Return the cycles in which one multiprocessor reads a tile for all connections."""
        n_neurons = self.n_in if of_columns else self.n_active
        issue_factor = issue_cycles * SHARED_BYTES_A_CYCLE / WARP_LOAD_BYTES
        factor = max(bank_factor(lanes, self.nnz / n_neurons), issue_factor)
        read = n_neurons * self._padded(lanes, of_columns=of_columns) * 16 * lanes
        return read * factor / (SHARED_BYTES_A_CYCLE * SHARED_EFFICIENCY)

    def _padded(self, lanes: int, *, of_columns: bool = False) -> float:
        """Return the connections of a neuron, or of an input, with their padding."""
        _, n_segments = self._tile_shape(lanes, of_columns=of_columns)
        n_neurons, n_inputs = self.n_active, self.n_in
        if of_columns:
            n_neurons, n_inputs = self.n_in, self.n_out
        return padded_connections(self.nnz / n_neurons, n_inputs, n_segments, lanes)

    def _grids(self, groups: int, times: int, dtype: np.dtype[Any]) -> Iterator[tuple[int, int]]:
        """Yield splits of the groups and warps of a block, for a grid that is `times` as large."""
        filling = (n * self.properties.processors // times for n in (1, 2, 3, 4, 6, 8))
        for splits in _counts(min(groups, MOST_SPLITS), filling):
            for warps in WARPS:
                if dtype.itemsize < 8 or warps <= MOST_FLOAT64_WARPS:
                    yield splits, warps


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _stage_cycles(lanes: int, tile_rows: int, itemsize: int, warps: int, resident: int) -> float:
    """Return the cycles in which the blocks of a multiprocessor stage a tile each."""
    trips, _ = _staged(tile_rows, tile_rows, 1, warps, lanes, itemsize)
    bytes_staged = resident * tile_rows * 16 * lanes
    return max(bytes_staged / STAGED_BYTES_A_CYCLE, trips * TRIP_CYCLES)


def _staged(
    n_inputs: int, tile_rows: int, n_segments: int, warps: int, lanes: int, itemsize: int
) -> tuple[int, int]:
    """Return the trips and loads in which a thread stages all segments of a tile, at most."""
    quads_ahead = 1 if itemsize == 8 else LOADS_AHEAD * itemsize // 16
    trips = loads = 0
    for rows in (*(n_segments - 1) * (tile_rows,), n_inputs - (n_segments - 1) * tile_rows):
        rows_a_thread = -(-rows // (32 * warps // lanes))
        trips += rows_a_thread // quads_ahead + rows_a_thread % quads_ahead
        loads += rows_a_thread * 16 // itemsize
    return trips, loads


def _passes(n_neurons: int, lanes: int, splits: int, warps: int) -> int:
    """Return the groups of neurons that a warp of the largest split has, at most."""
    groups = -(-n_neurons * lanes // 32)
    per_split = -(-groups // splits)
    return -(-per_split // warps)


def _counts(most: int, more: Iterable[int] = ()) -> list[int]:
    """Return numbers up to `most`: powers of the root of two, and `more`."""
    powers = (round(2 ** (i / 2)) for i in range(32))
    return sorted({min(most, max(1, count)) for count in (*powers, *more)})
