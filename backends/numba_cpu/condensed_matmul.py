"""The product with a condensed weight, and its gradients, as CPU kernels (SPEC 2).

Layouts. Values and indices are (n_active, k) as in the format; 16-bit values are read through
`load`. Small batches read x as it is, (batch, n_in), and sum one neuron at a time. Larger ones
stage x feature-major in tiles of `width` batch rows, (tiles, n_in, width), so that each connection
is one vector times one weight. Gradients of x run the same way through the transposed index,
gradients of the values as dot products along the batch.

A kernel is a function over a range of items, and a twin that hands ranges to the pool. An item's
sum is one thread's, in an order that does not depend on the ranges: same bits for any number of
threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.compiling import frozen, kernel
from srigl_core.backends.numba_cpu.epilogue import activate, activation_code
from srigl_core.backends.numba_cpu.float_mode import honour_subnormals, restore_float_mode
from srigl_core.backends.numba_cpu.threads import pool
from srigl_core.backends.numba_cpu.value_types import as_bits, load
from srigl_core.condensed_weight import CondensedWeight
from srigl_core.contract import MatmulGradients
from srigl_core.value_types import accumulator_dtype, round_to

__all__ = ["NumbaPrepared", "TransposedIndex", "cache_directory"]

Array = NDArray[Any]

SMALL_BATCH = 8
"""Batch rows from which x is staged in tiles."""

ROWS_PER_ITEM = 32
"""Neurons, or columns, of one tile that a thread takes at once."""


class TransposedIndex:
    """For each column its connections: which active row, and where the value lies.

    Built once for a mask, when a gradient of x is first asked for.

    Attributes
    ----------
    starts : ndarray of int64, (n_in + 1,)
        Column c has the connections ``starts[c]`` to ``starts[c + 1]``.
    entries : ndarray of int64, (nnz,)
        Positions in ``values.ravel()``, ascending within a column.
    rows : ndarray of int64, (nnz,)
        Positions in `active`.
    """

    __slots__ = ("entries", "rows", "starts")

    def __init__(self, weight: CondensedWeight) -> None:
        columns = weight.indices.ravel()
        self.entries = np.argsort(columns, kind="stable")
        self.rows = self.entries // weight.fan_in
        degrees = np.bincount(columns, minlength=weight.shape[1])
        self.starts = np.concatenate([[0], np.cumsum(degrees)])

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.entries.nbytes + self.rows.nbytes + self.starts.nbytes


class _Connections:
    """What depends on the mask only, and is shared by all values on it."""

    __slots__ = ("_transposed", "ablated", "compact_targets", "weight")

    def __init__(self, weight: CondensedWeight) -> None:
        self.weight = weight
        self.ablated = weight.ablated
        self.compact_targets = frozen(np.arange(weight.n_active))
        self._transposed: TransposedIndex | None = None

    def transposed(self) -> TransposedIndex:
        if self._transposed is None:
            self._transposed = TransposedIndex(self.weight)
        return self._transposed

    @property
    def nbytes(self) -> int:
        own = self.ablated.nbytes + self.compact_targets.nbytes
        return own + (self._transposed.nbytes if self._transposed else 0)


class NumbaPrepared:
    """A condensed weight in this backend's layout."""

    __slots__ = ("_bits", "_connections", "weight")

    def __init__(self, weight: CondensedWeight, connections: _Connections | None = None) -> None:
        self.weight = weight
        self._bits = as_bits(weight.values)
        self._connections = connections or _Connections(weight)

    def describe(self) -> dict[str, object]:
        """Return kernels, layout and bytes beside the weight's own."""
        return {
            "kernel": f"row sums below batch {SMALL_BATCH}, feature-major tiles from there",
            "layout": "condensed",
            "bytes": self._connections.nbytes,
        }

    def with_values(self, weight: CondensedWeight) -> NumbaPrepared:
        """Return the same for other values, sharing all that depends on the mask."""
        return NumbaPrepared(weight, self._connections)

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
        kind = accumulator_dtype(x.dtype, weight.dtype)
        direct = out.dtype == kind and out.flags.carray
        result = out if direct else np.empty(out.shape, kind)
        targets = self._connections.compact_targets if compact else weight.active
        offset = np.zeros(weight.shape[0], kind) if bias is None else bias.astype(kind)
        code = activation_code(activation)
        if not compact and self._connections.ablated.size:
            _write_constants(result, offset, self._connections.ablated, code)
        arrays = (self._bits, weight.indices, offset[weight.active], targets, result, code)
        with pool(threads, x.shape[0] * weight.nnz) as n_threads:
            if x.shape[0] < SMALL_BATCH:
                _launch(
                    _row_sums,
                    _row_sums_parallel,
                    -(-weight.n_active // ROWS_PER_ITEM),
                    n_threads,
                    frozen(np.require(x, kind, ["C", "A"])),
                    *arrays,
                )
            else:
                staged = _staged(x, kind, _tile_width(x.shape[0]))
                _launch(
                    _tile_sums,
                    _tile_sums_parallel,
                    staged.shape[0] * -(-weight.n_active // ROWS_PER_ITEM),
                    n_threads,
                    staged,
                    *arrays,
                )
        if not direct:
            out[...] = round_to(result, out.dtype)

    def backward(
        self, grad: Array, x: Array | None, *, out: MatmulGradients, threads: int | None
    ) -> None:
        """Write the gradients to `out`."""
        with pool(threads, grad.shape[0] * self.weight.nnz) as n_threads:
            if out.x is not None:
                out.x[...] = round_to(self._input_gradient(grad, n_threads), out.x.dtype)
            if out.values is not None and x is not None:
                dvalues = self._value_gradient(grad, x, n_threads)
                out.values[...] = round_to(dvalues, out.values.dtype)
        if out.bias is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                dbias = grad.sum(axis=0, dtype=accumulator_dtype(grad.dtype))
                out.bias[...] = round_to(dbias, out.bias.dtype)

    def _input_gradient(self, grad: Array, n_threads: int) -> Array:
        kind = accumulator_dtype(grad.dtype, self.weight.dtype)
        staged = _staged(grad[:, self.weight.active], kind, _tile_width(grad.shape[0]))
        transposed = self._connections.transposed()
        n_in = self.weight.shape[1]
        dx = np.empty((grad.shape[0], n_in), kind)
        _launch(
            _column_sums,
            _column_sums_parallel,
            staged.shape[0] * -(-n_in // ROWS_PER_ITEM),
            n_threads,
            staged,
            self._bits.ravel(),
            transposed.starts,
            transposed.entries,
            transposed.rows,
            dx,
        )
        return dx

    def _value_gradient(self, grad: Array, x: Array, n_threads: int) -> Array:
        weight = self.weight
        kind = accumulator_dtype(grad.dtype, x.dtype, weight.dtype)
        dvalues = np.empty(weight.values.shape, kind)
        _launch(
            _batch_sums,
            _batch_sums_parallel,
            -(-weight.n_active // ROWS_PER_ITEM),
            n_threads,
            _staged(grad[:, weight.active], kind, grad.shape[0])[0],
            _staged(x, kind, x.shape[0])[0],
            weight.indices,
            dvalues,
        )
        return dvalues


def _launch(serial: Any, parallel: Any, n_items: int, n_threads: int, *arrays: Any) -> None:
    if n_threads == 1:
        serial(0, n_items, *arrays)
    else:
        parallel(n_threads, n_items, *arrays)


def _tile_width(batch: int) -> int:
    return 8 if batch <= 16 else 32


def _staged(x: Array, kind: np.dtype[Any], width: int) -> Array:
    """Return x feature-major in tiles of `width` batch rows, (tiles, features, width).

    Rows past the end of the batch are 0.
    """
    batch, features = x.shape
    tiles = np.zeros((-(-batch // width), features, width), kind)
    whole = batch // width * width
    wide = x if x.dtype.itemsize != 2 else x.astype(np.float32)
    if whole:
        tiles[: whole // width] = wide[:whole].reshape(-1, width, features).transpose(0, 2, 1)
    if whole < batch:
        tiles[-1, :, : batch - whole] = wide[whole:].T
    return frozen(tiles)


def cache_directory() -> str | None:
    """Return where the kernels' compiled code is kept, or None if nowhere."""
    path: str | None = getattr(_row_sums._cache, "cache_path", None)
    return path


@kernel()
def _write_constants(out, offset, rows, code):
    """Give ablated neurons the constant act(bias)."""
    for row in rows:
        constant = activate(offset[row], code)
        for b in range(out.shape[0]):
            out[b, row] = constant


@kernel(reorder=True)
def _row_sums(first, last, x, values, indices, offset, targets, out, code):
    n_active, fan_in = values.shape
    for i in range(first * ROWS_PER_ITEM, min(last * ROWS_PER_ITEM, n_active)):
        for b in range(x.shape[0]):
            total = x.dtype.type(0)
            for j in range(fan_in):
                total += load(values[i, j]) * x[b, indices[i, j]]
            out[b, targets[i]] = activate(total + offset[i], code)


@kernel(parallel=True)
def _row_sums_parallel(n, items, x, values, indices, offset, targets, out, code):
    for t in prange(n):
        mode = honour_subnormals()
        _row_sums(
            items * t // n, items * (t + 1) // n, x, values, indices, offset, targets, out, code
        )
        restore_float_mode(mode)


@kernel()
def _tile_sums(first, last, x, values, indices, offset, targets, out, code):
    n_active, fan_in = values.shape
    width = x.shape[2]
    blocks = (n_active + ROWS_PER_ITEM - 1) // ROWS_PER_ITEM
    sums = np.empty(width, x.dtype)
    for item in range(first, last):
        tile, block = divmod(item, blocks)
        batch_rows = min(width, out.shape[0] - tile * width)
        for i in range(block * ROWS_PER_ITEM, min((block + 1) * ROWS_PER_ITEM, n_active)):
            sums[:] = offset[i]
            for j in range(fan_in):
                value = x.dtype.type(load(values[i, j]))
                features = x[tile, indices[i, j]]
                for lane in range(width):
                    sums[lane] += value * features[lane]
            for lane in range(batch_rows):
                out[tile * width + lane, targets[i]] = activate(sums[lane], code)


@kernel(parallel=True)
def _tile_sums_parallel(n, items, x, values, indices, offset, targets, out, code):
    for t in prange(n):
        mode = honour_subnormals()
        _tile_sums(
            items * t // n, items * (t + 1) // n, x, values, indices, offset, targets, out, code
        )
        restore_float_mode(mode)


@kernel()
def _column_sums(first, last, grad, values, starts, entries, rows, dx):
    batch, n_in = dx.shape
    width = grad.shape[2]
    blocks = (n_in + ROWS_PER_ITEM - 1) // ROWS_PER_ITEM
    sums = np.empty(width, grad.dtype)
    for item in range(first, last):
        tile, block = divmod(item, blocks)
        batch_rows = min(width, batch - tile * width)
        for column in range(block * ROWS_PER_ITEM, min((block + 1) * ROWS_PER_ITEM, n_in)):
            sums[:] = 0
            for e in range(starts[column], starts[column + 1]):
                value = grad.dtype.type(load(values[entries[e]]))
                gradients = grad[tile, rows[e]]
                for lane in range(width):
                    sums[lane] += value * gradients[lane]
            for lane in range(batch_rows):
                dx[tile * width + lane, column] = sums[lane]


@kernel(parallel=True)
def _column_sums_parallel(n, items, grad, values, starts, entries, rows, dx):
    for t in prange(n):
        mode = honour_subnormals()
        _column_sums(items * t // n, items * (t + 1) // n, grad, values, starts, entries, rows, dx)
        restore_float_mode(mode)


@kernel(reorder=True)
def _batch_sums(first, last, grad, x, indices, dvalues):
    n_active, fan_in = dvalues.shape
    for i in range(first * ROWS_PER_ITEM, min(last * ROWS_PER_ITEM, n_active)):
        for j in range(fan_in):
            column = indices[i, j]
            total = dvalues.dtype.type(0)
            for b in range(grad.shape[1]):
                total += grad[i, b] * x[column, b]
            dvalues[i, j] = total


@kernel(parallel=True)
def _batch_sums_parallel(n, items, grad, x, indices, dvalues):
    for t in prange(n):
        mode = honour_subnormals()
        _batch_sums(items * t // n, items * (t + 1) // n, grad, x, indices, dvalues)
        restore_float_mode(mode)
