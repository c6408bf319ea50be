"""Plans: a weight that a backend has laid out, and what can be computed with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, overload

from numpy.typing import ArrayLike

from srigl_core._arrays.checks import check_choice
from srigl_core._arrays.libraries import common_library
from srigl_core._format.packed_weight import PackedWeight
from srigl_core._format.weight import CondensedWeight, QuantizedWeight, check_condensed
from srigl_core._product_plan import ProductPlan, merged_rows
from srigl_core._product_spec import (
    QUANTIZED_INPUTS,
    ArraySpec,
    check_int8_fan_in,
    checked_threads,
    gradient_specs,
)
from srigl_core._registry import check_dtype, get_backend
from srigl_core.contract import Backend, MatmulGradients, PreparedWeight
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["Plan", "QuantizedPlan", "check_inputs", "plan_of", "prepare"]

_GRADIENTS = ("x", "values", "bias")

_gradient_specs = functools.lru_cache(maxsize=256)(gradient_specs)
"""Programs use few shapes, and the checks take the host longer than it takes to find them."""


@overload
def prepare(
    weight: CondensedWeight,
    *,
    inputs: str = "float",
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> Plan: ...


@overload
def prepare(
    weight: QuantizedWeight,
    *,
    inputs: str = "float",
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> QuantizedPlan: ...


def prepare(
    weight: CondensedWeight | QuantizedWeight,
    *,
    inputs: str = "float",
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> Plan | QuantizedPlan:
    """Lay out `weight` for repeated products.

    Parameters
    ----------
    weight : CondensedWeight or QuantizedWeight
    inputs : {"float", "int8"}
        With "float" the inputs stay as they are. With "int8", of a quantised weight only, each row
        of the inputs is quantised too.
    backend : str, Backend or None
        As in `srigl_core.get_backend`.
    threads : int or None
        The most threads to use; None is the backend's default. Never changes the result.

    Returns
    -------
    Plan, or QuantizedPlan for a quantised weight

    Raises
    ------
    SriglError
        If `inputs` does not fit the weight, the fan-in is too large for int8 inputs, or the backend
        that was named does not offer the product.
    ValueTypeError
        If `weight` is not a packed weight, or the backend does not take its dtypes.
    BackendUnavailableError
        If the backend that was named cannot run here.

    Examples
    --------
    >>> import numpy as np, srigl_core
    >>> weight = srigl_core.CondensedWeight.random((4, 6), fan_in=2, rng=0)
    >>> plan = srigl_core.prepare(weight, backend="reference")
    >>> plan(np.ones((3, 6), np.float32)).shape
    (3, 4)
    >>> quantized = srigl_core.prepare(weight.quantize(), inputs="int8", backend="reference")
    >>> quantized(np.ones((3, 6), np.float32)).shape
    (3, 4)
    """
    threads = checked_threads(threads)
    if not isinstance(weight, QuantizedWeight):
        check_condensed(weight)
    check_inputs(weight, inputs)
    if isinstance(weight, QuantizedWeight):
        return _prepare_quantized(weight, inputs, backend, threads)
    chosen = get_backend(backend)
    if "condensed_matmul_backward" not in chosen.capabilities.operations:
        get_backend(chosen, operation="condensed_matmul")
    check_dtype(chosen, "value", "values", weight.dtype)
    check_dtype(chosen, "index", "indices", weight.indices.dtype)
    return Plan(weight, chosen, chosen.prepare(weight), threads)


def check_inputs(weight: PackedWeight, inputs: object) -> None:
    """Check that a product of `weight` may have these `inputs`.

    Raises
    ------
    SriglError
        If `inputs` is none of `QUANTIZED_INPUTS`, or is "int8" and the weight is not quantised or
        its fan-in is too large.
    """
    check_choice(inputs, "inputs", QUANTIZED_INPUTS)
    if inputs == "float":
        return
    if not isinstance(weight, QuantizedWeight):
        raise SriglError(f"inputs={inputs!r} needs a quantised weight; pass weight.quantize()")
    check_int8_fan_in(weight.fan_in)


def _prepare_quantized(
    weight: QuantizedWeight, inputs: str, backend: str | Backend | None, threads: int | None
) -> QuantizedPlan:
    chosen: Any = get_backend(backend, operation="quantized_matmul", inputs=inputs)
    check_dtype(chosen, "index", "indices", weight.indices.dtype)
    prepared = chosen.prepare_quantized(weight, inputs)
    return QuantizedPlan(weight, chosen, prepared, threads, inputs)


@overload
def plan_of(
    weight: CondensedWeight, backend: str | Backend | None = None, inputs: str = "float"
) -> Plan: ...


@overload
def plan_of(
    weight: QuantizedWeight, backend: str | Backend | None = None, inputs: str = "float"
) -> QuantizedPlan: ...


def plan_of(
    weight: CondensedWeight | QuantizedWeight,
    backend: str | Backend | None = None,
    inputs: str = "float",
) -> Plan | QuantizedPlan:
    """Return the plan of a weight for `backend`, made once and kept with the weight."""
    operation = QuantizedPlan.operation if isinstance(weight, QuantizedWeight) else None
    chosen = get_backend(backend, operation=operation, inputs=inputs)
    key = chosen if inputs == "float" else (chosen, inputs)
    plan: Plan | QuantizedPlan | None = weight._plans.get(key)
    if plan is None:
        plan = weight._plans[key] = prepare(weight, inputs=inputs, backend=chosen)
    return plan


@dataclass(frozen=True, eq=False, repr=False)
class Plan(ProductPlan):
    """A condensed weight laid out for one backend; immutable, callable and printable.

    Made by `prepare`. One plan may be called from many threads at once.

    Attributes
    ----------
    weight : CondensedWeight
    backend : Backend
    threads : int or None
    inputs : str
        "float".
    arrays : ArrayOps
        The backend's array operations.
    """

    weight: CondensedWeight
    _prepared: PreparedWeight

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
            Arrays of the library of `grad`.
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
        with self.arrays.execution_context(grad):
            return self._gradients(grad, x, wanted, out, threads, workspace)

    def _gradients(
        self,
        grad: Any,
        x: Any | None,
        wanted: tuple[str, ...],
        out: MatmulGradients | None,
        threads: int | None,
        workspace: Any | None,
    ) -> MatmulGradients:
        weight, arrays, like = self.weight, self.arrays, grad
        outs: dict[str, Any] = dict.fromkeys(wanted)
        if out is not None:
            outs = {name: getattr(out, name) for name in wanted}
        library = common_library(
            {"grad": grad, "x": x if "values" in wanted else None}
            | {f"out.{name}": array for name, array in outs.items()}
        )
        grad = arrays.as_float_array(grad, "grad")
        inputs = {"grad": grad}
        if "values" not in wanted:
            x = None
        elif x is None:
            raise SriglError("the gradient of the values needs x, the forward pass's input")
        else:
            x = inputs["x"] = arrays.as_float_array(x, "x")
        specs = _gradient_specs(
            self._input_spec(grad, "grad"),
            None if x is None else self._input_spec(x, "x"),
            weight.shape,
            ArraySpec(weight.values.shape, weight.dtype),
        )
        results: dict[str, Any] = {}
        others = dict(inputs)
        for name, array in outs.items():
            results[name] = self._result_array(array, *specs[name], others)
            others[f"the gradient of {name}"] = results[name]
        options = self._workspace(workspace, others)
        if math.prod(grad.shape):
            flats = {n: merged_rows(array) if n == "x" else array for n, array in results.items()}
            self._prepared.backward(
                merged_rows(grad),
                None if x is None else merged_rows(x),
                out=MatmulGradients(**flats),
                threads=threads,
                **options,
            )
            for name, flat in flats.items():
                self._copy_back(results[name], flat)
        else:
            for array in results.values():
                arrays.assign(array, 0)
        for name, array in results.items():
            if outs[name] is None:
                outs[name] = arrays.to_caller(array, like)
            else:
                library.written(outs[name])
        return MatmulGradients(**outs)

    def write_gradients(
        self,
        grad: Any,
        x: Any | None,
        *,
        out: MatmulGradients,
        threads: int | None,
        values: Any | None = None,
    ) -> None:
        """Write gradients of checked two-dimensional arrays to `out`, for framework operators.

        Parameters
        ----------
        grad : array of the backend, (batch, n_out), batch >= 1
        x : array of the backend, (batch, n_in), or None
        out : MatmulGradients
            Arrays of the backend; None for gradients that are not asked for.
        threads : int or None
        values : array of the backend, or None
            As in `write_product`.
        """
        with self.arrays.execution_context(grad):
            self._prepared_with(values).backward(grad, x, out=out, threads=threads)

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
        return self.with_weight(self.weight.with_values(values))

    def with_weight(self, weight: CondensedWeight) -> Plan:
        """Return a plan for a weight on the same connections, sharing the packed indices."""
        check_condensed(weight)
        if weight.connections != self.weight.connections:
            raise SriglError("weight has other connections than the plan; prepare it by itself")
        return Plan(weight, self.backend, self._prepared.with_values(weight), self.threads)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedPlan(ProductPlan):
    """A quantised weight laid out for one backend; immutable, callable and printable.

    Made by `prepare`. One plan may be called from many threads at once.

    Attributes
    ----------
    weight : QuantizedWeight
    backend : Backend
    threads : int or None
    inputs : {"float", "int8"}
        Whether the product takes inputs as they are, or quantises each row.
    arrays : ArrayOps
        The backend's array operations.
    """

    operation: ClassVar[str] = "quantized_matmul"

    weight: QuantizedWeight

    def backward(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse: there are no gradients of a quantised weight.

        Raises
        ------
        SriglError
            Always.
        """
        raise SriglError(
            "a quantised weight is for inference and has no gradients; train the weight that it "
            "was made from"
        )


def _checked_wrt(wrt: Iterable[str]) -> tuple[str, ...]:
    try:
        wanted = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    except Exception:  # it may be any object, whose own code is run
        wanted = ()
    if not wanted or any(not isinstance(n, str) or n not in _GRADIENTS for n in wanted):
        raise SriglError(f"wrt={wrt!r} must name one or more of {', '.join(_GRADIENTS)}")
    return tuple(dict.fromkeys(wanted))
