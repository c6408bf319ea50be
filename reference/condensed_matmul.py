"""The product with a condensed weight, and its gradients (SPEC 2; paper sec. 4.4).

Sums take one connection (or one row of the batch) at a time, in the accumulator's dtype, so that
the order of the additions is visible.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import as_float_array
from srigl_core._arrays.dtypes import accumulator_dtype, result_dtype, round_to
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._format.weight import CondensedWeight
from srigl_core.contract import MatmulGradients
from srigl_core.errors import SriglError
from srigl_core.reference.activations import activate

__all__ = ["backward", "dense_gradient", "forward"]

Array = NDArray[Any]


def forward(
    x: Array,
    weight: CondensedWeight,
    bias: Array | None = None,
    *,
    activation: str = "none",
    compact: bool = False,
    dtype: np.dtype[Any] | None = None,
) -> Array:
    """Return ``act(x @ (W*M).T + bias)`` computed from the connected inputs only.

    Parameters
    ----------
    x : ndarray, (batch, n_in)
    weight : CondensedWeight, (n_out, n_in)
    bias : ndarray, (n_out,), or None
    activation : str
        One of `srigl_core.contract.ACTIVATIONS`.
    compact : bool
        Return the columns of active neurons only.
    dtype : numpy.dtype or None
        Dtype of the result; None is ``result_type(x, values)``.

    Returns
    -------
    ndarray, (batch, n_out), or (batch, n_active) if `compact`

    Notes
    -----
    SPEC 2. Accumulates in float32, or float64 where either input is float64; the activation is
    evaluated in float64, and the result rounded once.
    """
    sum_dtype = accumulator_dtype(x.dtype, weight.dtype)
    dtype = np.result_type(x, weight.values) if dtype is None else dtype
    with np.errstate(all="ignore"):
        inputs, values = x.astype(sum_dtype), weight.values.astype(sum_dtype)
        offset = np.zeros(weight.shape[0], sum_dtype) if bias is None else bias.astype(sum_dtype)
        z = np.broadcast_to(offset, (x.shape[0], weight.shape[0])).copy()
        summed = z[:, weight.active]
        for j in range(weight.fan_in):
            summed += values[:, j] * inputs[:, weight.indices[:, j]]
        z[:, weight.active] = summed
        return _activated(summed if compact else z, activation, dtype)


def _activated(z: Array, activation: str, dtype: np.dtype[Any]) -> Array:
    if activation == "none":
        return round_to(z, dtype)
    return round_to(activate(z.astype(np.float64), activation), dtype)


def backward(
    grad: Array, x: Array | None, weight: CondensedWeight, *, out: MatmulGradients
) -> None:
    """Write the gradients for which `out` has arrays.

    Parameters
    ----------
    grad : ndarray, (batch, n_out)
        dL/dz.
    x : ndarray, (batch, n_in), or None
        Needed for the gradient of the values.
    weight : CondensedWeight, (n_out, n_in)
    out : MatmulGradients
        ``x`` (batch, n_in), ``values`` (n_active, k), ``bias`` (n_out,), each an array or None.

    Notes
    -----
    SPEC 2, Backward.
    """
    with np.errstate(all="ignore"):
        if out.x is not None:
            out.x[...] = round_to(_input_gradient(grad, weight), out.x.dtype)
        if out.values is not None and x is not None:
            out.values[...] = round_to(_value_gradient(grad, x, weight), out.values.dtype)
        if out.bias is not None:
            sum_dtype = accumulator_dtype(grad.dtype)
            out.bias[...] = round_to(grad.astype(sum_dtype).sum(axis=0), out.bias.dtype)


def _input_gradient(grad: Array, weight: CondensedWeight) -> Array:
    """dx[c] = sum of g[active[i]] * values[i, j] over the (i, j) with indices[i, j] = c."""
    sum_dtype = accumulator_dtype(grad.dtype, weight.dtype)
    values, connected = weight.values.astype(sum_dtype), grad[:, weight.active].astype(sum_dtype)
    dx = np.zeros((grad.shape[0], weight.shape[1]), sum_dtype)
    for i, columns in enumerate(weight.indices):
        dx[:, columns] += connected[:, i, None] * values[i]
    return dx


def _value_gradient(grad: Array, x: Array, weight: CondensedWeight) -> Array:
    """dvalues[i, j] = sum over the batch of g[active[i]] * x[indices[i, j]]."""
    sum_dtype = accumulator_dtype(grad.dtype, x.dtype, weight.dtype)
    dvalues = np.zeros(weight.values.shape, sum_dtype)
    for g_row, x_row in zip(grad.astype(sum_dtype), x.astype(sum_dtype), strict=True):
        dvalues += g_row[weight.active, None] * x_row[weight.indices]
    return dvalues


def dense_gradient(grad: ArrayLike, x: ArrayLike) -> Array:
    """Return the gradient of the dense weight, ``grad.T @ x``, needed only at mask updates.

    Parameters
    ----------
    grad : array, (..., n_out)
        dL/dz of all neurons; an ablated neuron can revive only by its gradient.
    x : array, (..., n_in)
        The input of the forward pass, with the same leading axes.

    Returns
    -------
    ndarray, (n_out, n_in)
        float64 if either argument is float64, else float32.

    Raises
    ------
    SriglError
        If the leading axes differ, or there is none.
    ValueTypeError
        If a dtype is not supported, or float16 meets bfloat16.

    Notes
    -----
    SPEC 2, Backward. BLAS is not used: its sums depend on the number of threads, and the gradient
    decides which weights are grown. Cost O(batch * n_out * n_in).

    Examples
    --------
    >>> dense_gradient(np.array([[1.0, 0.0], [2.0, -1.0]]), np.array([[3.0], [4.0]]))
    array([[11.],
           [-4.]])
    """
    grad, x = as_float_array(grad, "grad"), as_float_array(x, "x")
    result_dtype(grad.dtype, x.dtype)
    if not grad.ndim or not x.ndim or grad.shape[:-1] != x.shape[:-1]:
        raise SriglError(
            f"grad of shape {grad.shape} and x of shape {x.shape} must be (..., n_out) and "
            f"(..., n_in) with the same leading axes"
        )
    sum_dtype = accumulator_dtype(grad.dtype, x.dtype)
    rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]).astype(sum_dtype)
    columns = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(sum_dtype)
    with honour_subnormals(), np.errstate(all="ignore"):
        product: Array = np.einsum("bo,bi->oi", rows, columns, optimize=False)
    return product
