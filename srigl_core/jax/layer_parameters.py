"""Values, connections and bias of a new layer, for the layers of flax and equinox."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from srigl_core._arrays.checks import as_mask
from srigl_core._format.weight import CondensedWeight
from srigl_core.errors import SriglError
from srigl_core.jax.connections import Connections, from_condensed

__all__ = ["draw_parameters", "parameters_of_condensed", "parameters_of_dense"]


def draw_parameters(
    key: Any, in_features: int, out_features: int, *, fan_in: int, use_bias: bool, dtype: Any
) -> tuple[Any, Connections, Any | None]:
    """Draw connections, and values and biases uniform within ``sqrt(1 / fan_in)`` (SPEC 5).

    Raises
    ------
    SriglError
        If `fan_in` is out of range.
    ValueTypeError
        If `key` is a tracer.
    """
    keys = jax.random.split(key, 3)
    connections = Connections.random(keys[0], (out_features, in_features), fan_in=fan_in)
    most = fan_in**-0.5
    values, bias = (
        jax.random.uniform(key, shape, dtype, -most, most)
        for key, shape in ((keys[1], (out_features, fan_in)), (keys[2], (out_features,)))
    )
    return values, connections, bias if use_bias else None


def parameters_of_condensed(
    weight: CondensedWeight, bias: Any | None
) -> tuple[Any, Connections, Any | None]:
    """Return the parameters of a condensed weight, with JAX arrays.

    Raises
    ------
    SriglError
        If `bias` has another shape than (n_out,).
    ValueTypeError
        As in `from_condensed`.
    """
    return *from_condensed(weight), _checked(bias, weight.shape)


def parameters_of_dense(
    weight: Any, mask: Any, bias: Any | None, *, is_kernel: bool = False
) -> tuple[Any, Connections, Any | None]:
    """Return the parameters of a dense weight with a mask.

    Both are (n_out, n_in), or (n_in, n_out) for the kernel of a Flax layer.

    Raises
    ------
    SriglError
        If the weight is no matrix, the mask has another shape or is not constant fan-in, or `bias`
        has another shape than (n_out,).
    """
    if weight.ndim != 2:
        raise SriglError(
            f"the weight has shape {weight.shape}, but must have two axes; pass a linear layer"
        )
    mask = as_mask(mask, weight.shape, "mask")
    if is_kernel:
        weight, mask = weight.T, mask.T
    connections = Connections.from_mask(mask)
    return connections.gather(jnp.asarray(weight)), connections, _checked(bias, weight.shape)


def _checked(bias: Any | None, shape: tuple[int, int]) -> Any | None:
    if bias is not None and jnp.shape(bias) != shape[:1]:
        raise SriglError(f"bias has shape {jnp.shape(bias)}, but must be {shape[:1]}")
    return None if bias is None else jnp.asarray(bias)
