"""The mask update of one layer, and of its optimiser's state, in JAX's arrays (SPEC 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from srigl_core._api import apply_update
from srigl_core._arrays.libraries import library_of
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.errors import SriglError
from srigl_core.jax.connections import Connections
from srigl_core.jax.plan_cache import evict

__all__ = ["SriglUpdate", "remap_state", "srigl_update"]


class SriglUpdate(NamedTuple):
    """The result of `srigl_update`, a named tuple.

    Attributes
    ----------
    weight : array
        Dense, or the values at the new connections, like the argument.
    mask : array of bool, or Connections
        Like the argument.
    state : pytree
        The optimiser's state.
    report : MaskUpdate
        The counts and the rows ablated and revived; its `mask` and `weight` are dense.
    """

    weight: Any
    mask: Any
    state: Any
    report: MaskUpdate


def srigl_update(
    weight: Any,
    grad: Any,
    mask: Any,
    settings: UpdateSettings,
    state: Any = None,
) -> SriglUpdate:
    """Return a layer with its mask updated; outside of ``jit``.

    Parameters
    ----------
    weight : array
        After the optimiser's step: dense, (n_out, ...), where `mask` is an array, or the values,
        (n_active, k), where it is `Connections`.
    grad : array, (n_out, ...)
        The dense gradient, of all connections that there could be: that of a loss which has
        ``connections.scatter(values)`` in place of the layer's weight.
    mask : array of bool, (n_out, ...), or Connections
    settings : UpdateSettings
    state : pytree
        The optimiser's state of this layer; its arrays of the weight's shape are remapped.

    Returns
    -------
    SriglUpdate
        The arguments are not changed.

    Raises
    ------
    SriglError
        As in `srigl_core.update_mask`.

    Examples
    --------
    >>> import jax, numpy as np, srigl_core
    >>> from srigl_core import UpdateSettings
    >>> from srigl_core.jax import from_condensed, srigl_update
    >>> weight = srigl_core.CondensedWeight(np.float32([[3], [1]]), [[0], [2]], [0, 1], (2, 3))
    >>> values, connections = from_condensed(weight)
    >>> grad = jax.numpy.array([[0, 0, 0], [5.0, 0, 0]])
    >>> momentum = {"count": 7, "mu": values}
    >>> values, connections, momentum, report = srigl_update(
    ...     values, grad, connections, UpdateSettings(2, 0.5), momentum
    ... )
    >>> connections.indices.tolist(), values.tolist(), momentum["mu"].tolist()
    ([[0], [0]], [[3.0], [0.0]], [[3.0], [0.0]])
    """
    is_condensed = isinstance(mask, Connections)
    library_of(weight).check(weight, "weight")
    if is_condensed and weight.shape != mask.indices.shape:
        raise SriglError(
            f"weight has shape {weight.shape}, but beside Connections it must be the values, "
            f"{mask.indices.shape}"
        )
    report = apply_update(
        mask.scatter(weight) if is_condensed else weight,
        grad.reshape(mask.shape) if is_condensed else grad,
        mask.to_mask() if is_condensed else mask,
        settings,
    )
    if not is_condensed:
        new_state = remap_state(state, mask, report.mask)
        return SriglUpdate(report.weight, report.mask, new_state, report)
    evict(mask.key)
    connections = Connections.from_mask(report.mask)
    new_state = remap_state(state, mask, connections)
    return SriglUpdate(connections.gather(report.weight), connections, new_state, report)


def remap_state(state: Any, before: Any, after: Any) -> Any:
    """Return optimiser state with zeros where a weight is newly active or inactive (SPEC 4.8).

    Parameters
    ----------
    state : pytree
        Of one layer: arrays of the weight's shape are remapped. Or of several: whatever in it has
        the structure of `before` is, as the moments that optax keeps have that of the parameters.
        Everything else, such as a step count, is returned as it is.
    before, after : array of bool, Connections, or pytree of such
        Of one layer; or in the structure of the parameters, with None for those without a mask.

    Returns
    -------
    pytree
        As `state`; arrays of the shape of a layer's values have that of its new ones.

    Raises
    ------
    SriglError
        If `before` and `after` differ in structure or shape.
    """
    old, layers = jax.tree.flatten(before, is_leaf=_is_mask)
    new, new_layers = jax.tree.flatten(after, is_leaf=_is_mask)
    shapes, new_shapes = (
        [mask if mask is None else mask.shape for mask in ms] for ms in (old, new)
    )
    if (layers, shapes) != (new_layers, new_shapes):
        raise SriglError(
            f"before and after must be masks of the same layers, but are of {layers} and "
            f"{new_layers}, with shapes {shapes} and {new_shapes}"
        )

    def has_layers(part: Any) -> bool:
        return bool(jax.tree.structure(part, is_leaf=lambda leaf: leaf is None) == layers)

    def remapped(part: Any) -> Any:
        if not has_layers(part):
            return part
        leaves = jax.tree.leaves(part, is_leaf=lambda leaf: leaf is None)
        return layers.unflatten(map(_remapped, leaves, old, new))

    return jax.tree.map(remapped, state, is_leaf=has_layers)


def _is_mask(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, Connections)


def _remapped(leaf: Any, before: Any, after: Any) -> Any:
    shape = getattr(leaf, "shape", None)
    if isinstance(before, Connections):
        return after.gather(before.scatter(leaf)) if shape == before.indices.shape else leaf
    if before is None or shape != before.shape:
        return leaf
    return jnp.where(before & after, leaf, jnp.zeros((), leaf.dtype))
