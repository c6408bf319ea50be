"""The product with a condensed weight, for JAX's transformations (SPEC 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import accumulator_dtype, result_dtype, value_dtype
from srigl_core._product_spec import ArraySpec, product_spec
from srigl_core.contract import ACTIVATIONS, MatmulGradients
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.jax.connections import Connections
from srigl_core.jax.host_call import check_on_cpu, host_call
from srigl_core.jax.plan_cache import plan_for

__all__ = ["condensed_linear"]

_MOST_COPIED_BYTES = 1 << 20
"""Bytes of a result up to which the plan's fast path and a copy are faster than ``out=``."""


def condensed_linear(
    x: Any,
    values: Any,
    connections: Connections,
    bias: Any | None = None,
    *,
    activation: str | None = None,
) -> Any:
    """Return ``act(x @ (W*M).T + bias)``; differentiable, within ``jit``, ``grad`` and ``vmap``.

    Parameters
    ----------
    x : array, (..., n_in)
        float16, bfloat16, float32 or float64.
    values : array, (n_active, k)
        The weight at the connections.
    connections : Connections
    bias : array, (n_out,), or None
    activation : str or None
        One of `srigl_core.contract.ACTIVATIONS`; "gelu" is the erf form.

    Returns
    -------
    array, (..., n_out)
        Of dtype ``result_type(x, values)``.

    Raises
    ------
    SriglError
        If a shape does not fit, or `activation` is unknown.
    ValueTypeError
        If a dtype is not supported, or float16 meets bfloat16.
    BackendUnavailableError
        If an array is on another device than a CPU.

    Notes
    -----
    Gradients have the dtypes of what they are of; forward mode and second derivatives are not
    offered. The derivative of a smooth activation takes one more product, for its argument. Under
    ``vmap`` over `x` alone the mapped axis joins the batch; over weights, one product follows the
    other. Subnormal numbers count, though JAX's CPU threads flush them.

    Examples
    --------
    >>> import jax, numpy as np, srigl_core
    >>> from srigl_core.jax import condensed_linear, from_condensed
    >>> weight = srigl_core.CondensedWeight(np.array([[2.0]], np.float32), [[1]], [0], (2, 3))
    >>> values, connections = from_condensed(weight)
    >>> layer = jax.jit(condensed_linear)
    >>> layer(np.float32([[1, 10, 100]]), values, connections, np.float32([0.5, 0.25]))
    Array([[20.5 ,  0.25]], dtype=float32)
    """
    if not isinstance(connections, Connections):
        raise ValueTypeError(
            f"connections must be Connections, got {type(connections).__name__}; make them with "
            f"srigl_core.jax.from_condensed(weight) or Connections.from_mask(mask)"
        )
    x, values = jnp.asarray(x), jnp.asarray(values)
    bias = None if bias is None else jnp.asarray(bias)
    if bias is not None:
        value_dtype(bias.dtype, "bias of dtype")
    spec = product_spec(
        ArraySpec(x.shape, x.dtype),
        connections.shape,
        values.dtype,
        bias_shape=None if bias is None else bias.shape,
        activation=activation,
    )
    if values.shape != connections.indices.shape:
        raise SriglError(
            f"values has shape {values.shape}, but must have one number for each connection: "
            f"{connections.indices.shape}"
        )
    check_on_cpu(*jax.tree.leaves((x, values, connections, bias)))
    return _linear(x, values, connections, bias, spec.activation.name)


def _product(
    x: Any,
    values: Any,
    connections: Connections,
    bias: Any | None,
    activation: str,
    dtype: np.dtype[Any],
) -> Any:
    biases = () if bias is None else (bias,)
    shape = (*x.shape[:-1], connections.shape[0])
    function = _Product(connections.shape, activation)
    return host_call(function, shape, dtype, *_operands(x, values, connections), *biases)


def _gradient(
    name: str, like: Any, grad: Any, x: Any | None, values: Any, connections: Connections
) -> Any:
    """Return one of the gradients by itself, so that XLA leaves out those that nobody uses."""
    inputs = () if x is None else (x,)
    function = _Gradient(connections.shape, name)
    operands = _operands(grad, values, connections)
    return host_call(function, like.shape, like.dtype, *operands, *inputs)


def _operands(array: Any, values: Any, connections: Connections) -> tuple[Any, ...]:
    return array, values, connections.indices, connections.active, connections.key


def _layer(x: Any, values: Any, connections: Connections, bias: Any | None, activation: str) -> Any:
    dtype = result_dtype(x.dtype, values.dtype)
    return _product(x, values, connections, bias, activation, dtype)


def _forward(
    x: Any, values: Any, connections: Connections, bias: Any | None, activation: str
) -> tuple[Any, Any]:
    y = _layer(x, values, connections, bias, activation)
    return y, (x, values, connections, bias, y if activation == "relu" else None)


def _backward(activation: str, kept: Any, grad: Any) -> tuple[Any, ...]:
    x, values, connections, bias, y = kept
    if activation == "relu":
        # By its bits, since XLA takes a subnormal number for 0.
        is_positive = jax.lax.bitcast_convert_type(y, f"int{8 * y.dtype.itemsize}") > 0
        grad = jnp.where(is_positive, grad, 0)
    elif activation != "none":
        dtype = accumulator_dtype(x.dtype, values.dtype)
        z = _product(x, values, connections, bias, "none", dtype)
        (grad,) = jax.vjp(_ACTIVATIONS[activation], z)[1](grad.astype(dtype))
    dx = _gradient("x", x, grad, None, values, connections)
    dvalues = _gradient("values", values, grad, x, values, connections)
    dbias = None if bias is None else _gradient("bias", bias, grad, None, values, connections)
    return dx, dvalues, None, dbias


_FUNCTIONS = SimpleNamespace(exp=jnp.exp, tanh=jnp.tanh, where=jnp.where, erf=jax.scipy.special.erf)
_OWN = {
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
    "silu": jax.nn.silu,
}
_ACTIVATIONS = {
    name: _OWN.get(name, partial(activation.formula, xp=_FUNCTIONS))
    for name, activation in ACTIVATIONS.items()
}
"""JAX's own functions where it has them, else the formulas of the table."""

_differentiable = jax.custom_vjp(_layer, nondiff_argnums=(4,))
_differentiable.defvjp(_forward, _backward)
_linear = jax.jit(_differentiable, static_argnums=(4,))  # so that it is traced once outside of jit


@dataclass(frozen=True)
class _Product:
    """Writes a product: what `host_call` calls."""

    shape: tuple[int, int]
    activation: str

    def __call__(self, out: NDArray[Any], x: NDArray[Any], *others: NDArray[Any]) -> None:
        for plan, y, inputs, *bias in _each_weight(self.shape, out, x, *others, joins=True):
            offset = bias[0] if bias else None
            same_dtype = inputs.dtype == plan.weight.dtype == y.dtype
            if same_dtype and y.nbytes <= _MOST_COPIED_BYTES:
                y[...] = plan(inputs, offset, activation=self.activation)
            else:
                plan(inputs, offset, activation=self.activation, out=y)


@dataclass(frozen=True)
class _Gradient:
    """Writes one gradient of a product."""

    shape: tuple[int, int]
    name: str

    def __call__(self, out: NDArray[Any], grad: NDArray[Any], *others: NDArray[Any]) -> None:
        joins = self.name == "x"
        for plan, gradient, g, *x in _each_weight(self.shape, out, grad, *others, joins=joins):
            target = MatmulGradients(**{self.name: gradient})
            plan.backward(g, x[0] if x else None, wrt=self.name, out=target)


def _each_weight(
    shape: tuple[int, int],
    out: NDArray[Any],
    batch: NDArray[Any],
    values: NDArray[Any],
    indices: NDArray[Any],
    active: NDArray[Any],
    key: NDArray[np.uint32],
    *others: NDArray[Any],
    joins: bool,
) -> Iterator[tuple[Any, ...]]:
    """Yield plan, result, batch and the others for each weight that ``vmap`` has mapped over.

    Parameters
    ----------
    joins : bool
        Whether mapped axes of the batch can just be part of it, if it alone is mapped.
    """
    n_mapped = values.ndim - 2
    if not n_mapped:
        yield plan_for(shape, values, indices, active, key), out, batch, *others
        return
    weight = values, indices, active, key
    if joins and all(a.shape[:n_mapped] == (1,) * n_mapped for a in (*weight, *others)):
        parts = [a.reshape(a.shape[n_mapped:]) for a in (*weight, *others)]
        yield plan_for(shape, *parts[:4]), out, batch, *parts[4:]
        return
    for index in np.ndindex(out.shape[:n_mapped]):
        y, *parts = (
            a[tuple(i if n > 1 else 0 for i, n in zip(index, a.shape, strict=False))]
            for a in (out, batch, *weight, *others)
        )
        yield plan_for(shape, *parts[1:5]), y, parts[0], *parts[5:]
