"""The product with a condensed weight under JAX's transformations (SPEC 2).

There are two primitives. ``layer_p`` is the layer, with its bias and activation. ``term_p`` is a
derivative of

    sum of grad * (x @ (W*M).T + bias)

by one of its arrays. By `grad` that is the product, or the bias at each row of the batch
("offset"); by the other arrays it is a gradient. A term is linear in each of its arrays, and its
derivatives are terms. So there are derivatives of any order, in forward and in reverse mode. Each
term is a call of its own, so that XLA removes unused ones.

``vmap`` adds leading axes to all operands, of length 1 to those that are not mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import accumulator_dtype, result_dtype, value_dtype
from srigl_core._product_spec import ArraySpec, product_spec
from srigl_core.contract import ACTIVATIONS, MatmulGradients
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.jax.connections import Connections
from srigl_core.jax.dense_gradient import with_dense_gradient
from srigl_core.jax.host_call import check_on_cpu, host_call
from srigl_core.jax.plan_cache import any_plan_for, plan_for
from srigl_core.jax.sharding import array_like, sharded_as, vary, varying_axes

__all__ = ["condensed_linear"]

_MOST_COPIED_BYTES = 1 << 20
"""The largest result for which the plan's fast path and a copy are faster than ``out=``."""


def condensed_linear(
    x: Any,
    values: Any,
    connections: Connections,
    bias: Any | None = None,
    *,
    activation: str | None = None,
) -> Any:
    """Return ``act(x @ (W*M).T + bias)``. It works under JAX's transformations.

    Parameters
    ----------
    x : array, (..., n_in)
        float16, bfloat16, float32 or float64.
    values : array, (n_active, k), or (n_out, n_in)
        The weights at the connections; or the dense weight, of which only these are read. The
        gradient of a dense weight is that of all its positions, which a mask update needs.
    connections : Connections
    bias : array, (n_out,), or None
    activation : str or None
        One of `srigl_core.contract.ACTIVATIONS`; "gelu" is the erf form.

    Returns
    -------
    array, (..., n_out)
        Its dtype is ``result_type(x, values)``.

    Raises
    ------
    SriglError
        If a shape does not fit, or `activation` is unknown.
    ValueTypeError
        If a dtype is not supported, or float16 and bfloat16 are mixed.
    BackendUnavailableError
        If an array is not on the CPU.

    Notes
    -----
    A gradient has the dtype of its argument. There are derivatives of any order, in forward and in
    reverse mode. The gradient of a smooth activation takes one more product, for the argument of
    its derivative. Under ``vmap`` over `x` alone the mapped axis becomes part of the batch. Under
    ``vmap`` over weights there is one product for each weight. Subnormal numbers are not flushed,
    although JAX's CPU threads flush them. ``jax.export`` writes standard operations.

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
    connections.check_arrays()
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
    check_on_cpu(*jax.tree.leaves((x, values, connections, bias)))
    if values.shape == connections.indices.shape:
        return _linear(x, values, connections, bias, spec.activation.name)
    if values.shape != connections.shape:
        raise SriglError(
            f"values has shape {values.shape}, but must have one number for each connection, "
            f"{connections.indices.shape}, or be the dense weight, {connections.shape}"
        )
    used = jax.lax.stop_gradient(connections.gather(values))
    z = with_dense_gradient(_linear(x, used, connections, bias, "none"), x, values)
    return _ACTIVATIONS[spec.activation.name](z)


@partial(jax.jit, static_argnums=4)  # outside of jit it is traced only once
def _linear(
    x: Any, values: Any, connections: Connections, bias: Any | None, activation: str
) -> Any:
    operands = x, values, connections.indices, connections.active, connections.key
    params = {"shape": connections.shape, "dtype": result_dtype(x.dtype, values.dtype)}
    if bias is not None or activation != "none":
        biases = () if bias is None else (bias,)
        return _bind(layer_p, *operands, *biases, activation=activation, **params)
    return _bind(term_p, *operands, of="y", **params)


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
"""JAX's own functions where it has them, otherwise the formulas of the table."""


layer_p = Primitive("condensed_linear")
term_p = Primitive("condensed_term")

_OPERANDS = {
    "y": ("x", "values"),
    "x": ("y", "values"),
    "values": ("y", "x"),
    "bias": ("y", None),
    "offset": ("bias", None),
}
"""The arrays of each term, in order; those of the connections follow.

Of "bias" and "offset" the second operand is the values, which only find the plan.
"""


def _bind(primitive: Any, *operands: Any, **params: Any) -> Any:
    """Apply a primitive to operands that vary over the same axes of a ``shard_map``."""
    axes = [varying_axes(operand) for operand in operands]
    together = frozenset().union(*axes)
    operands = tuple(
        vary(operand, together - own) for operand, own in zip(operands, axes, strict=True)
    )
    return primitive.bind(*operands, **params)


def _shape_of_term(
    of: str, shape: tuple[int, int], a: Any, b: Any, *others: Any, batch: Any = ()
) -> Any:
    indices, _, key, *_ = others
    n_mapped = key.ndim - 1
    mapped = jnp.broadcast_shapes(*(o.shape[:n_mapped] for o in (a, b, *others)))
    rest = {
        "y": (*a.shape[n_mapped:-1], shape[0]),
        "x": (*a.shape[n_mapped:-1], shape[1]),
        "values": indices.shape[n_mapped:],
        "bias": shape[:1],
        "offset": (*batch, shape[0]),
    }
    return *mapped, *rest[of]


def _aval_of_layer(*avals: Any, shape: Any, dtype: Any, activation: str) -> Any:
    return _aval_of_term(*avals, of="y", shape=shape, dtype=dtype)


def _aval_of_term(*avals: Any, of: str, shape: Any, dtype: Any, batch: Any = ()) -> Any:
    n_axes = avals[0].ndim - 1 if of in ("y", "x") else 0
    result_shape = _shape_of_term(of, shape, *avals, batch=batch)
    return array_like(avals[0], n_axes, result_shape, dtype)


# ---------------------------------------------------------------- derivatives


def _derive_layer(primals: Any, tangents: Any, *, activation: str, **params: Any) -> Any:
    x, values, *connections = primals[:5]
    dx, dvalues, _, _, _, *dbias = tangents
    y = _bind(layer_p, *primals, activation=activation, **params)
    wide = accumulator_dtype(x.dtype, values.dtype)
    params["dtype"] = y.dtype if activation in ("none", "relu") else wide
    dz = [
        _bind(term_p, *operands, *connections, of="y", **params)
        for operands in ((dx, values), (x, dvalues))
        if not any(isinstance(operand, ad.Zero) for operand in operands)
    ]
    if dbias and not isinstance(dbias[0], ad.Zero):
        batch = y.shape[connections[2].ndim - 1 : -1]
        operands = dbias[0], values, *connections
        dz.append(_bind(term_p, *operands, of="offset", batch=batch, **params))
    dy = sum(dz[1:], dz[0]) if dz else jnp.zeros_like(y)
    if activation == "relu":
        # Compares bits, because XLA treats subnormal numbers as 0.
        is_positive = jax.lax.bitcast_convert_type(y, f"int{8 * y.dtype.itemsize}") > 0
        dy = jnp.where(is_positive, dy, 0)
    elif activation != "none":
        z = _bind(layer_p, *primals, activation="none", **params)
        _, dy = jax.jvp(_ACTIVATIONS[activation], (z,), (dy,))
    return y, dy.astype(y.dtype)


def _derive_term(primals: Any, tangents: Any, **params: Any) -> Any:
    a, b, *connections = primals
    da, db, *_ = tangents
    parts = [
        _bind(term_p, *operands, *connections, **params)
        for operands, name in zip(((da, b), (a, db)), _OPERANDS[params["of"]], strict=True)
        if name is not None and not any(isinstance(operand, ad.Zero) for operand in operands)
    ]
    result = _bind(term_p, *primals, **params)
    return result, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(result)


def _transpose_term(
    grad: Any, a: Any, b: Any, *connections: Any, of: str, shape: Any, **_: Any
) -> Any:
    """Return the derivative by the array that is linear; it is a term of the others."""
    place = 0 if ad.is_undefined_primal(a) else 1
    wanted = (a, b)[place].aval
    n_mapped = connections[2].ndim - 1
    name, other = str(_OPERANDS[of][place]), _OPERANDS[of][1 - place]
    params = {"of": name, "shape": shape, "dtype": wanted.dtype}
    if other is None:
        operands = [grad, b]
        if of == "bias":
            params |= {"of": "offset", "batch": wanted.shape[n_mapped:-1]}
    else:
        arrays = {of: grad, other: (b, a)[place]}
        operands = [arrays[str(operand)] for operand in _OPERANDS[name]]
    result = _bind(term_p, *operands, *connections, **params)
    lengths = zip(result.shape[:n_mapped], wanted.shape[:n_mapped], strict=True)
    shared = tuple(i for i, (each, one) in enumerate(lengths) if each != one)
    gradients = [None] * (2 + len(connections))
    gradients[place] = sharded_as(result.sum(shared, keepdims=True) if shared else result, wanted)
    return gradients


# ---------------------------------------------------------------- vmap


def _map_layer(operands: Any, axes: Any, **params: Any) -> Any:
    return _map(layer_p, operands, axes, joins=True, **params)


def _map_term(operands: Any, axes: Any, **params: Any) -> Any:
    return _map(term_p, operands, axes, joins=params["of"] in ("y", "x"), **params)


def _map(primitive: Any, operands: Any, axes: Any, *, joins: bool, **params: Any) -> Any:
    """Apply a primitive to mapped operands; return the result and its mapped axis.

    Parameters
    ----------
    joins : bool
        Whether the mapped axis becomes one of the batch if only the first operand is mapped.
    """
    n_mapped = operands[4].ndim - 1
    if joins and all(axis is None for axis in axes[1:]):
        x = jnp.moveaxis(operands[0], axes[0], n_mapped)
        return _bind(primitive, x, *operands[1:], **params), n_mapped
    moved = (
        jnp.expand_dims(operand, 0) if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    )
    return _bind(primitive, *moved, **params), 0


# ---------------------------------------------------------------- on the host


def _call_layer(*operands: Any, shape: Any, dtype: Any, activation: str) -> Any:
    result_shape = _shape_of_term("y", shape, *operands)
    return host_call(_Layer(shape, activation), result_shape, dtype, *operands)


def _call_term(*operands: Any, of: str, shape: Any, dtype: Any, batch: Any = ()) -> Any:
    if of == "offset":
        return _export_term(*operands, of=of, shape=shape, dtype=dtype, batch=batch)
    function = _Layer(shape, "none") if of == "y" else _Gradient(shape, of)
    return host_call(function, _shape_of_term(of, shape, *operands), dtype, *operands)


@dataclass(frozen=True)
class _Layer:
    """Computes a layer; called by `host_call`."""

    shape: tuple[int, int]
    activation: str

    def __call__(self, *arrays: NDArray[Any]) -> None:
        for y, x, values, indices, active, key, *bias in _each_mapped(*arrays):
            plan = plan_for(self.shape, values, indices, active, key)
            offset = bias[0] if bias else None
            same_dtype = x.dtype == plan.weight.dtype == y.dtype
            if same_dtype and y.nbytes <= _MOST_COPIED_BYTES:
                y[...] = plan(x, offset, activation=self.activation)
            else:
                plan(x, offset, activation=self.activation, out=y)


@dataclass(frozen=True)
class _Gradient:
    """Computes one gradient of a product; called by `host_call`."""

    shape: tuple[int, int]
    name: str

    def __call__(self, *arrays: NDArray[Any]) -> None:
        for gradient, grad, other, *connections in _each_mapped(*arrays):
            if self.name == "values":
                plan, x = any_plan_for(self.shape, gradient.dtype, *connections), other
            else:
                plan, x = plan_for(self.shape, other, *connections), None
            target = MatmulGradients(**{self.name: gradient})
            plan.backward(grad, x, wrt=self.name, out=target)


def _each_mapped(out: NDArray[Any], *operands: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield result and operands for each index of the axes that ``vmap`` maps over."""
    n_mapped = operands[4].ndim - 1
    for index in np.ndindex(out.shape[:n_mapped]):
        yield tuple(
            array[tuple(min(i, n - 1) for i, n in zip(index, array.shape, strict=False))]
            for array in (out, *operands)
        )


# ---------------------------------------------------------------- in exported functions
#
# An exported function outlives the process, so it cannot call Python.


def _export_layer(*operands: Any, activation: str, dtype: Any, shape: Any) -> Any:
    def layer(x: Any, values: Any, indices: Any, active: Any, _: Any, *bias: Any) -> Any:
        z = _standard_term(x, values, indices, active, of="y", shape=shape)
        if bias:
            z += bias[0].astype(dtype)
        return _ACTIVATIONS[activation](z).astype(dtype)

    return _vmapped(layer, *operands)


def _export_term(*operands: Any, of: str, dtype: Any, shape: Any, batch: Any = ()) -> Any:
    def term(a: Any, b: Any, indices: Any, active: Any, _: Any) -> Any:
        if of == "offset":
            return jnp.broadcast_to(a.astype(dtype), (*batch, shape[0]))
        return _standard_term(a, b, indices, active, of=of, shape=shape).astype(dtype)

    return _vmapped(term, *operands)


def _standard_term(a: Any, b: Any, indices: Any, active: Any, *, of: str, shape: Any) -> Any:
    """Return a term in JAX's own operations, in the accumulators' dtype."""
    wide = accumulator_dtype(a.dtype, b.dtype)
    a, b = a.astype(wide), b.astype(wide)
    if of == "y":
        active_y = (a[..., indices] * b).sum(-1)
        return jnp.zeros((*a.shape[:-1], shape[0]), wide).at[..., active].set(active_y)
    rows = tuple(range(a.ndim - 1))
    if of == "bias":
        return a.sum(rows)
    grad = a[..., active, None]
    if of == "x":
        return jnp.zeros((*a.shape[:-1], shape[1]), wide).at[..., indices].add(grad * b)
    return (grad * b[..., indices]).sum(rows)


def _vmapped(function: Callable[..., Any], *operands: Any) -> Any:
    """Call a function of operands without mapped axes for each index of these axes."""
    if operands[4].ndim == 1:
        return function(*operands)
    axes = [None if operand.shape[0] == 1 else 0 for operand in operands]
    shared = [a[0] if axis is None else a for a, axis in zip(operands, axes, strict=True)]
    if all(axis is None for axis in axes):
        return _vmapped(function, *shared)[None]
    return jax.vmap(partial(_vmapped, function), axes)(*shared)


# ---------------------------------------------------------------- registration


def _register(primitive: Any, aval: Any, derive: Any, each: Any, call: Any, export: Any) -> None:
    primitive.def_impl(call)
    primitive.def_abstract_eval(aval)
    ad.primitive_jvps[primitive] = derive
    batching.primitive_batchers[primitive] = each
    on_host, standard = (mlir.lower_fun(f, multiple_results=False) for f in (call, export))

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        is_export = context.module_context.lowering_parameters.for_export
        return (standard if is_export else on_host)(context, *operands, **params)

    mlir.register_lowering(primitive, lower)


_register(layer_p, _aval_of_layer, _derive_layer, _map_layer, _call_layer, _export_layer)
_register(term_p, _aval_of_term, _derive_term, _map_term, _call_term, _export_term)
ad.primitive_transposes[term_p] = _transpose_term
