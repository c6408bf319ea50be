"""The connections of a layer as a pytree, an argument of jitted functions."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from srigl_core._arrays.libraries import library_of
from srigl_core._format import connections as host
from srigl_core._format.weight import CondensedWeight, check_condensed
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["Connections", "from_condensed", "to_condensed"]

_MOST_INPUTS = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class Connections:
    """The connections of a constant fan-in layer.

    Connections are a pytree. A jitted function that takes them as an argument is not compiled again
    for other connections of the same shapes. Make them with `from_condensed`, `from_mask`, `random`
    or `of`, outside of ``jit``. Do not change the arrays, which `key` identifies.

    Parameters
    ----------
    indices : array of int32, (n_active, k)
        Column numbers, ascending within a row.
    active : array of int32, (n_active,)
        Row numbers, ascending.
    key : array of uint32, (4,)
        A hash of `shape`, `indices` and `active`, the key of cached layouts.
    shape : tuple of int
        Dense shape, (n_out, n_in).
    """

    indices: Any
    active: Any
    key: Any
    shape: tuple[int, int]

    @classmethod
    def of(cls, indices: Any, active: Any, shape: tuple[int, int]) -> Connections:
        """Check arrays and return their connections.

        Parameters
        ----------
        indices : array of integers, (n_active, k)
            Column numbers, strictly ascending within a row.
        active : array of integers, (n_active,)
            Row numbers, strictly ascending.
        shape : tuple of int
            Dense shape, (n_out, n_in).

        Raises
        ------
        SriglError
            If shapes disagree, or a number is out of range or out of order.
        ValueTypeError
            If they are tracers, or not arrays of integers.
        """
        for name, array in (("indices", indices), ("active", active)):
            library_of(array).check(array, name)
        return _on_device(host.Connections(indices, active, shape))

    @classmethod
    def from_mask(cls, mask: Any) -> Connections:
        """Return the connections of a constant fan-in mask.

        Parameters
        ----------
        mask : array of bool, (n_out, ...)

        Raises
        ------
        SriglError
            If the rows that are not empty have different numbers of True.
        """
        return _on_device(host.Connections.from_mask(mask))

    @classmethod
    def random(
        cls, key: Any, shape: tuple[int, int], *, fan_in: int, n_active: int | None = None
    ) -> Connections:
        """Draw connections uniformly at random.

        Parameters
        ----------
        key : array
            A key of ``jax.random``. The draw is NumPy's, seeded by it.
        shape : tuple of int
            (n_out, n_in).
        fan_in : int
            Connections of each active neuron, 1..n_in.
        n_active : int or None
            Number of active neurons, drawn at random; None means all.

        Raises
        ------
        SriglError
            If `fan_in` or `n_active` is out of range.
        ValueTypeError
            If `key` is a tracer.
        """
        numbers = jax.random.key_data(key)
        library_of(numbers).check(numbers, "key")
        rng = np.random.default_rng(np.asarray(numbers).ravel())
        drawn = host.Connections.random(shape, fan_in=fan_in, n_active=n_active, rng=rng)
        return _on_device(drawn)

    @property
    def n_active(self) -> int:
        """Number of active neurons."""
        return int(self.active.shape[-1])

    @property
    def fan_in(self) -> int:
        """Connections of each active neuron, k."""
        return int(self.indices.shape[-1])

    def to_mask(self) -> Any:
        """Return the mask, an array of bool, (n_out, n_in). It works within ``jit``."""
        return self.scatter(jax.numpy.ones(self.indices.shape, bool))

    def scatter(self, values: Any) -> Any:
        """Return a dense array with `values` at the connections and 0 elsewhere.

        It is differentiable and works within ``jit``.

        Parameters
        ----------
        values : array, (n_active, k)
            An array of any dtype.

        Returns
        -------
        array, (n_out, n_in)
        """
        dense = jax.numpy.zeros(self.shape, values.dtype)
        return dense.at[self.active[:, None], self.indices].set(values)

    def gather(self, dense: Any) -> Any:
        """Return the elements of a dense array at the connections.

        It is differentiable and works within ``jit``.

        Parameters
        ----------
        dense : array, (n_out, ...)
            An array with the size of the dense weight.

        Returns
        -------
        array, (n_active, k)
        """
        return dense.reshape(self.shape)[self.active[:, None], self.indices]

    def check_arrays(self) -> None:
        """Raise ValueTypeError if `jax.tree.map` has put something else in place of the arrays."""
        for name, leaf in self._leaves().items():
            if not isinstance(leaf, jax.Array | np.ndarray):
                raise ValueTypeError(
                    f"connections.{name} must be an array, got {type(leaf).__name__}; pass the "
                    f"connections that from_condensed, from_mask, random or of returned"
                )

    def _leaves(self) -> dict[str, Any]:
        return {"indices": self.indices, "active": self.active, "key": self.key}

    def __eq__(self, other: object) -> bool:
        """Whether `shape` and what is in place of the arrays are the same."""
        if not isinstance(other, Connections):
            return NotImplemented
        pairs = zip(self._leaves().values(), other._leaves().values(), strict=True)
        return self.shape == other.shape and all(_same(*pair) for pair in pairs)

    def __hash__(self) -> int:
        return hash((Connections, self.shape))

    def __repr__(self) -> str:
        # jax.tree.map may replace the arrays by any objects. A dtype has a shape, too.
        shapes = [getattr(leaf, "shape", None) for leaf in self._leaves().values()]
        n_axes = [len(shape) if isinstance(shape, tuple) else 0 for shape in shapes]
        if n_axes[0] >= 2 and n_axes[0] == n_axes[1] + 1:
            return f"Connections({self.shape}, n_active={self.n_active}, fan_in={self.fan_in})"
        leaves = ", ".join(f"{name}={leaf!r}" for name, leaf in self._leaves().items())
        return f"Connections({self.shape}, {leaves})"


jax.tree_util.register_dataclass(
    Connections, data_fields=["indices", "active", "key"], meta_fields=["shape"]
)
with contextlib.suppress(ImportError):  # raised by versions that need a package for it
    from jax import export

    export.register_pytree_node_serialization(
        Connections,
        serialized_name="srigl_core.jax.Connections",
        serialize_auxdata=lambda meta: json.dumps(meta).encode(),
        deserialize_auxdata=lambda data: (tuple(json.loads(data)[0]),),
    )


def from_condensed(weight: CondensedWeight) -> tuple[Any, Connections]:
    """Return the values and the connections of a condensed weight, with JAX arrays.

    Parameters
    ----------
    weight : CondensedWeight

    Returns
    -------
    values : array, (n_active, k)
        The trainable parameters.
    connections : Connections

    Raises
    ------
    ValueTypeError
        If `weight` is not a condensed weight, or it is float64 and jax_enable_x64 is off.
    """
    check_condensed(weight)
    values = jax.numpy.array(weight.values)
    if values.dtype != weight.dtype:
        raise ValueTypeError(
            f"JAX would round a weight of {weight.dtype} to {values.dtype}; enable "
            f"jax_enable_x64, or convert the weight"
        )
    return values, _on_device(weight.connections)


def to_condensed(values: Any, connections: Connections) -> CondensedWeight:
    """Return values and connections as a condensed weight. It cannot be called within ``jit``.

    Parameters
    ----------
    values : array, (n_active, k)
    connections : Connections

    Returns
    -------
    CondensedWeight
    """
    if not isinstance(connections, Connections):
        raise ValueTypeError(
            f"connections must be srigl_core.jax.Connections, got {type(connections).__name__}"
        )
    return CondensedWeight(values, connections.indices, connections.active, connections.shape)


def _on_device(connections: host.Connections) -> Connections:
    if connections.shape[1] > _MOST_INPUTS:
        raise SriglError(f"n_in={connections.shape[1]} exceeds the int32 indices used with JAX")
    _register_with_flax()
    return Connections(
        jax.numpy.array(connections.indices.astype(np.int32)),
        jax.numpy.array(connections.active.astype(np.int32)),
        jax.numpy.array(np.frombuffer(connections.digest(), np.uint32)),
        connections.shape,
    )


def _same(leaf: Any, other: Any) -> bool:
    """Compare what is in place of two arrays; tracers are equal to themselves only."""
    if leaf is other:
        return True
    if any(isinstance(each, jax.core.Tracer) for each in (leaf, other)):
        return False
    if all(isinstance(each, jax.Array | np.ndarray) for each in (leaf, other)):
        return bool(leaf.dtype == other.dtype and np.array_equal(leaf, other))
    return type(leaf) is type(other) and bool(leaf == other)


def _register_with_flax() -> None:
    """Let ``flax.serialization`` write and read connections, if it is imported."""
    flax = sys.modules.get("flax.serialization")
    if flax is not None:
        flax.register_serialization_state(
            Connections, Connections._leaves, _from_state_dict, override=True
        )


def _from_state_dict(target: Connections, state: dict[str, Any]) -> Connections:
    """Return the connections that flax has read; they may have another fan-in than `target`."""
    connections = Connections.of(state["indices"], state["active"], target.shape)
    if not np.array_equal(connections.key, state["key"]):
        raise SriglError(
            f"the state does not hold connections of shape {target.shape}, or was changed; "
            f"restore it into connections of the layer that was saved"
        )
    return connections
