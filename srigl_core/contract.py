"""What a backend is: the two protocols it implements and the capabilities it declares.

A backend never validates: everything it is handed has passed the public door (`srigl_core._plan`,
`srigl_core._api`), so arrays have the stated shapes, dtypes and memory order.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import VALUE_TYPES, accumulator_dtype, round_to

if TYPE_CHECKING:
    from srigl_core._format.weight import CondensedWeight
    from srigl_core._update import MaskUpdate, UpdateSettings

__all__ = [
    "ACTIVATIONS",
    "OPERATIONS",
    "ArrayKind",
    "Backend",
    "Capabilities",
    "MatmulGradients",
    "PreparedWeight",
    "accumulator_dtype",
    "round_to",
]

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""Names an `activation` argument may take; None means "none"."""

OPERATIONS = ("condensed_matmul", "condensed_matmul_backward", "update_mask")
"""Operations a backend may declare."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Parameters
    ----------
    device : str
        Where its arrays live: "cpu" or "cuda".
    operations : frozenset of str
        Those of `OPERATIONS` that it implements.
    value_dtypes : frozenset of str
        Those of `VALUE_TYPES` that it takes for values and inputs.
    index_dtypes : frozenset of str
        Those of "uint16" and "uint32" that it takes for indices.
    priority : int
        Among the backends that can run here the highest is used when none is named.
    """

    device: str = "cpu"
    operations: frozenset[str] = frozenset(OPERATIONS)
    value_dtypes: frozenset[str] = frozenset(VALUE_TYPES)
    index_dtypes: frozenset[str] = frozenset({"uint16", "uint32"})
    priority: int = 0


@dataclass(frozen=True, eq=False)
class MatmulGradients:
    """Gradients of a condensed matmul; None where not asked for.

    Parameters
    ----------
    x : ndarray or None
        dL/dx, `(..., n_in)`.
    values : ndarray or None
        dL/dvalues, `(n_active, k)`.
    bias : ndarray or None
        dL/dbias, `(n_out,)`.
    """

    x: NDArray[Any] | None = field(default=None)
    values: NDArray[Any] | None = field(default=None)
    bias: NDArray[Any] | None = field(default=None)


class ArrayKind(Protocol):
    """What the public door does with a backend's arrays, where these are not NumPy's.

    An array has NumPy's `shape`, `ndim`, `size`, `dtype`, `reshape` and assignment. The caller's
    may be of any library that `srigl_core._arrays.libraries` knows.
    """

    def computing(self, like: object) -> AbstractContextManager[None]:
        """Return a context to check and compute in, for a call with `like`."""
        ...

    def as_float_array(self, array: object, what: str) -> Any:
        """Return `array` as one of the backend's, of a value type, without a copy.

        Raises
        ------
        ValueTypeError
            If it is none, lives on another device, or holds other numbers; says `what` it is.
        """
        ...

    def as_mask(self, mask: object, shape: tuple[int, ...]) -> Any:
        """Return `mask` as one of the backend's arrays, of bool.

        Raises
        ------
        ValueTypeError
            If it is none, or holds no booleans.
        SriglError
            If it has another shape.
        """
        ...

    def contiguous(self, array: Any) -> Any:
        """Return an array in C order, itself if it is."""
        ...

    def count_not_finite(self, array: Any, mask: Any | None = None) -> int:
        """Return how many numbers, of those where `mask` is True, are NaN or infinite."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a new array."""
        ...

    def as_out(self, out: object, shape: tuple[int, ...], inputs: dict[str, Any]) -> Any:
        """Return `out` as one of the backend's arrays, of the same memory.

        Raises
        ------
        ValueTypeError
            If it is no array of a value type that can be written in place.
        SriglError
            If its shape differs, or it shares memory with one of `inputs`.
        """
        ...

    def as_workspace(self, workspace: object, others: dict[str, Any]) -> Any:
        """Return `workspace` as one of the backend's arrays, of the same memory.

        Raises
        ------
        ValueTypeError
            If it is no array of uint8 that can be written in place.
        SriglError
            If it is not contiguous, or shares memory with one of `others`.
        """
        ...

    def assign(self, target: Any, source: Any) -> None:
        """Copy `source`, an array of the same type and size or 0, to `target`."""
        ...

    def round_to(self, array: Any, dtype: np.dtype[Any]) -> Any:
        """Return `array` rounded once to `dtype`."""
        ...

    def share_memory(self, one: Any, other: Any) -> bool:
        """Whether a view and its array are still of the same memory."""
        ...

    def given_back(self, array: Any, like: object) -> Any:
        """Return a new result in the kind of array that the caller's `like` is."""
        ...


class PreparedWeight(Protocol):
    """A condensed weight in a backend's own layout; immutable, and safe to share among threads.

    It may also have a method ``quick_matmul(x, bias, activation, compact, threads)``, called
    before anything is checked but `threads`. It returns the new result, or None to have the
    arguments checked and `matmul` called; it must not raise, and must honour subnormals itself.
    And it may have ``nanoseconds(batch)``, an estimate of what a product takes with one thread.

    One that has a method ``workspace_bytes(batch, dtype)`` also takes ``workspace``, bytes that the
    caller lends for the time of a call, in `matmul` and `backward`; None where none are lent. The
    method says how many suffice for inputs of that type in C order.
    """

    def describe(self) -> Mapping[str, object]:
        """Return what there is to know of the layout; at least "kernel", "layout", "bytes"."""
        ...

    def matmul(
        self,
        x: NDArray[Any],
        bias: NDArray[Any] | None,
        *,
        activation: str,
        compact: bool,
        out: NDArray[Any],
        threads: int | None,
    ) -> None:
        """Write act(x @ (W*M).T + bias) to `out` (SPEC 2).

        Parameters
        ----------
        x : ndarray, (batch, n_in), batch >= 1
            Any of the value types, any strides; not to be written.
        bias : ndarray, (n_out,), or None
            Of dtype result_type(x, values).
        activation : str
            One of `ACTIVATIONS`.
        compact : bool
            Whether to leave out the columns of ablated neurons.
        out : ndarray, (batch, n_active if compact else n_out)
            Any of the value types, any strides; shares no memory with the inputs. Every element
            is to be written, rounded once from the accumulator.
        threads : int or None
            Threads to use at most; None is the backend's default. Never changes a bit of `out`.
        """
        ...

    def backward(
        self,
        grad: NDArray[Any],
        x: NDArray[Any] | None,
        *,
        out: MatmulGradients,
        threads: int | None,
    ) -> None:
        """Write the gradients that `out` has arrays for (SPEC 2, Backward).

        Parameters
        ----------
        grad : ndarray, (batch, n_out), batch >= 1
            dL/dz, any value type, any strides.
        x : ndarray, (batch, n_in), or None
            The input of the forward pass; None if `out.values` is None.
        out : MatmulGradients
            Arrays of any value type and any strides, `x` `(batch, n_in)`.
        threads : int or None
            As in `matmul`.
        """
        ...

    def with_values(self, weight: CondensedWeight) -> PreparedWeight:
        """Return the same layout for a weight that differs in its values only."""
        ...


class Backend(Protocol):
    """A set of kernels; registered in the entry-point group ``srigl_core.backends``.

    The methods of operations that it does not declare are never called, and may be missing.

    The entry point names a class (or any callable without arguments) that makes one. Making it, or
    importing its module, raises `BackendUnavailableError` where it cannot run, saying what is
    missing and what to install. One whose arrays are not NumPy's has an attribute ``arrays``, an
    `ArrayKind`.
    """

    name: str
    capabilities: Capabilities

    def prepare(self, weight: CondensedWeight) -> PreparedWeight:
        """Return `weight` in this backend's layout."""
        ...

    def update_mask(
        self,
        weight: NDArray[Any],
        grad: NDArray[Any],
        mask: NDArray[Any],
        settings: UpdateSettings,
        *,
        threads: int | None,
    ) -> MaskUpdate:
        """Return the mask update of SPEC 4, bit for bit that of the reference.

        Parameters
        ----------
        weight, grad : ndarray, (n_out, n_in), C order
            Any of the value types; `grad` is finite, and so is `weight` where `mask` is True.
        mask : ndarray of bool, (n_out, n_in), C order
        settings : UpdateSettings
        threads : int or None
            As in `PreparedWeight.matmul`.
        """
        ...
