"""The public door of the condensed matmul: check the arguments once, then call the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from srigl_core._arrays.checks import check_integer
from srigl_core._arrays.dtypes import result_dtype, value_dtype
from srigl_core._arrays.libraries import common_library, library_of
from srigl_core._arrays.operations import HOST_ARRAYS
from srigl_core._recommendation import dense_nanoseconds
from srigl_core._registry import check_dtype, get_backend
from srigl_core.contract import (
    ACTIVATIONS,
    ArrayKind,
    Backend,
    MatmulGradients,
    PreparedWeight,
)
from srigl_core.errors import SriglError, ValueTypeError

if TYPE_CHECKING:
    from srigl_core._format.weight import CondensedWeight

__all__ = ["Plan", "check_condensed", "checked_threads", "prepare"]

Array = TypeVar("Array")

_BATCHES_DESCRIBED = (1, 64, 256)
_GRADIENTS = ("x", "values", "bias")


def prepare(
    weight: CondensedWeight, *, backend: str | Backend | None = None, threads: int | None = None
) -> Plan:
    """Lay out `weight` for repeated products.

    Parameters
    ----------
    weight : CondensedWeight
    backend : str, Backend or None
        As in `srigl_core.get_backend`.
    threads : int or None
        Threads to use at most; None is the backend's default. Never changes the result.

    Returns
    -------
    Plan

    Raises
    ------
    ValueTypeError
        If `weight` is no condensed weight, or the backend does not take its dtypes.
    BackendUnavailableError
        If the backend asked for cannot run here.

    Examples
    --------
    >>> import numpy as np, srigl_core
    >>> weight = srigl_core.CondensedWeight.random((4, 6), fan_in=2, rng=0)
    >>> plan = srigl_core.prepare(weight, backend="reference")
    >>> plan(np.ones((3, 6), np.float32)).shape
    (3, 4)
    """
    check_condensed(weight)
    chosen = get_backend(backend)
    if "condensed_matmul_backward" not in chosen.capabilities.operations:
        get_backend(chosen, operation="condensed_matmul")
    check_dtype(chosen, "values", weight.dtype)
    check_dtype(chosen, "indices", weight.indices.dtype)
    return Plan(weight, chosen, chosen.prepare(weight), checked_threads(threads))


class Plan:
    """A condensed weight laid out for one backend; immutable, callable and printable.

    Made by `prepare`. One plan may be called from many threads at once.

    Attributes
    ----------
    weight : CondensedWeight
    backend : Backend
    threads : int or None
    """

    __slots__ = (
        "__weakref__",  # which jax.jit asks for before it calls
        "_arrays",
        "_prepared",
        "_quick_matmul",
        "backend",
        "threads",
        "weight",
    )

    weight: CondensedWeight
    backend: Backend
    threads: int | None
    _arrays: ArrayKind
    _prepared: PreparedWeight
    _quick_matmul: Callable[..., Any]

    def __init__(
        self,
        weight: CondensedWeight,
        backend: Backend,
        prepared: PreparedWeight,
        threads: int | None,
    ) -> None:
        quick = getattr(prepared, "quick_matmul", _not_quick)
        arrays = getattr(backend, "arrays", HOST_ARRAYS)
        values = (arrays, prepared, quick, backend, threads, weight)
        for name, value in zip(self.__slots__[1:], values, strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a plan is immutable; call prepare(...) or with_values(...)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a plan is immutable; call prepare(...) or with_values(...)")

    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    def __reduce__(self) -> Any:
        raise ValueTypeError("a plan belongs to its process; pickle its weight, and prepare that")

    def __call__(
        self,
        x: Array,
        bias: Any | None = None,
        *,
        activation: str | None = None,
        compact: bool = False,
        out: Any | None = None,
        threads: int | None = None,
        workspace: Any | None = None,
    ) -> Array:
        """Return the product; arguments and errors are those of `srigl_core.condensed_matmul`.

        Parameters
        ----------
        x : array, (..., n_in)
        bias : array, (n_out,), or None
        activation : {None, "none", "relu", "gelu", "gelu_tanh", "silu"}
        compact : bool
        out : array, (..., n_out) or (..., n_active), or None
        threads : int or None
            Overrides the plan's.
        workspace : array of uint8, (at least `workspace_bytes`,), or None
            Memory for the time of the call, of a backend on a GPU; None takes it from a pool.

        Returns
        -------
        array, (..., n_out), or (..., n_active) if `compact`
            Of the kind that `x` is.
        """
        threads = self.threads if threads is None else checked_threads(threads)
        if out is None and workspace is None:
            quick: Array | None = self._quick_matmul(x, bias, activation, compact, threads)
            if quick is None and type(x) is not np.ndarray:
                quick = self._quick_lent(x, bias, activation, compact, threads)
            if quick is not None:
                return quick
        with self._arrays.computing(x):
            product: Array = self._multiply(x, bias, activation, compact, out, threads, workspace)
            return product

    def _quick_lent(self, x: Any, bias: Any | None, *options: Any) -> Any | None:
        """Return the quick product of another library's arrays in its kind, or None."""
        library = library_of(x)
        lent = None if self._quick_matmul is _not_quick else library.lend_at_once(x)
        if lent is None:
            return None
        if bias is not None:
            is_alike = type(bias) is type(x) or library_of(bias) is library
            bias = library.lend_at_once(bias) if is_alike else None
            if bias is None:
                return None
        product = self._quick_matmul(lent, bias, *options)
        return None if product is None else library.adopt(product, x)

    def _multiply(
        self,
        given: Any,
        bias: Any | None,
        activation: str | None,
        compact: bool,
        out: Any | None,
        threads: int | None,
        workspace: Any | None,
    ) -> Any:
        weight, arrays = self.weight, self._arrays
        n_out, n_in = weight.shape
        if "condensed_matmul" not in self.backend.capabilities.operations:
            get_backend(self.backend, operation="condensed_matmul")
        library = common_library({"x": given, "bias": bias, "out": out})
        x = arrays.as_float_array(given, "x")
        if x.ndim == 0 or x.shape[-1] != n_in:
            raise SriglError(
                f"x has shape {x.shape}, but its last axis must be the weight's n_in={n_in} "
                f"(weight {weight.shape})"
            )
        kind = self._result_dtype(x, "x")
        if bias is not None:
            bias = arrays.as_float_array(bias, "bias")
            if bias.shape != (n_out,):
                raise SriglError(
                    f"bias has shape {bias.shape}, but needs one number for each of the n_out="
                    f"{n_out} neurons, ablated ones included: ({n_out},)"
                )
        activation = "none" if activation is None else activation
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise SriglError(f"activation={activation!r} is unknown; use {', '.join(ACTIVATIONS)}")
        shape = (*x.shape[:-1], weight.n_active if compact else n_out)
        inputs = {"x": x} if bias is None else {"x": x, "bias": bias}
        result = self._result_array(out, shape, kind, inputs)
        lent = self._lent(workspace, {**inputs, "out": result})
        if result.size:
            flat = _rows(result)
            self._prepared.matmul(
                _rows(x),
                None if bias is None else arrays.round_to(bias, kind),
                activation=activation,
                compact=compact,
                out=flat,
                threads=threads,
                **lent,
            )
            self._copy_back(result, flat)
        if out is None:
            return arrays.given_back(result, given)
        library.written(out)
        return out

    def backward(
        self,
        grad: Any,
        x: Any | None = None,
        *,
        wrt: Iterable[str] = _GRADIENTS,
        out: MatmulGradients | None = None,
        threads: int | None = None,
        workspace: Any | None = None,
    ) -> MatmulGradients:
        """Return the gradients; arguments and errors: `srigl_core.condensed_matmul_backward`.

        Parameters
        ----------
        grad : array, (..., n_out)
        x : array, (..., n_in), or None
        wrt : iterable of {"x", "values", "bias"}
        out : MatmulGradients or None
        threads : int or None
            Overrides the plan's.
        workspace : array of uint8, (at least `workspace_bytes`,), or None
            As in a product.

        Returns
        -------
        MatmulGradients
            Arrays of the kind that `grad` is.
        """
        wanted = _checked_wrt(wrt)
        if out is not None and not isinstance(out, MatmulGradients):
            raise ValueTypeError(
                f"out must be a MatmulGradients, got {type(out).__name__}; for example "
                f"out=MatmulGradients(x=array)"
            )
        if "condensed_matmul_backward" not in self.backend.capabilities.operations:
            get_backend(self.backend, operation="condensed_matmul_backward")
        threads = self.threads if threads is None else checked_threads(threads)
        with self._arrays.computing(grad):
            return self._gradients(grad, x, wanted, out, threads, workspace)

    def _gradients(
        self,
        given: Any,
        x: Any | None,
        wanted: tuple[str, ...],
        out: MatmulGradients | None,
        threads: int | None,
        workspace: Any | None,
    ) -> MatmulGradients:
        weight, arrays = self.weight, self._arrays
        n_out, n_in = weight.shape
        outs: dict[str, Any] = dict.fromkeys(wanted)
        if out is not None:
            outs = {name: getattr(out, name) for name in wanted}
        library = common_library(
            {"grad": given, "x": x if "values" in wanted else None}
            | {f"out.{name}": array for name, array in outs.items()}
        )
        grad = arrays.as_float_array(given, "grad")
        if grad.ndim == 0 or grad.shape[-1] != n_out:
            raise SriglError(
                f"grad has shape {grad.shape}, but its last axis must be the weight's "
                f"n_out={n_out} (weight {weight.shape}); compact gradients are not taken"
            )
        inputs = {"grad": grad}
        if "values" in wanted:
            if x is None:
                raise SriglError("the gradient of the values needs x, the forward pass's input")
            x = inputs["x"] = arrays.as_float_array(x, "x")
            if x.shape != (*grad.shape[:-1], n_in):
                raise SriglError(
                    f"x has shape {x.shape}, but grad of shape {grad.shape} and a weight "
                    f"{weight.shape} need {(*grad.shape[:-1], n_in)}"
                )
        else:
            x = None
        results = self._gradient_arrays(grad, x, outs, inputs)
        lent = self._lent(workspace, inputs | {f"out.{name}": a for name, a in results.items()})
        if grad.size:
            flats = {n: _rows(array) if n == "x" else array for n, array in results.items()}
            self._prepared.backward(
                _rows(grad),
                None if x is None else _rows(x),
                out=MatmulGradients(**flats),
                threads=threads,
                **lent,
            )
            for name, flat in flats.items():
                self._copy_back(results[name], flat)
        else:
            for array in results.values():
                arrays.assign(array, 0)
        for name, array in results.items():
            if outs[name] is None:
                outs[name] = arrays.given_back(array, given)
            else:
                library.written(outs[name])
        return MatmulGradients(**outs)

    def workspace_bytes(self, batch: int, dtype: DTypeLike | None = None) -> int:
        """Return how many bytes of `workspace` suffice for a call with inputs in C order.

        Parameters
        ----------
        batch : int
            Rows of x, at most.
        dtype : dtype or None
            Of x, the gradient and the results; None is the weight's.

        Returns
        -------
        int
            0 for a backend that takes no workspace.
        """
        count = getattr(self._prepared, "workspace_bytes", None)
        batch = check_integer(batch, "batch", least=0)
        kind = value_dtype(self.weight.dtype if dtype is None else dtype, "dtype")
        return 0 if count is None or not batch else int(count(batch, kind))

    def with_values(self, values: ArrayLike) -> Plan:
        """Return a plan for other values on the same connections, sharing the packed indices.

        Parameters
        ----------
        values : array, (n_active, k)
            Of the weight's dtype. Copied.

        Raises
        ------
        SriglError
            If the shape or the dtype differ.
        """
        weight = self.weight.with_values(values)
        return Plan(weight, self.backend, self._prepared.with_values(weight), self.threads)

    def describe(self) -> dict[str, object]:
        """Return the backend, the kernel, the layout and its bytes, as a new dict.

        And, where the backend has a model of its speed, what that says of the dense product.
        """
        facts = {
            "backend": self.backend.name,
            "threads": "backend's default" if self.threads is None else self.threads,
            **self._prepared.describe(),
        }
        for batch in _BATCHES_DESCRIBED:
            ours = self.nanoseconds(batch)
            if ours is not None:
                times = dense_nanoseconds(self.weight, batch) / ours
                verdict = "" if times >= 1 else ": dense is faster"
                facts[f"estimate at batch {batch}"] = f"{times:.1f}x dense{verdict}"
        return facts

    def nanoseconds(self, batch: int) -> float | None:
        """Return about what a product takes with one thread, or None if the backend cannot tell.

        Parameters
        ----------
        batch : int
            Rows of x.
        """
        estimate = getattr(self._prepared, "nanoseconds", None)
        return None if estimate is None else float(estimate(batch))

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value}" for name, value in self.describe().items())
        return f"Plan({self.weight!r}, {facts})"

    def _result_dtype(self, array: NDArray[Any], what: str) -> np.dtype[Any]:
        check_dtype(self.backend, what, array.dtype)
        return result_dtype(array.dtype, self.weight.dtype)

    def _gradient_arrays(
        self,
        grad: NDArray[Any],
        x: NDArray[Any] | None,
        outs: dict[str, Any],
        inputs: dict[str, NDArray[Any]],
    ) -> dict[str, NDArray[Any]]:
        product = self._result_dtype(grad, "grad")
        at_least = np.dtype(np.float32)
        if x is not None:
            self._result_dtype(x, "x")
            result_dtype(grad.dtype, x.dtype)
        taking_part = [grad.dtype, self.weight.dtype, *([] if x is None else [x.dtype])]
        kinds = {
            "x": product,
            "values": np.result_type(at_least, *taking_part),
            "bias": np.result_type(at_least, grad.dtype),
        }
        n_out, n_in = self.weight.shape
        shapes = {
            "x": (*grad.shape[:-1], n_in),
            "values": self.weight.values.shape,
            "bias": (n_out,),
        }
        results: dict[str, NDArray[Any]] = {}
        others = dict(inputs)
        for name, out in outs.items():
            results[name] = self._result_array(out, shapes[name], kinds[name], others)
            others[f"the gradient of {name}"] = results[name]
        return results

    def _result_array(
        self,
        out: object,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        inputs: dict[str, NDArray[Any]],
    ) -> Any:
        if out is None:
            return self._arrays.empty(shape, dtype)
        return self._arrays.as_out(out, shape, inputs)

    def _copy_back(self, array: NDArray[Any], flat: NDArray[Any]) -> None:
        if not self._arrays.share_memory(array, flat):
            self._arrays.assign(array, flat.reshape(array.shape))

    def _lent(self, workspace: Any | None, others: dict[str, Any]) -> dict[str, Any]:
        """Return what the kernels are told of the caller's workspace."""
        if workspace is None:
            return {}
        if not hasattr(self._prepared, "workspace_bytes"):
            raise SriglError(f"backend {self.backend.name!r} takes no workspace; leave it out")
        return {"workspace": self._arrays.as_workspace(workspace, others)}


def _not_quick(*arguments: object) -> None:
    """Stand in for a backend that has no `quick_matmul`."""


def check_condensed(weight: object) -> None:
    """Check that `weight` is a condensed weight.

    Raises
    ------
    ValueTypeError
        If it is anything else, a dense or CSR weight for example.
    """
    # Not by its class: its module imports this one.
    if not (hasattr(weight, "indices") and hasattr(weight, "active")):
        raise ValueTypeError(
            f"weight must be a CondensedWeight, got {type(weight).__name__}; make one with "
            f"CondensedWeight.from_dense(weight, mask)"
        )


def checked_threads(threads: int | None) -> int | None:
    """Return `threads`, at least 1, or None for the backend's default.

    Raises
    ------
    SriglError
        If it is less than 1, or no integer.
    """
    if threads is None or (type(threads) is int and threads > 0):  # what it mostly is, quickly
        return threads
    return check_integer(threads, "threads", least=1)


def _checked_wrt(wrt: Iterable[str]) -> tuple[str, ...]:
    try:
        wanted = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    except TypeError:
        wanted = ()
    if not wanted or any(name not in _GRADIENTS for name in wanted):
        raise SriglError(f"wrt={wrt!r} must name one or more of {', '.join(_GRADIENTS)}")
    return tuple(dict.fromkeys(wanted))


def _rows(array: NDArray[Any]) -> NDArray[Any]:
    """Return `array` with its leading axes as one: a view, or a copy where strides forbid one."""
    return array.reshape(-1, array.shape[-1])
