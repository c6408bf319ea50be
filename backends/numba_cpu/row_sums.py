"""The plain loop over neurons, on the condensed arrays themselves.

It is for layers that are too small to be worth packing. It also recomputes products with NaN or
infinity, which a padded layout could spread to other neurons.
"""

from __future__ import annotations

from typing import Any

from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.results import fill_ablated, finish_row, first_column
from srigl_core.backends.numba_cpu.row_layout import RowLayout
from srigl_core.backends.numba_cpu.simd import flat
from srigl_core.backends.numba_cpu.value_types import load

__all__ = ["RowSums"]


class RowSums(RowLayout):
    """The condensed arrays, without packing."""

    name = "row sums"
    most_rows = 2

    def __init__(self, indices: Any) -> None:
        super().__init__(
            None, (indices,), n_items=len(indices), padding=1.0, nanoseconds=0.5 * indices.size
        )


@kernel(reorder=True)
def _sum_rows(first, last, values, indices, x, bias, columns, out, code):
    n_in, line, offset, result = x.shape[x.ndim - 1], flat(x), flat(bias), flat(out)
    fan_in, n_columns = indices.shape[1], offset.size
    begin = first_column(first, columns, n_columns)
    end = first_column(last, columns, n_columns)
    if columns.size != n_columns:
        fill_ablated(result, 0, line.size // n_in, columns, first, last, offset)
    for b in range(line.size // n_in):
        row = b * n_columns
        for i in range(first, last):
            total = line.dtype.type(0)
            for j in range(fan_in):
                total += load(values[i, j]) * line[b * n_in + indices[i, j]]
            result[row + columns[i]] = total + offset[columns[i]]
        finish_row(result, row, begin, end, code)
    return True


RowSums.launch = Launcher(_sum_rows)
