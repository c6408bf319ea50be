"""The condensed format: numbers on the connections of a constant fan-in layer (SPEC 1 and 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from srigl_core._arrays.checks import as_float_array, as_int8_array, as_mask, check_generator
from srigl_core._arrays.dtypes import as_float_view, is_half, round_to, value_dtype
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._arrays.immutable import immutable
from srigl_core._format.connections import Connections, checked_shape
from srigl_core._format.packed_weight import PackedWeight, checked_connections
from srigl_core.errors import SriglError, ValueTypeError

if TYPE_CHECKING:
    import scipy.sparse.linalg

__all__ = ["CondensedWeight", "QuantizedWeight", "check_condensed"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class CondensedWeight(PackedWeight):
    """An immutable, packed constant fan-in weight: connections, and one value for each.

    Row ``active[i]`` of the dense weight has ``values[i, j]`` at column ``indices[i, j]``, and
    zeros elsewhere. Rows that are not in `active` are ablated. A value of 0.0 is still active:
    activity is membership, never ``w != 0``.

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

    Attributes
    ----------
    values : ndarray, (n_active, k)
        Read-only.
    connections : Connections
        The indices, the active rows and the shape.

    Raises
    ------
    SriglError
        If shapes disagree, a number is out of range or out of order, or nothing is active.
    ValueTypeError
        If a dtype is not supported.

    Notes
    -----
    The arrays are copied and read-only. SPEC 1; the paper's condensed representation, sec. 4.4
    and appendix F.

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

    def __init__(
        self, values: ArrayLike, indices: ArrayLike, active: ArrayLike, shape: tuple[int, int]
    ) -> None:
        self._set(as_float_array(values, "values"), Connections(indices, active, shape))

    @classmethod
    def from_connections(cls, values: ArrayLike, connections: Connections) -> CondensedWeight:
        """Return a weight on connections, which it shares.

        Parameters
        ----------
        values : array, (n_active, k)
            Copied.
        connections : Connections

        Raises
        ------
        SriglError
            If the shape of `values` is not that of the indices.
        ValueTypeError
            If `values` is not an array of a value type, or `connections` is something else.
        """
        weight = object.__new__(cls)
        weight._set(as_float_array(values, "values"), checked_connections(connections))
        return weight

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
        connections = Connections.from_mask(as_mask(mask, dense.shape))
        rows = connections.active[:, None]
        values = dense.reshape(connections.shape)[rows, connections.indices]
        return cls.from_connections(values, connections)

    @classmethod
    def from_nonzero(cls, weight: ArrayLike) -> CondensedWeight:
        """Pack the entries of `weight` that are not zero.

        An active weight of 0.0, such as one that was just grown, is lost. If there is a mask, use
        `from_dense`.

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
        """Pack a SciPy sparse matrix. Its stored entries are active, zeros included.

        Parameters
        ----------
        matrix : scipy.sparse array or matrix, (n_out, n_in)
            Duplicates are added up, as SciPy does.

        Raises
        ------
        ValueTypeError
            If it is not a SciPy sparse matrix, or its dtype is not a value type.
        SriglError
            If a row does not store the common number of entries, or none.
        """
        import scipy.sparse

        if not scipy.sparse.issparse(matrix):
            raise ValueTypeError(
                f"matrix must be a SciPy sparse array, got {type(matrix).__name__}; for a dense "
                f"array use from_dense"
            )
        try:
            # With a pointer out of range, SciPy's compiled code would read beyond its arrays.
            getattr(matrix, "check_format", lambda full_check: None)(full_check=True)
            csr = scipy.sparse.csr_array(matrix, copy=True)
            csr.sum_duplicates()
        except (TypeError, ValueError) as error:
            raise SriglError(f"matrix is not a valid sparse matrix of numbers: {error}") from error
        if csr.ndim != 2 or 0 in csr.shape:
            raise SriglError(
                f"matrix has shape {csr.shape}, but must have a pair (n_out, n_in), none of them 0"
            )
        counts = np.diff(csr.indptr)
        active = np.flatnonzero(counts)
        if not active.size or np.unique(counts[active]).size > 1:
            raise SriglError(
                f"matrix is not constant fan-in: its rows store from {counts.min()} to "
                f"{counts.max()} entries (row {counts.argmax()}), but each row must store the "
                f"same number or none, and at least one row must store some; pad or prune rows to "
                f"one count"
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
        n_out, _ = checked_shape(shape)
        n_active = n_out if n_active is None else n_active
        rng = check_generator(rng)
        connections = Connections.random(shape, fan_in=fan_in, n_active=n_active, rng=rng)
        values = rng.standard_normal(connections.indices.shape) / np.sqrt(fan_in)
        return cls.from_connections(round_to(values, value_dtype(dtype)), connections)

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
        if values.dtype != self.dtype:
            raise ValueTypeError(f"values has dtype {values.dtype}, but must be {self.dtype}")
        return self.from_connections(values, self.connections)

    @property
    def value_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that hold the numbers, by name, as files store them."""
        return {"values": self.values}

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """Dtype of the values, which decides the type of a product."""
        return self.dtype

    def quantize(self) -> QuantizedWeight:
        """Return this weight with 8-bit values and a scale for each neuron, for inference.

        Returns
        -------
        QuantizedWeight
            On the same connections.

        Raises
        ------
        SriglError
            If a value is not finite, or is too large for float32.

        Notes
        -----
        SPEC 6: symmetric, by the largest magnitude of each neuron, rounded to nearest even.

        Examples
        --------
        >>> import numpy as np
        >>> weight = CondensedWeight(np.array([[0.5, -1.0]]), [[0, 3]], active=[1], shape=(2, 4))
        >>> weight.quantize().values
        array([[  64, -127]], dtype=int8)
        """
        # Imported here, since the reference imports this module.
        from srigl_core.reference.quantized_matmul import quantize_weight

        return quantize_weight(self)

    def to_dense(self) -> NDArray[Any]:
        """Return the masked dense weight, ``W * M``, (n_out, n_in), a new array."""
        dense = np.zeros(self.shape, self.dtype)
        dense[self.active[:, None], self.indices] = self.values
        return dense

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

    def as_linear_operator(self) -> scipy.sparse.linalg.LinearOperator:
        """Return this weight as a SciPy linear operator, with its transpose.

        Operands are checked as in `condensed_matmul`. Integers, with which SciPy probes operators,
        are cast to the weight's dtype.

        Raises
        ------
        ValueTypeError
            If the values are 16-bit: SciPy's solvers compute in float32 or float64.
        """
        import scipy.sparse.linalg

        if is_half(self.dtype):
            raise ValueTypeError(
                f"SciPy's solvers do not take {self.dtype}; convert the values to float32 first"
            )
        plan = self._plan()

        def operand(x: NDArray[Any]) -> NDArray[Any]:
            return x.astype(self.dtype) if x.dtype.kind in "iu" else x

        def transposed(y: NDArray[Any]) -> Any:
            return plan.backward(operand(y).T, wrt="x").x.T

        def product(x: NDArray[Any]) -> Any:
            return plan(operand(x).T).T

        return scipy.sparse.linalg.LinearOperator(
            self.shape,
            dtype=self.dtype,
            matvec=lambda x: product(x.ravel()),
            rmatvec=lambda y: transposed(y.ravel()),
            matmat=product,
            rmatmat=transposed,
        )


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


def check_condensed(weight: object) -> None:
    """Check that `weight` is a condensed weight of floating-point values.

    Raises
    ------
    ValueTypeError
        If it is anything else, a dense, CSR or quantised weight for example.
    """
    if not isinstance(weight, CondensedWeight):
        remedy = "make one with CondensedWeight.from_dense(weight, mask)"
        if isinstance(weight, PackedWeight):
            remedy = (
                "a quantised weight is for inference and has no gradients; pass the weight that it "
                "was made from"
            )
        raise ValueTypeError(
            f"weight must be a CondensedWeight, got {type(weight).__name__}; {remedy}"
        )
