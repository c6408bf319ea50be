"""The product with a quantised weight in JAX, as a call of the host's kernels (SPEC 6).

XLA fuses multiplications and additions, so that its own operations do not give the bits of SPEC 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from srigl_core._arrays.checks import check_choice
from srigl_core._arrays.dtypes import value_dtype
from srigl_core._format.weight import QuantizedWeight
from srigl_core._plan import QuantizedPlan, plan_of
from srigl_core._product_spec import QUANTIZED_INPUTS, ArraySpec, product_spec
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.jax.host_call import check_on_cpu, host_call

__all__ = ["quantized_linear"]


def quantized_linear(
    x: Any,
    weight: QuantizedWeight,
    bias: Any | None = None,
    *,
    inputs: str = "float",
    activation: str | None = None,
) -> Any:
    """Return ``act(x @ (W*M).T + bias)`` of a quantised weight, also under ``jit``.

    Parameters
    ----------
    x : array, (..., n_in)
        float16, bfloat16, float32 or float64.
    weight : QuantizedWeight, (n_out, n_in)
        A constant of a jitted function, not an argument.
    bias : array, (n_out,), or None
    inputs : {"float", "int8"}
        Whether inputs stay as they are, or each row of them is quantised too.
    activation : str or None
        One of `srigl_core.contract.ACTIVATIONS`.

    Returns
    -------
    array, (..., n_out)
        Bit for bit what ``srigl_core.prepare(weight, inputs=inputs)`` gives.

    Raises
    ------
    SriglError
        If a shape does not fit, an argument is unknown, or a gradient is asked for.
    ValueTypeError
        If `weight` is no quantised weight, or a dtype is not supported.
    BackendUnavailableError
        If an array is not on the CPU.

    Notes
    -----
    SPEC 6. ``vmap`` over `x` is one product. There are no gradients, and ``jax.export`` cannot
    write a call of the host.

    Examples
    --------
    >>> import jax, numpy as np, srigl_core
    >>> from srigl_core.jax import quantized_linear
    >>> weight = srigl_core.CondensedWeight.random((3, 8), fan_in=2, rng=0).quantize()
    >>> layer = jax.jit(lambda x: quantized_linear(x, weight, inputs="int8"))
    >>> layer(np.ones((4, 8), np.float32)).shape
    (4, 3)
    """
    if not isinstance(weight, QuantizedWeight):
        raise ValueTypeError(
            f"weight must be a QuantizedWeight, got {type(weight).__name__}; "
            f"CondensedWeight.quantize() makes one"
        )
    check_choice(inputs, "inputs", QUANTIZED_INPUTS)
    x = jnp.asarray(x)
    biases = () if bias is None else (jnp.asarray(bias),)
    for each in biases:
        value_dtype(each.dtype, "bias of dtype")
    spec = product_spec(
        ArraySpec(x.shape, x.dtype),
        weight.shape,
        weight.float_dtype,
        bias_shape=biases[0].shape if biases else None,
        activation=activation,
        inputs=inputs,
    )
    check_on_cpu(x, *biases)
    if 0 in spec.shape:
        return jnp.zeros(spec.shape, spec.dtype)
    product = _Product(plan_of(weight, inputs=inputs), spec.activation.name)
    return _call(product, x, *biases)


@dataclass(frozen=True)
class _Product:
    """Writes a product, for `host_call`."""

    plan: QuantizedPlan
    activation: str

    def __call__(self, out: Any, x: Any, *biases: Any) -> None:
        self.plan(x, *biases, activation=self.activation, out=out)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _call(product: _Product, x: Any, *biases: Any) -> Any:
    weight = product.plan.weight

    @custom_vmap  # type: ignore[untyped-decorator] # JAX is untyped here
    def call(x: Any, *biases: Any) -> Any:
        spec = product_spec(ArraySpec(x.shape, x.dtype), weight.shape, weight.float_dtype)
        return host_call(product, spec.shape, spec.dtype, x, *biases)

    @call.def_vmap  # type: ignore[untyped-decorator]
    def merge_axis(size: int, is_mapped: list[bool], x: Any, *biases: Any) -> tuple[Any, bool]:
        if any(is_mapped[1:]):
            raise SriglError("a quantised layer takes one bias; map over x alone with vmap")
        return call(x, *biases), True

    return call(x, *biases)


@_call.defjvp  # type: ignore[untyped-decorator]
def _refuse_gradient(product: _Product, *arguments: Any) -> Any:
    product.plan.backward()
