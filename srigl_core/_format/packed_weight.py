"""What all packed weights have: connections, and arrays of numbers that lie on them (SPEC 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import as_float_array
from srigl_core._arrays.immutable import immutable
from srigl_core._format.connections import Connections
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["MemoryReport", "PackedWeight", "checked_connections"]


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a layer in three forms. It prints as a small table.

    Parameters
    ----------
    values, indices, active : int
        Bytes of the three arrays of the condensed form.
    dense : int
        Bytes of the dense weight in the same dtype.
    csr : int
        Bytes of a CSR matrix of the same values with int32 column numbers and row pointers.
    """

    values: int
    indices: int
    active: int
    dense: int
    csr: int

    @property
    def condensed(self) -> int:
        """Bytes of the condensed form."""
        return self.values + self.indices + self.active

    def __str__(self) -> str:
        rows = (("condensed", self.condensed), ("CSR", self.csr), ("dense", self.dense))
        return "\n".join(
            f"{name:<10}{size:>14,} bytes{size / self.condensed:>8.2f}x" for name, size in rows
        )


@dataclass(frozen=True, init=False, eq=False, repr=False)
class PackedWeight:
    """An immutable constant fan-in weight: connections, and one value for each.

    A subclass adds a field for each further array of numbers, and lists all in `value_arrays`. Its
    ``from_connections`` takes these arrays and the connections.

    Attributes
    ----------
    values : ndarray, (n_active, k)
        Read-only.
    connections : Connections
        The indices, the active rows and the shape.
    """

    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # so that ndarray @ weight is refused, not taken elementwise

    values: NDArray[Any]
    connections: Connections
    _plans: dict[Any, Any] = field(init=False)
    """The plans that `srigl_core._plan.plan_of` made, by what they are for."""

    def _set(self, values: NDArray[Any], connections: Connections) -> None:
        """Store checked connections and a copy of the values; every weight is made here."""
        if values.shape != connections.indices.shape:
            raise SriglError(
                f"values has shape {values.shape}, but must have one number for each connection, "
                f"(n_active, k): {connections.indices.shape}"
            )
        object.__setattr__(self, "values", immutable(values))
        object.__setattr__(self, "connections", connections)
        object.__setattr__(self, "_plans", {})

    # Not abstract methods: each call checks the kind of its weight, which is slow for an ABC.

    @property
    def value_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that hold the numbers, by name, as files store them."""
        raise NotImplementedError

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """The float type of the weight's numbers, which decides the type of a product."""
        raise NotImplementedError

    @property
    def indices(self) -> NDArray[Any]:
        """Column numbers, uint16 or uint32, (n_active, k); read-only."""
        return self.connections.indices

    @property
    def active(self) -> NDArray[np.int64]:
        """Row numbers of the active neurons, int64, (n_active,); read-only."""
        return self.connections.active

    @property
    def shape(self) -> tuple[int, int]:
        """Dense shape, (n_out, n_in)."""
        return self.connections.shape

    @property
    def n_active(self) -> int:
        """Number of active neurons."""
        return len(self.values)

    @property
    def fan_in(self) -> int:
        """Connections of each active neuron, k."""
        return len(self.values[0])

    @property
    def nnz(self) -> int:
        """Number of active weights, ``n_active * fan_in``."""
        return self.values.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def sparsity(self) -> float:
        """Share of the dense weight that is inactive."""
        return 1 - self.nnz / (self.shape[0] * self.shape[1])

    @property
    def ablated(self) -> NDArray[np.int64]:
        """Row numbers of the ablated neurons, ascending, (n_out - n_active,), int64."""
        return self.connections.ablated

    @property
    def nbytes(self) -> int:
        """Bytes of the condensed form."""
        return self.memory_report().condensed

    def memory_report(self) -> MemoryReport:
        """Return the bytes of this layer condensed, as CSR and dense."""
        item = self.dtype.itemsize
        return MemoryReport(
            values=sum(array.nbytes for array in self.value_arrays.values()),
            indices=self.indices.nbytes,
            active=self.active.nbytes,
            dense=self.shape[0] * self.shape[1] * item,
            csr=self.nnz * (item + 4) + (self.shape[0] + 1) * 4,
        )

    def to_mask(self) -> NDArray[np.bool_]:
        """Return the mask, (n_out, n_in), a new array."""
        return self.connections.to_mask()

    def __matmul__(self, x: ArrayLike) -> NDArray[Any]:
        """Return ``(W*M) @ x`` for x of shape (n_in,) or (n_in, m)."""
        x = as_float_array(x, "x")
        if x.ndim not in (1, 2) or x.shape[0] != self.shape[1]:
            raise SriglError(
                f"weight of shape {self.shape} @ x needs x of shape ({self.shape[1]},) or "
                f"({self.shape[1]}, m), got {x.shape}; for batch-first x use condensed_matmul"
            )
        product: NDArray[Any] = self._plan()(x.T).T
        return product

    def _plan(self) -> Any:
        # Imported here, since the module of plans imports this one.
        from srigl_core._plan import plan_of

        return plan_of(self)  # type: ignore[call-overload] # of one of the subclasses

    def __eq__(self, other: object) -> bool:
        """Whether kind, shape, dtype, connections and the bits of the numbers are the same."""
        if not isinstance(other, PackedWeight):
            return NotImplemented
        return (
            type(self) is type(other)
            and self.dtype == other.dtype
            and self.connections == other.connections
            and all(
                np.array_equal(_bits(array), _bits(other.value_arrays[name]))
                for name, array in self.value_arrays.items()
            )
        )

    def __reduce__(self) -> tuple[Any, ...]:
        made_by = type(self).from_connections  # type: ignore[attr-defined] # of each subclass
        return (made_by, (*self.value_arrays.values(), self.connections))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.shape}, n_active={self.n_active}, fan_in={self.fan_in}, "
            f"dtype={self.dtype}, {self.sparsity:.1%} sparse, {self.nbytes:,} bytes)"
        )


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(f"u{array.itemsize}")


def checked_connections(connections: object) -> Connections:
    """Return `connections` if that is what they are.

    Raises
    ------
    ValueTypeError
        If `connections` is something else.
    """
    if not isinstance(connections, Connections):
        raise ValueTypeError(
            f"connections must be Connections, got {type(connections).__name__}; make them with "
            f"Connections.from_mask(mask)"
        )
    return connections
