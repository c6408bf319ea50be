"""How many weights each layer gets: exact budgets, uniform and ERK (SPEC 3; Evci et al. 2020)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from srigl_core._arrays.checks import check_integer, check_lengths, check_real
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["DISTRIBUTIONS", "LayerBudget", "erk", "nnz_budget", "uniform"]

DISTRIBUTIONS = ("erk", "uniform")

Shapes: TypeAlias = Sequence[tuple[int, ...]] | Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerBudget:
    """The weights one layer may have.

    Parameters
    ----------
    shape : tuple of int
        Original shape, kernel dimensions included.
    nnz_budget : int
        B. A mask may have fewer weights, since constant fan-in rounds down to whole rows.
    density : Fraction
        Target share of active weights, before B was rounded down.
    """

    shape: tuple[int, ...]
    nnz_budget: int
    density: Fraction

    @property
    def n_weights(self) -> int:
        """Number of weights of the dense layer, N."""
        return math.prod(self.shape)

    @property
    def is_dense(self) -> bool:
        """Whether the layer has all its weights."""
        return self.nnz_budget == self.n_weights

    @property
    def sparsity(self) -> float:
        """Target sparsity."""
        return float(1 - self.density)


def nnz_budget(n_weights: int, sparsity: float) -> int:
    """Return the number of weights that `sparsity` leaves of `n_weights`.

    Parameters
    ----------
    n_weights : int
        N.
    sparsity : float
        In [0, 1).

    Returns
    -------
    int
        ``floor(N * d + N / 2**51)`` with ``d = 1 - sparsity``, evaluated exactly.

    Raises
    ------
    SriglError
        If `sparsity` is out of range, or `n_weights` is not positive.

    Notes
    -----
    SPEC 3. The second term undoes the rounding of a computed `sparsity`, so that a layer of
    19 x 45 at 80% gets 171 weights; the released code gives it 170 (decision O13).

    Examples
    --------
    >>> nnz_budget(19 * 45, 0.8)
    171
    """
    return math.floor(check_integer(n_weights, "n_weights", least=1) * _density(sparsity))


def uniform(
    shapes: Shapes,
    sparsity: float,
    *,
    dense: Iterable[int] = (),
    fixed: Mapping[int, int] | None = None,
) -> list[LayerBudget]:
    """Give every sparse layer the same sparsity.

    Parameters
    ----------
    shapes : sequence of tuple of int, or mapping of str to such
        Original shapes of the layers. Names appear in error messages.
    sparsity : float
        Of the whole network, in [0, 1).
    dense : iterable of int
        Positions of the layers that stay dense; the others get fewer weights instead.
    fixed : mapping of int to int, or None
        Budgets of single layers by position; the others share what is left.

    Returns
    -------
    list of LayerBudget

    Raises
    ------
    SriglError
        If `sparsity` is out of range, or a position or a budget does not fit.

    Warns
    -----
    UserWarning
        If the dense and fixed layers alone use up the network's budget. The other layers then get
        `sparsity` each, and the network exceeds its budget.

    Notes
    -----
    SPEC 3.
    """
    named, sizes, budgets, density = _checked(shapes, sparsity, dense, fixed)
    sparse = [i for i in range(len(sizes)) if i not in budgets]
    share = density
    if sparse and budgets:
        left = sum(sizes) * density - sum(budgets.values())
        share = min(Fraction(1), left / sum(sizes[i] for i in sparse))
        if left < 1:
            warnings.warn(
                f"the layers with budgets of their own have {sum(budgets.values())} weights, all "
                f"that sparsity={sparsity} leaves the network; the other layers take "
                f"that sparsity themselves, and the network will have more weights",
                stacklevel=2,
            )
            share = density
    return _layer_budgets(named, budgets, dict.fromkeys(sparse, share))


def erk(
    shapes: Shapes,
    sparsity: float,
    *,
    dense: Iterable[int] = (),
    fixed: Mapping[int, int] | None = None,
    power: float = 1.0,
) -> list[LayerBudget]:
    """Give layers a density in proportion to ``(sum(shape) / prod(shape)) ** power``.

    Parameters
    ----------
    shapes, sparsity, dense, fixed
        As in `uniform`.
    power : float
        The Erdős-Rényi-Kernel exponent; 1 is computed exactly.

    Returns
    -------
    list of LayerBudget
        A layer whose density would exceed 1 becomes dense, and the rest is solved again.

    Raises
    ------
    SriglError
        If `sparsity` is out of range, a position or a budget does not fit, or the dense layers
        alone exceed the network's budget.

    Notes
    -----
    SPEC 3; Evci et al. 2020, sec. 3.1. With power 1 a layer gets ``floor(eps * sum(shape))``.
    """
    named, sizes, budgets, density = _checked(shapes, sparsity, dense, fixed)
    check_real(power, "power")
    try:
        raw = [
            Fraction(sum(shape), size) if power == 1 else Fraction((sum(shape) / size) ** power)
            for shape, size in zip(named.values(), sizes, strict=True)
        ]
    except OverflowError:
        raw = [Fraction(0)]
    if 0 in raw:
        raise SriglError(f"power={power!r} takes a density out of float64's range; try 0 to 2")
    while True:
        sparse = [i for i in range(len(sizes)) if i not in budgets]
        left = sum(sizes) * density - sum(budgets.values())
        if left < 0:
            raise SriglError(
                f"sparsity={sparsity} leaves the network {math.floor(sum(sizes) * density)} "
                f"weights, but the layers kept dense or given budgets have "
                f"{sum(budgets.values())} already; lower the sparsity or make a layer sparse"
            )
        if not sparse:
            return _layer_budgets(named, budgets, {})
        eps = left / sum(raw[i] * sizes[i] for i in sparse)
        full = [i for i in sparse if eps * raw[i] > 1]
        if not full:
            return _layer_budgets(named, budgets, {i: eps * raw[i] for i in sparse})
        budgets.update({i: sizes[i] for i in full})


def _density(sparsity: float) -> Fraction:
    if not 0 <= check_real(sparsity, "sparsity") < 1:
        raise SriglError(
            f"sparsity={sparsity!r} must be in [0, 1): 0.9 keeps a tenth of the weights"
        )
    return Fraction(1 - float(sparsity)) + Fraction(1, 2**51)


def _checked(
    shapes: Shapes,
    sparsity: float,
    dense: Iterable[int],
    fixed: Mapping[int, int] | None,
) -> tuple[dict[str, tuple[int, ...]], list[int], dict[int, int], Fraction]:
    """Return shapes by name, sizes, the budgets that are fixed, and the network's density."""
    if not isinstance(shapes, Mapping | list | tuple):
        raise ValueTypeError(f"shapes={shapes!r} must be a list of shapes, or a dict of them")
    if not isinstance(shapes, Mapping):
        shapes = {str(i): shape for i, shape in enumerate(shapes)}
    try:
        dense = tuple(dense)
        is_iterable = True
    except Exception:  # it may be any object, whose own code is run
        is_iterable = False
    if not is_iterable or not isinstance(fixed, Mapping | None):
        raise ValueTypeError(
            f"dense={dense!r} must be a list of positions, and fixed={fixed!r} a dict of budgets"
        )
    named = {
        name: check_lengths(shape, f"shape of layer {name!r}") for name, shape in shapes.items()
    }
    for name, shape in named.items():
        if len(shape) < 2 or 0 in shape:
            raise SriglError(f"layer {name!r} of shape {shape} has no neurons with inputs")
    if not named:
        raise SriglError("shapes is empty; name at least one layer")
    sizes = [math.prod(shape) for shape in named.values()]
    budgets = {check_integer(i, "dense", least=0, most=len(sizes) - 1): 0 for i in dense}
    budgets = {i: sizes[i] for i in budgets}
    for i, budget in (fixed or {}).items():
        check_integer(i, "fixed", least=0, most=len(sizes) - 1)
        what = f"nnz_budget of layer {list(named)[i]!r}"
        budgets[i] = check_integer(budget, what, least=1, most=sizes[i])
    return named, sizes, budgets, min(Fraction(1), _density(sparsity))


def _layer_budgets(
    shapes: Mapping[str, tuple[int, ...]],
    budgets: Mapping[int, int],
    densities: Mapping[int, Fraction],
) -> list[LayerBudget]:
    layers = []
    for i, (name, shape) in enumerate(shapes.items()):
        size = math.prod(shape)
        budget = budgets[i] if i in budgets else math.floor(size * densities[i])
        density = Fraction(budget, size) if i in budgets else densities[i]
        if budget < 1:
            raise SriglError(
                f"layer {name!r} of shape {shape} gets {float(size * density):.3f} weights, "
                f"less than one; lower the sparsity, or give it a budget of its own"
            )
        layers.append(LayerBudget(shape, budget, density))
    return layers
