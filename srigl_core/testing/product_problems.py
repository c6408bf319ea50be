"""Products that can tell a right kernel from a wrong one, built from a source of integers.

A problem stays within a kernel's capabilities.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import result_dtype, value_dtype
from srigl_core._format.connections import Connections
from srigl_core._format.weight import CondensedWeight
from srigl_core.contract import ACTIVATIONS
from srigl_core.testing.bounds import float_limits
from srigl_core.testing.kernel_capabilities import (
    DISTINCT_LAYOUTS,
    EVERYTHING,
    LAYOUTS,
    KernelCapabilities,
)
from srigl_core.testing.problem_arrays import (
    MAGNITUDES,
    ORDERED_DTYPES,
    combinable_dtypes,
    laid_out,
    random_numbers,
)
from srigl_core.testing.problem_sizes import (
    LARGE,
    LARGEST_SIZE,
    LEADS,
    SMALL,
    ProductSizes,
    Schedule,
    product_sizes,
)
from srigl_core.testing.problem_sources import DataSource

__all__ = [
    "NOT_OF_A_BIAS",
    "SPECIAL_NUMBERS",
    "MatmulProblem",
    "matmul_problem",
    "random_inputs",
    "random_weight",
    "subnormal_problem",
]

F32, F64, F16, BF16 = ORDERED_DTYPES
DTYPE_PAIRS = (
    *((F32, F32), (F64, F64), (F32, F64), (F64, F32), (F16, F16), (BF16, BF16), (F16, F32)),
    *((BF16, F32), (F32, F16), (F32, BF16), (F64, BF16), (F16, F64), (F64, F16), (BF16, F64)),
)
_FEW = 32
"""The sums of a large problem have about as many terms that are not 0. The error bound grows with \
the terms: among thousands a wrong one would be within it."""

_FULL = np.array([2**63 - 1, 2**64 - 1], np.uint64).view(np.float64)
SPECIAL_NUMBERS = {
    "all": (np.nan, np.inf, -np.inf, *_FULL),
    "NaN": (np.nan,),
    "inf": (np.inf,),
    "-inf": (-np.inf,),
    "NaN of all bits": (_FULL[0],),
    "-NaN of all bits": (_FULL[1],),
}
"""The numbers that are not finite, together and each alone."""

_MOST_OF_SIXTEEN_BITS = 65_536

_MOST_AT_ONCE = 2**23
"""Random numbers that are drawn at once; drawing neuron by neuron is slow for many neurons."""

NOT_OF_A_BIAS = {"F", "rows reversed", "shared everywhere"}
"""Layouts that are another one if an array has one axis."""


@dataclass(frozen=True, eq=False)
class MatmulProblem:
    """A product and its gradients.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
    x : ndarray, (..., n_in)
    grad : ndarray, (..., n_out)
    bias : ndarray, (n_out,), or None
    activation : str
    out_dtype : numpy.dtype
        The dtype of `out` where a law passes one.
    out_layout, layout, grad_layout, bias_layout : str
        The memory layouts of `out`, `x`, `grad` and `bias`, from `LAYOUTS`.
    special : str
        Which numbers that are not finite a law puts in, from `SPECIAL_NUMBERS`.
    seed : int
        Seed of what a law chooses.
    """

    weight: CondensedWeight
    x: NDArray[Any]
    grad: NDArray[Any]
    bias: NDArray[Any] | None
    activation: str
    out_dtype: np.dtype[Any]
    out_layout: str = "C"
    layout: str = "C"
    grad_layout: str = "C"
    bias_layout: str = "C"
    special: str = "all"
    seed: int = 0

    def rng(self, salt: int = 0) -> np.random.Generator:
        """Return a generator for what a law chooses; another one for each `salt`."""
        return np.random.default_rng((self.seed, salt))

    def special_numbers(self, shape: tuple[int, ...], salt: int = 0) -> NDArray[np.float64]:
        """Return numbers that are not finite, of the kind of `special`."""
        return self.rng(salt).choice(SPECIAL_NUMBERS[self.special], shape)

    @property
    def result_dtype(self) -> np.dtype[Any]:
        """Dtype of the product."""
        return result_dtype(self.x.dtype, self.weight.dtype)


def matmul_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> MatmulProblem:
    """Build a product: any shape, dtype, magnitude and memory layout, all numbers finite."""
    sizes = _product_sizes(source, capabilities)
    pairs = (*3 * DTYPE_PAIRS[:1], *DTYPE_PAIRS)  # the most common pair more often
    pairs_taken = [pair for pair in pairs if capabilities.value_dtypes.issuperset(pair)]
    x_dtype, values_dtype = map(value_dtype, source.sampled_from(pairs_taken))
    # In a large layer one number may be wrong, which must not be 0, or small beside others.
    is_large = max(astuple(sizes)) > LARGE
    is_plain = source.first_round() and is_large
    magnitude = source.sampled_from((*8 * is_large * ("normal",), *MAGNITUDES))
    if is_plain:
        magnitude = "away from zero"
    layout, grad_layout, bias_layout = [
        source.sampled_from(_layouts(capabilities, sizes, name)) for name in ("x", "grad", "bias")
    ]
    grad_dtypes = (x_dtype, x_dtype, *combinable_dtypes(capabilities, x_dtype, values_dtype))
    grad_dtype = source.sampled_from(grad_dtypes)
    bias_dtypes = (None, x_dtype, np.dtype(np.float32), np.dtype(np.float64))
    bias_dtype = source.sampled_from(bias_dtypes) if capabilities.bias else None
    bias_magnitude = source.sampled_from(("normal", magnitude))
    activations = [name for name in ACTIVATIONS if name in capabilities.activations]
    activation = source.sampled_from(activations[:1] if is_plain else activations)
    out_dtype = result_dtype(x_dtype, values_dtype)
    if capabilities.out:
        out_dtype = value_dtype(source.sampled_from(ORDERED_DTYPES))
    out_layout = source.sampled_from(_layouts(capabilities, sizes, "out"))
    special = source.sampled_from(("all", "all", *SPECIAL_NUMBERS))
    thinned = source.sampled_from((True, True, True, is_plain))
    seed = source.integer(0, 2**16)
    rng = source.rng()
    lead, shape = sizes.leading_shape, (sizes.n_out, sizes.n_in)
    weight = random_weight(rng, shape, sizes.fan_in, sizes.n_active, values_dtype, magnitude)
    x = random_inputs(rng, weight, lead, x_dtype, magnitude)
    grad = random_numbers(rng, (*lead, sizes.n_out), grad_dtype, magnitude)
    if thinned:
        weight, x, grad = _thinned(rng, weight, x, grad)
    bias = None
    if bias_dtype is not None:
        bias = laid_out(
            random_numbers(rng, (sizes.n_out,), bias_dtype, bias_magnitude), bias_layout
        )
    x, grad = laid_out(x, layout), laid_out(grad, grad_layout)
    more = (out_layout, layout, grad_layout, bias_layout, special, seed)
    return MatmulProblem(weight, x, grad, bias, activation, out_dtype, *more)


def _product_sizes(source: DataSource, capabilities: KernelCapabilities) -> ProductSizes:
    """Draw the sizes of a product that a kernel can compute."""
    most, ablation = capabilities.largest_problem, capabilities.ablation

    def scheduled(schedule: Schedule) -> tuple[int, ...]:
        return astuple(product_sizes(schedule, most, ablation=ablation))

    limits = (len(LEADS), *5 * (LARGEST_SIZE,))
    sizes = ProductSizes(*source.sizes(limits, scheduled)).within(most)
    n_in = sizes.n_in
    if "uint32" not in capabilities.index_dtypes:
        n_in = min(n_in, _MOST_OF_SIXTEEN_BITS)
    elif "uint16" not in capabilities.index_dtypes:
        n_in = max(n_in, _MOST_OF_SIXTEEN_BITS + 1)
    n_out = sizes.n_out if ablation else sizes.n_active
    return replace(sizes, n_out=n_out, n_in=n_in, fan_in=min(sizes.fan_in, n_in))


def _layouts(capabilities: KernelCapabilities, sizes: ProductSizes, name: str) -> list[str]:
    """Return the memory layouts that an array of a problem may have, the simplest first.

    Arrays that share elements are small: thousands of equal rows would hide a wrong one. As few
    problems are small, these layouts are drawn more often in them.
    """
    unlike = {"out": {"offset by a byte"}, "bias": NOT_OF_A_BIAS}.get(name, set())
    shared = tuple(each for each in LAYOUTS if each not in DISTINCT_LAYOUTS)
    is_small = name != "out" and max(sizes.batch, sizes.n_in, sizes.n_out) <= SMALL
    options = [each for each in LAYOUTS if each not in shared] + 3 * is_small * list(shared)
    return [each for each in options if each in capabilities.layouts and each not in unlike]


def _thinned(
    rng: np.random.Generator, weight: CondensedWeight, x: NDArray[Any], grad: NDArray[Any]
) -> tuple[CondensedWeight, NDArray[Any], NDArray[Any]]:
    """Set most numbers to 0 where a sum has many terms, so that each that is left can be seen."""
    values = _sparse(rng, weight.values, -1)
    neurons_of_an_input = weight.nnz // weight.shape[1]
    if neurons_of_an_input > 8 * _FEW:
        grad = _sparse(rng, grad, -1, int(weight.active[-1]))
    if grad.ndim > 1:
        grad = _sparse(rng, grad.reshape(-1, grad.shape[-1]), 0).reshape(grad.shape)
    return weight.with_values(values), x, grad


def _sparse(
    rng: np.random.Generator, array: NDArray[Any], axis: int, last: int = -1
) -> NDArray[Any]:
    """Return `array` with zeros in all but a few slices along an axis, if it is long.

    The first one and the `last` one are among these.
    """
    size = array.shape[axis]
    if size <= 8 * _FEW:
        return array
    kept = np.zeros(size, bool)
    kept[[0, last, *rng.integers(size, size=_FEW)]] = True
    return np.where(kept if axis else kept[:, None], array, array.dtype.type(0))


def random_weight(
    rng: np.random.Generator,
    shape: tuple[int, int],
    fan_in: int,
    n_active: int,
    dtype: np.dtype[Any],
    magnitude: str,
) -> CondensedWeight:
    """Return a weight whose first neuron is connected to the first and the last column.

    In some, no neuron is connected to the columns left out.
    """
    active = np.sort(rng.choice(shape[0], n_active, replace=False))
    n_used = int(rng.integers(fan_in, shape[1], endpoint=True)) if rng.random() < 0.4 else shape[1]
    used = np.sort(rng.choice(shape[1], n_used, replace=False))
    indices = used[_random_columns(rng, n_active, n_used, fan_in)]
    indices[0, 0] = 0
    indices[0, -1] = shape[1] - 1
    values = random_numbers(rng, indices.shape, dtype, magnitude)
    return CondensedWeight(values, indices, active, shape)


def _random_columns(
    rng: np.random.Generator, n_active: int, n_in: int, fan_in: int
) -> NDArray[Any]:
    """Return the columns of each neuron, (n_active, fan_in), ascending."""
    if n_active * n_in > _MOST_AT_ONCE:
        return Connections.random((n_active, n_in), fan_in=fan_in, rng=rng).indices.copy()
    keys = rng.random((n_active, n_in))
    return np.sort(np.argpartition(keys, fan_in - 1, axis=1)[:, :fan_in], axis=1)


def subnormal_problem(source: DataSource, capabilities: KernelCapabilities) -> MatmulProblem:
    """Build a product whose every term is subnormal: by its inputs and `grad`, or by its values."""
    problem = matmul_problem(source, capabilities)
    by_values = source.sampled_from((False, True))
    rng = np.random.default_rng(0)

    def numbers(like: NDArray[Any], *, subnormal: bool) -> NDArray[Any]:
        scale = float_limits(like.dtype).smallest if subnormal else 1.0
        most = 500 if subnormal else 4
        return np.asarray(rng.integers(1, most, like.shape) * scale).astype(like.dtype)

    weight = problem.weight
    x, grad = (numbers(part, subnormal=not by_values) for part in (problem.x, problem.grad))
    return replace(
        problem,
        weight=weight.with_values(numbers(weight.values, subnormal=by_values)),
        x=laid_out(x, problem.layout),
        grad=laid_out(grad, problem.grad_layout),
        bias=None if problem.bias is None else numbers(problem.bias, subnormal=True),
    )


def random_inputs(
    rng: np.random.Generator,
    weight: CondensedWeight,
    lead: tuple[int, ...],
    dtype: np.dtype[Any],
    magnitude: str,
) -> NDArray[Any]:
    """Return inputs, (..., n_in), of a magnitude in `MAGNITUDES`."""
    shape = (*lead, weight.shape[1])
    x = random_numbers(rng, shape, dtype, magnitude)
    if magnitude == "cancelling":
        most = float_limits(dtype).largest
        cancelling = np.clip(_cancelling(rng, weight), -most, most).astype(dtype)
        x[...] = np.where(rng.random(shape) < 0.5, cancelling, x)
    return x


def _cancelling(rng: np.random.Generator, weight: CondensedWeight) -> NDArray[np.float64]:
    """Return inputs, (n_in,), for which the first neuron's terms nearly cancel."""
    x = rng.standard_normal(weight.shape[1])
    values = weight.values[0].astype(np.float64)
    for left, right in zip(range(0, values.size - 1, 2), range(1, values.size, 2), strict=False):
        if values[left] and values[right]:
            with np.errstate(all="ignore"):
                ratio = values[left] / values[right] * (1 + 2.0**-20)
                x[weight.indices[0, right]] = -x[weight.indices[0, left]] * ratio
    return x
