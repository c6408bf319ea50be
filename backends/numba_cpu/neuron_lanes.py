"""Small batches on any processor: one neuron in each lane of a vector.

Layout: groups of as many neurons as a vector has lanes; step j of a group holds connection j of
each of them, (groups, k, lanes). Constant fan-in makes all lanes end together, so there is no
padding but for neurons that fill up the last group. Each step loads the lanes' inputs one by one:
the gather instructions are slower than that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from srigl_core.backends.numba_cpu.calling import Direct
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.connections import aligned_empty
from srigl_core.backends.numba_cpu.float_mode import honour_subnormals, restore_float_mode
from srigl_core.backends.numba_cpu.results import (
    are_side_by_side,
    fill_ablated,
    finish_row,
    first_column,
)
from srigl_core.backends.numba_cpu.row_layout import RowLayout
from srigl_core.backends.numba_cpu.simd import add, flat, fma, gather, load, store, zeros

__all__ = ["NeuronLanes"]

LANES = 16


class NeuronLanes(RowLayout):
    """Connections interleaved by neuron."""

    name = "neuron lanes"
    most_rows = 2

    def __init__(self, indices: Any) -> None:
        n_rows, fan_in = indices.shape
        n_groups = -(-n_rows // LANES)
        rows = np.minimum(np.arange(n_groups * LANES), n_rows - 1).reshape(n_groups, 1, LANES)
        positions = (rows * fan_in + np.arange(fan_in)[:, None]).ravel()
        columns = aligned_empty(positions.size, indices.dtype)
        columns[:] = indices.ravel()[positions]
        super().__init__(
            positions,
            (columns,),
            padding=positions.size / indices.size,
            nanoseconds=0.18 * positions.size,
        )


@kernel()
def _sum_groups(first, last, values, indices, x, n_in, bias, columns, out, code):
    lanes = np.uint64(LANES)
    n_rows, n_columns = columns.size, bias.size
    step = np.uint64(values.size // ((n_rows + LANES - 1) // LANES))
    begin = first_column(min(first * LANES, n_rows), columns, n_columns)
    end = first_column(min(last * LANES, n_rows), columns, n_columns)
    lane_sums = np.empty(LANES, x.dtype)
    if n_rows != n_columns:
        neurons = min(first * LANES, n_rows), min(last * LANES, n_rows)
        fill_ablated(out, 0, x.size // n_in, columns, neurons[0], neurons[1], bias)
    for b in range(x.size // n_in):
        row = b * n_columns
        inputs = x[b * n_in : (b + 1) * n_in]
        for group in range(first, last):
            even, odd = zeros(x, LANES), zeros(x, LANES)
            at, stop = np.uint64(group) * step, np.uint64(group + 1) * step
            while at + lanes < stop:
                even = _add_step(values, indices, at, inputs, even)
                odd = _add_step(values, indices, at + lanes, inputs, odd)
                at += lanes + lanes
            if at < stop:
                even = _add_step(values, indices, at, inputs, even)
            total, neuron = add(even, odd), group * LANES
            if are_side_by_side(columns, neuron, LANES):
                column = columns[neuron]
                total = add(total, load(bias, np.uint64(column), LANES))
                store(out, np.uint64(row + column), total)
            else:
                store(lane_sums, np.uint64(0), total)
                for i in range(neuron, min(neuron + LANES, n_rows)):
                    out[row + columns[i]] = lane_sums[i - neuron] + bias[columns[i]]
        finish_row(out, row, begin, end, code)


@kernel()
def _add_step(values, indices, at, inputs, total):
    return fma(load(values, at, LANES), gather(inputs, indices, at, LANES), total)


@kernel()
def _serial(values, indices, x, bias, columns, out, code):
    mode = honour_subnormals()
    n_in = x.shape[x.ndim - 1]
    groups = (columns.size + LANES - 1) // LANES
    _sum_groups(0, groups, values, indices, flat(x), n_in, flat(bias), columns, flat(out), code)
    restore_float_mode(mode)
    return True


@kernel(parallel=True)
def _parallel(n, values, indices, x, bias, columns, out, code):
    n_in = x.shape[x.ndim - 1]
    line, offset, result = flat(x), flat(bias), flat(out)
    groups = (columns.size + LANES - 1) // LANES
    for t in prange(n):
        mode = honour_subnormals()
        first, last = groups * t // n, groups * (t + 1) // n
        _sum_groups(first, last, values, indices, line, n_in, offset, columns, result, code)
        restore_float_mode(mode)
    return True


NeuronLanes.serial, NeuronLanes.parallel = Direct(_serial), Direct(_parallel)
