"""What the layouts share whose kernels take the rows of a batch one by one."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compressed_rows import arranged

__all__ = ["RowLayout"]

Array = NDArray[Any]


class RowLayout:
    """Connections of a mask, laid out for one kernel.

    The kernel's arguments are ``(values, *arrays, x, bias, columns, out, code)``.

    Parameters
    ----------
    positions : ndarray or None
        Where the layout's values lie in the condensed ones, negative for padding; None where they
        are left as they are.
    arrays : tuple of ndarray
        What else the kernel takes that depends on the mask.
    n_items : int
        Neurons, or groups of them: what threads share.
    padding : float
        Values stored for each connection.
    nanoseconds : float
        About what one thread takes for a batch row.
    """

    name: ClassVar[str]
    most_rows: ClassVar[int]  # up to so many it beats tiles of eight
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
        """Bytes of what depends on the mask, beside the condensed arrays."""
        if self._positions is None:
            return 0
        return self._positions.nbytes + sum(array.nbytes for array in self.arrays)

    def arrange(self, bits: Array, kind: np.dtype[Any]) -> Array:
        """Return the values in this layout's order, for sums in `kind`.

        16-bit ones stay so, since bytes are what these kernels wait for, but for float64 sums.
        """
        if self._positions is None:
            return bits
        return arranged(bits, self._positions, kind if kind == np.float64 else bits.dtype)

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
        """Write the product to `out`; return whether it can be trusted."""
        arguments = (values, *self.arrays, x, bias, columns, out, code)
        return self.launch(self.n_items, n_threads, arguments)
