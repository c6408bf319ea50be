"""Equinox: the condensed linear layer as a module."""

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
    import equinox as eqx
except ImportError as error:
    raise BackendUnavailableError(
        f"srigl_core.integrations.equinox needs Equinox ({error}); install it: "
        f"{install_command('equinox')}"
    ) from error

__all__ = ["CondensedLinear"]


class CondensedLinear(eqx.Module):  # type: ignore[misc] # the package's types are not followed
    """A linear layer with constant fan-in and without a dense weight.

    Parameters
    ----------
    in_features, out_features : int
    fan_in : int
        Connections of each neuron, 1..in_features.
    use_bias : bool
    dtype : dtype
        Of values and bias.
    key : array
        A key of ``jax.random``, for connections, values and bias; not a tracer.

    Attributes
    ----------
    values : array, (n_active, fan_in)
    bias : array, (out_features,), or None
    connections : Connections
        Arrays of integers, so that ``eqx.is_inexact_array`` leaves them out.

    Raises
    ------
    SriglError
        If `fan_in` is out of range.
    ValueTypeError
        If `key` is a tracer.

    Notes
    -----
    SPEC 2 and 5. The product is that of `srigl_core.jax.condensed_linear`.
    """

    values: Any
    bias: Any
    connections: Connections

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        fan_in: int,
        use_bias: bool = True,
        dtype: Any = jax.numpy.float32,
        key: Any,
    ) -> None:
        self.values, self.connections, self.bias = draw_parameters(
            key, in_features, out_features, fan_in=fan_in, use_bias=use_bias, dtype=dtype
        )

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
    def from_dense(cls, layer: eqx.nn.Linear, mask: Any) -> CondensedLinear:
        """Return a layer with the weights of a dense one where the mask is True.

        Parameters
        ----------
        layer : equinox.nn.Linear
        mask : array of bool, (out_features, in_features)
            Like the layer's weight. Rows with a True have the same number of them.
        """
        return cls._of(*parameters_of_dense(layer.weight, mask, layer.bias))

    @classmethod
    def _of(cls, values: Any, connections: Connections, bias: Any | None) -> CondensedLinear:
        template = cls(1, 1, fan_in=1, key=jax.random.key(0))
        layer: CondensedLinear = eqx.tree_at(
            lambda layer: (layer.values, layer.connections, layer.bias),
            template,
            (values, connections, bias),
        )
        return layer

    def __call__(self, x: Any, *, key: Any | None = None) -> Any:
        """Return ``x @ (W*M).T + bias``, of an array (..., in_features); `key` is not used."""
        return condensed_linear(x, self.values, self.connections, self.bias)
