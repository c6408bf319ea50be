"""From the sums of a kernel to the result: scales, bias, ablated neurons, activation (SPEC 2)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.epilogue import activate_row
from srigl_core.backends.numba_cpu.quantization import int8_product
from srigl_core.backends.numba_cpu.simd import add, load, store

__all__ = [
    "are_side_by_side",
    "deliverer",
    "fill_ablated",
    "finish_row",
    "first_column",
]

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


@kernel(inline=True)
def are_side_by_side(columns, first, count):
    """Whether `count` neurons from `first` on exist, with no ablated one between them."""
    last = first + count - 1
    return last < columns.size and columns[last] - columns[first] == count - 1


@functools.cache
def deliverer(lanes: int) -> Any:
    """Return the kernel that delivers the sums of `lanes` neurons."""

    @kernel(inline=True)
    def deliver(sums, neuron, columns, bias, out, row, spare):
        """Add the bias to the sums of neurons from `neuron` on, and write each to its column.

        The result row starts at ``out[row]``. `spare` is working memory for the vector. Lanes
        behind the last neuron are not written.
        """
        if are_side_by_side(columns, neuron, lanes):
            column = np.uint64(columns[neuron])
            store(out, np.uint64(row) + column, add(sums, load(bias, column, lanes)))
        else:
            _deliver_with_gaps(sums, lanes, neuron, columns, bias, out, row, spare)

    return deliver


@kernel()
def _deliver_with_gaps(sums, lanes, neuron, columns, bias, out, row, spare):
    """Deliver sixteen sums at a time, or one by one if ablated neurons lie between them."""
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


def finish_row(out, start, first, last, code):
    """Finish the sums in columns `first` to `last` of the result row that starts at ``out[start]``.

    For a weight of floats the sums have their bias, and `code` is that of the activation. For a
    quantised weight `code` is a tuple, and the sums have no bias yet: (code, scale, bias), or
    (code, scale, bias, s) if the inputs are quantised too. `scale` and `bias` have a number for
    each column, and `s` one for each row. The scale of an ablated neuron is 0.
    """
    raise NotImplementedError  # Numba compiles one of the three below, by the type of `code`


@overload(finish_row)
def _finish_row_of_type(out, start, first, last, code):
    if not isinstance(code, types.BaseTuple):
        return _finish_floats
    return _finish_weight_only if len(code) == 3 else _finish_int8


def _finish_floats(out, start, first, last, code):
    if code != 0:
        activate_row(out[start + first : start + last], code)


def _finish_weight_only(out, start, first, last, code):
    activation, scale, bias = code
    _scale_sums(out[start + first : start + last], scale[first:last], bias[first:last])
    finish_row(out, start, first, last, activation)


def _finish_int8(out, start, first, last, code):
    activation, scale, bias, s = code
    of_row = s[start // scale.size]
    _scale_integers(out[start + first : start + last], scale[first:last], bias[first:last], of_row)
    finish_row(out, start, first, last, activation)


@kernel()
def _scale_sums(row, scale, bias):
    for i in range(row.size):
        row[i] = row[i] * scale[i] + bias[i]


@kernel(exact=True)
def _scale_integers(row, scale, bias, s):
    for i in range(row.size):
        v = int8_product(row[i], scale[i], s) if scale[i] != 0 else np.float32(-0.0)
        row[i] = v + bias[i]
