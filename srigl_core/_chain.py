"""Chains: the plans of a stack of layers, called as one (SPEC 7)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import numpy as np

from srigl_core._activations import activation_named
from srigl_core._arrays.checks import check_flag
from srigl_core._arrays.dtypes import accumulator_dtype
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._arrays.immutable import immutable
from srigl_core._arrays.libraries import common_library, device_of
from srigl_core._arrays.operations import HOST_ARRAYS, ArrayOps
from srigl_core._fast_path import FastPath
from srigl_core._format.packed_weight import PackedWeight
from srigl_core._format.weight import QuantizedWeight
from srigl_core._plan import Plan, QuantizedPlan, plan_of
from srigl_core._product_plan import BoundToProcess
from srigl_core._product_spec import ArraySpec, checked_threads, product_spec
from srigl_core._registry import get_backend
from srigl_core.contract import Backend, ChainLayer
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["Chain", "LayerPlan", "chain", "in_layer", "parsed_layer"]

Array = TypeVar("Array")


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer of a chain.

    Attributes
    ----------
    plan : Plan or QuantizedPlan
    bias : array of the backend, (n_out,), or None
        A copy.
    activation : str
    """

    plan: Plan | QuantizedPlan
    bias: Any | None
    activation: str

    def describe(self) -> dict[str, object]:
        """Describe the layer: its kernel, and what follows the sums."""
        kernel = self.plan._prepared.describe()["kernel"]
        inputs = {} if self.plan.inputs == "float" else {"inputs": self.plan.inputs}
        bias = self.bias is not None
        return {"kernel": kernel, **inputs, "bias": bias, "activation": self.activation}


def chain(
    layers: Iterable[tuple[Any, ...]],
    *,
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> Chain:
    """Lay out a stack of layers, each of which takes the result of the one before.

    Parameters
    ----------
    layers : iterable of tuple
        One or more of (weight, bias, activation): a `CondensedWeight` or `QuantizedWeight`; an
        array, (n_out,), or None; and the name of an activation, or None. A quantised weight may be
        followed by a fourth, its `inputs`, "float" or "int8". Biases are copied.
    backend : str, Backend or None
        As in `srigl_core.get_backend`; the same for all layers.
    threads : int or None
        The most threads to use; None is the backend's default. Never changes the result.

    Returns
    -------
    Chain

    Raises
    ------
    SriglError
        If there is no layer, a layer has not as many inputs as the one before has neurons, or an
        argument of a layer is not valid. The message names the layer.
    ValueTypeError
        If a layer is no such tuple, or a part of it has a wrong type.
    BackendUnavailableError
        If the backend that was named cannot run here.

    Notes
    -----
    SPEC 7. The chain shares what was laid out with the plans that a weight keeps. Where the backend
    computes chains ("chain" is one of its operations) and `x` is in C order and of the dtype that
    all layers sum, float32 or float64, a call is one native call; it saves about a microsecond a
    layer.

    Examples
    --------
    >>> import numpy as np, srigl_core
    >>> hidden = srigl_core.CondensedWeight.random((8, 6), fan_in=2, rng=0)
    >>> output = srigl_core.CondensedWeight.random((3, 8), fan_in=4, rng=1)
    >>> layers = [(hidden, np.zeros(8), "relu"), (output, None, None)]
    >>> model = srigl_core.chain(layers, backend="reference")
    >>> model(np.ones((5, 6), np.float32)).shape
    (5, 3)
    """
    try:
        parts = [tuple(layer) for layer in layers]
    except Exception as error:  # it may be any object, whose own code is run
        raise ValueTypeError(
            f"layers must be a list of tuples (weight, bias, activation), got "
            f"{type(layers).__name__}"
        ) from error
    if not parts:
        raise SriglError("layers is empty; a chain has one layer at least")
    threads = checked_threads(threads)
    parsed = [in_layer(i, parsed_layer, layer) for i, layer in enumerate(parts)]
    for i, (before, after) in enumerate(itertools.pairwise(parsed)):
        if after[0].shape[1] != before[0].shape[0]:
            raise SriglError(
                f"layer {i + 1} has n_in={after[0].shape[1]}, but layer {i} has n_out="
                f"{before[0].shape[0]}: a layer takes the result of the one before"
            )
    chosen = _backend_for(parsed, backend)
    plans = [in_layer(i, _planned, layer, chosen) for i, layer in enumerate(parsed)]
    return Chain(tuple(plans), chosen, threads)


_Parsed = tuple[PackedWeight, Any, str, str]


def in_layer(layer: object, function: Any, *arguments: Any) -> Any:
    """Call a function; its errors name the layer, by a number or a name in quotes."""
    try:
        return function(*arguments)
    except SriglError as error:
        raise type(error)(f"layer {layer}: {error}") from error


def parsed_layer(layer: tuple[Any, ...]) -> _Parsed:
    """Return weight, bias, activation and inputs.

    Raises
    ------
    SriglError
        If there is no activation of that name.
    ValueTypeError
        If it is no such tuple.
    """
    if not 3 <= len(layer) <= 4 or not isinstance(layer[0], PackedWeight):
        kinds = ", ".join(type(part).__name__ for part in layer)
        raise ValueTypeError(
            f"expected (weight, bias, activation), and for a quantised weight inputs, got "
            f"({kinds}); the weight is a CondensedWeight or QuantizedWeight"
        )
    weight, bias, activation, *inputs = layer
    return weight, bias, activation_named(activation).name, *(inputs or ["float"])


def _backend_for(layers: list[_Parsed], backend: str | Backend | None) -> Backend:
    """Return the backend that was named, or the preferred one for what few backends offer."""
    quantized = [inputs for weight, *_, inputs in layers if isinstance(weight, QuantizedWeight)]
    if not quantized:
        return get_backend(backend)
    inputs = "int8" if "int8" in quantized else "float"
    return get_backend(backend, operation="quantized_matmul", inputs=inputs)


def _planned(layer: _Parsed, backend: Backend) -> LayerPlan:
    weight, bias, activation, inputs = layer
    plan: Plan | QuantizedPlan = plan_of(weight, backend, inputs)  # type: ignore[call-overload]
    get_backend(backend, operation=plan.operation, inputs=inputs)
    if bias is not None:
        bias = _own(bias, plan.arrays)
        if bias.shape != weight.shape[:1]:
            raise SriglError(
                f"bias has shape {tuple(bias.shape)}, but needs one number for each of the n_out="
                f"{weight.shape[0]} neurons"
            )
    return LayerPlan(plan, bias, activation)


def _own(bias: Any, arrays: ArrayOps) -> Any:
    """Return a copy of a bias as an array of the backend; a bias on the host may be moved."""
    of = HOST_ARRAYS if device_of(bias) == "cpu" else arrays
    with of.execution_context(bias):
        host = of.to_host(of.as_float_array(bias, "bias"))
    return immutable(host) if arrays is HOST_ARRAYS else arrays.from_host(host)


@dataclass(frozen=True, eq=False, repr=False)
class Chain(FastPath, BoundToProcess):
    """The plans of a stack of layers; immutable, callable and printable.

    Made by `chain`. One chain may be called from many threads at once. It is for inference and
    has no gradients.

    Attributes
    ----------
    layers : tuple of LayerPlan
    backend : Backend
    threads : int or None
    arrays : ArrayOps
        The backend's array operations.
    """

    layers: tuple[LayerPlan, ...]
    backend: Backend
    threads: int | None
    arrays: ArrayOps = field(init=False)
    _matmul_fast: Callable[..., None] | None = field(init=False)
    _usual: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        first, last = self.layers[0].plan.weight, self.layers[-1].plan.weight
        dtypes = {accumulator_dtype(layer.plan.weight.float_dtype) for layer in self.layers}
        dtype = dtypes.pop()
        fast = None if dtypes else self._native(dtype)
        usual = (dtype, last.shape[0], first.shape[1], last.n_active == last.shape[0])
        object.__setattr__(self, "arrays", getattr(self.backend, "arrays", HOST_ARRAYS))
        object.__setattr__(self, "_matmul_fast", fast)
        object.__setattr__(self, "_usual", usual)

    def _native(self, dtype: np.dtype[Any]) -> Any | None:
        """Return the backend's own function for this chain, for arrays of a dtype, or None."""
        if "chain" not in self.backend.capabilities.operations:
            return None
        offered: Any = self.backend
        layers = []
        for layer in self.layers:
            bias = layer.bias
            if bias is not None:
                with honour_subnormals():
                    bias = immutable(layer.plan.arrays.round_to(bias, dtype))
            code = activation_named(layer.activation).code
            layers.append(ChainLayer(layer.plan._prepared, bias, code))
        return offered.chain(layers)

    def __call__(
        self,
        x: Array,
        *,
        out: Any | None = None,
        compact: bool = False,
        threads: int | None = None,
    ) -> Array:
        """Return the result of the last layer.

        Parameters
        ----------
        x : array, (..., n_in)
            As in `srigl_core.condensed_matmul`.
        out : array, (..., n_out) or (..., n_active), or None
            Array for the last layer's result, of any value type and of the library of `x`.
        compact : bool
            Return only the columns of the last layer's active neurons.
        threads : int or None
            Overrides the chain's.

        Returns
        -------
        array, (..., n_out), or (..., n_active) if `compact`
            An array of the library of `x`: bit for bit what the plans give one after the other.

        Raises
        ------
        SriglError
            If a shape does not fit, or `out` cannot be written.
        ValueTypeError
            If a dtype is not supported, or float16 meets bfloat16; the message names the layer.
        """
        threads = self.threads if threads is None else checked_threads(threads)
        result: Array | None = self.fast_product(x, None, None, compact, threads, out)
        if result is not None:
            return result
        with self.arrays.execution_context(x):
            last: Array = self._call_each(x, out, compact, threads)
        return last

    def is_native_for(self, dtype: np.dtype[Any]) -> bool:
        """Return whether the backend computes all layers in one call for inputs of that dtype."""
        return self._matmul_fast is not None and bool(dtype == self._usual[0])

    def _call_each(self, x: Any, out: Any | None, compact: bool, threads: int | None) -> Any:
        """Call the plans one after the other."""
        arrays, like = self.arrays, x
        compact = check_flag(compact, "compact")
        library = common_library({"x": x, "out": out})
        x = arrays.as_float_array(x, "x")
        shape = self._result_shape(ArraySpec(tuple(x.shape), arrays.dtype(x)), compact=compact)
        result = None if out is None else arrays.as_out(out, shape, {"x": x})
        for layer in self.layers[:-1]:
            x = layer.plan(x, layer.bias, activation=layer.activation, threads=threads)
        last = self.layers[-1]
        options: dict[str, Any] = {"activation": last.activation, "threads": threads}
        result = last.plan(x, last.bias, compact=compact, out=result, **options)
        if out is None:
            return arrays.to_caller(result, like)
        library.written(out)
        return out

    def _result_shape(self, spec: ArraySpec, *, compact: bool) -> tuple[int, ...]:
        """Check the inputs of all layers, and return the shape of the result."""
        for i, layer in enumerate(self.layers):
            weight = layer.plan.weight
            checked = in_layer(i, product_spec, spec, weight.shape, weight.float_dtype)
            spec = ArraySpec(checked.shape, checked.dtype)
        return (*spec.shape[:-1], weight.n_active) if compact else spec.shape

    def backward(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse: a chain is for inference.

        Raises
        ------
        SriglError
            Always.
        """
        raise SriglError(
            "a chain is for inference and has no gradients; call the layers' plans one after the "
            "other, whose backward gives them"
        )

    def describe(self) -> dict[str, object]:
        """Describe the backend, how calls are made, and each layer, in a new dict."""
        one = self._matmul_fast is not None
        return {
            "backend": self.backend.name,
            "threads": "backend's default" if self.threads is None else self.threads,
            "calls": "one for all layers" if one else "one for each layer",
            "layers": [layer.describe() for layer in self.layers],
        }

    def __repr__(self) -> str:
        facts = self.describe()
        facts.pop("layers")
        lines = [f"Chain({', '.join(f'{name}={value}' for name, value in facts.items())},"]
        for i, layer in enumerate(self.layers):
            parts = ", ".join(f"{name}={value}" for name, value in layer.describe().items())
            lines.append(f"  {i}: {layer.plan.weight!r}, {parts}")
        return "\n".join(lines) + "\n)"
