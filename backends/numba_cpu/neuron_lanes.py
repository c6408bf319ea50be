"""Small batches on any processor: one neuron in each lane of a vector.

Layout: a group has as many neurons as a vector has lanes. Step j of a group holds connection j of
each of its neurons, (groups, k, lanes). With constant fan-in all lanes end together, so that only
the last group may need padding. Each step loads the lanes' inputs one by one, which is faster than
the gather instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty, position_dtype
from srigl_core.backends.numba_cpu.results import (
    are_side_by_side,
    fill_ablated,
    finish_row,
    first_column,
    scatter_sums,
)
from srigl_core.backends.numba_cpu.row_layout import RowLayout
from srigl_core.backends.numba_cpu.simd import add, flat, fma, gather, load, store, zeros

__all__ = ["LANES", "NeuronLanes"]

LANES = 16


class NeuronLanes(RowLayout):
    """Connections, interleaved by neuron."""

    name = "neuron lanes"
    most_rows = 2

    def __init__(self, indices: Any) -> None:
        n_rows, fan_in = indices.shape
        n_groups = -(-n_rows // LANES)
        rows = np.minimum(np.arange(n_groups * LANES), n_rows - 1).reshape(n_groups, 1, LANES)
        positions = (rows * fan_in + np.arange(fan_in)[:, None]).ravel()
        positions = positions.astype(position_dtype(indices.size))
        columns = aligned_empty(positions.size, indices.dtype)
        columns[:] = indices.ravel()[positions]
        super().__init__(
            positions,
            (columns,),
            n_items=n_groups,
            padding=positions.size / indices.size,
            nanoseconds=0.18 * positions.size,
        )


@kernel()
def _compute(first, last, values, indices, x, bias, columns, out, code):
    n_in, rows, offset, result = x.shape[x.ndim - 1], flat(x), flat(bias), flat(out)
    lanes, n_neurons, n_columns = np.uint64(LANES), columns.size, offset.size
    step = np.uint64(values.size // ((n_neurons + LANES - 1) // LANES))
    low, high = min(first * LANES, n_neurons), min(last * LANES, n_neurons)
    begin, end = first_column(low, columns, n_columns), first_column(high, columns, n_columns)
    spare = np.empty(LANES, rows.dtype)
    if n_neurons != n_columns:
        fill_ablated(result, 0, rows.size // n_in, columns, low, high, offset)
    for b in range(rows.size // n_in):
        row, inputs = b * n_columns, rows[b * n_in : (b + 1) * n_in]
        for group in range(first, last):
            even, odd = zeros(rows, LANES), zeros(rows, LANES)
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
                total = add(total, load(offset, np.uint64(column), LANES))
                store(result, np.uint64(row + column), total)
            else:
                scatter_sums(total, LANES, neuron, columns, offset, result, row, spare)
        finish_row(result, row, begin, end, code)
    return True


@kernel()
def _add_step(values, indices, at, inputs, total):
    return fma(load(values, at, LANES), gather(inputs, indices, at, LANES), total)


NeuronLanes.launch = Launcher(_compute)
