"""Products and gradients in extended precision, with what bounds their errors (SPEC 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import accumulator_dtype
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core.testing.bounds import Outcome, float_limits

__all__ = ["chunks_of_neurons", "expected_gradients", "expected_product"]


_CHUNK = 2**18
"""Products that are computed at once."""


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
        terms[weight.active] = weight.fan_in
        inputs = x.astype(np.longdouble)
        for neurons in chunks_of_neurons(weight, inputs.size // x.shape[-1]):
            values = weight.values[neurons].astype(np.longdouble)
            products = inputs[..., weight.indices[neurons]] * values
            rows, scale = weight.active[neurons], scales[neurons]
            z[..., rows] = scale * products.sum(axis=-1)
            size = _magnitudes(products).sum(axis=-1)
            is_large = size > float_limits(accumulator).largest / 2
            magnitude[..., rows] = np.where(is_large, np.inf, scale * size)
        if bias is not None:
            z += bias.astype(np.longdouble)
            magnitude += _magnitudes(bias.astype(np.longdouble))
        return Outcome(z, magnitude, terms, accumulator, activation)


def chunks_of_neurons(weight: CondensedWeight | QuantizedWeight, batch: int) -> Iterator[slice]:
    """Yield slices of neurons that have few products each."""
    step = max(1, _CHUNK // max(1, batch * weight.fan_in))
    for start in range(0, weight.n_active, step):
        yield slice(start, start + step)


def _magnitudes(products: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    """Return the magnitudes of the finite terms: only these may overflow in a partial sum."""
    magnitudes = np.abs(products)
    magnitudes[~np.isfinite(magnitudes)] = 0
    return magnitudes


def expected_gradients(
    weight: CondensedWeight, grad: NDArray[Any], x: NDArray[Any]
) -> dict[str, Outcome]:
    """Return dx, dvalues and dbias in extended precision, as "x", "values" and "bias"."""
    g = grad.reshape(-1, grad.shape[-1]).astype(np.longdouble)
    rows = x.reshape(-1, x.shape[-1]).astype(np.longdouble)
    dx, dx_scale = (np.zeros((rows.shape[1], len(g)), np.longdouble) for _ in range(2))
    dvalues, values_scale = (np.zeros(weight.values.shape, np.longdouble) for _ in range(2))
    degree = np.bincount(weight.indices.ravel(), minlength=weight.shape[1])
    with np.errstate(all="ignore"):
        for neurons in chunks_of_neurons(weight, len(g)):
            columns, connected = weight.indices[neurons], g[:, weight.active[neurons]]
            values = weight.values[neurons].astype(np.longdouble)
            products = connected[:, :, None] * values
            _add_by_column(dx, columns, products)
            _add_by_column(dx_scale, columns, _magnitudes(products))
            products = connected[:, :, None] * rows[:, columns]
            dvalues[neurons] = products.sum(axis=0)
            values_scale[neurons] = _magnitudes(products).sum(axis=0)
        dx, dx_scale = dx.T, dx_scale.T
        batch = np.array(g.shape[0])
        x_dtype = accumulator_dtype(grad.dtype, weight.dtype)
        values_dtype = accumulator_dtype(grad.dtype, weight.dtype, x.dtype)
        bias_dtype = accumulator_dtype(grad.dtype)
        return {
            "x": Outcome(dx.reshape(x.shape), dx_scale.reshape(x.shape), degree, x_dtype),
            "values": Outcome(dvalues, values_scale, batch, values_dtype),
            "bias": Outcome(g.sum(axis=0), _magnitudes(g).sum(axis=0), batch, bias_dtype),
        }


def _add_by_column(
    sums: NDArray[np.longdouble], columns: NDArray[Any], products: NDArray[np.longdouble]
) -> None:
    """Add products, (batch, neurons, k), to `sums`, (n_in, batch), at their `columns`."""
    order = np.argsort(columns, axis=None, kind="stable")
    ordered = columns.ravel()[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    by_column = products.reshape(len(products), columns.size)[:, order].T
    sums[ordered[first]] += np.add.reduceat(by_column, first, axis=0)
