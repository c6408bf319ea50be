"""Base class of the layouts whose kernels process one batch row at a time, or a few."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import arranged
from srigl_core.backends.numba_cpu.results import fill_ablated, finish_row, first_column
from srigl_core.backends.numba_cpu.simd import flat

__all__ = ["RowLayout", "row_launcher"]

Array = NDArray[Any]

ROWS = 64
"""Batch rows of an item, which one thread computes."""


class RowLayout:
    """Connections of a mask in the order of one kernel, which sums groups of neurons.

    The kernel's arguments are ``(x, bias, columns, out, code, values, *arrays)``.

    Parameters
    ----------
    positions : ndarray
        Position of each of the layout's values in the condensed values, negative for padding.
    arrays : tuple of ndarray
        The kernel's other arguments that depend on the mask.
    launch : Launcher
        The kernel, from `row_launcher`.
    n_groups : int
        Number of groups of neurons.
    padding : float
        Number of values stored for each connection.
    most_rows : float
        Largest batch for which it is faster than tiles of eight; infinity for any.
    nanoseconds : float
        Estimated single-threaded time of a batch row.
    """

    name: ClassVar[str]

    def __init__(
        self,
        positions: Array,
        arrays: tuple[Array, ...],
        *,
        launch: Launcher,
        n_groups: int,
        padding: float,
        most_rows: float,
        nanoseconds: float,
    ) -> None:
        self._positions = positions
        self.arrays = arrays
        self.launch = launch
        self._n_groups = n_groups
        self.padding = padding
        self.most_rows = most_rows
        self.nanoseconds = nanoseconds

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that depend on the mask, without the condensed arrays."""
        return self._positions.nbytes + sum(array.nbytes for array in self.arrays)

    def batch_nanoseconds(self, batch: int) -> float:
        """Return the estimated single-threaded time of a batch."""
        return batch * self.nanoseconds

    def n_items(self, batch: int) -> int:
        """Return the number of items that threads share."""
        return self._n_groups * -(-batch // ROWS)

    def arrange(self, bits: Array, dtype: np.dtype[Any]) -> Array:
        """Return the values in this layout's order, for sums in `dtype`.

        Narrow values stay narrow, since memory bandwidth limits these kernels; only float64 sums
        need a conversion.
        """
        return arranged(bits, self._positions, dtype if dtype == np.float64 else bits.dtype)

    def multiply(
        self,
        values: Array,
        x: Array,
        bias: Array,
        columns: Array,
        out: Array,
        code: int,
        n_threads: int,
    ) -> None:
        """Write the product to `out`; `x` and `out` have a batch axis or none."""
        batch = 1 if x.ndim == 1 else len(x)
        arguments = (x, bias, columns, out, code, values, *self.arrays)
        self.launch(self.n_items(batch), n_threads, arguments)


def row_launcher(lanes: int, sum_rows: Any, item_rows: int = ROWS) -> Launcher:
    """Return the kernel of a layout with `lanes` neurons in a group.

    ``sum_rows(groups, rows, values, arrays, x, n_in, columns, bias, out)`` writes the sums and the
    bias of two ranges, of groups and of batch rows. Its arrays are one-dimensional. An item is one
    group of neurons for up to `item_rows` batch rows.
    """

    @kernel()
    def run(first, last, x, bias, columns, out, code, values, *arrays):
        n_in, line, offset, result = x.shape[x.ndim - 1], flat(x), flat(bias), flat(out)
        n_neurons, n_columns = columns.size, offset.size
        n_groups = (n_neurons + lanes - 1) // lanes
        for part in range(first // n_groups, (last + n_groups - 1) // n_groups):
            groups = max(first - part * n_groups, 0), min(last - part * n_groups, n_groups)
            rows = part * item_rows, min((part + 1) * item_rows, line.size // n_in)
            low, high = min(groups[0] * lanes, n_neurons), min(groups[1] * lanes, n_neurons)
            if n_neurons != n_columns:
                start = rows[0] * n_columns
                fill_ablated(result, start, rows[1] - rows[0], columns, low, high, offset)
            sum_rows(groups, rows, values, arrays, line, n_in, columns, offset, result)
            begin = first_column(low, columns, n_columns)
            end = first_column(high, columns, n_columns)
            for row in range(rows[0], rows[1]):
                finish_row(result, row * n_columns, begin, end, code)

    return Launcher(run)
