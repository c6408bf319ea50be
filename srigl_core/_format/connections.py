"""The connections of a constant fan-in layer, without values and without a dense mask."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import index_dtype
from srigl_core._format.weight import CondensedWeight, draw_columns

__all__ = ["CondensedMask"]


@dataclass(frozen=True, eq=False)
class CondensedMask:
    """Which inputs each active neuron has.

    Parameters
    ----------
    indices : ndarray of uint16 or uint32, (n_active, k)
        Ascending within a row.
    active : ndarray of int64, (n_active,)
        Ascending.
    shape : tuple of int
        (n_out, n_in).
    """

    indices: NDArray[Any]
    active: NDArray[np.int64]
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: CondensedWeight) -> CondensedMask:
        """Return the connections of a condensed weight, whose arrays they share."""
        return cls(weight.indices, weight.active, weight.shape)

    @classmethod
    def drawn(
        cls, shape: tuple[int, int], *, fan_in: int, rng: np.random.Generator
    ) -> CondensedMask:
        """Draw what `srigl_core.reference.random_mask` draws; all neurons are active."""
        n_out, n_in = shape
        columns = draw_columns(n_out, n_in, fan_in, rng)
        return cls(columns.astype(index_dtype(n_in)), np.arange(n_out), shape)

    @property
    def n_active(self) -> int:
        """Number of active neurons."""
        return len(self.active)

    @property
    def fan_in(self) -> int:
        """Connections of each."""
        return int(self.indices.shape[1])

    @property
    def nnz(self) -> int:
        """Number of connections."""
        return int(self.indices.size)

    def to_mask(self) -> NDArray[np.bool_]:
        """Return the dense mask, (n_out, n_in)."""
        mask = np.zeros(self.shape, np.bool_)
        mask[self.active[:, None], self.indices] = True
        return mask

    def with_values(self, values: NDArray[Any]) -> CondensedWeight:
        """Return the condensed weight of these connections with `values`, (n_active, k)."""
        return CondensedWeight(values, self.indices, self.active, self.shape)

    def digest(self) -> str:
        """Return a hash that two masks share if they are the same."""
        found = hashlib.sha256(repr((self.shape, self.indices.shape)).encode())
        found.update(self.active.tobytes())
        found.update(self.indices.tobytes())
        return found.hexdigest()

    def same(self, other: CondensedMask | CondensedWeight) -> bool:
        """Whether the other one has the same connections."""
        return (
            self.shape == other.shape
            and np.array_equal(self.active, other.active)
            and np.array_equal(self.indices, other.indices)
        )
