"""The product with a condensed weight, and its gradients, as CPU kernels (SPEC 2).

The kernel of a product depends on the batch, the mask and the processor:

- up to a few rows: `byte_planes` with AVX-512 VBMI, `neuron_lanes` on other processors, for
  float64, and where connections are few, as in small output layers, for any batch;
- larger batches: `lockstep`, in tiles of 8 to 32 batch rows. It also computes the gradient of
  x, with the connections transposed;
- `value_gradient` for the gradient of the values.

A layout is made when it is first used, once for a mask. Other values on the same mask are arranged
in one pass. One thread computes each item's sums, in an order that does not depend on how items are
divided among threads. Any number of threads therefore gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import accumulator_dtype, round_to
from srigl_core._format.packed_weight import PackedWeight
from srigl_core.backends.numba_cpu.batch_tiles import (
    LANE_NANOSECONDS,
    MOVE_NANOSECONDS,
    ROW_NANOSECONDS,
    lanes_of,
    tile_parts,
    tiles_nanoseconds,
)
from srigl_core.backends.numba_cpu.byte_planes import BytePlanes
from srigl_core.backends.numba_cpu.calling import Call
from srigl_core.backends.numba_cpu.compressed_rows import CompressedRows
from srigl_core.backends.numba_cpu.lockstep import Lockstep
from srigl_core.backends.numba_cpu.neuron_lanes import NeuronLanes
from srigl_core.backends.numba_cpu.processor import has_byte_lookup
from srigl_core.backends.numba_cpu.threads import is_small, pool
from srigl_core.backends.numba_cpu.value_gradient import (
    MOST_GATHERED,
    gathered_gradient,
    value_gradient,
)
from srigl_core.backends.numba_cpu.value_types import as_bits
from srigl_core.contract import ACTIVATIONS, MatmulGradients

__all__ = ["CALL_NANOSECONDS", "NumbaPrepared", "rounded_into"]

Array = NDArray[Any]

MOST_ROWS = 4
"""Largest batch for which rows can be faster than tiles, unless connections are few."""

MOST_BATCHES = 64
"""Sizes of batches whose calls a weight keeps."""

CALL_NANOSECONDS = 1_500
"""Time of a call, measured on one machine with AVX-512. It serves recommendations."""


class _Layouts:
    """The layouts of one mask, which all values on the mask share."""

    def __init__(self, weight: PackedWeight) -> None:
        self._indices, self._n_in = weight.indices, weight.shape[1]
        self.is_full = weight.n_active == weight.shape[0]
        self.every_neuron = np.arange(weight.n_active)
        self.every_input = np.arange(self._n_in)
        n_neurons, fan_in = self._indices.shape
        moves = (self._n_in + n_neurons) * ROW_NANOSECONDS
        row_of_tile = moves + n_neurons * fan_in * LANE_NANOSECONDS
        has_few_connections = NeuronLanes.estimate(n_neurons, fan_in) < row_of_tile
        self.most_rows = np.inf if has_few_connections else MOST_ROWS
        self._made: dict[Any, Any] = {}

    def for_rows(self, dtype: np.dtype[Any]) -> Any:
        """Return the layout that processes batch rows one by one, for sums in `dtype`."""
        key = ("rows", dtype.itemsize)
        return self._made.get(key) or self._keep(key, self._best_for_rows(dtype))

    def for_batch(self, batch: int, dtype: np.dtype[Any]) -> Any | None:
        """Return the layout for batch rows one by one if it is the faster one, else None."""
        if batch <= self.most_rows:
            layout = self.for_rows(dtype)
            if batch <= layout.most_rows:
                return layout
        return None

    def _best_for_rows(self, dtype: np.dtype[Any]) -> Any:
        indices, n_in = self._indices, self._n_in
        nanoseconds = NeuronLanes.estimate(*indices.shape)
        can_look_up = self.most_rows == MOST_ROWS and has_byte_lookup()
        if can_look_up and BytePlanes.can_beat(nanoseconds, indices, n_in, dtype):
            planes = BytePlanes(indices, n_in)
            if planes.nanoseconds <= nanoseconds:
                return planes
        made = self._made.get("lanes")
        return made or self._keep("lanes", NeuronLanes(indices, self.most_rows))

    def for_tiles(self, lanes: int, dtype: np.dtype[Any], *, of_columns: bool = False) -> Any:
        """Return the layout for tiles of `lanes` batch rows."""
        key = ("tiles", lanes, dtype.itemsize, of_columns)
        made = self._made.get(key)
        if made is None:
            connect = CompressedRows.of_columns if of_columns else CompressedRows.of_neurons
            made = self._keep(key, Lockstep(connect(self._indices, self._n_in), lanes, dtype))
        return made

    def _keep(self, key: Any, made: Any) -> Any:
        """Store a layout, and return it; if two threads made it at once, the first one."""
        return self._made.setdefault(key, made)

    @property
    def nbytes(self) -> int:
        return sum({id(layout): layout.nbytes for layout in self._made.values()}.values())


class NumbaPrepared:
    """A weight in this backend's layouts: of floats, or the integers of a quantised weight."""

    __slots__ = (
        "_active",
        "_arranged",
        "_bits",
        "_layouts",
        "_no_bias",
        "_of_batch",
        "_ready",
        "_tiled",
        "_tiles_work",
        "dtype",
        "weight",
    )

    def __init__(self, weight: PackedWeight, layouts: _Layouts | None = None) -> None:
        self.weight, self._active = weight, weight.active
        self._bits = as_bits(weight.values)
        self._layouts = layouts or _Layouts(weight)
        self.dtype = accumulator_dtype(weight.float_dtype)
        self._no_bias = np.zeros(weight.shape[0], self.dtype)
        self._tiles_work = weight.nnz * LANE_NANOSECONDS  # of a batch row
        self._arranged: dict[Any, Array] = {}
        self._ready: dict[int, Any] = {}
        self._of_batch: dict[int, Any] = {}
        self._tiled: dict[tuple[int, int, bool], Any] = {}

    def matmul_fast(
        self, x: Array, bias: Array | None, code: Any, out: Array, threads: int | None
    ) -> None:
        """Write the product of plain arrays to `out`; `code` is that of `results.finish_row`."""
        offset = self._no_bias if bias is None else bias
        active, rank = self._active, x.ndim
        batch = 1 if rank == 1 else len(x)
        if batch <= self._layouts.most_rows:
            layout, product, arrays = self._ready.get(rank) or self._make_ready(
                x, offset, out, code
            )
            if batch <= layout.most_rows:
                work = batch * layout.nanoseconds
                if threads == 1 or is_small(threads, work):
                    product(layout.n_items(batch), (x, offset, active, out, code, *arrays))
                else:
                    with pool(threads, work) as n:
                        layout.multiply(arrays[0], x, offset, active, out, code, n)
                return
        work = batch * self._tiles_work
        if threads == 1 or is_small(threads, work):
            others = x, offset, active, out, code
            for serial, n_items, front in self._of_batch.get(batch) or self._keep_batch(others):
                serial(n_items, (*front, *others))
        else:
            with pool(threads, work) as n:
                self._multiply_tiles(x, offset, active, out, code, n)

    def _make_ready(self, x: Array, bias: Array, out: Array, code: Any) -> Any:
        """Return the layout, its compiled kernel for inputs like `x`, and its arrays."""
        layout = self._layouts.for_rows(self.dtype)
        arrays = (self._values(layout, self.dtype), *layout.arrays)
        arguments = (x, bias, self._active, out, code, *arrays)
        self._ready[x.ndim] = layout, layout.launch.serial(arguments), arrays
        return self._ready[x.ndim]

    def _keep_batch(self, others: tuple[Any, ...]) -> Any:
        """Return what one thread calls for a batch: compiled code, items, and first arguments."""
        calls = []
        for first, tiles, lanes in tile_parts(len(others[0]), self.dtype.itemsize):
            layout, arrays, serial = self._tiles_of(lanes, others)
            runs = layout.least_runs
            calls.append((serial, tiles * runs, (runs, first, *arrays)))
        if len(self._of_batch) == MOST_BATCHES:
            self._of_batch.clear()
        self._of_batch[len(others[0])] = calls
        return calls

    def calls(self, x: Array, bias: Array | None, out: Array, code: Any) -> Iterator[Call]:
        """Yield the kernels that `matmul_fast` calls on one thread: their items and arguments."""
        others = (x, self._no_bias if bias is None else bias, self._active, out, code)
        layout = self._layouts.for_batch(len(x), x.dtype)
        if layout is not None:
            arrays = (self._values(layout, x.dtype), *layout.arrays)
            yield layout.launch, layout.n_items(len(x)), (*others, *arrays)
        else:
            for first, tiles, lanes in tile_parts(len(x), x.itemsize):
                layout, arrays, _ = self._tiles_of(lanes, others)
                runs = layout.least_runs
                yield layout.launch, tiles * runs, (runs, first, *arrays, *others)

    def work(self, batch: int) -> float:
        """Estimate the nanoseconds of a product's sums on one thread, as `matmul_fast` does."""
        layout = self._layouts.for_batch(batch, self.dtype)
        return float(batch * (self._tiles_work if layout is None else layout.nanoseconds))

    def describe(self) -> dict[str, object]:
        """Return kernels, layout, and bytes in addition to the weight's own."""
        layout = self._layouts.for_rows(self.dtype)
        beyond = f" up to batch {layout.most_rows}, lockstep beyond"
        return {
            "kernel": layout.name + ("" if layout.most_rows == np.inf else beyond),
            "layout": "condensed",
            "padding": round(layout.padding, 3),
            "bytes": self._layouts.nbytes + sum(array.nbytes for array in self._arranged.values()),
        }

    def nanoseconds(self, batch: int) -> float:
        """Estimate the single-threaded time of a product, by a model fitted to float32."""
        layout = self._layouts.for_batch(batch, self.dtype)
        if layout is not None:
            return CALL_NANOSECONDS + float(layout.batch_nanoseconds(batch))
        sums = tiles_nanoseconds(batch, self.dtype.itemsize) * self.weight.nnz
        moves = batch * sum(self.weight.shape) * MOVE_NANOSECONDS * self.dtype.itemsize / 4
        return CALL_NANOSECONDS + sums + moves

    def with_values(self, weight: PackedWeight) -> NumbaPrepared:
        """Return this layout for other values; they share everything that depends on the mask."""
        return NumbaPrepared(weight, self._layouts)

    def matmul(
        self,
        x: Array,
        bias: Array | None,
        *,
        activation: str,
        compact: bool,
        out: Array,
        threads: int | None,
    ) -> None:
        """Write the product to `out`."""
        weight = self.weight
        dtype = accumulator_dtype(x.dtype, weight.float_dtype)
        if bias is None:
            offset = np.zeros(out.shape[1], dtype)
        else:
            offset = np.require(bias[weight.active] if compact else bias, dtype, ["C", "A"])
        inputs = np.require(x, dtype, ["C", "A"])
        code = ACTIVATIONS[activation].code
        with rounded_into(out, dtype) as result:
            self.multiply(inputs, offset, compact, result, code, threads)

    def multiply(
        self, x: Array, bias: Array, compact: bool, out: Array, code: Any, threads: int | None
    ) -> None:
        """Compute a product; all arrays have one dtype and are in C order."""
        columns, batch = self._layouts.every_neuron if compact else self._active, len(x)
        layout = self._layouts.for_batch(batch, x.dtype)
        if layout is not None:
            values = self._values(layout, x.dtype)
            with pool(threads, batch * layout.nanoseconds) as n_threads:
                layout.multiply(values, x, bias, columns, out, code, n_threads)
            return
        with pool(threads, batch * self._tiles_work) as n_threads:
            self._multiply_tiles(x, bias, columns, out, code, n_threads)

    def _multiply_tiles(
        self,
        x: Array,
        bias: Array,
        columns: Array,
        out: Array,
        code: Any,
        n_threads: int,
        *,
        of_columns: bool = False,
    ) -> None:
        """Compute a product in tiles."""
        others = x, bias, columns, out, code
        for first, tiles, lanes in tile_parts(len(x), x.itemsize):
            layout, arrays, serial = self._tiles_of(lanes, others, of_columns=of_columns)
            if n_threads == 1:
                runs = layout.least_runs
                serial(tiles * runs, (runs, first, *arrays, *others))
            else:
                runs = layout.runs(tiles, n_threads)
                layout.launch(tiles * runs, n_threads, (runs, first, *arrays, *others))

    def _tiles_of(self, lanes: int, others: tuple[Any, ...], *, of_columns: bool = False) -> Any:
        """Return the layout for tiles, its arrays, and its compiled code for one thread."""
        dtype = others[0].dtype
        key = (lanes, dtype.itemsize, of_columns)
        made = self._tiled.get(key)
        if made is None:
            layout = self._layouts.for_tiles(lanes, dtype, of_columns=of_columns)
            arrays = (*layout.arrays, self._values(layout, dtype))
            made = layout, arrays, layout.launch.serial((1, 0, *arrays, *others))
            self._tiled[key] = made
        return made

    def _values(self, layout: Any, dtype: np.dtype[Any]) -> Array:
        """Return the values in a layout's order."""
        key = (layout, dtype.itemsize)  # the hash of a dtype is slow
        values = self._arranged.get(key)
        if values is None:
            values = self._arranged[key] = layout.arrange(self._bits, dtype)
        return values

    def backward(
        self, grad: Array, x: Array | None, *, out: MatmulGradients, threads: int | None
    ) -> None:
        """Write the gradients to `out`."""
        active = grad if self._layouts.is_full else grad[:, self.weight.active]
        work = grad.shape[0] * self._tiles_work
        with pool(threads, work) as n_threads:
            if out.x is not None:
                self._input_gradient(active, out.x, n_threads)
            if out.values is not None and x is not None:
                self._value_gradient(active, x, out.values, n_threads)
        if out.bias is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                dbias = grad.sum(axis=0, dtype=accumulator_dtype(grad.dtype))
                out.bias[...] = round_to(dbias, out.bias.dtype)

    def _input_gradient(self, grad: Array, out: Array, n_threads: int) -> None:
        dtype = accumulator_dtype(grad.dtype, self.weight.float_dtype)
        with rounded_into(out, dtype) as result:
            self._multiply_tiles(
                np.require(grad, dtype, ["C", "A"]),
                np.zeros(out.shape[1], dtype),
                self._layouts.every_input,
                result,
                ACTIVATIONS["none"].code,
                n_threads,
                of_columns=True,
            )

    def _value_gradient(self, grad: Array, x: Array, out: Array, n_threads: int) -> None:
        dtype = accumulator_dtype(grad.dtype, x.dtype, self.weight.float_dtype)
        with rounded_into(out, dtype) as result:
            arrays = (*(np.require(array, dtype, ["C", "A"]) for array in (grad, x)), result)
            if len(x) <= MOST_GATHERED:
                gathered_gradient(self.weight.indices, *arrays, n_threads=n_threads)
            else:
                layout = self._layouts.for_tiles(lanes_of(len(x), dtype.itemsize), dtype)
                value_gradient(layout, *arrays, n_threads=n_threads)


@contextmanager
def rounded_into(out: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
    """Return an array of `dtype` in C order for results, which are then rounded into `out`.

    It is `out` itself where that serves.
    """
    direct = out.dtype == dtype and out.flags.carray
    result = out if direct else np.empty(out.shape, dtype)
    yield result
    if not direct:
        out[...] = round_to(result, out.dtype)
