"""The plain loop over neurons: the condensed format as it is, no packing.

For layers too small to be worth packing, and for inputs with NaN or infinity where a padded
layout could spread them.
"""

from __future__ import annotations

from typing import Any

from numba import prange

from srigl_core.backends.numba_cpu.calling import Direct
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.float_mode import honour_subnormals, restore_float_mode
from srigl_core.backends.numba_cpu.results import fill_ablated, finish_row, first_column
from srigl_core.backends.numba_cpu.row_layout import RowLayout
from srigl_core.backends.numba_cpu.simd import flat
from srigl_core.backends.numba_cpu.value_types import load

__all__ = ["RowSums"]


class RowSums(RowLayout):
    """The condensed arrays themselves."""

    name = "row sums"
    most_rows = 2

    def __init__(self, indices: Any) -> None:
        super().__init__(None, (indices,), padding=1.0, nanoseconds=0.5 * indices.size)


@kernel(reorder=True)
def _sum_rows(first, last, values, indices, x, n_in, bias, columns, out, code):
    fan_in, n_columns = indices.shape[1], bias.size
    begin = first_column(first, columns, n_columns)
    end = first_column(last, columns, n_columns)
    if columns.size != n_columns:
        fill_ablated(out, 0, x.size // n_in, columns, first, last, bias)
    for b in range(x.size // n_in):
        row = b * n_columns
        for i in range(first, last):
            total = x.dtype.type(0)
            for j in range(fan_in):
                total += load(values[i, j]) * x[b * n_in + indices[i, j]]
            out[row + columns[i]] = total + bias[columns[i]]
        finish_row(out, row, begin, end, code)


@kernel()
def _serial(values, indices, x, bias, columns, out, code):
    mode = honour_subnormals()
    n_in = x.shape[x.ndim - 1]
    _sum_rows(0, columns.size, values, indices, flat(x), n_in, flat(bias), columns, flat(out), code)
    restore_float_mode(mode)
    return True


@kernel(parallel=True)
def _parallel(n, values, indices, x, bias, columns, out, code):
    n_in = x.shape[x.ndim - 1]
    line, offset, result = flat(x), flat(bias), flat(out)
    for t in prange(n):
        mode = honour_subnormals()
        first, last = columns.size * t // n, columns.size * (t + 1) // n
        _sum_rows(first, last, values, indices, line, n_in, offset, columns, result, code)
        restore_float_mode(mode)
    return True


RowSums.serial, RowSums.parallel = Direct(_serial), Direct(_parallel)
