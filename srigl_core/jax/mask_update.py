"""The mask update of a layer and of its optimiser state, with JAX arrays (SPEC 4)."""

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

__all__ = ["SriglUpdate", "check_same_structure", "is_mask", "remap_state", "srigl_update"]


class SriglUpdate(NamedTuple):
    """The result of `srigl_update`, a named tuple.

    Attributes
    ----------
    weight : array
        The new dense weight or values, like the argument.
    mask : array of bool, or Connections
        The new mask or connections, like the argument.
    state : pytree
        The optimiser's new state.
    report : MaskUpdate
        Counts, and the rows that were ablated and revived. `mask` and `weight` are dense.
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
    """Update the mask of a layer. It cannot be called within ``jit``.

    Parameters
    ----------
    weight : array
        The layer's weight after the optimiser's step. It is dense, (n_out, ...), if `mask` is an
        array. If `mask` is `Connections` it is the values, (n_active, k).
    grad : array, (n_out, ...)
        The dense gradient: the gradient of the loss with respect to
        ``connections.scatter(values)`` in place of the layer's weight.
    mask : array of bool, (n_out, ...), or Connections
    settings : UpdateSettings
    state : pytree
        The optimiser's state of this layer. Arrays of the weight's shape are remapped.

    Returns
    -------
    SriglUpdate

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
    library_of(weight).check(weight, "weight")
    if not isinstance(mask, Connections):
        report = apply_update(weight, grad, mask, settings)
        new_state = remap_state(state, mask, report.mask)
        return SriglUpdate(report.weight, report.mask, new_state, report)
    if weight.shape != mask.indices.shape:
        raise SriglError(
            f"weight has shape {weight.shape}, but with Connections it must be the values, of "
            f"shape {mask.indices.shape}"
        )
    dense, dense_grad = mask.scatter(weight), grad.reshape(mask.shape)
    report = apply_update(dense, dense_grad, mask.to_mask(), settings)
    evict(mask.key)
    connections = Connections.from_mask(report.mask)
    new_state = remap_state(state, mask, connections)
    return SriglUpdate(connections.gather(report.weight), connections, new_state, report)


def remap_state(state: Any, before: Any, after: Any, start: Any = None) -> Any:
    """Return optimiser state that starts anew where a weight is newly active or inactive.

    Parameters
    ----------
    state : pytree
        The state of one layer or of several. For one layer, arrays of the weight's shape are
        remapped. For several, those are whose path ends with the path of a parameter and which have
        its shape, such as the moments in optax. Everything else, such as a step count, is returned
        unchanged.
    before, after : array of bool, Connections, or pytree of them
        The mask or the connections of one layer. For several layers, a pytree in the structure of
        the parameters, with None for parameters without a mask.
    start : pytree
        The state that the optimiser starts with at the new parameters, in the structure of `state`.
        None means zeros.

    Returns
    -------
    pytree
        The state in the structure of `state`. Arrays in the shape of a layer's values get the shape
        of its new values.

    Raises
    ------
    SriglError
        If `before` and `after` differ in structure or shape, or `state` and `start` in structure.

    Notes
    -----
    SPEC 4.8.
    """
    layers = [jax.tree_util.tree_flatten_with_path(m, is_leaf=is_mask) for m in (before, after)]
    (old, structure), (new, new_structure) = layers
    shapes, new_shapes = (
        [mask if mask is None else mask.shape for _, mask in masks] for masks in (old, new)
    )
    if (structure, shapes) != (new_structure, new_shapes):
        raise SriglError(
            f"before and after must be masks of the same layers, but are of {structure} and "
            f"{new_structure}, with shapes {shapes} and {new_shapes}"
        )
    masks = {path: (mask, new_mask) for (path, mask), (_, new_mask) in zip(old, new, strict=True)}

    def remapped(path: tuple[Any, ...], leaf: Any, first: Any = None) -> Any:
        for ending in (path[i:] for i in range(len(path) + 1)):
            if ending in masks:
                return _remapped(leaf, first, *masks[ending])
        return leaf

    if start is None:
        return jax.tree_util.tree_map_with_path(remapped, state)
    check_same_structure(state, start)
    return jax.tree_util.tree_map_with_path(remapped, state, start)


def check_same_structure(state: Any, start: Any) -> None:
    """Check that an optimiser's state has the structure of the state that it starts with."""
    structures = [jax.tree.structure(each) for each in (state, start)]
    if structures[0] != structures[1]:
        raise SriglError(
            f"state must have the structure of the state that the optimiser starts with, "
            f"{structures[1]}, but has {structures[0]}; pass the state of this optimiser"
        )


def is_mask(leaf: Any) -> bool:
    """Return whether an entry of a pytree of masks is None or connections."""
    return leaf is None or isinstance(leaf, Connections)


def _remapped(leaf: Any, first: Any, before: Any, after: Any) -> Any:
    is_condensed = isinstance(before, Connections)
    shape = before.indices.shape if is_condensed else getattr(before, "shape", None)
    if before is None or getattr(leaf, "shape", None) != shape:
        return leaf
    if is_condensed:
        leaf, kept = after.gather(before.scatter(leaf)), after.gather(before.to_mask())
    else:
        kept = before & after
    return jnp.where(kept, leaf, jnp.zeros((), leaf.dtype) if first is None else first)
