"""Initial masks and initial weights of sparse layers (SPEC 5; Evci et al. 2022)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from srigl_core._arrays.checks import as_mask, check_choice, check_generator, check_integer
from srigl_core._arrays.dtypes import round_to, value_dtype
from srigl_core._format.connections import Connections, flat_shape

__all__ = ["INITS", "random_mask", "random_unstructured_mask", "sparse_init"]

INITS = (
    "kaiming_normal",
    "kaiming_uniform",
    "torch_default",
    "grad_flow",
    "grad_flow_released",
)


def random_mask(
    shape: tuple[int, ...], *, fan_in: int, rng: np.random.Generator | int
) -> NDArray[np.bool_]:
    """Draw `fan_in` connections for every neuron, uniformly without replacement.

    Parameters
    ----------
    shape : tuple of int
        (n_out, n_in) or (out, in, kh, kw).
    fan_in : int
        1..n_in.
    rng : numpy.random.Generator or int
        A generator or a seed.

    Returns
    -------
    ndarray of bool, `shape`

    Raises
    ------
    SriglError
        If `fan_in` is out of range.
    """
    connections = Connections.random(flat_shape(shape), fan_in=fan_in, rng=rng)
    return connections.to_mask().reshape(shape)


def random_unstructured_mask(
    shape: tuple[int, ...], *, nnz: int, rng: np.random.Generator | int
) -> NDArray[np.bool_]:
    """Draw `nnz` positions of the whole layer, uniformly without replacement.

    Parameters
    ----------
    shape : tuple of int
        (n_out, n_in) or (out, in, kh, kw).
    nnz : int
        1..n_out * n_in.
    rng : numpy.random.Generator or int
        A generator or a seed.

    Returns
    -------
    ndarray of bool, `shape`

    Raises
    ------
    SriglError
        If `nnz` is out of range.
    """
    n_weights = math.prod(flat_shape(shape))
    check_integer(nnz, "nnz", least=1, most=n_weights)
    mask = np.zeros(n_weights, np.bool_)
    mask[check_generator(rng).choice(n_weights, nnz, replace=False, shuffle=False)] = True
    return mask.reshape(shape)


def sparse_init(
    mask: NDArray[np.bool_],
    init: str = "kaiming_normal",
    *,
    rng: np.random.Generator | int,
    dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """Draw weights for the active positions, scaled by the row's fan-in in place of n_in.

    Parameters
    ----------
    mask : ndarray of bool, (n_out, n_in) or (out, in, kh, kw)
    init : str
        With k the row's number of active weights: "kaiming_normal" and "grad_flow", normal of
        standard deviation sqrt(2/k); "kaiming_uniform", uniform within sqrt(6/k);
        "torch_default", uniform within sqrt(1/k); "grad_flow_released", normal of standard
        deviation 2/k, as the released code does by mistake (decision O24).
    rng : numpy.random.Generator or int
        A generator or a seed.
    dtype : dtype-like
        One of the value types.

    Returns
    -------
    ndarray of `dtype`, shape of `mask`
        0 at inactive positions.

    Raises
    ------
    SriglError
        If `init` is unknown.
    ValueTypeError
        If `mask` is not an array of bool.
    """
    check_choice(init, "init", INITS)
    mask, rng = as_mask(mask, None), check_generator(rng)
    shape = flat_shape(mask.shape)
    active = mask.reshape(shape)
    fan_in = np.maximum(np.count_nonzero(active, axis=1), 1)[:, None]
    if init in ("kaiming_uniform", "torch_default"):
        bound = np.sqrt((6 if init == "kaiming_uniform" else 1) / fan_in)
        weight = rng.uniform(-1, 1, shape) * bound
    else:
        weight = rng.standard_normal(shape)
        weight *= 2 / fan_in if init == "grad_flow_released" else np.sqrt(2 / fan_in)
    return round_to(np.where(active, weight, 0), value_dtype(dtype)).reshape(mask.shape)
