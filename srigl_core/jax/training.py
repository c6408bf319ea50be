"""SRigL for a training loop of optax: three calls in each step."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srigl_core._training.config import TrainingConfig
from srigl_core._training.sparse_trainer import SparseTrainer
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.jax.connections import Connections
from srigl_core.jax.mask_update import check_same_structure, is_mask, remap_state
from srigl_core.jax.plan_cache import evict
from srigl_core.reference.schedule import UpdateSchedule

__all__ = ["SRigL"]

_NEURON_AXES = {"kernel": -1, "weight": 0}
"""The axis of the neurons in the parameters of flax and of equinox."""


class SRigL:
    """Train the parameters of a model with sparse weights of constant fan-in.

    ::

        srigl = SRigL(params, optimizer, layers=["hidden.kernel", "output.kernel"], sparsity=0.9,
                      schedule=n_steps)
        params = srigl.masked(params)
        state = optimizer.init(params)
        for x, y in batches:
            gradient = jax.grad(loss)(srigl.for_gradient(params), x, y)
            updates, state = optimizer.update(srigl.after_backward(gradient), state, params)
            params, state = srigl.step(optax.apply_updates(params, updates), state)

    Dense weights keep their shapes, with zeros. The `values` of condensed layers are trained
    without a dense weight; pass their `connections`, and after each `step` take the new ones from
    `connect`.

    Parameters
    ----------
    params : pytree
        The parameters that are trained. A parameter's name is its path, joined by dots, such as
        "hidden.kernel".
    optimizer : optax.GradientTransformation
        Its ``init`` gives the state of newly active weights.
    layers : iterable of str
        Names of the sparse weights, or patterns, in network order. Neurons of the last, the
        network's outputs, are not ablated. A pattern has the order of the pytree, which sorts
        dictionaries; a name may be repeated later: ``["*.kernel", "output.kernel"]``.
    sparsity : float or None
        Sparsity of these weights together, in [0, 1). None, if all are of condensed layers, which
        then keep their sizes.
    schedule : UpdateSchedule or int
        The training steps with a mask update; an int is the total number of training steps.
    connections : pytree
        Has the `Connections` of condensed layers. Those of the parameter "hidden.values" are at
        "hidden.connections", as in the layers of `srigl_core.integrations`.
    neuron_axis : {0, -1} or None
        The axis of the neurons in dense weights. None means the last axis of a "kernel", as in
        flax, and the first of a "weight", as in equinox. Other names need it.
    config : TrainingConfig or None
        Method, distribution, update settings, options of single layers, seed. Condensed layers need
        the method "srigl".

    Attributes
    ----------
    trainer : SparseTrainer
        Has budgets, fan-ins, active neurons, `is_due` and ITOP rates.
    masks : pytree
        In the structure of `params`: masks of dense weights, `Connections` of condensed layers,
        None for other parameters. It may be an argument of jitted functions.

    Raises
    ------
    SriglError
        If a setting is out of range, or `layers` names what is not a weight.

    Notes
    -----
    SPEC 4 and 5; the paper, sec. 3. Its methods are called outside of ``jit``. Updates are computed
    on the host.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax
    >>> from srigl_core.jax import SRigL
    >>> from srigl_core.reference import UpdateSchedule
    >>> params = {"kernel": jnp.arange(32.0).reshape(8, 4), "bias": jnp.zeros(4)}
    >>> schedule = UpdateSchedule(t_end=100, delta_t=10)
    >>> srigl = SRigL(params, optax.adam(0.1), layers=["kernel"], sparsity=0.5, schedule=schedule)
    >>> [int(column.sum()) for column in srigl.masks["kernel"].T], srigl.masks["bias"]
    ([4, 4, 4, 4], None)
    """

    def __init__(
        self,
        params: Any,
        optimizer: Any,
        *,
        layers: Iterable[str],
        sparsity: float | None = None,
        schedule: UpdateSchedule | int,
        connections: Any = None,
        neuron_axis: int | None = None,
        config: TrainingConfig | None = None,
    ) -> None:
        self._optimizer = optimizer
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_mask)
        found = {_name(path): leaf for path, leaf in leaves}
        self._names = list(found)
        beside = {
            self._values_of(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(connections, is_leaf=is_mask)
            if isinstance(leaf, Connections)
        }
        self._connections: dict[str, Connections] = {}
        self._is_connected = True
        self._axes: dict[str, int] = {}
        shapes, given = {}, {}
        for name in _selected(layers, self._names):
            if name in beside:
                part = self._connections[name] = beside[name]
                if found[name].shape != part.indices.shape:
                    raise SriglError(
                        f"layer {name!r} has shape {found[name].shape}, but its connections are of "
                        f"values of shape {part.indices.shape}"
                    )
                shapes[name], given[name] = part.shape, np.asarray(part.to_mask())
                continue
            axis = self._axes[name] = _neuron_axis(name, found[name], neuron_axis)
            shape = found[name].shape
            shapes[name] = shape if axis == 0 else (shape[-1], *shape[:-1])
        self.trainer = SparseTrainer(
            shapes, sparsity=sparsity, schedule=schedule, config=config, masks=given
        )
        if self._connections and self.trainer.config.method != "srigl":
            raise SriglError(
                f"method={self.trainer.config.method!r} cannot train condensed layers, which need "
                f"method='srigl'; train dense weights"
            )
        self._set_masks()

    def masked(self, params: Any) -> Any:
        """Return the parameters with zeros at inactive weights."""
        return _masked(params, self.masks)

    def for_gradient(self, params: Any) -> Any:
        """Return the parameters at which to take the gradient of the coming step.

        If the next update needs it, a condensed layer's `values` become its dense weight, whose
        gradient `condensed_linear` gives without a dense product in the forward pass. A function
        under ``jit`` is compiled for both. Without condensed layers it returns `params`.

        Raises
        ------
        SriglError
            If the last `step` or `load_state_dict` has set connections that were not taken from
            `connect` yet.
        """
        if not self._is_connected:
            raise SriglError(
                "the last step or load_state_dict has set connections; take them before the next "
                "step: connections = srigl.connect(connections)"
            )
        return _dense(params, self.masks) if self.trainer.needs_grad else params

    def after_backward(self, gradient: Any) -> Any:
        """Record the gradient that an update needs, and return it with zeros at inactive weights.

        Parameters
        ----------
        gradient : pytree
            The gradient of the mean loss at ``for_gradient(params)``, before it is clipped.

        Returns
        -------
        pytree
            The gradient for the optimiser, in the shapes of the parameters.

        Raises
        ------
        SriglError
            If the structure or a shape differs from that of the parameters.
        """
        leaves = self._leaves(gradient, "gradient")
        if self.trainer.needs_grad:
            rows = {name: self._rows(name, leaves[name]) for name in self.trainer.sparse_layers}
            for name, grad in rows.items():
                if grad.shape != (shape := self.trainer.budgets[name].shape):
                    raise SriglError(
                        f"the gradient of {name!r} has shape {grad.shape}, but this step needs "
                        f"that of all positions, {shape}; take the gradient at "
                        f"srigl.for_gradient(params)"
                    )
            for name, grad in rows.items():
                self.trainer.accumulate(name, grad)
        return _masked(gradient, self.masks)

    def step(self, params: Any, state: Any) -> tuple[Any, Any]:
        """Count a training step after the optimiser's, and update the masks if an update is due.

        Parameters
        ----------
        params : pytree
            The parameters after the optimiser's step.
        state : pytree
            The optimiser's state.

        Returns
        -------
        params : pytree
            Inactive weights are zero. If neurons of a condensed layer are ablated, or its fan-in
            changes, its values have a new shape.
        state : pytree
            After an update, newly active weights have the state that the optimiser starts with.

        Raises
        ------
        SriglError
            If a number is not finite, a gradient is missing, or `state` is not one of the optimiser
            and these parameters. Nothing is changed, and the step is not counted. Also, after its
            first update, if the method has another mask for the backward pass.
        """
        before, weights = self.masks, {}
        leaves = self._leaves(params, "params")
        if self.trainer.is_due:
            check_same_structure(state, jax.eval_shape(self._optimizer.init, params))
            dense = self._leaves(_dense(params, before), "params")
            weights = {name: self._rows(name, dense[name]) for name in self.trainer.sparse_layers}
        updates = self.trainer.step(weights)
        if not updates:
            return _masked(params, before), state
        if any(update.backward_mask is not None for update in updates.values()):
            raise SriglError(
                f"method={self.trainer.config.method!r} has another mask for the backward pass, "
                f"which is not supported in JAX; use srigl_core.SparseTrainer"
            )
        self._set_masks()
        self._is_connected = not self._connections
        for name, update in updates.items():
            if name in self._connections:
                new = update.weight[update.mask].reshape(self._connections[name].indices.shape)
            else:
                new = np.moveaxis(update.weight, 0, self._axes[name])
            leaves[name] = _placed(new, leaves[name])
        params = _masked(self._structure.unflatten(leaves.values()), self.masks)
        new_state = _restarted(self._optimizer.init, params, state, before, self.masks)
        return params, jax.tree.map(_placed, new_state, state)

    def connect(self, tree: Any) -> Any:
        """Return a pytree with the present connections in place of those of condensed layers.

        Parameters
        ----------
        tree : pytree
            As the argument `connections` of the constructor.

        Raises
        ------
        SriglError
            If it lacks those of a layer.
        """
        missing = set(self._connections)

        def present(path: Any, leaf: Any) -> Any:
            name = self._values_of(path)
            if not isinstance(leaf, Connections) or name not in self._connections:
                return leaf
            missing.discard(name)
            return self._connections[name]

        connected = jax.tree_util.tree_map_with_path(present, tree, is_leaf=is_mask)
        if missing:
            raise SriglError(f"tree has no connections of layer {', '.join(sorted(missing))}")
        self._is_connected = True
        return connected

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, a pytree of NumPy arrays that keeps its structure."""
        state = self.trainer.state_dict()
        arrays = {name: state.pop(name) for name in ("masks", "ever_active")}
        window = {n: state["window"].get(n, (None, 0)) for n in self.trainer.sparse_layers}
        state["window"] = {name: calls for name, (_, calls) in window.items()}
        return {
            **arrays,
            "window": {n: np.zeros(1) if sum_ is None else sum_ for n, (sum_, _) in window.items()},
            "trainer": np.frombuffer(json.dumps(state).encode(), np.uint8),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the `state_dict` of an object made with the same arguments.

        The parameters and the optimiser's state are those of the same step. The connections of
        condensed layers are then taken from `connect`, as after an update.

        Raises
        ------
        SriglError
            If `state` is not a `state_dict`, or was taken with other settings; nothing is changed.
        """
        try:
            arrays = {
                part: {name: np.asarray(array) for name, array in state[part].items()}
                for part in ("masks", "ever_active", "window")
            }
            rest = json.loads(np.asarray(state["trainer"]).tobytes())
            window = {name: (arrays["window"][name], n) for name, n in rest["window"].items() if n}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SriglError(f"state is not a whole state_dict(): {error!r}") from error
        self.trainer.load_state_dict({**rest, **arrays, "window": window})
        self._set_masks()
        self._is_connected = not self._connections

    def _set_masks(self) -> None:
        """Take the masks of the trainer."""
        masks: dict[str, Any] = dict.fromkeys(self._names)
        for name, old in self._connections.items():
            masks[name] = Connections.from_mask(self.trainer.masks[name])
            if masks[name] != old:
                evict(old.key)
            self._connections[name] = masks[name]
        for name in self._axes.keys() & set(self.trainer.sparse_layers):
            masks[name] = jnp.array(np.moveaxis(self.trainer.masks[name], 0, self._axes[name]))
        self.masks = self._structure.unflatten(masks.values())

    def _rows(self, name: str, dense: Any) -> Any:
        """Return an array of a layer on the host, with its neurons first."""
        array = np.asarray(dense)
        return np.moveaxis(array, -1, 0) if self._axes.get(name) == -1 else array

    def _values_of(self, path: Any) -> str:
        """Return the name of the values beside connections, which linen has in a collection."""
        layer = _name(path).split(".")[:-1]
        names = [".".join([*parts, "values"]) for parts in (layer, layer[1:])]
        return names[0] if names[0] in self._names else names[1]

    def _leaves(self, tree: Any, what: str) -> dict[str, Any]:
        leaves, structure = jax.tree.flatten(tree, is_leaf=is_mask)
        if structure != self._structure:
            raise SriglError(
                f"{what} must have the structure of the parameters, {self._structure}, but has "
                f"{structure}"
            )
        return dict(zip(self._names, leaves, strict=True))


def _name(path: Any) -> str:
    """Return the name of a parameter; ``value`` is the attribute of a variable of flax NNX."""
    name: str = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value")


def _selected(layers: Iterable[str], names: list[str]) -> list[str]:
    """Return the parameters that are named, in the order in which they are."""
    if isinstance(layers, str):
        raise ValueTypeError(f"layers={layers!r} must be a list of names; write [{layers!r}]")
    selected: list[str] = []
    for pattern in layers:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise SriglError(
                f"layers has an entry {pattern!r}, but the parameters are: {', '.join(names)}"
            )
        selected = [name for name in selected if name not in found] + found
    return selected


def _neuron_axis(name: str, weight: Any, neuron_axis: int | None) -> int:
    if getattr(weight, "ndim", 0) < 2:
        raise SriglError(f"layer {name!r} is not a weight of two or more axes")
    axis = _NEURON_AXES.get(name.rpartition(".")[2]) if neuron_axis is None else neuron_axis
    if axis not in (0, -1):
        raise SriglError(
            f"neuron_axis={neuron_axis!r} must be the axis of the neurons in {name!r}, of shape "
            f"{weight.shape}: 0 for (n_out, n_in), or -1 for (n_in, n_out); if it is the values of "
            f"a condensed layer, pass the connections"
        )
    return axis


def _placed(new: Any, old: Any) -> Any:
    """Return an array on the devices of another one, if that was put there."""
    return jax.device_put(new, old.sharding if getattr(old, "committed", False) else None)


def _map(function: Callable[[Any, Any], Any], masks: Any, tree: Any) -> Any:
    return jax.tree.map(function, masks, tree, is_leaf=is_mask)


# Each is one compiled function, since shapes are new after an update that ablates neurons.


@jax.jit  # type: ignore[untyped-decorator] # JAX is untyped here
def _masked(tree: Any, masks: Any) -> Any:
    """Return parameters or gradients in the parameters' shapes, with zeros at inactive weights."""

    def masked(mask: Any, leaf: Any) -> Any:
        if isinstance(mask, Connections):
            return leaf if leaf.shape == mask.indices.shape else mask.gather(leaf)
        return leaf if mask is None else jnp.where(mask, leaf, 0)

    return _map(masked, masks, tree)


@jax.jit  # type: ignore[untyped-decorator]
def _dense(params: Any, masks: Any) -> Any:
    """Return parameters with dense weights in place of the values of condensed layers."""

    def dense(mask: Any, leaf: Any) -> Any:
        return mask.scatter(leaf) if isinstance(mask, Connections) else leaf

    return _map(dense, masks, params)


@partial(jax.jit, static_argnums=0)
def _restarted(init: Callable[[Any], Any], params: Any, state: Any, before: Any, after: Any) -> Any:
    """Return an optimiser's state after an update."""
    return remap_state(state, before, after, init(params))
