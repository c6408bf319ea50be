"""The condensed format: a constant fan-in layer as values and column numbers (SPEC 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from srigl_core._arrays.checks import (
    as_float_array,
    as_mask,
    check_generator,
    check_integer,
    check_lengths,
)
from srigl_core._arrays.dtypes import as_float_view, index_dtype, round_to, value_dtype
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._plan import Plan, prepare
from srigl_core._registry import get_backend
from srigl_core.contract import Backend
from srigl_core.errors import SriglError, ValueTypeError

if TYPE_CHECKING:
    import scipy.sparse.linalg

__all__ = ["CondensedWeight", "MemoryReport", "draw_columns", "flat_shape"]


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a layer in three forms; printing it gives a small table.

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


class CondensedWeight:
    """An immutable constant fan-in weight, packed.

    Row ``active[i]`` of the dense weight has ``values[i, j]`` at column ``indices[i, j]``, and
    nothing else; rows not in `active` are ablated. A value of 0.0 is still active: activity is
    membership, never ``w != 0``.

    Parameters
    ----------
    values : ndarray, float16, bfloat16, float32 or float64, (n_active, k)
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
        If a dtype is not of its kind.

    Notes
    -----
    The arrays are copied and frozen. SPEC 1; the paper's condensed representation, sec. 4.4 and
    appendix F.

    Examples
    --------
    >>> import numpy as np
    >>> weight = CondensedWeight(
    ...     np.array([[0.5, -1.0], [2.0, 0.0]]), [[0, 3], [1, 2]], active=[0, 2], shape=(3, 4)
    ... )
    >>> weight
    CondensedWeight((3, 4), n_active=2, fan_in=2, dtype=float64, 66.7% sparse, 56 bytes)
    >>> weight.to_dense()
    array([[ 0.5,  0. ,  0. , -1. ],
           [ 0. ,  0. ,  0. ,  0. ],
           [ 0. ,  2. ,  0. ,  0. ]])
    """

    __slots__ = ("_plans", "active", "indices", "shape", "values")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # so that ndarray @ weight is refused, not taken elementwise

    values: NDArray[Any]
    indices: NDArray[Any]
    active: NDArray[np.int64]
    shape: tuple[int, int]
    _plans: dict[Backend, Plan]

    def __init__(
        self, values: ArrayLike, indices: ArrayLike, active: ArrayLike, shape: tuple[int, int]
    ) -> None:
        n_out, n_in = _checked_shape(shape)
        values = as_float_array(values, "values")
        if values.ndim != 2 or 0 in values.shape:
            raise SriglError(
                f"values has shape {values.shape}, but must be (n_active, k) with at least one "
                f"active neuron and a fan-in of at least one"
            )
        n_active, fan_in = values.shape
        if fan_in > n_in or n_active > n_out:
            raise SriglError(
                f"values of shape {values.shape} (n_active, k) does not fit a weight of shape "
                f"{(n_out, n_in)}"
            )
        columns = _ascending(indices, "indices", values.shape, n_in)
        rows = _ascending(active, "active", (n_active,), n_out)
        self._freeze(values, columns.astype(index_dtype(n_in)), rows, (n_out, n_in))

    def _freeze(
        self,
        values: NDArray[Any],
        indices: NDArray[Any],
        active: NDArray[np.int64],
        shape: tuple[int, int],
    ) -> None:
        arrays = {"indices": indices, "active": active}
        arrays["values"] = np.array(values, order="C", copy=True, subok=False)
        for name, array in arrays.items():
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "_plans", {})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a condensed weight is immutable; make a new one, e.g. with_values()")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a condensed weight is immutable; make a new one, e.g. with_values()")

    @classmethod
    def from_dense(cls, weight: ArrayLike, mask: NDArray[np.bool_]) -> CondensedWeight:
        """Pack the entries of `weight` where `mask` is True.

        Parameters
        ----------
        weight : array, (n_out, ...)
            A convolution's `(out, in, kh, kw)` is taken as `(out, in*kh*kw)`.
        mask : ndarray of bool, same shape
            Constant fan-in: every row has the same number of True, or none.

        Raises
        ------
        SriglError
            If `mask` is not constant fan-in, or all False.
        """
        dense = as_float_array(weight, "weight")
        shape = flat_shape(dense.shape)
        mask = as_mask(mask, dense.shape).reshape(shape)
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
        columns = np.nonzero(mask)[1].reshape(active.size, -1)
        return cls(dense.reshape(shape)[active[:, None], columns], columns, active, shape)

    @classmethod
    def from_nonzero(cls, weight: ArrayLike) -> CondensedWeight:
        """Pack the entries of `weight` that are not zero.

        An active weight that happens to be 0.0, such as one just grown, is lost: use `from_dense`
        with the mask wherever there is one.

        Parameters
        ----------
        weight : array, (n_out, ...)

        Raises
        ------
        SriglError
            If the non-zero entries are not constant fan-in, or there are none.
        """
        dense = as_float_array(weight, "weight")
        with honour_subnormals():
            return cls.from_dense(dense, dense != 0)

    @classmethod
    def from_csr(cls, matrix: Any) -> CondensedWeight:
        """Pack a SciPy sparse matrix; its stored entries are active, stored zeros included.

        Parameters
        ----------
        matrix : scipy.sparse array or matrix, (n_out, n_in)
            Duplicates are added up, as SciPy does.

        Raises
        ------
        ValueTypeError
            If it is no SciPy sparse matrix, or its numbers are not of a value type.
        SriglError
            If its rows do not all store the same number of entries or none.
        """
        import scipy.sparse

        if not scipy.sparse.issparse(matrix):
            raise ValueTypeError(
                f"matrix must be a SciPy sparse array, got {type(matrix).__name__}; for a dense "
                f"array use from_dense"
            )
        try:
            # A pointer out of range would have SciPy's compiled code read beyond its arrays.
            getattr(matrix, "check_format", lambda full_check: None)(full_check=True)
            csr = scipy.sparse.csr_array(matrix, copy=True)
            csr.sum_duplicates()
        except (TypeError, ValueError) as error:
            raise SriglError(f"matrix is not a valid sparse matrix of numbers: {error}") from error
        counts = np.diff(csr.indptr)
        active = np.flatnonzero(counts)
        if not active.size or np.unique(counts[active]).size > 1:
            raise SriglError(
                f"matrix is not constant fan-in: its rows store from {counts.min()} to "
                f"{counts.max()} entries (row {counts.argmax()}), where all must store the same "
                f"number or none, and at least one some; pad or prune rows to one count"
            )
        shape = (active.size, counts[active[0]])
        return cls(csr.data.reshape(shape), csr.indices.reshape(shape), active, csr.shape)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        *,
        fan_in: int,
        n_active: int | None = None,
        dtype: DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
    ) -> CondensedWeight:
        """Draw a weight of random connections and normal values of variance ``1 / fan_in``.

        Parameters
        ----------
        shape : tuple of int
            (n_out, n_in).
        fan_in : int
            Connections of each active neuron, 1..n_in.
        n_active : int or None
            Number of active neurons, drawn at random; None means all.
        dtype : dtype-like
            One of the value types, or its name.
        rng : numpy.random.Generator, int or None
            A generator or a seed.

        Raises
        ------
        SriglError
            If `fan_in` or `n_active` is out of range.
        """
        n_out, n_in = _checked_shape(shape)
        check_integer(fan_in, "fan_in", least=1, most=n_in)
        n_active = (
            n_out if n_active is None else check_integer(n_active, "n_active", least=1, most=n_out)
        )
        rng = check_generator(rng)
        active = np.sort(rng.choice(n_out, n_active, replace=False))
        columns = draw_columns(n_active, n_in, fan_in, rng)
        values = rng.standard_normal((n_active, fan_in)) / np.sqrt(fan_in)
        return cls(round_to(values, value_dtype(dtype)), columns, active, (n_out, n_in))

    def with_values(self, values: ArrayLike) -> CondensedWeight:
        """Return a weight with the same connections and other values.

        Parameters
        ----------
        values : array, (n_active, k)
            Of this weight's dtype. Copied.

        Raises
        ------
        SriglError
            If the shape differs.
        ValueTypeError
            If the dtype differs.
        """
        values = as_float_array(values, "values")
        if values.shape != self.values.shape:
            raise SriglError(f"values has shape {values.shape}, but must be {self.values.shape}")
        if values.dtype != self.dtype:
            raise ValueTypeError(f"values has dtype {values.dtype}, but must be {self.dtype}")
        other = object.__new__(CondensedWeight)
        other._freeze(values, self.indices, self.active, self.shape)
        return other

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
        return np.setdiff1d(np.arange(self.shape[0]), self.active, assume_unique=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.values.nbytes + self.indices.nbytes + self.active.nbytes

    def memory_report(self) -> MemoryReport:
        """Return the bytes of this layer condensed, as CSR and dense."""
        item = self.dtype.itemsize
        return MemoryReport(
            values=self.values.nbytes,
            indices=self.indices.nbytes,
            active=self.active.nbytes,
            dense=self.shape[0] * self.shape[1] * item,
            csr=self.nnz * (item + 4) + (self.shape[0] + 1) * 4,
        )

    def to_dense(self) -> NDArray[Any]:
        """Return the masked dense weight, ``W * M``, (n_out, n_in), a new array."""
        dense = np.zeros(self.shape, self.dtype)
        dense[self.active[:, None], self.indices] = self.values
        return dense

    def to_mask(self) -> NDArray[np.bool_]:
        """Return the mask, (n_out, n_in), a new array."""
        mask = np.zeros(self.shape, np.bool_)
        mask[self.active[:, None], self.indices] = True
        return mask

    def to_csr(self) -> scipy.sparse.csr_array:
        """Return a SciPy CSR array, active zeros stored.

        16-bit values become float32, since SciPy has no 16-bit numbers.
        """
        import scipy.sparse

        row_ends = np.zeros(self.shape[0] + 1, np.int64)
        row_ends[self.active + 1] = self.fan_in
        return scipy.sparse.csr_array(
            (
                as_float_view(self.values).ravel().copy(),
                self.indices.ravel().astype(np.int64),
                np.cumsum(row_ends),
            ),
            shape=self.shape,
        )

    def plan(self, backend: str | Backend | None = None) -> Plan:
        """Return this weight's plan for `backend`, made once and kept with the weight."""
        chosen = get_backend(backend)
        plan = self._plans.get(chosen)
        if plan is None:
            plan = self._plans[chosen] = prepare(self, backend=chosen)
        return plan

    def __matmul__(self, x: ArrayLike) -> NDArray[Any]:
        """Return ``(W*M) @ x`` for x of shape (n_in,) or (n_in, m)."""
        x = as_float_array(x, "x")
        if x.ndim not in (1, 2) or x.shape[0] != self.shape[1]:
            raise SriglError(
                f"weight of shape {self.shape} @ x needs x of shape ({self.shape[1]},) or "
                f"({self.shape[1]}, m), got {x.shape}; for batch-first x use condensed_matmul"
            )
        return self.plan()(x.T).T

    def as_linear_operator(self) -> scipy.sparse.linalg.LinearOperator:
        """Return this weight as a SciPy linear operator, with its transpose.

        Operands are taken as by `condensed_matmul`; integers, with which SciPy tries operators out,
        are cast to the weight's dtype.

        Raises
        ------
        ValueTypeError
            If the values are 16-bit: SciPy's solvers compute in float32 or float64.
        """
        import scipy.sparse.linalg

        if self.dtype.itemsize == 2:
            raise ValueTypeError(
                f"SciPy's solvers do not take {self.dtype}; convert the values to float32 first"
            )
        plan = self.plan()

        def operand(x: NDArray[Any]) -> NDArray[Any]:
            return x.astype(self.dtype) if x.dtype.kind in "iu" else x

        def transposed(y: NDArray[Any]) -> NDArray[Any]:
            gradient = plan.backward(operand(y).T, wrt="x").x
            assert gradient is not None
            return gradient.T

        def product(x: NDArray[Any]) -> NDArray[Any]:
            return plan(operand(x).T).T

        return scipy.sparse.linalg.LinearOperator(
            self.shape,
            dtype=self.dtype,
            matvec=lambda x: product(x.ravel()),
            rmatvec=lambda y: transposed(y.ravel()),
            matmat=product,
            rmatmat=transposed,
        )

    def __eq__(self, other: object) -> bool:
        """Whether shape, dtype, connections and the values' bits are the same."""
        if not isinstance(other, CondensedWeight):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.dtype == other.dtype
            and np.array_equal(self.active, other.active)
            and np.array_equal(self.indices, other.indices)
            and self.values.tobytes() == other.values.tobytes()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (CondensedWeight, (self.values, self.indices, self.active, self.shape))

    def __repr__(self) -> str:
        return (
            f"CondensedWeight({self.shape}, n_active={self.n_active}, fan_in={self.fan_in}, "
            f"dtype={self.dtype}, {self.sparsity:.1%} sparse, {self.nbytes:,} bytes)"
        )


def draw_columns(
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
        If there are fewer than two axes, or one is empty.
    """
    lengths = check_lengths(shape, "shape")
    if len(lengths) < 2 or 0 in lengths:
        raise SriglError(
            f"a weight of shape {shape} has no neurons with inputs; it must be (n_out, n_in) or "
            f"(out, in, kh, kw), no axis empty"
        )
    return lengths[0], math.prod(lengths[1:])


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    try:
        n_out, n_in = shape
    except (TypeError, ValueError):
        raise SriglError(f"shape={shape!r} must be a pair (n_out, n_in)") from None
    return (
        check_integer(n_out, "n_out", least=1, most=2**63 - 1),
        check_integer(n_in, "n_in", least=1, most=2**32),
    )


def _ascending(
    numbers: ArrayLike, what: str, shape: tuple[int, ...], limit: int
) -> NDArray[np.int64]:
    """Return `numbers` as a new int64 array of `shape`, ascending on the last axis, in 0..limit."""
    try:
        array = np.asarray(numbers)
    except (TypeError, ValueError) as error:
        raise SriglError(f"{what} is no array of shape {shape} ({error})") from error
    if array.dtype.kind not in "iu":
        raise ValueTypeError(f"{what} has dtype {array.dtype}, but must hold integers")
    if array.shape != shape:
        raise SriglError(f"{what} has shape {array.shape}, but the values need {shape}")
    wrong = (array < 0) | (array >= limit)
    if wrong.any():
        raise SriglError(f"{what} holds {array[wrong][0]}, but must lie in 0..{limit - 1}")
    array = array.astype(np.int64)
    if (np.diff(array, axis=-1) <= 0).any():
        raise SriglError(f"{what} must be strictly ascending along its last axis; sort them first")
    return array
