"""From the sums of a kernel to the result: bias, ablated neurons, activation (SPEC 2)."""

from __future__ import annotations

import numpy as np

from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.epilogue import activate_row
from srigl_core.backends.numba_cpu.simd import add, load, store

__all__ = ["are_side_by_side", "deliver_sums", "fill_ablated", "finish_row", "first_column"]

_WIDTH = 16


@kernel()
def first_column(row, columns, n_columns):
    """Return the first column of the result that neuron `row` owns.

    A neuron owns its own column and the columns of ablated neurons after it. The first neuron also
    owns those before it.
    """
    if row == 0:
        return np.int64(0)
    if row == columns.size:
        return np.int64(n_columns)
    return columns[row]


@kernel()
def are_side_by_side(columns, first, count):
    """Whether `count` neurons from `first` on exist, with no ablated one between them."""
    last = first + count - 1
    return last < columns.size and columns[last] - columns[first] == count - 1


@kernel()
def deliver_sums(sums, lanes, neuron, columns, bias, out, row, spare):
    """Add the bias to the sums of `lanes` neurons from `neuron` on, and write each to its column.

    The result row starts at ``out[row]``. `spare` is working memory for the vector, whose lanes are
    a multiple of 16. Lanes behind the last neuron are not written.
    """
    store(spare, np.uint64(0), sums)
    for lane in range(0, lanes, _WIDTH):
        first = neuron + lane
        if are_side_by_side(columns, first, _WIDTH):
            column = columns[first]
            total = load(spare, np.uint64(lane), _WIDTH)
            total = add(total, load(bias, np.uint64(column), _WIDTH))
            store(out, np.uint64(row + column), total)
        else:
            for i in range(first, min(first + _WIDTH, columns.size)):
                out[row + columns[i]] = spare[i - neuron] + bias[columns[i]]


@kernel()
def fill_ablated(out, start, n_rows, columns, first, last, bias):
    """Write the bias to the columns of ablated neurons that neurons `first` to `last` own.

    The result has `n_rows` rows; the first starts at ``out[start]``.
    """
    n_columns = bias.size
    at = first_column(first, columns, n_columns)
    for neuron in range(first, last + 1):
        stop = columns[neuron] if neuron < last else first_column(last, columns, n_columns)
        for column in range(at, stop):
            for row in range(n_rows):
                out[start + row * n_columns + column] = bias[column]
        at = stop + 1


@kernel()
def finish_row(out, start, first, last, code):
    """Apply the activation to columns `first` to `last` of a result row."""
    if code != 0:
        activate_row(out[start + first : start + last], code)
