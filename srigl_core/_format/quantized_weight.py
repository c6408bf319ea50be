"""The condensed format with 8-bit values and a scale for each neuron (SPEC 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from srigl_core._arrays.checks import as_float_array, as_int8_array
from srigl_core._arrays.dtypes import round_to, value_dtype
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._arrays.immutable import immutable
from srigl_core._format.connections import Connections
from srigl_core._format.packed_weight import PackedWeight, checked_connections
from srigl_core._format.weight import CondensedWeight
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["QuantizedWeight"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class QuantizedWeight(PackedWeight):
    """An immutable, packed constant fan-in weight of 8-bit integers, for inference.

    Row ``active[i]`` of the dense weight has ``scale[i] * values[i, j]`` at column
    ``indices[i, j]``, and zeros elsewhere. `CondensedWeight.quantize` makes one. A value of 0 is
    still active. There are no gradients of a quantised weight.

    Parameters
    ----------
    values : ndarray of int8, (n_active, k)
        Within -127..127.
    scale : ndarray of float32, (n_active,)
        Finite and positive.
    indices : ndarray of integers, (n_active, k)
        Column numbers, strictly ascending within a row. Kept as uint16 if n_in <= 65536, else
        uint32.
    active : ndarray of integers, (n_active,)
        Row numbers, strictly ascending. Kept as int64.
    shape : tuple of int
        Dense shape, (n_out, n_in).

    Attributes
    ----------
    values, scale : ndarray
        Read-only.
    connections : Connections
        The indices, the active rows and the shape.

    Raises
    ------
    SriglError
        If shapes disagree, a number is out of range or out of order, or nothing is active.
    ValueTypeError
        If a dtype is another one.

    Notes
    -----
    The arrays are copied and read-only. SPEC 6.

    Examples
    --------
    >>> import numpy as np
    >>> scale = np.array([0.5, 0.25], np.float32)
    >>> values = np.array([[2, -127], [4, 0]], np.int8)
    >>> weight = QuantizedWeight(values, scale, [[0, 3], [1, 2]], active=[0, 2], shape=(3, 4))
    >>> weight
    QuantizedWeight((3, 4), n_active=2, fan_in=2, dtype=int8, 66.7% sparse, 36 bytes)
    >>> weight.to_dense()
    array([[  1. ,   0. ,   0. , -63.5],
           [  0. ,   0. ,   0. ,   0. ],
           [  0. ,   1. ,   0. ,   0. ]], dtype=float32)
    """

    scale: NDArray[np.float32]

    def __init__(
        self,
        values: ArrayLike,
        scale: ArrayLike,
        indices: ArrayLike,
        active: ArrayLike,
        shape: tuple[int, int],
    ) -> None:
        self._set_quantized(values, scale, Connections(indices, active, shape))

    def _set_quantized(self, values: ArrayLike, scale: ArrayLike, connections: Connections) -> None:
        numbers = as_int8_array(values, "values")
        self._set(numbers, connections)
        if numbers.min() < -127:
            raise SriglError("values holds -128, but must lie in -127..127")
        scales = as_float_array(scale, "scale")
        if scales.dtype != np.float32:
            raise ValueTypeError(f"scale has dtype {scales.dtype}, but must be float32")
        if scales.shape != (self.n_active,):
            raise SriglError(
                f"scale has shape {scales.shape}, but must have one number for each active "
                f"neuron: {(self.n_active,)}"
            )
        with honour_subnormals():
            wrong = ~(np.isfinite(scales) & (scales > 0))
        if wrong.any():
            raise SriglError(
                f"scale holds {scales[wrong][0]}, but all its numbers must be finite and positive"
            )
        object.__setattr__(self, "scale", immutable(scales))

    @classmethod
    def from_connections(
        cls, values: ArrayLike, scale: ArrayLike, connections: Connections
    ) -> QuantizedWeight:
        """Return a weight on connections, which it shares.

        Parameters
        ----------
        values : array of int8, (n_active, k)
            Copied.
        scale : array of float32, (n_active,)
            Copied.
        connections : Connections

        Raises
        ------
        SriglError
            If a shape does not fit the connections, or a number is out of range.
        ValueTypeError
            If a dtype is another one, or `connections` is something else.
        """
        weight = object.__new__(cls)
        weight._set_quantized(values, scale, checked_connections(connections))
        return weight

    @property
    def value_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that hold the numbers, by name, as files store them."""
        return {"values": self.values, "scale": self.scale}

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """Dtype of the scale, float32, which decides the type of a product."""
        return self.scale.dtype

    def dequantize(self, dtype: DTypeLike = np.float32) -> CondensedWeight:
        """Return the weight ``scale[i] * values[i, j]`` in floating point, on the same connections.

        Parameters
        ----------
        dtype : dtype-like
            One of the value types, or its name. float64 holds each number exactly; in another type
            it is rounded once, to infinity if it is too large.
        """
        with honour_subnormals():
            exact = self.scale.astype(np.float64)[:, None] * self.values
            values = round_to(exact, value_dtype(dtype))
        return CondensedWeight.from_connections(values, self.connections)

    def to_dense(self) -> NDArray[Any]:
        """Return the masked dense weight, ``W * M``, float32, (n_out, n_in), a new array."""
        return self.dequantize().to_dense()
