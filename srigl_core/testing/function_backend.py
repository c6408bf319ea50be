"""A function as a backend, so that the laws can be tried on it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import VALUE_TYPES, result_dtype, round_to
from srigl_core._arrays.operations import HOST_ARRAYS
from srigl_core._format.packed_weight import PackedWeight
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._update import CondensedUpdate, GradientRows, MaskUpdate, UpdateSettings
from srigl_core.contract import OPERATIONS, Capabilities, MatmulGradients
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.mask_update import make_update, srigl_update
from srigl_core.testing.kernel_capabilities import REMAP_SETTINGS, KernelCapabilities, completed
from srigl_core.testing.law import LawViolation

__all__ = ["FunctionBackend", "declare"]

Function = TypeVar("Function", bound=Callable[..., Any])

_WEIGHT = ("weight", "values", "indices", "active", "n_out", "n_in")
_SETTINGS = ("settings", *(part.name for part in fields(UpdateSettings)))
PARAMETERS = {
    "condensed_matmul": ("x", *_WEIGHT, "bias", "activation", "compact", "out", "threads"),
    "condensed_matmul_backward": ("grad", "x", *_WEIGHT, "threads"),
    "quantized_matmul": (
        *("x", *_WEIGHT, "scale", "inputs", "bias", "activation", "compact", "out", "threads"),
    ),
    "update_mask": ("weight", "grad", "mask", *_SETTINGS, "threads"),
    "update_condensed": (*_WEIGHT, "gradient_rows", "block_rows", *_SETTINGS, "threads"),
    "remap_state": ("state", "mask", "new_mask", "start"),
    "remap_condensed": ("state", "weight", "update", "source", "start"),
}
"""The parameters that a function for an operation may have."""


class FunctionBackend:
    """A function that computes one operation, as a `Backend`.

    The function is called with the arguments that its parameters name; ``**kwargs`` takes all of
    them. Parameters with a default may have other names. The arguments are

    - for products, gradients and ``update_condensed``: `weight`, the `CondensedWeight`, and its
      parts `values` and `indices`, (n_active, k), `active`, (n_active,), `n_out` and `n_in`;
    - for all operations but remaps: `threads`, an int or None;
    - for ``condensed_matmul``: `x`, (batch, n_in); `bias`, (n_out,) or None; `activation`;
      `compact`; `out`, an array to write to. The function returns (batch, n_out), or
      (batch, n_active) if `compact`, in dtype ``np.result_type(x, values)``, or it writes to
      `out`;
    - for ``quantized_matmul``: the same, where `weight` is the `QuantizedWeight`, with its part
      `scale`, (n_active,), and `inputs` is "float" or "int8". It returns dtype
      ``np.result_type(x, scale)``. A function without the parameter `inputs` computes the one
      product that its capabilities declare as `quantized_inputs`;
    - for ``condensed_matmul_backward``: `grad`, (batch, n_out), and `x`. It returns dx,
      (batch, n_in), dvalues, (n_active, k), and dbias, (n_out,), each of any value type;
    - for ``update_mask``: `weight`, `grad` and `mask`, (n_out, n_in), and the settings, by name or
      as `settings`. It returns the new mask, or mask and weight, or a `MaskUpdate`;
    - for ``update_condensed``: `gradient_rows` and `block_rows`, as
      `srigl_core.contract.CondensedUpdater` describes them, and the settings. It returns a
      `CondensedUpdate`;
    - for ``remap_state``: `state`, an array of any dtype, and the masks before and after an update,
      `mask` and `new_mask`, all (n_out, n_in); `start`, the number that state begins with. It
      returns the new state, (n_out, n_in);
    - for ``remap_condensed``: `weight`, the `CondensedWeight` before an update, and `state`, of its
      values, (n_active, k); `update`, the `CondensedUpdate`, and its `source`; `start`. It returns
      the new state, in the shape of `source`.

    Updates raise ValueError if the budget is too small (SPEC 4.5).

    An empty batch is answered without a call. Without `asarray`, the arrays of a weight are
    read-only.

    Parameters
    ----------
    function : callable
    op : str or None
        One of `srigl_core.contract.OPERATIONS` other than "chain", "remap_state" or
        "remap_condensed". For this and the options below, None is what the function was declared
        with (`declare`); the default is "condensed_matmul".
    capabilities : Capabilities or None
        What the function can do; by default all that its parameters allow. Without the parameter
        `bias` or `activation` problems have none; without `weight`, `active` and `n_out` no neuron
        is ablated.
    asarray : callable or None
        Converts NumPy arrays, which are then in C order, to the function's, as ``jnp.asarray``.
    index_dtype : dtype-like or None
        The dtype to cast `indices` and `active` to; by default they stay uint16 or uint32, and
        int64.

    Attributes
    ----------
    options : dict of str to object
        Those of `capabilities`, `asarray` and `index_dtype` that were passed here.
    xfails : mapping of str to str
        The laws that are expected to fail, each with a reason.

    Raises
    ------
    SriglError
        If `function` is a class or a backend, a parameter without a default has another name,
        there is no operation `op`, `index_dtype` is not an integer dtype, or the function has a
        parameter `out` although `asarray` converts its arrays.
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
        declared = _declared(function)
        self.options = _not_none(
            capabilities=capabilities, asarray=asarray, index_dtype=index_dtype
        )
        op = op or declared.get("op", "condensed_matmul")
        if op not in PARAMETERS:
            fault = "is for backends, not for functions" if op in OPERATIONS else "is unknown"
            raise SriglError(f"op={op!r} {fault}; use one of {', '.join(PARAMETERS)}")
        options = {**declared, **self.options}
        self.function, self._asarray = function, options.get("asarray")
        self._returned: tuple[NDArray[Any], bytes] | None = None
        self._index_dtype = _integer_dtype(options.get("index_dtype"))
        self._parameters = _parameters(function, op)
        if self._asarray is not None and "out" in self._parameters:
            raise SriglError(
                "a function whose arrays asarray makes cannot write to out, which is NumPy's; "
                "return the product instead"
            )
        self.name = getattr(function, "__name__", type(function).__name__)
        self.xfails: Mapping[str, str] = declared.get("xfails", {})
        self.capabilities: Capabilities = _narrowed(
            completed(options.get("capabilities", KernelCapabilities())),
            op,
            self._parameters,
            is_converted=self._asarray is not None,
        )

    @property
    def takes_threads(self) -> bool:
        """Whether the function is told how many threads to use."""
        return "threads" in self._parameters

    def prepare(self, weight: CondensedWeight) -> _FunctionWeight:
        """Return the weight, to be passed to the function at each call."""
        return _FunctionWeight(self, weight)

    def prepare_quantized(self, weight: QuantizedWeight, inputs: str) -> _FunctionProduct:
        """Return the weight, to be passed to the function at each call."""
        return _FunctionProduct(self, weight, {"scale": weight.scale, "inputs": inputs})

    def call(self, **arguments: Any) -> Any:
        """Call the function with those of the arguments that it has parameters for."""
        taken = {name: self._converted(name, arguments[name]) for name in self._parameters}
        with np.errstate(all="ignore"):
            result = self.function(**taken)
        if self._asarray is not None:
            self._check_unwritten(arguments, taken)
        return result

    def _check_unwritten(self, arguments: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
        """Raise `LawViolation` if the function wrote to an array that was converted for it."""
        for name, converted in taken.items():
            if isinstance(arguments[name], np.ndarray):
                before = self._cast(name, arguments[name])
                after = _any_as_numpy(converted, f"the argument {name}", before.dtype, before.shape)
                if after.dtype == before.dtype and after.tobytes() != before.tobytes():
                    raise LawViolation(f"the function wrote to its argument {name}")

    def _check_earlier(self, product: NDArray[Any]) -> None:
        """Raise `LawViolation` if a call has changed what the function returned before."""
        earlier, self._returned = self._returned, (product, product.tobytes())
        if earlier is not None and earlier[0].tobytes() != earlier[1]:
            raise LawViolation(
                "a later call changed an earlier product; the function must return a new array"
            )

    def update_mask(
        self,
        weight: NDArray[Any],
        grad: NDArray[Any],
        mask: NDArray[Any],
        settings: UpdateSettings,
        *,
        threads: int | None,
    ) -> MaskUpdate:
        """Return the function's update, with the correct values for what it does not return."""
        arrays = {"weight": weight, "grad": grad, "mask": mask}
        result = self._update(settings, **arrays, threads=threads)
        if isinstance(result, MaskUpdate):
            return result
        parts = result if isinstance(result, tuple) else (result,)
        try:
            new_mask = HOST_ARRAYS.as_mask(parts[0], mask.shape)
        except SriglError as error:
            raise LawViolation(f"the new mask: {error}") from error
        try:
            expected = srigl_update(weight, grad, mask, settings)
        except SriglError as error:
            raise LawViolation(f"a mask was returned, expected ValueError: {error}") from error
        update = make_update(
            weight,
            mask,
            new_mask,
            grown_init=settings.grown_init,
            fan_in=expected.fan_in,
            threshold=expected.threshold,
            salient_counts=expected.salient_counts,
        )
        if len(parts) == 1:
            return update
        return replace(update, weight=_as_numpy(parts[1], "the new weight", mask.shape))

    def update_condensed(
        self,
        weight: CondensedWeight,
        gradient_rows: GradientRows,
        settings: UpdateSettings,
        *,
        block_rows: int,
        threads: int | None,
    ) -> CondensedUpdate:
        """Return the function's update."""

        def rows(start: int, stop: int) -> Any:
            return self._converted("grad", gradient_rows(start, stop))

        options = {"gradient_rows": rows, "block_rows": block_rows, "threads": threads}
        result = self._update(settings, **_parts(weight), **options)
        if not isinstance(result, CondensedUpdate):
            raise LawViolation(f"expected a CondensedUpdate, got {type(result).__name__}")
        return result

    def remap_state(
        self, state: NDArray[Any], mask: NDArray[Any], new_mask: NDArray[Any], *, start: float
    ) -> NDArray[Any]:
        """Return the function's new state of a dense layer."""
        result = self.call(state=state, mask=mask, new_mask=new_mask, start=start)
        return _any_as_numpy(result, "the new state", state.dtype, state.shape)

    def remap_condensed(
        self, state: NDArray[Any], weight: CondensedWeight, update: CondensedUpdate, *, start: float
    ) -> NDArray[Any]:
        """Return the function's new state of a condensed layer."""
        before_and_after = {"weight": weight, "update": update, "source": update.source}
        result = self.call(state=state, **before_and_after, start=start)
        return _any_as_numpy(result, "the new state", state.dtype, update.source.shape)

    def _update(self, settings: UpdateSettings, **arguments: Any) -> Any:
        try:
            return self.call(**arguments, **asdict(settings), settings=settings)
        except ValueError as error:
            raise SriglError(str(error)) from error

    def _converted(self, name: str, argument: Any) -> Any:
        if not isinstance(argument, np.ndarray):
            return argument
        argument = self._cast(name, argument)
        if self._asarray is None:
            return argument
        return self._asarray(np.array(argument, order="C"))  # a copy, which is not read-only

    def _cast(self, name: str, argument: NDArray[Any]) -> NDArray[Any]:
        is_index = name in ("indices", "active") and self._index_dtype is not None
        return argument.astype(self._index_dtype) if is_index else argument


def _parts(weight: PackedWeight) -> dict[str, Any]:
    n_out, n_in = weight.shape
    parts = {name: getattr(weight, name) for name in ("values", "indices", "active")}
    return {"weight": weight, **parts, "n_out": n_out, "n_in": n_in}


class _FunctionProduct:
    """A weight, multiplied by a function."""

    def __init__(
        self, backend: FunctionBackend, weight: PackedWeight, others: Mapping[str, Any] | None
    ) -> None:
        self._backend, self._weight = backend, weight
        self._parts = {**_parts(weight), **(others or {})}

    def describe(self) -> Mapping[str, object]:
        """Describe the layout."""
        nbytes = self._weight.values.nbytes + self._weight.indices.nbytes
        return {"kernel": self._backend.name, "layout": "condensed", "bytes": nbytes}

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
        """Write the function's product to `out`, or let the function write it."""
        parameters = self._backend._parameters
        compact = compact and "compact" in parameters
        shape = (len(x), self._weight.n_active if compact else self._weight.shape[0])
        product = out if shape == out.shape else np.empty(shape, out.dtype)
        if "out" in parameters:
            product[...] = np.nan  # shows which elements the function does not write
        options = {"activation": activation, "compact": compact, "threads": threads}
        result = self._backend.call(x=x, bias=bias, out=product, **options, **self._parts)
        if "out" not in parameters or (result is not None and result is not product):
            product = _as_numpy(result, "the product", shape)
            self._backend._check_earlier(product)
            dtype = result_dtype(x.dtype, self._weight.float_dtype)
            if product.dtype != dtype:
                raise LawViolation(f"the product has dtype {product.dtype}, expected {dtype}")
        if product is not out:
            if shape != out.shape:
                product = product[:, self._weight.active]
            out[...] = round_to(product, out.dtype)


class _FunctionWeight(_FunctionProduct):
    """A condensed weight, multiplied by a function, or whose gradients it computes."""

    def __init__(self, backend: FunctionBackend, weight: CondensedWeight) -> None:
        super().__init__(backend, weight, None)

    def with_values(self, weight: CondensedWeight) -> _FunctionWeight:
        """Return another weight, multiplied by the function."""
        return _FunctionWeight(self._backend, weight)

    def backward(
        self,
        grad: NDArray[Any],
        x: NDArray[Any] | None,
        *,
        out: MatmulGradients,
        threads: int | None,
    ) -> None:
        """Write the gradients that the function returns to `out`."""
        if x is None:  # the function always gets one; what depends on it is not used
            x = np.zeros((len(grad), self._weight.shape[1]), grad.dtype)
        result = self._backend.call(grad=grad, x=x, **self._parts, threads=threads)
        if isinstance(result, MatmulGradients):
            result = (result.x, result.values, result.bias)
        if not isinstance(result, tuple) or len(result) != 3:
            raise LawViolation(f"expected dx, dvalues and dbias, got {type(result).__name__}")
        for part, gradient in zip(fields(out), result, strict=True):
            target = getattr(out, part.name)
            if target is not None:
                gradient = _as_numpy(gradient, f"the gradient of {part.name}", target.shape)
                target[...] = round_to(gradient, target.dtype)


def declare(
    op: str = "condensed_matmul",
    *,
    capabilities: Capabilities | None = None,
    asarray: Callable[[NDArray[Any]], Any] | None = None,
    index_dtype: Any | None = None,
    xfails: Mapping[str, str] | None = None,
) -> Callable[[Function], Function]:
    """Return a decorator that declares how a function is to be checked.

    Parameters
    ----------
    op, capabilities, asarray, index_dtype
        As in `FunctionBackend`.
    xfails : mapping of str to str, or None
        The laws that are expected to fail, each with a reason.

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
    declared = _not_none(
        op=op,
        capabilities=capabilities,
        asarray=asarray,
        index_dtype=index_dtype,
        xfails=dict(xfails or {}),
    )

    def decorate(function: Function) -> Function:
        if inspect.isclass(function):
            raise ValueTypeError(
                f"{function.__name__} is a class; give it the attributes capabilities and xfails"
            )
        function.declared = declared  # type: ignore[attr-defined]
        return function

    return decorate


def _not_none(**options: Any) -> dict[str, Any]:
    return {name: option for name, option in options.items() if option is not None}


def _declared(function: Any) -> dict[str, Any]:
    """Return what a function, or the one that a partial calls, was declared with."""
    while isinstance(function, functools.partial) and not hasattr(function, "declared"):
        function = function.func
    declared: dict[str, Any] = getattr(function, "declared", {})
    return declared


def _integer_dtype(index_dtype: Any) -> np.dtype[Any] | None:
    if index_dtype is None:
        return None
    try:
        dtype: np.dtype[Any] = np.dtype(index_dtype)
    except TypeError as error:
        raise SriglError(f"index_dtype={index_dtype!r} is no dtype ({error})") from error
    if dtype.kind not in "iu":
        raise SriglError(f"index_dtype={index_dtype!r} is no integer dtype; use int32 or int64")
    return dtype


def _parameters(function: Callable[..., Any], op: str) -> frozenset[str]:
    """Return the names of the arguments that a function is called with."""
    names = PARAMETERS[op]
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise SriglError(
            f"the parameters of {function!r} cannot be read; wrap it in a function of Python"
        ) from error
    if any(part.kind is part.VAR_KEYWORD for part in parameters):
        return frozenset(names)
    for part in parameters:
        is_unknown = part.name not in names and part.default is part.empty
        if part.kind is part.POSITIONAL_ONLY or is_unknown:
            raise SriglError(
                f"the function's parameter {part.name!r} cannot be passed for {op}; name "
                f"parameters {', '.join(names)}, or give it a default"
            )
    return frozenset(part.name for part in parameters if part.name in names)


def _narrowed(
    capabilities: KernelCapabilities, op: str, parameters: frozenset[str], *, is_converted: bool
) -> KernelCapabilities:
    """Return the declared capabilities without those that the parameters rule out."""
    capabilities = replace(capabilities, operations=frozenset({op}))
    if op.startswith("update") and "settings" not in parameters:
        capabilities = replace(capabilities, settings=capabilities.settings & parameters)
    if op == "update_mask":
        return replace(capabilities, out=False)
    layouts = frozenset({"C"}) if is_converted else capabilities.layouts
    if op.startswith("remap"):
        settings = capabilities.settings - (REMAP_SETTINGS - parameters)
        return replace(capabilities, out=False, layouts=layouts, settings=settings)
    if op == "quantized_matmul" and "inputs" not in parameters:
        _check_one_product(capabilities.quantized_inputs)
    if op in ("condensed_matmul", "quantized_matmul"):
        if "activation" not in parameters:
            capabilities = replace(capabilities, activations=frozenset({"none"}))
        if "bias" not in parameters:
            capabilities = replace(capabilities, bias=False)
    can_ablate = not parameters.isdisjoint({"weight", "active", "n_out"})
    return replace(
        capabilities,
        ablation=capabilities.ablation and can_ablate,
        layouts=layouts,
        out=capabilities.out and "out" in parameters,
    )


def _check_one_product(quantized_inputs: frozenset[str]) -> None:
    if len(quantized_inputs) != 1:
        raise SriglError(
            "a function for quantized_matmul needs a parameter 'inputs', or capabilities that "
            "declare the one product that it computes, such as quantized_inputs={'int8'}"
        )


def _as_numpy(result: Any, what: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return a result, an array of any library, as a NumPy array."""
    try:
        array = HOST_ARRAYS.as_float_array(result, what)
    except SriglError as error:
        raise LawViolation(str(error)) from error
    if array.shape != shape:
        raise LawViolation(f"{what} has shape {array.shape}, expected {shape}")
    return array


def _any_as_numpy(
    result: Any, what: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    """Return an array of any library and dtype as a NumPy array."""
    if dtype.name in VALUE_TYPES:
        return _as_numpy(result, what, shape)
    array = np.asarray(result)
    if array.shape != shape:
        raise LawViolation(f"{what} has shape {array.shape}, expected {shape}")
    return array
