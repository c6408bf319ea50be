"""Flax Linen: the condensed linear layer as a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from srigl_core._format.weight import CondensedWeight
from srigl_core._install import install_command
from srigl_core.errors import BackendUnavailableError, SriglError
from srigl_core.jax import Connections, condensed_linear
from srigl_core.jax.layer_parameters import (
    draw_parameters,
    parameters_of_condensed,
    parameters_of_dense,
)

try:
    from flax import linen
except ImportError as error:
    raise BackendUnavailableError(
        f"srigl_core.integrations.flax_linen needs Flax ({error}); install it: "
        f"{install_command('flax')}"
    ) from error

__all__ = ["CondensedLinear"]


class CondensedLinear(linen.Module):  # type: ignore[misc] # the package's types are not followed
    """A linear layer with constant fan-in and without a dense weight.

    The collection ``params`` has its `values`, (n_active, fan_in), and `bias`, (out_features,). The
    collection ``connections`` has its `connections`, which are not trained. ``init`` draws them all
    by the key ``params``, outside of ``jit`` and ``eval_shape``.

    Attributes
    ----------
    in_features, out_features : int
        These and the others are the constructor's arguments, in this order.
    fan_in : int
        Connections of each neuron that ``init`` draws, 1..in_features.
    use_bias : bool
    dtype : dtype
        Of values and bias.

    Raises
    ------
    SriglError
        In ``init``, if `fan_in` is out of range.
    ValueTypeError
        In ``init``, if the key is a tracer.

    Notes
    -----
    SPEC 2 and 5. The product is that of `srigl_core.jax.condensed_linear`.
    """

    in_features: int
    out_features: int
    fan_in: int
    use_bias: bool = True
    dtype: Any = jax.numpy.float32

    @classmethod
    def from_condensed(
        cls, weight: CondensedWeight, bias: Any | None = None
    ) -> tuple[CondensedLinear, dict[str, Any]]:
        """Return a layer, and variables with these weights.

        Parameters
        ----------
        weight : CondensedWeight, (out_features, in_features)
        bias : array, (out_features,), or None
        """
        return cls._of(*parameters_of_condensed(weight, bias))

    @classmethod
    def from_dense(
        cls, params: Mapping[str, Any], mask: Any
    ) -> tuple[CondensedLinear, dict[str, Any]]:
        """Return a layer, and variables with the weights of a dense one where the mask is True.

        Parameters
        ----------
        params : mapping of str to array
            The parameters of a ``linen.Dense``: its kernel and, unless it has none, its bias.
        mask : array of bool, (in_features, out_features)
            Like the kernel. Columns with a True have the same number of them.
        """
        if "kernel" not in params:
            raise SriglError(
                f"params has no 'kernel', but {', '.join(params)}; pass the parameters of one "
                f"linen.Dense"
            )
        kernel, bias = params["kernel"], params.get("bias")
        return cls._of(*parameters_of_dense(kernel, mask, bias, is_kernel=True))

    @classmethod
    def _of(
        cls, values: Any, connections: Connections, bias: Any | None
    ) -> tuple[CondensedLinear, dict[str, Any]]:
        n_out, n_in = connections.shape
        layer = cls(n_in, n_out, connections.fan_in, bias is not None, values.dtype)
        return layer, _variables(values, connections, bias)

    @linen.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
        """Return ``x @ (W*M).T + bias``, of an array (..., in_features)."""
        first: dict[str, Any] = {}
        if self.is_initializing():
            drawn = draw_parameters(
                self.make_rng("params"),
                self.in_features,
                self.out_features,
                fan_in=self.fan_in,
                use_bias=self.use_bias,
                dtype=self.dtype,
            )
            first = _variables(*drawn)

        def variable(collection: str, name: str) -> Any:
            return self.variable(collection, name, lambda: first[collection][name]).value

        values, connections = variable("params", "values"), variable("connections", "connections")
        bias = variable("params", "bias") if self.use_bias else None
        return condensed_linear(x, values, connections, bias)


def _variables(values: Any, connections: Connections, bias: Any | None) -> dict[str, Any]:
    params = {"values": values} | ({} if bias is None else {"bias": bias})
    return {"params": params, "connections": {"connections": connections}}
