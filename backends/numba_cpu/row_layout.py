"""Base class of the layouts whose kernels process the rows of a batch one by one."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compressed_rows import arranged

__all__ = ["RowLayout"]

Array = NDArray[Any]


class RowLayout:
    """Connections of a mask in the order of one kernel.

    The kernel's arguments are ``(values, *arrays, x, bias, columns, out, code)``.

    Parameters
    ----------
    positions : ndarray or None
        Position of each of the layout's values in the condensed values, negative for padding. None
        if the kernel reads the condensed values.
    arrays : tuple of ndarray
        The kernel's other arguments that depend on the mask.
    n_items : int
        Number of neurons, or groups of neurons, that threads share.
    padding : float
        Number of values stored for each connection.
    nanoseconds : float
        Estimated single-threaded time of a batch row.
    """

    name: ClassVar[str]
    most_rows: ClassVar[int]  # the largest batch for which it is faster than tiles of eight
    launch: ClassVar[Launcher]

    def __init__(
        self,
        positions: Array | None,
        arrays: tuple[Array, ...],
        *,
        n_items: int,
        padding: float,
        nanoseconds: float,
    ) -> None:
        self._positions = positions
        self.arrays = arrays
        self.n_items = n_items
        self.padding = padding
        self.nanoseconds = nanoseconds

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that depend on the mask, without the condensed arrays."""
        if self._positions is None:
            return 0
        return self._positions.nbytes + sum(array.nbytes for array in self.arrays)

    def arrange(self, bits: Array, dtype: np.dtype[Any]) -> Array:
        """Return the values in this layout's order, for sums in `dtype`.

        16-bit values stay 16-bit, since memory bandwidth limits these kernels; only float64 sums
        need a conversion.
        """
        if self._positions is None:
            return bits
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
    ) -> bool:
        """Write the product to `out`, and return whether it is valid."""
        arguments = (values, *self.arrays, x, bias, columns, out, code)
        return self.launch(self.n_items, n_threads, arguments)
