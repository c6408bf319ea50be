"""Mask updates that can tell a right kernel from a wrong one, built from a source of integers.

A problem stays within a kernel's capabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.connections import Connections
from srigl_core._format.weight import CondensedWeight
from srigl_core._update import UpdateSettings
from srigl_core.errors import SriglError
from srigl_core.reference.mask_update import srigl_update
from srigl_core.testing.kernel_capabilities import EVERYTHING, KernelCapabilities
from srigl_core.testing.problem_arrays import (
    UPDATE_MAGNITUDES,
    any_mask,
    combinable_dtypes,
    random_numbers,
)
from srigl_core.testing.problem_sizes import LARGE, LARGEST_SIZE, SMALL, UpdateSizes, update_sizes
from srigl_core.testing.problem_sources import DataSource

__all__ = [
    "CondensedUpdateProblem",
    "UpdateProblem",
    "condensed_update_problem",
    "update_problem",
]


_WIDE = 1_024

_Share = Callable[[np.random.Generator, int], float]


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


def update_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> UpdateProblem:
    """Build a mask update: tie-rich or distinct numbers, any mask, any setting that works."""
    most = capabilities.largest_problem
    sizes = source.sizes(
        (LARGEST_SIZE, LARGEST_SIZE), lambda schedule: astuple(update_sizes(schedule, most))
    )
    n_out, n_in = shape = astuple(UpdateSizes(*sizes).within(most))
    is_plain = source.first_round() and max(shape) > LARGE
    magnitudes: tuple[str, ...] = (*UPDATE_MAGNITUDES, "zeros", "zeros", "close")
    if is_plain:  # ties would leave the last columns out
        magnitudes = ("normal", "integers") if _is_tall(shape) else ("normal",)
    magnitude = source.sampled_from(magnitudes)
    dtypes = combinable_dtypes(capabilities)
    close_ones = [dtype for dtype in dtypes if dtype == np.float64 and magnitude == "close"]
    dtype = source.sampled_from((*dtypes, *3 * close_ones))
    grad_dtype = source.sampled_from((dtype, dtype, *dtypes))
    densities = (None, None, None, "any", "any", "any", "none", "all")
    density = source.sampled_from(densities[3:4] if is_plain else densities)
    settings, drop_share, gamma_share = _any_settings(source, capabilities, shape, is_plain)
    if magnitude == "zeros" and source.sampled_from((True, False)):
        drop_share, settings = None, replace(settings, drop_fraction=0.0)  # more room than weights
    stays = source.sampled_from((*5 * (False,), True)) and not is_plain
    unseen = source.sampled_from((0.0, 0.0, np.nan))
    seed = source.integer(0, 2**16)
    rng = source.rng()
    weight = random_numbers(rng, shape, dtype, magnitude)
    grad = random_numbers(rng, shape, grad_dtype, magnitude)
    mask = any_mask(rng, shape, constant_fan_in=density is None)
    if is_plain:  # some weights are pruned and some grow, or some neurons ablated and some revived
        share = rng.uniform(0.4, 0.8) if _is_tall(shape) else settings.nnz_budget / mask.size
        mask = rng.random(shape) < share
    elif density in ("none", "all"):
        mask[...] = density == "all"
    elif drop_share is _decimal:
        mask = _connections_of_a_decimal_count(rng, shape).to_mask()
    if stays:  # the update changes no connection
        mask = any_mask(rng, (1, n_in), constant_fan_in=True).repeat(n_out, axis=0)
        nnz = int(np.count_nonzero(mask))
        no_ablation = replace(settings, gamma_sal=None, min_salient=None)
        settings = replace(no_ablation, nnz_budget=nnz, drop_fraction=0.0)
    else:
        settings = _with_shares(rng, settings, mask, drop_share, gamma_share)
    weight[~mask & (rng.random(shape) < 0.5)] = unseen
    return _affordable(UpdateProblem(weight, grad, mask, settings, seed=seed))


def _any_settings(
    source: DataSource, capabilities: KernelCapabilities, shape: tuple[int, int], is_plain: bool
) -> tuple[UpdateSettings, _Share | None, _Share | None]:
    """Draw settings, and how drop_fraction and gamma_sal are made; None leaves them.

    A plain update of many rows ablates neurons, also those after the first 65,536.
    """
    n_out, n_in = shape
    is_tall = is_plain and _is_tall(shape)

    def setting(name: str, options: Sequence[Any], otherwise: Any = None) -> Any:
        return source.sampled_from(options) if name in capabilities.settings else otherwise

    least, most = source.sampled_from((n_out, n_out, n_out, 1)), n_out * n_in
    if is_plain:  # few of many weights, so that a wrong choice shows
        least, most = max(n_out, most // 20), max(n_out, most // 3)
    nnz_budget = source.integer(least, most)
    each = nnz_budget // n_out
    options = (None, None, each) if is_plain else (*7 * (None,), each, each, *3 * (n_in,))
    whole = source.sampled_from((1,) if is_tall else options)
    if whole is not None:  # each neuron may have the same number of weights
        nnz_budget = n_out * max(1, whole)
    drop_fractions = (0.3, 0.0, 0.0, 1.0, 0.05, 0.5, 0.9)
    drop_fraction = source.sampled_from(drop_fractions[:1] if is_plain else drop_fractions)
    drop_share = source.sampled_from(_SHARES[:1] if is_plain else _SHARES)
    gammas: tuple[float | None, ...] = (0.3, None, None, 1.0, 0.9, 0.01, 0.6)
    gamma_shares: tuple[_Share | None, ...] = _GAMMA_SHARES
    if is_plain:
        gammas, gamma_shares = gammas[-1:] if is_tall else (0.3, None, 0.01), (None,)
    elif 2 * _DECIMAL_COUNTS[0] <= n_in <= LARGE:  # wide enough for decimal fractions to matter
        gammas, gamma_shares = gammas[:1], (_decimal,)
    gamma_sal = setting("gamma_sal", gammas)
    gamma_share = source.sampled_from(gamma_shares)
    counts = (source.integer(0, n_in), source.sampled_from((n_in + 1, 2**40)))
    is_counted = setting("min_salient", (False, True, True), False) and not is_plain
    count = source.sampled_from(counts) if gamma_sal is None and is_counted else None
    settings = UpdateSettings(
        nnz_budget,
        drop_fraction,
        gamma_sal=gamma_sal,
        min_salient=count,
        saliency_scope=setting("saliency_scope", ("inactive", "all"), "inactive"),
        grown_init=setting("grown_init", (0.0, 0.5, -0.1, 1e-8), 0.0),
    )
    return settings, drop_share, gamma_share if gamma_sal is not None else None


def _is_tall(shape: tuple[int, int]) -> bool:
    """Return whether a layer is there for its many neurons, which are ablated and revived."""
    return shape[0] > 8 * shape[1]


def _with_shares(
    rng: np.random.Generator,
    settings: UpdateSettings,
    mask: NDArray[np.bool_],
    drop_share: _Share | None,
    gamma_share: _Share | None,
) -> UpdateSettings:
    """Return settings with fractions made for the numbers of weights that they are taken of."""
    n_out, n_in = mask.shape
    if drop_share is not None:
        settings = replace(settings, drop_fraction=drop_share(rng, int(np.count_nonzero(mask))))
    if gamma_share is _decimal:  # a budget of most weights would need most rows: no threshold
        fan_ins = [count for count in _DECIMAL_COUNTS if count <= n_in // 2]
        fan_ins = fan_ins or [count for count in _DECIMAL_COUNTS[:1] if count <= n_in]
        if fan_ins:
            settings = replace(settings, nnz_budget=n_out * int(rng.choice(fan_ins)))
    if gamma_share is not None:
        gamma_sal = gamma_share(rng, settings.nnz_budget // n_out)
        settings = replace(settings, gamma_sal=gamma_sal)
    return settings


def condensed_update_problem(
    source: DataSource, capabilities: KernelCapabilities = EVERYTHING
) -> CondensedUpdateProblem:
    """Build a mask update of a condensed layer: that of a dense layer, with another mask."""
    dense = update_problem(source, capabilities)
    n_out, n_in = shape = dense.mask.shape
    fan_ins = (1, n_in, max(1, n_in // 2), min(n_in, 7))
    if n_in > _WIDE:  # less than most budgets, so that weights grow
        fan_ins = (1, n_in, n_in // 20, 7)
    fan_in = source.sampled_from(fan_ins)
    n_active = source.integer(1, n_out) if capabilities.ablation else n_out
    is_usual = source.sampled_from((True, False, False)) and n_in > 1 and not _is_tall(shape)
    if is_usual:
        fan_in, n_active = min(fan_in, n_in - 1), n_out
    fewest = 1 + n_out // SMALL  # many blocks of one row take long
    block_rows = source.sampled_from((fewest, 2 * fewest, 7 * fewest, n_out, n_out + 1))
    drop_share, rng = source.sampled_from(_SHARES), source.rng()
    if _is_tall(shape) and n_out > LARGE:
        drop_share = None
    connections = Connections.random((n_out, n_in), fan_in=fan_in, n_active=n_active, rng=rng)
    if drop_share is _decimal and capabilities.ablation and not is_usual:
        connections = _connections_of_a_decimal_count(rng, (n_out, n_in))
    mask, settings = connections.to_mask(), dense.settings
    if is_usual:  # connections move, and neurons and fan-in stay, as in most steps of a training
        budget = connections.nnz + int(rng.integers(n_out))
        fraction = float(rng.choice([0.3, 0.5, 0.9]))
        settings = replace(settings, nnz_budget=budget, drop_fraction=fraction)
        settings = replace(settings, gamma_sal=None, min_salient=None)
    elif drop_share is not None:
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


_SHARES = (*6 * (None,), *2 * (_just_below_a_count,), *3 * (_decimal,))
"""How a fraction is made for a number of weights; None is one of any value."""

_GAMMA_SHARES = (None, None, _just_below_a_count, *3 * (_decimal,))
