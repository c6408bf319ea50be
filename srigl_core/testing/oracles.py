"""Products and gradients in extended precision, with what bounds their errors (SPEC 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import accumulator_dtype
from srigl_core._format.quantized_weight import QuantizedWeight
from srigl_core._format.weight import CondensedWeight
from srigl_core.testing.bounds import Outcome, float_limits

__all__ = ["expected_gradients", "expected_product"]


def expected_product(
    weight: CondensedWeight | QuantizedWeight,
    x: NDArray[Any],
    bias: NDArray[Any] | None,
    activation: str,
) -> Outcome:
    """Return the product in extended precision, (..., n_out); `bias` has the product's dtype.

    With a quantised weight it is the product with the inputs as they are. Its scale may be applied
    to the terms or to their sum, so neither may come near overflow (SPEC 6).
    """
    accumulator = accumulator_dtype(x.dtype, weight.float_dtype)
    scales = np.ones(weight.n_active, np.longdouble)
    if isinstance(weight, QuantizedWeight):
        scales = weight.scale.astype(np.longdouble)
    with np.errstate(all="ignore"):
        z = np.zeros((*x.shape[:-1], weight.shape[0]), np.longdouble)
        magnitude = np.zeros_like(z)
        terms = np.zeros(weight.shape[0], np.int64)
        for row, scale, values, columns in zip(
            weight.active, scales, weight.values.astype(np.longdouble), weight.indices, strict=True
        ):
            products = x[..., columns].astype(np.longdouble) * values
            z[..., row] = scale * products.sum(axis=-1)
            size = _magnitudes(products).sum(axis=-1)
            is_large = size > float_limits(accumulator).largest / 2
            magnitude[..., row] = np.where(is_large, np.inf, scale * size)
            terms[row] = columns.size
        if bias is not None:
            z += bias.astype(np.longdouble)
            magnitude += _magnitudes(bias.astype(np.longdouble))
        return Outcome(z, magnitude, terms, accumulator, activation)


def _magnitudes(products: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    """Return the magnitudes of the finite terms: only these may overflow in a partial sum."""
    return np.where(np.isfinite(products), np.abs(products), 0)


def expected_gradients(
    weight: CondensedWeight, grad: NDArray[Any], x: NDArray[Any]
) -> dict[str, Outcome]:
    """Return dx, dvalues and dbias in extended precision, as "x", "values" and "bias"."""
    g = grad.reshape(-1, grad.shape[-1]).astype(np.longdouble)
    rows = x.reshape(-1, x.shape[-1]).astype(np.longdouble)
    dx, dx_scale = np.zeros(rows.shape, np.longdouble), np.zeros(rows.shape, np.longdouble)
    dvalues, values_scale = (np.zeros(weight.values.shape, np.longdouble) for _ in range(2))
    degree = np.bincount(weight.indices.ravel(), minlength=weight.shape[1])
    with np.errstate(all="ignore"):
        for i, (row, columns) in enumerate(zip(weight.active, weight.indices, strict=True)):
            products = g[:, row, None] * weight.values[i].astype(np.longdouble)
            dx[:, columns] += products
            dx_scale[:, columns] += _magnitudes(products)
            products = g[:, row, None] * rows[:, columns]
            dvalues[i], values_scale[i] = products.sum(axis=0), _magnitudes(products).sum(axis=0)
        batch = np.array(g.shape[0])
        x_dtype = accumulator_dtype(grad.dtype, weight.dtype)
        values_dtype = accumulator_dtype(grad.dtype, weight.dtype, x.dtype)
        bias_dtype = accumulator_dtype(grad.dtype)
        return {
            "x": Outcome(dx.reshape(x.shape), dx_scale.reshape(x.shape), degree, x_dtype),
            "values": Outcome(dvalues, values_scale, batch, values_dtype),
            "bias": Outcome(g.sum(axis=0), _magnitudes(g).sum(axis=0), batch, bias_dtype),
        }
