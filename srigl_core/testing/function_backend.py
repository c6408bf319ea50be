"""A bare function as a backend, so that the laws can be tried on it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import result_dtype, round_to
from srigl_core._arrays.operations import HOST_ARRAYS
from srigl_core._format.weight import CondensedWeight
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.contract import OPERATIONS, Capabilities, MatmulGradients
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.mask_update import make_update, srigl_update
from srigl_core.testing.kernel_capabilities import OPTIONAL_SETTINGS, KernelCapabilities, in_full
from srigl_core.testing.law import LawViolation

__all__ = ["FunctionBackend", "declare"]

Function = TypeVar("Function", bound=Callable[..., Any])

_WEIGHT = ("weight", "values", "indices", "active", "n_out", "n_in")
_SETTINGS = tuple(part.name for part in fields(UpdateSettings))
PARAMETERS = {
    "condensed_matmul": ("x", *_WEIGHT, "bias", "activation", "compact", "out", "threads"),
    "condensed_matmul_backward": ("grad", "x", *_WEIGHT, "threads"),
    "update_mask": ("weight", "grad", "mask", *_SETTINGS, "settings", "threads"),
}
"""What a function for an operation may be handed, by the names of its parameters."""


class FunctionBackend:
    """A function that computes one operation, as a `Backend`.

    The function is called with what its parameters are called after, so that it takes what it
    needs and no more; ``**kwargs`` takes everything. For ``condensed_matmul``: `x`, (batch, n_in),
    and of the weight `values` and `indices`, (n_active, k), `active`, (n_active,), `n_out` and
    `n_in`, or `weight`, the `CondensedWeight`; `bias`, (n_out,) or None; `activation`; `compact`;
    `out`, to be written; `threads`, an int or None. It returns (batch, n_out), or (batch, n_active)
    where `compact` is true, in ``np.result_type(x, values)``, or writes to `out`. There is at least
    one row: an empty batch is answered without a call. For ``condensed_matmul_backward``: `grad`,
    (batch, n_out), `x`, the weight and `threads`; it returns dx, (batch, n_in), dvalues,
    (n_active, k), and dbias, (n_out,), in value types of its choice. For ``update_mask``: `weight`,
    `grad` and `mask`, (n_out, n_in), and the settings, by name or as `settings`; it returns the new
    mask, or mask and weight, or a `MaskUpdate`, and raises ValueError where the budget is too small
    (SPEC 4.5). Without `asarray`, the arrays of a weight cannot be written.

    Parameters
    ----------
    function : callable
    op : str or None
        One of `srigl_core.contract.OPERATIONS`; None is "condensed_matmul". What is None here and
        below is what the function was declared with (`declare`).
    capabilities : Capabilities or None
        What it takes on; None is all that its parameters allow. Without `bias` or `activation`
        among these there is none in a problem; without `weight`, `active` and `n_out` no neuron is
        ablated.
    asarray : callable or None
        Makes the function's arrays of NumPy's, which are then in C order; as ``jnp.asarray``.
    index_dtype : dtype-like or None
        What `indices` and `active` are cast to; None leaves uint16 or uint32, and int64.

    Attributes
    ----------
    given : dict of str to object
        Those of `capabilities`, `asarray` and `index_dtype` that it was made with.
    xfails : mapping of str to str
        Laws that are expected to fail, and why.

    Raises
    ------
    SriglError
        If it is a class or a backend, a parameter without a default has another name, there is no
        operation `op`, `index_dtype` is no type of integers, or `out` is to be written by a
        function whose arrays `asarray` makes.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        op: str | None = None,
        *,
        capabilities: Capabilities | None = None,
        asarray: Callable[[NDArray[Any]], Any] | None = None,
        index_dtype: Any | None = None,
    ) -> None:
        if not callable(function) or inspect.isclass(function):
            raise ValueTypeError(
                f"a kernel must be a function, got {function!r}; a backend, or a class that makes "
                f"one, is for srigl_core.testing.verify"
            )
        declared = _declaration_of(function)
        given: dict[str, Any] = {
            "capabilities": capabilities,
            "asarray": asarray,
            "index_dtype": index_dtype,
        }
        self.given = {name: value for name, value in given.items() if value is not None}
        op = op or declared.op
        capabilities = capabilities or declared.capabilities
        asarray = asarray or declared.asarray
        index_dtype = declared.index_dtype if index_dtype is None else index_dtype
        if op not in OPERATIONS:
            raise SriglError(f"op={op!r} is unknown; use one of {', '.join(OPERATIONS)}")
        self.function, self._asarray = function, asarray
        self._index_dtype = None if index_dtype is None else _index_type(index_dtype)
        self._taken = _taken(function, op)
        if asarray is not None and "out" in self._taken:
            raise SriglError(
                "a function whose arrays asarray makes cannot write to out, which is NumPy's; "
                "return the product instead"
            )
        self.name = getattr(function, "__name__", type(function).__name__)
        self.xfails = declared.xfails
        self.capabilities: Capabilities = _capabilities(
            self._taken, op, capabilities, asarray is not None
        )

    def prepare(self, weight: CondensedWeight) -> _FunctionWeight:
        """Return the weight, to be handed to the function at each call."""
        return _FunctionWeight(self, weight)

    def call(self, offered: Mapping[str, Any]) -> Any:
        """Call the function with what it takes of `offered`."""
        given = {name: self._lent(name, offered[name]) for name in self._taken}
        with np.errstate(all="ignore"):
            return self.function(**given)

    def update_mask(
        self,
        weight: NDArray[Any],
        grad: NDArray[Any],
        mask: NDArray[Any],
        settings: UpdateSettings,
        *,
        threads: int | None,
    ) -> MaskUpdate:
        """Return the function's update; what it does not tell is taken to be right."""
        named = {name: getattr(settings, name) for name in _SETTINGS}
        arrays = {"weight": weight, "grad": grad, "mask": mask}
        try:
            found = self.call({**arrays, **named, "settings": settings, "threads": threads})
        except ValueError as error:
            raise SriglError(str(error)) from error
        if isinstance(found, MaskUpdate):
            return found
        parts = found if isinstance(found, tuple) else (found,)
        try:
            new_mask = HOST_ARRAYS.as_mask(parts[0], mask.shape)
        except SriglError as error:
            raise LawViolation(f"the new mask: {error}") from error
        try:
            right = srigl_update(weight, grad, mask, settings)
        except SriglError as error:
            raise LawViolation(f"a mask was returned, expected ValueError: {error}") from error
        update = make_update(
            weight,
            mask,
            new_mask,
            grown_init=settings.grown_init,
            fan_in=right.fan_in,
            threshold=right.threshold,
            salient_counts=right.salient_counts,
        )
        if len(parts) == 1:
            return update
        return replace(update, weight=_host(parts[1], "the new weight"))

    def _lent(self, name: str, given: Any) -> Any:
        if not isinstance(given, np.ndarray):
            return given
        if name in ("indices", "active") and self._index_dtype is not None:
            given = given.astype(self._index_dtype)
        if self._asarray is None:
            return given
        # A copy: what the function writes to its arrays is its own affair then.
        return self._asarray(np.array(given, order="C"))


class _FunctionWeight:
    """A weight, multiplied by a function."""

    def __init__(self, backend: FunctionBackend, weight: CondensedWeight) -> None:
        self._backend, self._weight = backend, weight

    def describe(self) -> Mapping[str, object]:
        """Return what a plan shows."""
        nbytes = self._weight.values.nbytes + self._weight.indices.nbytes
        return {"kernel": self._backend.name, "layout": "condensed", "bytes": nbytes}

    def with_values(self, weight: CondensedWeight) -> _FunctionWeight:
        """Return another weight, multiplied by the function."""
        return _FunctionWeight(self._backend, weight)

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
        """Write what the function returns to `out`, or have it write there."""
        taken = self._backend._taken
        is_compact = compact and "compact" in taken
        columns = self._weight.n_active if is_compact else self._weight.shape[0]
        own = out if columns == out.shape[1] else np.full((len(x), columns), np.nan, out.dtype)
        options = {"activation": activation, "compact": is_compact, "out": own, "threads": threads}
        if "out" in taken:
            own[...] = np.nan  # so that what is not written shows
        found = self._backend.call({"x": x, "bias": bias, **self._parts(), **options})
        if "out" not in taken or (found is not None and found is not own):
            own = _host(found, "the product")
            due = result_dtype(x.dtype, self._weight.dtype)
            if own.shape != (len(x), columns) or own.dtype != due:
                raise LawViolation(
                    f"the product has dtype {own.dtype} and shape {own.shape}, expected {due} and "
                    f"{(len(x), columns)}"
                )
        if own is not out:
            chosen = own if own.shape == out.shape else own[:, self._weight.active]
            out[...] = chosen if chosen.dtype == out.dtype else round_to(chosen, out.dtype)

    def backward(
        self,
        grad: NDArray[Any],
        x: NDArray[Any] | None,
        *,
        out: MatmulGradients,
        threads: int | None,
    ) -> None:
        """Write the gradients that the function returns to `out`."""
        if x is None:  # the function may always want it; what depends on it is not asked for
            x = np.zeros((len(grad), self._weight.shape[1]), grad.dtype)
        found = self._backend.call({"grad": grad, "x": x, **self._parts(), "threads": threads})
        if isinstance(found, MatmulGradients):
            found = tuple(getattr(found, part.name) for part in fields(found))
        if not isinstance(found, tuple) or len(found) != 3:
            raise LawViolation(f"expected dx, dvalues and dbias, got {type(found).__name__}")
        for part, gradient in zip(fields(out), found, strict=True):
            due = getattr(out, part.name)
            if due is None:
                continue
            given = _host(gradient, f"the gradient of {part.name}")
            if given.shape != due.shape:
                raise LawViolation(
                    f"the gradient of {part.name} has shape {given.shape}, expected {due.shape}"
                )
            due[...] = given if given.dtype == due.dtype else round_to(given, due.dtype)

    def _parts(self) -> dict[str, Any]:
        weight = self._weight
        return {
            "weight": weight,
            "values": weight.values,
            "indices": weight.indices,
            "active": weight.active,
            "n_out": weight.shape[0],
            "n_in": weight.shape[1],
        }


def declare(
    op: str = "condensed_matmul",
    *,
    capabilities: Capabilities | None = None,
    asarray: Callable[[NDArray[Any]], Any] | None = None,
    index_dtype: Any | None = None,
    xfails: Mapping[str, str] | None = None,
) -> Callable[[Function], Function]:
    """Return a decorator that notes on a function how it is to be checked.

    Parameters
    ----------
    op, capabilities, asarray, index_dtype
        As in `FunctionBackend`.
    xfails : mapping of str to str, or None
        Laws that are expected to fail, and why.

    Raises
    ------
    ValueTypeError
        By the decorator, for a class: a backend has attributes ``capabilities`` and ``xfails``.

    Examples
    --------
    >>> @declare(capabilities=KernelCapabilities(value_dtypes=frozenset({"float32"})))
    ... def product(x, values, indices):
    ...     return np.einsum("bnk,nk->bn", x[:, indices], values)
    >>> FunctionBackend(product).capabilities.value_dtypes
    frozenset({'float32'})
    """
    noted = _Declaration(op, capabilities, asarray, index_dtype, dict(xfails or {}))

    def decorate(function: Function) -> Function:
        if inspect.isclass(function):
            raise ValueTypeError(
                f"{function.__name__} is a class; give it the attributes capabilities and xfails"
            )
        function.declared = noted  # type: ignore[attr-defined]
        return function

    return decorate


@dataclass(frozen=True)
class _Declaration:
    op: str = "condensed_matmul"
    capabilities: Capabilities | None = None
    asarray: Callable[[NDArray[Any]], Any] | None = None
    index_dtype: Any | None = None
    xfails: Mapping[str, str] = field(default_factory=dict)


def _declaration_of(function: Any) -> _Declaration:
    """Return what a function, or the one that a partial calls, was declared with."""
    while isinstance(function, functools.partial) and not hasattr(function, "declared"):
        function = function.func
    found: _Declaration = getattr(function, "declared", _Declaration())
    return found


def _index_type(given: Any) -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = np.dtype(given)
    except TypeError as error:
        raise SriglError(f"index_dtype={given!r} is no dtype ({error})") from error
    if found.kind not in "iu":
        raise SriglError(f"index_dtype={given!r} is no type of integers; use int32 or int64")
    return found


def _taken(function: Callable[..., Any], op: str) -> frozenset[str]:
    """Return the names that a function is called with."""
    names = PARAMETERS[op]
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise SriglError(
            f"the parameters of {function!r} cannot be told; wrap it in a function of Python"
        ) from error
    if any(part.kind is part.VAR_KEYWORD for part in parameters):
        return frozenset(names)
    for part in parameters:
        strange = part.name not in names and part.default is part.empty
        if part.kind is part.POSITIONAL_ONLY or strange:
            raise SriglError(
                f"the function's parameter {part.name!r} is none that it can be called with for "
                f"{op}; name parameters {', '.join(names)}, or give it a default"
            )
    return frozenset(part.name for part in parameters if part.name in names)


def _capabilities(
    taken: frozenset[str], op: str, given: Capabilities | None, is_converted: bool
) -> KernelCapabilities:
    """Return what is declared, less what a function of those parameters cannot do."""
    able = replace(in_full(given or KernelCapabilities()), operations=frozenset({op}))
    if op == "update_mask":
        named = OPTIONAL_SETTINGS if "settings" in taken else OPTIONAL_SETTINGS & taken
        return replace(able, settings=able.settings & named, out=False)
    is_product = op == "condensed_matmul"
    return replace(
        able,
        bias=able.bias and (not is_product or "bias" in taken),
        activations=able.activations
        if not is_product or "activation" in taken
        else frozenset({"none"}),
        ablation=able.ablation and not taken.isdisjoint({"weight", "active", "n_out"}),
        strides=able.strides and not is_converted,
        out=able.out and "out" in taken,
    )


def _host(found: Any, what: str) -> NDArray[Any]:
    """Return a result, of whatever library, as an array of NumPy."""
    try:
        return HOST_ARRAYS.as_float_array(found, what)
    except SriglError as error:
        raise LawViolation(str(error)) from error
