"""Flax NNX: the condensed linear layer as a module."""

from __future__ import annotations

from typing import Any

import jax

from srigl_core._format.weight import CondensedWeight
from srigl_core._install import install_command
from srigl_core.errors import BackendUnavailableError
from srigl_core.jax import Connections, condensed_linear
from srigl_core.jax.layer_parameters import (
    draw_parameters,
    parameters_of_condensed,
    parameters_of_dense,
)

try:
    from flax import nnx
except ImportError as error:
    raise BackendUnavailableError(
        f"srigl_core.integrations.flax_nnx needs Flax ({error}); install it: "
        f"{install_command('flax')}"
    ) from error

__all__ = ["CondensedLinear", "ConnectionsVariable"]


class ConnectionsVariable(nnx.Variable):  # type: ignore[misc] # the package's types are not followed
    """The connections of a layer, which are not trained."""


class CondensedLinear(nnx.Module):  # type: ignore[misc]
    """A linear layer with constant fan-in and without a dense weight.

    Parameters
    ----------
    in_features, out_features : int
    fan_in : int
        Connections of each neuron, 1..in_features.
    use_bias : bool
    dtype : dtype
        Of values and bias.
    rngs : flax.nnx.Rngs
        Its stream ``params`` gives the key for connections, values and bias; not a tracer.

    Attributes
    ----------
    values : flax.nnx.Param of array, (n_active, fan_in)
    bias : flax.nnx.Param of array, (out_features,), or None
    connections : ConnectionsVariable of Connections

    Raises
    ------
    SriglError
        If `fan_in` is out of range.
    ValueTypeError
        If the key is a tracer: make the layer outside of ``jit`` and ``eval_shape``.

    Notes
    -----
    SPEC 2 and 5. The product is that of `srigl_core.jax.condensed_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        fan_in: int,
        use_bias: bool = True,
        dtype: Any = jax.numpy.float32,
        rngs: nnx.Rngs,
    ) -> None:
        drawn = draw_parameters(
            rngs.params(), in_features, out_features, fan_in=fan_in, use_bias=use_bias, dtype=dtype
        )
        self._set(*drawn)

    @classmethod
    def from_condensed(cls, weight: CondensedWeight, bias: Any | None = None) -> CondensedLinear:
        """Return a layer with these weights.

        Parameters
        ----------
        weight : CondensedWeight, (out_features, in_features)
        bias : array, (out_features,), or None
        """
        return cls._of(*parameters_of_condensed(weight, bias))

    @classmethod
    def from_dense(cls, layer: nnx.Linear, mask: Any) -> CondensedLinear:
        """Return a layer with the weights of a dense one where the mask is True.

        Parameters
        ----------
        layer : flax.nnx.Linear
        mask : array of bool, (in_features, out_features)
            Like the layer's kernel. Columns with a True have the same number of them.
        """
        bias = None if layer.bias is None else layer.bias.get_value()
        return cls._of(*parameters_of_dense(layer.kernel.get_value(), mask, bias, is_kernel=True))

    @classmethod
    def _of(cls, values: Any, connections: Connections, bias: Any | None) -> CondensedLinear:
        layer = cls(1, 1, fan_in=1, rngs=nnx.Rngs(0))
        layer._set(values, connections, bias)
        return layer

    def _set(self, values: Any, connections: Connections, bias: Any | None) -> None:
        self.values = nnx.Param(values)
        self.connections = ConnectionsVariable(connections)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Any) -> Any:
        """Return ``x @ (W*M).T + bias``, of an array (..., in_features)."""
        bias = None if self.bias is None else self.bias.get_value()
        return condensed_linear(x, self.values.get_value(), self.connections.get_value(), bias)
