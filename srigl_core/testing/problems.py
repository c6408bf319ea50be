"""Problems that can tell a right kernel from a wrong one, built from a source of integers.

A problem is a function of the integers that its builder draws. They come from a seeded generator
(`SeededSource`), from Hypothesis (`srigl_core.testing.strategies.HypothesisSource`), which shrinks
a failure by drawing smaller ones, or from an earlier problem (`RecordedSource`). The first option
of every list is the simplest. A problem stays within a kernel's capabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import result_dtype, value_dtype
from srigl_core._format.connections import Connections
from srigl_core._format.weight import CondensedWeight
from srigl_core._update import UpdateSettings
from srigl_core.contract import ACTIVATIONS
from srigl_core.errors import SriglError
from srigl_core.reference.mask_update import srigl_update
from srigl_core.testing.bounds import float_limits
from srigl_core.testing.kernel_capabilities import DISTINCT_LAYOUTS, LAYOUTS, KernelCapabilities
from srigl_core.testing.problem_sizes import (
    LARGEST_SIZE,
    LEADS,
    SMALL,
    ProductSizes,
    Schedule,
    UpdateSizes,
    product_sizes,
    update_sizes,
)

__all__ = [
    "DISTINCT_LAYOUTS",
    "EVERYTHING",
    "LAYOUTS",
    "MAGNITUDES",
    "SPECIAL_NUMBERS",
    "UPDATE_MAGNITUDES",
    "CondensedUpdateProblem",
    "DataSource",
    "MatmulProblem",
    "RecordedSource",
    "SeededSource",
    "UpdateProblem",
    "any_mask",
    "array_of",
    "combinable_dtypes",
    "condensed_update_problem",
    "laid_out",
    "matmul_problem",
    "random_inputs",
    "random_numbers",
    "random_weight",
    "subnormal_problem",
    "update_problem",
]

Option = TypeVar("Option")

MAGNITUDES = ("integers", "normal", "zeros", "cancelling", "subnormal", "huge", "spread")
UPDATE_MAGNITUDES = ("integers", "normal", "zeros", "subnormal", "spread", "close")
ORDERED_DTYPES = F32, F64, F16, BF16 = ("float32", "float64", "float16", "bfloat16")
DTYPE_PAIRS = (
    *((F32, F32), (F64, F64), (F32, F64), (F64, F32), (F16, F16), (BF16, BF16), (F16, F32)),
    *((BF16, F32), (F32, F16), (F32, BF16), (F64, BF16), (F16, F64), (F64, F16), (BF16, F64)),
)
EVERYTHING = KernelCapabilities()
BETWEEN = 77  # in memory between the elements of an array
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

_LARGE = 1_000

_MOST_AT_ONCE = 2**23
"""Random numbers that are drawn at once; drawing neuron by neuron is slow for many neurons."""

_KINDS = 16
"""One in as many draws of sizes takes large ones."""


class DataSource:
    """A source of integers; `drawn` are those drawn so far, for a `RecordedSource`.

    Parameters
    ----------
    draw : callable of two ints
        ``draw(least, most)`` returns an integer within ``least..most``.
    """

    def __init__(self, draw: Callable[[int, int], int]) -> None:
        self._draw = draw
        self.drawn: list[int] = []

    def integer(self, least: int, most: int) -> int:
        """Draw an integer within ``least..most``."""
        self.drawn.append(self._draw(least, most))
        return self.drawn[-1]

    def sampled_from(self, options: Sequence[Option]) -> Option:
        """Draw the index of an option; return that option."""
        return options[self.integer(0, len(options) - 1)]

    def sizes(
        self, most: Sequence[int], scheduled: Callable[[Schedule], Sequence[int]]
    ) -> list[int]:
        """Draw sizes of 1 to `most`; those of a run's problems follow a schedule."""
        limit = LARGEST_SIZE if self.integer(0, _KINDS - 1) == 0 else SMALL
        return [self.integer(1, min(each, limit)) for each in most]

    def rng(self) -> np.random.Generator:
        """Draw the seed of a generator, for a problem's many numbers."""
        return np.random.default_rng(self.integer(0, 2**32 - 1))


class SeededSource(DataSource):
    """Integers of a seeded generator, the same on every machine.

    Parameters
    ----------
    *seed : int
        The last is the number of the problem in a run, which has the others as its seed. Together
        the problems of a run have every class of sizes (`srigl_core.testing.problem_sizes`).
    """

    def __init__(self, *seed: int) -> None:
        rng = np.random.default_rng(seed)
        super().__init__(lambda least, most: int(rng.integers(least, most, endpoint=True)))
        self._schedule = Schedule(seed[:-1], seed[-1])

    def sizes(
        self, most: Sequence[int], scheduled: Callable[[Schedule], Sequence[int]]
    ) -> list[int]:
        """Return the sizes of this problem's place in its run."""
        sizes = list(scheduled(self._schedule))
        self.drawn += [0, *sizes]
        return sizes


class RecordedSource(DataSource):
    """The integers that an earlier problem was built from, the `drawn` of its source."""

    def __init__(self, integers: Sequence[int]) -> None:
        remaining = iter(integers)

        def draw(least: int, most: int) -> int:
            recorded = next(remaining, None)
            if recorded is None:
                raise SriglError(
                    "the integers end before the problem is complete; they were drawn for a "
                    "kernel of other capabilities, or by another version"
                )
            return min(max(recorded, least), most)

        super().__init__(draw)


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


@dataclass(frozen=True, eq=False)
class UpdateProblem:
    """A mask update.

    Parameters
    ----------
    weight, grad : ndarray, (n_out, n_in)
    mask : ndarray of bool, (n_out, n_in)
    settings : UpdateSettings
    seed : int
        Seed of what a law chooses.
    """

    weight: NDArray[Any]
    grad: NDArray[Any]
    mask: NDArray[np.bool_]
    settings: UpdateSettings
    seed: int = field(default=0, kw_only=True)

    def rng(self) -> np.random.Generator:
        """Return a generator for what a law chooses."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True, eq=False)
class CondensedUpdateProblem:
    """A mask update of a condensed layer.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
    grad : ndarray, (n_out, n_in)
        The dense gradient, of which an update asks for rows.
    settings : UpdateSettings
    block_rows : int
    seed : int
        Seed of what a law chooses.
    """

    weight: CondensedWeight
    grad: NDArray[Any]
    settings: UpdateSettings
    block_rows: int
    seed: int = 0

    def rng(self) -> np.random.Generator:
        """Return a generator for what a law chooses."""
        return np.random.default_rng(self.seed)


def matmul_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> MatmulProblem:
    """Build a product: any shape, dtype, magnitude and memory layout, all numbers finite."""
    sizes = _product_sizes(source, capabilities)
    pairs = (*3 * DTYPE_PAIRS[:1], *DTYPE_PAIRS)  # the most common pair more often
    pairs_taken = [pair for pair in pairs if capabilities.value_dtypes.issuperset(pair)]
    x_dtype, values_dtype = map(value_dtype, source.sampled_from(pairs_taken))
    # In a large layer one number is wrong, which must not be 0, or small beside others.
    is_large = max(astuple(sizes)) > _LARGE
    magnitude = source.sampled_from((*8 * is_large * ("normal",), *MAGNITUDES))
    layout, grad_layout, bias_layout = [
        source.sampled_from(_layouts(capabilities, sizes, name)) for name in ("x", "grad", "bias")
    ]
    grad_dtypes = (x_dtype, x_dtype, *combinable_dtypes(capabilities, x_dtype, values_dtype))
    grad_dtype = source.sampled_from(grad_dtypes)
    bias_dtypes = (None, x_dtype, np.dtype(np.float32), np.dtype(np.float64))
    bias_dtype = source.sampled_from(bias_dtypes) if capabilities.bias else None
    bias_magnitude = source.sampled_from(("normal", magnitude))
    activations = [name for name in ACTIVATIONS if name in capabilities.activations]
    activation = source.sampled_from(4 * is_large * activations[:1] + activations)
    out_dtype = result_dtype(x_dtype, values_dtype)
    if capabilities.out:
        out_dtype = value_dtype(source.sampled_from(ORDERED_DTYPES))
    out_layout = source.sampled_from(_layouts(capabilities, sizes, "out"))
    special = source.sampled_from(("all", "all", *SPECIAL_NUMBERS))
    thinned = source.sampled_from((True, True, True, False))
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

    Arrays that share elements are small: thousands of equal rows would hide a wrong one.
    """
    unlike = {"out": {"offset by a byte"}, "bias": {"F", "rows reversed"}}.get(name, set())
    if name == "out" or max(sizes.batch, sizes.n_in, sizes.n_out) > SMALL:
        unlike |= {"shared rows", "shared columns"}
    return [each for each in LAYOUTS if each in capabilities.layouts and each not in unlike]


def _thinned(
    rng: np.random.Generator, weight: CondensedWeight, x: NDArray[Any], grad: NDArray[Any]
) -> tuple[CondensedWeight, NDArray[Any], NDArray[Any]]:
    """Set most numbers to 0 where a sum has many terms, so that each that is left can be seen."""
    values = _sparse(rng, weight.values, -1)
    neurons_of_an_input = weight.nnz // weight.shape[1]
    if neurons_of_an_input > 8 * _FEW:
        grad = _sparse(rng, grad, -1)
    if grad.ndim == 2:
        grad = _sparse(rng, grad, 0)
    return weight.with_values(values), x, grad


def _sparse(rng: np.random.Generator, array: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return `array` with zeros in all but a few slices along an axis, if it is long."""
    size = array.shape[axis]
    if size <= 8 * _FEW:
        return array
    kept = np.zeros(size, bool)
    kept[[0, -1, *rng.integers(size, size=_FEW)]] = True
    return np.where(kept if axis else kept[:, None], array, array.dtype.type(0))


def combinable_dtypes(
    capabilities: KernelCapabilities, *others: np.dtype[Any]
) -> list[np.dtype[Any]]:
    """Return the value types that combine with all `others`, float32 first."""
    refused = {{"float16": "bfloat16", "bfloat16": "float16"}.get(other.name) for other in others}
    names = [name for name in ORDERED_DTYPES if name in capabilities.value_dtypes - refused]
    return [value_dtype(name) for name in names]


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
        bias=None,
    )


def update_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> UpdateProblem:
    """Build a mask update: tie-rich or distinct numbers, any mask, any setting that works."""
    most = capabilities.largest_problem
    sizes = source.sizes(
        (LARGEST_SIZE, LARGEST_SIZE), lambda schedule: astuple(update_sizes(schedule, most))
    )
    n_out, n_in = astuple(UpdateSizes(*sizes).within(most))
    dtypes = combinable_dtypes(capabilities)
    dtype = source.sampled_from(dtypes)
    grad_dtype = source.sampled_from((dtype, dtype, *dtypes))
    magnitude = source.sampled_from((*UPDATE_MAGNITUDES, "zeros", "zeros"))
    is_tall = n_out > _LARGE  # it should ablate some neurons, also after the first 65,536
    often = 24 * is_tall * ("any",)
    density = source.sampled_from((None, None, None, "any", "any", "any", "none", "all", *often))
    nnz_budget = source.integer(source.sampled_from((n_out, n_out, n_out, 1)), n_out * n_in)
    whole = source.sampled_from((*9 * (None,), nnz_budget // n_out, nnz_budget // n_out, n_in))
    if whole is not None:  # each neuron may have the same number of weights
        nnz_budget = n_out * max(1, whole)
    drop_fraction = source.sampled_from((0.3, 0.0, 0.0, 1.0, 0.05, 0.5, 0.9))
    drop_share = source.sampled_from(_SHARES)

    def setting(name: str, options: Sequence[Any], otherwise: Any = None) -> Any:
        return source.sampled_from(options) if name in capabilities.settings else otherwise

    gammas = (0.3, None, None, 1.0, 0.9, 0.01, 0.6, *8 * is_tall * (0.6,))
    gamma_sal, min_salient = setting("gamma_sal", gammas), None
    share = source.sampled_from((None, None, None, _just_below_a_count, _decimal, _decimal))
    is_counted = gamma_sal is None and setting("min_salient", (False, True), False)
    counts = (source.integer(0, n_in), source.sampled_from((n_in + 1, 2**40)))
    if is_counted:
        min_salient = source.sampled_from((counts[0], counts[0], counts[1]))
    scope = setting("saliency_scope", ("inactive", "all"), "inactive")
    grown_init = setting("grown_init", (0.0, 0.5, -0.1, 1e-8), 0.0)
    unseen = source.sampled_from((0.0, 0.0, np.nan))
    seed = source.integer(0, 2**16)
    rng = source.rng()
    weight = random_numbers(rng, (n_out, n_in), dtype, magnitude)
    grad = random_numbers(rng, (n_out, n_in), grad_dtype, magnitude)
    mask = any_mask(rng, (n_out, n_in), constant_fan_in=density is None)
    if density in ("none", "all"):
        mask[...] = density == "all"
    elif drop_share is _decimal:
        mask = _connections_of_a_decimal_count(rng, (n_out, n_in)).to_mask()
    weight[~mask & (rng.random(mask.shape) < 0.5)] = unseen
    if drop_share is not None:
        drop_fraction = drop_share(rng, int(np.count_nonzero(mask)))
    if gamma_sal is not None and share is not None:
        if share is _decimal:
            fan_ins = [count for count in _DECIMAL_COUNTS if count <= n_in]
            nnz_budget = n_out * int(rng.choice(fan_ins)) if fan_ins else nnz_budget
        gamma_sal = share(rng, nnz_budget // n_out)
    settings = UpdateSettings(
        nnz_budget,
        drop_fraction,
        gamma_sal=gamma_sal,
        min_salient=min_salient,
        saliency_scope=scope,
        grown_init=grown_init,
    )
    return _affordable(UpdateProblem(weight, grad, mask, settings, seed=seed))


def condensed_update_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> CondensedUpdateProblem:
    """Build a mask update of a condensed layer: that of a dense layer, with another mask."""
    dense = update_problem(source, capabilities)
    n_out, n_in = dense.mask.shape
    fan_in = source.sampled_from((1, n_in, max(1, n_in // 2), min(n_in, 7)))
    n_active = source.integer(1, n_out) if capabilities.ablation else n_out
    fewest = 1 + n_out // SMALL  # many blocks of one row take long
    block_rows = source.sampled_from((fewest, 2 * fewest, 7 * fewest, n_out, n_out + 1))
    drop_share, rng = source.sampled_from(_SHARES), source.rng()
    connections = Connections.random((n_out, n_in), fan_in=fan_in, n_active=n_active, rng=rng)
    if drop_share is _decimal and capabilities.ablation:
        connections = _connections_of_a_decimal_count(rng, (n_out, n_in))
    mask, settings = connections.to_mask(), dense.settings
    if drop_share is not None:
        settings = replace(settings, drop_fraction=drop_share(rng, connections.nnz))
    # A weight that was not active may be NaN, and is now.
    weight = np.where(np.isnan(dense.weight), dense.weight.dtype.type(0), dense.weight)
    settings = _affordable(replace(dense, weight=weight, mask=mask, settings=settings)).settings
    condensed = CondensedWeight.from_dense(weight, mask)
    return CondensedUpdateProblem(condensed, dense.grad, settings, block_rows, dense.seed)


def _affordable(problem: UpdateProblem) -> UpdateProblem:
    """Return a problem whose budget gives every surviving neuron a weight."""
    n_out = len(problem.mask)
    if problem.settings.nnz_budget < n_out:
        try:
            srigl_update(problem.weight, problem.grad, problem.mask, problem.settings)
        except SriglError:
            return replace(problem, settings=replace(problem.settings, nnz_budget=n_out))
    return problem


def _just_below_a_count(rng: np.random.Generator, total: int) -> float:
    """Return a fraction whose product with `total` is just below an integer in float64."""
    total = max(total, 1)
    return float(np.nextafter(rng.integers(1, total, endpoint=True) / total, 0))


def _decimal(rng: np.random.Generator, total: int) -> float:
    """Return a decimal fraction; if possible, one whose product with `total` is rounded down."""
    options = [Fraction(n, 100) for n in rng.permutation(np.arange(1, 100)).tolist()]
    rounded_down = (part for part in options if float(part) * total < part * total)
    counts = (part for part in rounded_down if (part * total).denominator == 1)
    return float(next(counts, options[0]))


_DECIMAL_COUNTS = (50, 90, 100, 150, 170, 180, 200)
"""Numbers of weights for which `_decimal` has a fraction of which the product is rounded down."""


def _connections_of_a_decimal_count(
    rng: np.random.Generator, shape: tuple[int, int]
) -> Connections:
    """Return connections of which there are one of `_DECIMAL_COUNTS`, or any in a small layer."""
    n_out, n_in = shape
    options = [
        (n_active, count // n_active)
        for count in _DECIMAL_COUNTS
        for n_active in range(1, min(n_out, count) + 1)
        if count % n_active == 0 and count // n_active <= n_in
    ]
    n_active, fan_in = options[rng.integers(len(options))] if options else (n_out, 1)
    return Connections.random(shape, fan_in=fan_in, n_active=n_active, rng=rng)


_SHARES = (*7 * (None,), _just_below_a_count, _decimal, _decimal)
"""How a fraction is made for a number of weights; None is one of any value."""


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


def array_of(
    numbers: Any, dtype: str, layout: str = "C", shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    """Return an array of bool or a value type, named by `dtype`, in a layout of `LAYOUTS`."""
    array = np.array(numbers, bool if dtype == "bool" else value_dtype(dtype))
    return laid_out(array if shape is None else array.reshape(shape), layout)


def laid_out(array: NDArray[Any], layout: str) -> NDArray[Any]:
    """Return the numbers of `array` in a memory layout of `LAYOUTS`."""
    if layout == "F":
        return np.asfortranarray(array)
    if layout == "reversed":
        return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    if layout == "rows reversed":
        return np.ascontiguousarray(array[::-1])[::-1]
    if layout == "shared rows" and array.ndim > 1:
        return np.broadcast_to(array[:1], array.shape)
    if layout == "shared columns":
        return np.broadcast_to(array[..., :1], array.shape)
    if layout == "every second":
        shape = (*array.shape[:-1], 2 * array.shape[-1])
        view = np.full(shape, BETWEEN, array.dtype)[..., ::2]
    elif layout == "columns of a wider array":
        shape = (*array.shape[:-1], array.shape[-1] + 3)
        beyond = BETWEEN if array.dtype.kind in "biu" else np.nan
        view = np.full(shape, beyond, array.dtype)[..., 1:-2]
    elif layout == "F within a larger array":
        shape = (array.shape[0] + 1, *array.shape[1:])
        view = np.full(shape, BETWEEN, array.dtype, order="F")[:-1]
    elif layout == "offset by a byte":
        view = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    else:
        return np.ascontiguousarray(array)
    view[...] = array
    return view


def any_mask(
    rng: np.random.Generator, shape: tuple[int, int], *, constant_fan_in: bool
) -> NDArray[np.bool_]:
    """Return a mask: any constant fan-in with any ablation, or rows that differ."""
    n_out, n_in = shape
    if not constant_fan_in:
        return rng.random(shape) < rng.random()
    weight = CondensedWeight.random(
        shape,
        fan_in=int(rng.integers(1, n_in + 1)),
        n_active=int(rng.integers(1, n_out + 1)),
        rng=rng,
    )
    return weight.to_mask()


def random_numbers(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], magnitude: str
) -> NDArray[Any]:
    """Return finite numbers of a magnitude in `MAGNITUDES` or `UPDATE_MAGNITUDES`."""
    limits = float_limits(dtype)
    numbers: NDArray[Any]
    if magnitude == "integers":
        numbers = rng.integers(-4, 5, shape).astype(np.float64)
    elif magnitude == "zeros":
        numbers = rng.choice([0.0, -0.0, 1.0, -2.0], shape, p=[0.4, 0.3, 0.2, 0.1])
    elif magnitude == "subnormal":
        numbers = rng.integers(-9, 10, shape) * limits.smallest
        numbers = np.where(rng.random(shape) < 0.5, numbers, rng.integers(-3, 4, shape))
    elif magnitude == "close":
        signs = rng.choice([-1.0, 1.0], shape)
        numbers = signs * (1 + rng.integers(0, 16, shape) * 2 * limits.roundoff)
    elif magnitude == "huge":
        numbers = rng.standard_normal(shape) * np.sqrt(limits.largest) / 4
    elif magnitude == "spread":
        reach = 3.0 if dtype == np.float16 else 12.0
        numbers = rng.standard_normal(shape) * 10.0 ** rng.uniform(-reach, reach, shape)
    else:
        numbers = rng.standard_normal(shape)
    return np.asarray(numbers).astype(dtype)


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
