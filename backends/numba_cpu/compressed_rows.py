"""Which inputs each output sums, in the two directions that a product is taken (SPEC 2)."""

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
    """The rows of a sparse matrix, as compressed rows whose values lie in a condensed weight.

    Parameters
    ----------
    n_inputs : int
        Number of columns.
    starts : ndarray of int64, (n_rows + 1,)
        Row r has the connections ``starts[r]`` to ``starts[r + 1]``.
    columns : ndarray of integers, (nnz,)
        Ascending within a row.
    entries : ndarray of int32 or int64, (nnz,)
        Where each value lies in ``values.ravel()``.
    """

    n_inputs: int
    starts: NDArray[np.int64]
    columns: Array
    entries: Array

    @classmethod
    def of_neurons(cls, indices: Array, n_in: int) -> CompressedRows:
        """Return a row for each active neuron: what the forward product sums."""
        n_active, fan_in = indices.shape
        entries = np.arange(indices.size, dtype=position_dtype(indices.size))
        return cls(n_in, np.arange(n_active + 1) * fan_in, indices.ravel(), entries)

    @classmethod
    def of_columns(cls, indices: Array, n_in: int) -> CompressedRows:
        """Return a row for each input, of active neurons: what the gradient of x sums."""
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
        """Connections as a share of all possible ones."""
        return self.columns.size / max(1, self.n_rows * self.n_inputs)


def position_dtype(nnz: int) -> type[np.signedinteger[Any]]:
    """Return the type of positions among `nnz` values: as few bytes as will do."""
    return np.int32 if nnz <= np.iinfo(np.int32).max else np.int64


def aligned_empty(size: int, dtype: Any) -> Array:
    """Return an uninitialised one-dimensional array that starts on a cache line."""
    kind = np.dtype(dtype)
    memory = np.empty(size * kind.itemsize + _ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % _ALIGNMENT
    return memory[skip : skip + size * kind.itemsize].view(kind)


def arranged(bits: Array, positions: Array, kind: np.dtype[Any]) -> Array:
    """Return the values at `positions`, 0 where that is negative, on a cache line.

    Parameters
    ----------
    bits : ndarray, (n_active, k)
        As `as_bits` gives them.
    positions : ndarray of int32 or int64
        In ``bits.ravel()``.
    kind : numpy.dtype
        That of `bits`, or a float type to convert them to.
    """
    values = aligned_empty(positions.size, kind)
    (_arrange if kind == bits.dtype else _arrange_converted)(bits.ravel(), positions, values)
    return values


@kernel()
def _arrange(bits, positions, values):
    for i in range(positions.size):
        values[i] = bits[positions[i]] if positions[i] >= 0 else 0


@kernel()
def _arrange_converted(bits, positions, values):
    for i in range(positions.size):
        values[i] = load(bits[positions[i]]) if positions[i] >= 0 else 0
