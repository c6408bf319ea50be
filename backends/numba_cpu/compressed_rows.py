"""The inputs that each output sums, in the forward and the backward direction (SPEC 2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.value_types import load

__all__ = ["CompressedRows", "aligned_empty", "arranged", "position_dtype"]

Array = NDArray[Any]
_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class CompressedRows:
    """The rows of a sparse matrix whose values are those of a condensed weight.

    Parameters
    ----------
    n_inputs : int
        Number of columns.
    starts : ndarray of int64, (n_rows + 1,)
        Row r has the connections ``range(starts[r], starts[r + 1])``.
    columns : ndarray of integers, (nnz,)
        Ascending within a row.
    entries : ndarray of int32 or int64, (nnz,)
        Position of each value in ``values.ravel()``.
    """

    n_inputs: int
    starts: NDArray[np.int64]
    columns: Array
    entries: Array

    @classmethod
    def of_neurons(cls, indices: Array, n_in: int) -> CompressedRows:
        """Return one row for each active neuron: the sums of the forward product."""
        n_active, fan_in = indices.shape
        entries = np.arange(indices.size, dtype=position_dtype(indices.size))
        return cls(n_in, np.arange(n_active + 1) * fan_in, indices.ravel(), entries)

    @classmethod
    def of_columns(cls, indices: Array, n_in: int) -> CompressedRows:
        """Return one row of active neurons for each input: the sums of the gradient of x."""
        n_active, fan_in = indices.shape
        columns = indices.ravel()
        entries = np.argsort(columns, kind="stable").astype(position_dtype(indices.size))
        degrees = np.bincount(columns, minlength=n_in)
        starts = np.concatenate([[0], np.cumsum(degrees)])
        return cls(n_active, starts, entries // fan_in, entries)

    @property
    def n_rows(self) -> int:
        """Number of sums."""
        return self.starts.size - 1

    @cached_property
    def density(self) -> float:
        """Share of the possible connections that exist."""
        return self.columns.size / max(1, self.n_rows * self.n_inputs)


def position_dtype(nnz: int) -> type[np.signedinteger[Any]]:
    """Return the smallest dtype for positions among `nnz` values."""
    return np.int32 if nnz <= np.iinfo(np.int32).max else np.int64


def aligned_empty(size: int, dtype: Any) -> Array:
    """Return an uninitialised one-dimensional array that is aligned to a cache line."""
    dtype = np.dtype(dtype)
    memory = np.empty(size * dtype.itemsize + _ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % _ALIGNMENT
    return memory[skip : skip + size * dtype.itemsize].view(dtype)


def arranged(bits: Array, positions: Array, dtype: np.dtype[Any]) -> Array:
    """Return the values at `positions`, and 0 at negative ones, aligned to a cache line.

    Parameters
    ----------
    bits : ndarray, (n_active, k)
        Values, from `as_bits`.
    positions : ndarray of int32 or int64
        Positions in ``bits.ravel()``.
    dtype : numpy.dtype
        The dtype of `bits`, or a float dtype to convert to.
    """
    values = aligned_empty(positions.size, dtype)
    (_arrange if dtype == bits.dtype else _arrange_converted)(bits.ravel(), positions, values)
    return values


@kernel()
def _arrange(bits, positions, values):
    for i in range(positions.size):
        values[i] = bits[positions[i]] if positions[i] >= 0 else 0


@kernel()
def _arrange_converted(bits, positions, values):
    for i in range(positions.size):
        values[i] = load(bits[positions[i]]) if positions[i] >= 0 else 0
