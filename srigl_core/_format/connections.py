"""The connections of a constant fan-in layer: the inputs of each active neuron (SPEC 1)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import as_mask, check_generator, check_integer, check_lengths
from srigl_core._arrays.dtypes import index_dtype
from srigl_core._arrays.immutable import immutable
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["Connections", "checked_shape", "flat_shape"]

_MOST_ELEMENTS = 2**63 // 8 - 1
"""Of an int64 array, whose bytes NumPy counts in 63 bits."""


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Connections:
    """The connections of a constant fan-in layer: the packed form of its mask.

    Row ``active[i]`` of the mask is True at the columns ``indices[i]``. Rows that are not in
    `active` are ablated.

    Parameters
    ----------
    indices : ndarray of integers, (n_active, k)
        Column numbers, strictly ascending within a row. Kept as uint16 if n_in <= 65536, else
        uint32.
    active : ndarray of integers, (n_active,)
        Row numbers, strictly ascending. Kept as int64.
    shape : tuple of int
        Dense shape, (n_out, n_in).

    Raises
    ------
    SriglError
        If shapes disagree, a number is out of range or out of order, or nothing is active.
    ValueTypeError
        If an array does not hold integers.

    Notes
    -----
    The arrays are copied and read-only. SPEC 1.

    Examples
    --------
    >>> connections = Connections([[0, 3], [1, 2]], active=[0, 2], shape=(3, 4))
    >>> connections
    Connections((3, 4), n_active=2, fan_in=2)
    >>> connections.to_mask()
    array([[ True, False, False,  True],
           [False, False, False, False],
           [False,  True,  True, False]])
    """

    indices: NDArray[Any]
    active: NDArray[np.int64]
    shape: tuple[int, int]

    def __init__(self, indices: ArrayLike, active: ArrayLike, shape: tuple[int, int]) -> None:
        n_out, n_in = checked_shape(shape)
        columns = _integers(indices, "indices")
        if columns.ndim != 2 or 0 in columns.shape:
            raise SriglError(
                f"indices has shape {columns.shape}, but must be (n_active, k) with at least one "
                f"active neuron and a fan-in of at least one"
            )
        n_active, fan_in = columns.shape
        if fan_in > n_in or n_active > n_out:
            raise SriglError(
                f"indices of shape {columns.shape} (n_active, k) does not fit a weight of shape "
                f"{(n_out, n_in)}"
            )
        rows = _integers(active, "active")
        if rows.shape != (n_active,):
            raise SriglError(
                f"active has shape {rows.shape}, but indices of shape {columns.shape} need "
                f"{(n_active,)}"
            )
        arrays = {
            "indices": _ascending(columns, "indices", n_in).astype(index_dtype(n_in)),
            "active": _ascending(rows, "active", n_out),
        }
        for name, array in arrays.items():
            object.__setattr__(self, name, immutable(array))
        object.__setattr__(self, "shape", (n_out, n_in))

    @classmethod
    def from_mask(cls, mask: Any) -> Connections:
        """Pack a constant fan-in mask.

        Parameters
        ----------
        mask : array of bool, (n_out, ...)
            Every row has the same number of True, or none. A convolution's mask
            `(out, in, kh, kw)` is taken as `(out, in*kh*kw)`.

        Raises
        ------
        SriglError
            If `mask` is not constant fan-in, or all False.
        ValueTypeError
            If it is not an array of bool.
        """
        mask = as_mask(mask, None)
        shape = flat_shape(mask.shape)
        mask = mask.reshape(shape)
        counts = np.count_nonzero(mask, axis=1)
        active = np.flatnonzero(counts)
        if not active.size:
            raise SriglError("mask has no active weight; a condensed weight needs at least one")
        fan_ins = np.unique(counts[active])
        if fan_ins.size > 1:
            odd = active[counts[active] != fan_ins[-1]]
            raise SriglError(
                f"mask is not constant fan-in: {odd.size} of {active.size} active rows have fewer "
                f"than {fan_ins[-1]} weights (row {odd[0]} has {counts[odd[0]]}); pad or prune "
                f"rows to one count, or keep the layer as CSR"
            )
        return cls(np.nonzero(mask)[1].reshape(active.size, -1), active, shape)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        *,
        fan_in: int,
        n_active: int | None = None,
        rng: np.random.Generator | int | None = None,
    ) -> Connections:
        """Draw connections uniformly at random.

        Parameters
        ----------
        shape : tuple of int
            (n_out, n_in).
        fan_in : int
            Connections of each active neuron, 1..n_in.
        n_active : int or None
            Number of active neurons, drawn at random; None means all.
        rng : numpy.random.Generator, int or None
            A generator or a seed.

        Raises
        ------
        SriglError
            If `fan_in` or `n_active` is out of range.

        Notes
        -----
        With all neurons active the connections are those that `srigl_core.reference.random_mask`
        draws with the same generator.
        """
        n_out, n_in = checked_shape(shape)
        check_integer(fan_in, "fan_in", least=1, most=n_in)
        rng = check_generator(rng)
        if n_out * fan_in > _MOST_ELEMENTS:
            raise SriglError(
                f"shape={(n_out, n_in)} with fan_in={fan_in} has {n_out * fan_in:,} connections, "
                f"more than an array may hold"
            )
        active = np.arange(n_out)
        if n_active is not None:
            check_integer(n_active, "n_active", least=1, most=n_out)
            active = np.sort(rng.choice(n_out, n_active, replace=False))
        return cls(_draw_columns(active.size, n_in, fan_in, rng), active, (n_out, n_in))

    @property
    def n_active(self) -> int:
        """Number of active neurons."""
        return len(self.active)

    @property
    def fan_in(self) -> int:
        """Connections of each active neuron, k."""
        return int(self.indices.shape[1])

    @property
    def nnz(self) -> int:
        """Number of connections, ``n_active * fan_in``."""
        return int(self.indices.size)

    @property
    def ablated(self) -> NDArray[np.int64]:
        """Row numbers of the ablated neurons, ascending, (n_out - n_active,), int64."""
        return np.setdiff1d(np.arange(self.shape[0]), self.active, assume_unique=True)

    def to_mask(self) -> NDArray[np.bool_]:
        """Return the mask, (n_out, n_in), a new array."""
        mask = np.zeros(self.shape, np.bool_)
        mask[self.active[:, None], self.indices] = True
        return mask

    def digest(self) -> bytes:
        """Return a hash of 16 bytes, which equal connections share."""
        packed = hashlib.blake2b(repr(self.shape).encode(), digest_size=16)
        packed.update(self.indices.data)
        packed.update(self.active.data)
        return packed.digest()

    def __eq__(self, other: object) -> bool:
        """Whether shape, indices and active rows are the same."""
        if self is other:
            return True
        if not isinstance(other, Connections):
            return NotImplemented
        return (
            self.shape == other.shape
            and np.array_equal(self.active, other.active)
            and np.array_equal(self.indices, other.indices)
        )

    def __hash__(self) -> int:
        return hash(self.digest())

    def __reduce__(self) -> tuple[Any, ...]:
        return (Connections, (self.indices, self.active, self.shape))

    def __repr__(self) -> str:
        return f"Connections({self.shape}, n_active={self.n_active}, fan_in={self.fan_in})"


def _draw_columns(
    n_rows: int, n_in: int, fan_in: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw `fan_in` of `n_in` columns for each row, uniformly without replacement.

    Returns
    -------
    ndarray of int64, (n_rows, fan_in)
        Ascending within a row.
    """
    columns = np.empty((n_rows, fan_in), np.int64)
    for row in columns:
        row[:] = rng.choice(n_in, fan_in, replace=False, shuffle=False)
    columns.sort(axis=1)
    return columns


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (n_out, n_in) of a weight: a convolution's trailing axes count as one (SPEC 1).

    Raises
    ------
    SriglError
        If there are fewer than two axes, one is empty, or no array could have this shape.
    """
    lengths = check_lengths(shape, "shape")
    if len(lengths) < 2 or 0 in lengths:
        raise SriglError(
            f"a weight of shape {shape} has no neurons with inputs; it must be (n_out, n_in) or "
            f"(out, in, kh, kw), no axis empty"
        )
    if math.prod(lengths) > _MOST_ELEMENTS:
        raise SriglError(f"a weight of shape {shape} has more elements than an array may hold")
    return lengths[0], math.prod(lengths[1:])


def checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Return a dense shape as a pair of ints.

    Raises
    ------
    SriglError
        If it is not a pair, or a length is out of range.
    """
    try:
        n_out, n_in = shape
    except Exception:  # it may be any object, whose own code is run
        raise SriglError(f"shape={shape!r} must be a pair (n_out, n_in)") from None
    return (
        check_integer(n_out, "n_out", least=1, most=2**63 - 1),
        check_integer(n_in, "n_in", least=1, most=2**32),
    )


def _integers(numbers: ArrayLike, what: str) -> NDArray[Any]:
    try:
        array = np.asarray(numbers)
    except Exception as error:
        raise SriglError(f"{what} cannot be read as an array of integers ({error})") from error
    if array.dtype.kind not in "iu":
        raise ValueTypeError(f"{what} has dtype {array.dtype}, but must hold integers")
    return array


def _ascending(array: NDArray[Any], what: str, limit: int) -> NDArray[np.int64]:
    """Return an int64 copy of an array; check that it is below `limit`, and ascends along rows."""
    wrong = (array < 0) | (array >= limit)
    if wrong.any():
        raise SriglError(f"{what} holds {array[wrong][0]}, but must lie in 0..{limit - 1}")
    array = array.astype(np.int64)
    if (np.diff(array, axis=-1) <= 0).any():
        raise SriglError(f"{what} must be strictly ascending along its last axis; sort them first")
    return array
