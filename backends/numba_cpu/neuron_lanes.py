"""Single rows on any processor, and layers of few neurons: one neuron in each lane of a vector.

Layout: a group has as many neurons as a vector has lanes. Step j of a group holds connection j of
each of its neurons, (groups, k, lanes). With constant fan-in all lanes end together, so that only
the last group may need padding: it repeats the last neuron. Each step loads the lanes' inputs one
by one, which is faster than the gather instructions. Four batch rows at a time share the indices.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from srigl_core.backends.numba_cpu.calling import Launcher, uncounted
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty, position_dtype
from srigl_core.backends.numba_cpu.processor import vector_bytes
from srigl_core.backends.numba_cpu.results import deliverer
from srigl_core.backends.numba_cpu.row_layout import RowLayout, row_launcher
from srigl_core.backends.numba_cpu.scratch import registers
from srigl_core.backends.numba_cpu.simd import fma, gather, load, zeros

__all__ = ["NeuronLanes"]

NANOSECONDS = 0.18
"""Measured time of a connection of one batch row."""

MOST_ROWS = 1 if vector_bytes() >= 32 else 2
"""Largest batch for which this is faster than tiles, whose rows fill a register of 32 bytes."""


class NeuronLanes(RowLayout):
    """Connections, interleaved by neuron."""

    name = "neuron lanes"

    def __init__(self, indices: Any, most_rows: float) -> None:
        n_rows, fan_in = indices.shape
        lanes = lanes_of(n_rows)
        n_groups = -(-n_rows // lanes)
        rows = np.minimum(np.arange(n_groups * lanes), n_rows - 1).reshape(n_groups, 1, lanes)
        positions = (rows * fan_in + np.arange(fan_in)[:, None]).ravel()
        positions = positions.astype(position_dtype(indices.size))
        columns = aligned_empty(positions.size, indices.dtype)
        columns[:] = indices.ravel()[positions]
        super().__init__(
            positions,
            (columns,),
            launch=_launcher(lanes),
            n_groups=n_groups,
            padding=positions.size / indices.size,
            most_rows=most_rows if most_rows == np.inf else MOST_ROWS,
            nanoseconds=self.estimate(n_rows, fan_in),
        )

    @staticmethod
    def estimate(n_neurons: int, fan_in: int) -> float:
        """Return the estimated nanoseconds of a batch row."""
        lanes = lanes_of(n_neurons)
        return NANOSECONDS * fan_in * lanes * -(-n_neurons // lanes)


def lanes_of(n_neurons: int) -> int:
    """Return the lanes of a group: 16, or fewer if all neurons fit in them."""
    return 4 if n_neurons <= 4 else 8 if n_neurons <= 8 else 16


@functools.cache
def _launcher(lanes: int) -> Launcher:
    width = np.uint64(lanes)
    deliver = deliverer(lanes)

    @kernel()
    def sum_row(first, last, values, indices, x):
        """Return the sums of a group, whose values begin and end at `first` and `last`."""
        total = zeros(x, lanes)
        for at in range(first, last, width):
            total = fma(load(values, at, lanes), gather(x, indices, at, lanes), total)
        return total

    @kernel()
    def sum_four_rows(first, last, values, indices, a, b, c, d):
        """Return the sums of a group for four inputs."""
        of_a, of_b, of_c, of_d = zeros(a, lanes), zeros(a, lanes), zeros(a, lanes), zeros(a, lanes)
        for at in range(first, last, width):
            weights = load(values, at, lanes)
            of_a = fma(weights, gather(a, indices, at, lanes), of_a)
            of_b = fma(weights, gather(b, indices, at, lanes), of_b)
            of_c = fma(weights, gather(c, indices, at, lanes), of_c)
            of_d = fma(weights, gather(d, indices, at, lanes), of_d)
        return of_a, of_b, of_c, of_d

    @kernel()
    def sum_rows(groups, rows, values, arrays, x, n_in, columns, bias, out):
        (indices,) = arrays
        n_columns, spare = bias.size, registers(lanes, x)
        size = values.size // ((columns.size + lanes - 1) // lanes)
        row = rows[0]
        while row < rows[1]:
            n_rows = 4 if row + 4 <= rows[1] else 1
            a = uncounted(x[row * n_in : (row + 1) * n_in])
            b = uncounted(x[(row + 1) * n_in : (row + 2) * n_in])
            c = uncounted(x[(row + 2) * n_in : (row + 3) * n_in])
            d = uncounted(x[(row + 3) * n_in : (row + 4) * n_in])
            for group in range(groups[0], groups[1]):
                neuron, place = group * lanes, row * n_columns
                first, last = np.uint64(group * size), np.uint64((group + 1) * size)
                if n_rows == 4:
                    sums = sum_four_rows(first, last, values, indices, a, b, c, d)
                    for total in sums:
                        deliver(total, neuron, columns, bias, out, place, spare)
                        place += n_columns
                else:
                    total = sum_row(first, last, values, indices, a)
                    deliver(total, neuron, columns, bias, out, place, spare)
            row += n_rows

    return row_launcher(lanes, sum_rows)
