"""The settings of a mask update, its results, and the checks of its arguments (SPEC 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import as_float_array, check_integer, check_real
from srigl_core._arrays.dtypes import as_float_view
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._arrays.operations import HOST_ARRAYS, ArrayOps
from srigl_core._format.connections import flat_shape
from srigl_core._format.weight import CondensedWeight, check_condensed
from srigl_core.errors import SriglError, ValueTypeError

__all__ = [
    "SALIENCY_SCOPES",
    "CondensedUpdate",
    "GradientRows",
    "MaskUpdate",
    "UpdateOptions",
    "UpdateSettings",
    "check_finite",
    "check_update_arrays",
    "checked_condensed_update",
    "checked_update",
]

GradientRows = Callable[[int, int], ArrayLike]
"""Returns rows ``start`` to ``stop`` of a dense gradient."""

SALIENCY_SCOPES = ("inactive", "all")


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """The settings that all mask updates of a training run share.

    Parameters
    ----------
    gamma_sal : float or None
        A neuron is ablated if it has fewer salient weights than this share, in (0, 1], of the
        fan-in that the budget gives with no neuron ablated.
    min_salient : int or None
        The same threshold as a count. With neither, no neuron is ablated; both is an error.
    saliency_scope : {"inactive", "all"}
        Where the largest gradients are looked for: among the inactive positions (the paper), or
        among all positions (the released code).
    grown_init : float
        Value of a newly active weight.

    Raises
    ------
    SriglError
        If a setting is out of its range, or `gamma_sal` and `min_salient` are both given.
    ValueTypeError
        If a setting has the wrong type.
    """

    gamma_sal: float | None = 0.3
    min_salient: int | None = None
    saliency_scope: str = "inactive"
    grown_init: float = 0.0

    def __post_init__(self) -> None:
        # Plain numbers, since NumPy scalars would round or overflow in products with others.
        if self.gamma_sal is not None:
            if self.min_salient is not None:
                raise SriglError(
                    f"gamma_sal={self.gamma_sal!r} and min_salient={self.min_salient!r} state the "
                    f"same threshold, and gamma_sal has a default; to count weights pass "
                    f"gamma_sal=None with min_salient"
                )
            gamma_sal = check_real(self.gamma_sal, "gamma_sal")
            if not 0 < gamma_sal <= 1:
                raise SriglError(
                    f"gamma_sal={self.gamma_sal!r} must be in (0, 1], a share of the fan-in; for "
                    f"a count of weights use min_salient, for no ablation None"
                )
            object.__setattr__(self, "gamma_sal", gamma_sal)
        if self.min_salient is not None:
            min_salient = check_integer(self.min_salient, "min_salient", least=0)
            object.__setattr__(self, "min_salient", min_salient)
        if not isinstance(self.saliency_scope, str) or self.saliency_scope not in SALIENCY_SCOPES:
            raise SriglError(
                f"saliency_scope={self.saliency_scope!r} must be one of {SALIENCY_SCOPES}"
            )
        object.__setattr__(self, "grown_init", check_real(self.grown_init, "grown_init"))


@dataclass(frozen=True)
class UpdateSettings(UpdateOptions):
    """The settings of one mask update of one layer.

    Parameters
    ----------
    nnz_budget : int
        Weights that the layer may have, B, in 1..N.
    drop_fraction : float
        Share of the active weights to prune, zeta, in [0, 1].
    gamma_sal, min_salient, saliency_scope, grown_init
        As in `UpdateOptions`.

    Raises
    ------
    SriglError
        If a setting is out of its range, or `gamma_sal` and `min_salient` are both given.
    ValueTypeError
        If a setting has the wrong type.

    Examples
    --------
    >>> UpdateSettings(nnz_budget=40, drop_fraction=0.3, gamma_sal=None)  # doctest: +ELLIPSIS
    UpdateSettings(gamma_sal=None, ..., nnz_budget=40, drop_fraction=0.3)
    """

    nnz_budget: int
    drop_fraction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        nnz_budget = check_integer(self.nnz_budget, "nnz_budget", least=1)
        object.__setattr__(self, "nnz_budget", nnz_budget)
        drop_fraction = check_real(self.drop_fraction, "drop_fraction")
        if not 0 <= drop_fraction <= 1:
            raise SriglError(f"drop_fraction={self.drop_fraction!r} must be in [0, 1]")
        object.__setattr__(self, "drop_fraction", drop_fraction)

    def check_fits(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        """Check that the settings are possible for a layer.

        Parameters
        ----------
        shape : tuple of int
            (n_out, n_in).
        dtype : numpy.dtype
            Of its weight.

        Raises
        ------
        SriglError
            If the budget exceeds the layer, or `grown_init` overflows its dtype.
        """
        if self.nnz_budget > shape[0] * shape[1]:
            raise SriglError(
                f"nnz_budget={self.nnz_budget} exceeds the {shape[0] * shape[1]} weights of a "
                f"layer of shape {shape}; it must be in 1..{shape[0] * shape[1]}"
            )
        with np.errstate(over="ignore"):
            if np.isinf(dtype.type(self.grown_init)):
                raise SriglError(f"grown_init={self.grown_init!r} is too large for {dtype}")


@dataclass(frozen=True, eq=False)
class MaskUpdate:
    """The result of a mask update.

    Parameters
    ----------
    mask : ndarray of bool, shape of the weight
        The new mask.
    weight : ndarray, shape and dtype of the weight
        The weight at active positions, `grown_init` at newly active ones, 0 elsewhere.
    ablated : ndarray of int64, (n_out - n_active,)
        Row numbers of all inactive rows, ascending.
    revived : ndarray of int64
        Row numbers that were inactive before and are active now, ascending.
    fan_in : int or None
        Weights of each active row, k; None for an unstructured method.
    n_pruned, n_grown : int
        Positions active before and not after, and the reverse.
    threshold : int
        Salient weights below which a row was ablated, after the clamp; 0 ablates none.
    salient_counts : ndarray of int64, (n_out,)
        Salient weights of each row; empty for an unstructured method.
    backward_mask : ndarray of bool, shape of the weight, or None
        The weights that gradients reach; None where that is `mask`. Methods that differ keep the
        values of such weights in `weight`.
    """

    mask: NDArray[np.bool_]
    weight: NDArray[Any]
    ablated: NDArray[np.int64]
    revived: NDArray[np.int64]
    fan_in: int | None
    n_pruned: int
    n_grown: int
    threshold: int = 0
    salient_counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    backward_mask: NDArray[np.bool_] | None = None

    @property
    def nnz(self) -> int:
        """Number of active weights."""
        return int(self.mask.sum())

    @property
    def n_active(self) -> int:
        """Number of active neurons."""
        return len(self.mask) - self.ablated.size


@dataclass(frozen=True, eq=False)
class CondensedUpdate:
    """The result of a mask update of a condensed layer.

    Parameters
    ----------
    weight : CondensedWeight
        The values that stay, and `grown_init` at newly active positions.
    source : ndarray of int64, (n_active, k)
        Where each value was among the old ones, flat; -1 where it is newly active.
    ablated, revived, fan_in, n_pruned, n_grown, threshold, salient_counts
        As in `MaskUpdate`.
    """

    weight: CondensedWeight
    source: NDArray[np.int64]
    ablated: NDArray[np.int64]
    revived: NDArray[np.int64]
    fan_in: int
    n_pruned: int
    n_grown: int
    threshold: int
    salient_counts: NDArray[np.int64]

    @property
    def nnz(self) -> int:
        """Number of active weights."""
        return self.weight.nnz

    @property
    def n_active(self) -> int:
        """Number of active neurons."""
        return self.weight.n_active

    def remap(self, state: NDArray[Any]) -> NDArray[Any]:
        """Return optimiser state of the old values for the new ones (SPEC 4.8).

        Parameters
        ----------
        state : ndarray, (old n_active, old k) or flat

        Returns
        -------
        ndarray, (n_active, k)
            New; zero where a weight is newly active.

        Raises
        ------
        SriglError
            If there is not one number for each old value.
        """
        n_old = self.nnz - self.n_grown + self.n_pruned
        if state.size != n_old:
            raise SriglError(
                f"state has shape {state.shape}, but needs one number for each of the {n_old} "
                f"values before the update; pass what belongs to values (n_active, k)"
            )
        remapped: NDArray[Any] = np.where(
            self.source < 0, state.dtype.type(0), state.reshape(-1)[self.source]
        )
        return remapped


def checked_update(
    algorithm: Callable[..., MaskUpdate],
    weight: ArrayLike,
    grad: ArrayLike,
    mask: NDArray[np.bool_],
    settings: UpdateSettings,
    *,
    arrays: ArrayOps = HOST_ARRAYS,
    finite: bool = True,
    **options: Any,
) -> MaskUpdate:
    """Check the input, run `algorithm` on two axes, return its result in the weight's shape.

    Without `finite`, the algorithm calls `check_finite`.

    Raises
    ------
    SriglError
        If a shape, a number or the budget does not fit; nothing is changed.
    """
    with arrays.execution_context(weight):
        w, g, m = check_update_arrays(weight, grad, mask, arrays, finite=finite)
        shape = arrays.as_float_array(weight, "weight").shape
        check_settings(settings).check_fits(w.shape, arrays.dtype(w))
        update = algorithm(w, g, m, settings, **options)
        return replace(
            update,
            mask=arrays.to_caller(update.mask.reshape(shape), mask),
            weight=arrays.to_caller(update.weight.reshape(shape), weight),
        )


def check_settings(settings: object) -> UpdateSettings:
    """Return `settings` if they are the settings of an update.

    Raises
    ------
    ValueTypeError
        If they are anything else.
    """
    if not isinstance(settings, UpdateSettings):
        raise ValueTypeError(
            f"settings must be UpdateSettings, got {type(settings).__name__}; make them with "
            f"UpdateSettings(nnz_budget, drop_fraction)"
        )
    return settings


def check_update_arrays(
    weight: ArrayLike,
    grad: ArrayLike,
    mask: NDArray[np.bool_],
    arrays: ArrayOps = HOST_ARRAYS,
    *,
    finite: bool = True,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Return `weight`, `grad` and `mask` as C-ordered arrays of shape (n_out, n_in).

    Parameters
    ----------
    weight : array, (n_out, n_in) or (out, in, kh, kw)
        Finite where `mask` is True.
    grad : array, same shape
        Finite everywhere.
    mask : ndarray of bool, same shape
    arrays : ArrayOps
        The backend's.
    finite : bool
        Whether to check that numbers are finite.

    Raises
    ------
    SriglError
        If shapes differ, or a number that counts is not finite; the message has the count.
    ValueTypeError
        If a dtype is not supported.
    """
    w: Any = arrays.as_float_array(weight, "weight")
    g: Any = arrays.as_float_array(grad, "grad")
    shape = flat_shape(tuple(w.shape))
    if g.shape != w.shape:
        raise SriglError(f"grad has shape {tuple(g.shape)}, but its weight has {tuple(w.shape)}")
    m: Any = arrays.as_mask(mask, w.shape)
    if finite:
        counts = arrays.count_nonfinite(g), arrays.count_nonfinite(w, m)
        check_finite(*counts, shape[0] * shape[1])
    return (
        arrays.contiguous(w).reshape(shape),
        arrays.contiguous(g).reshape(shape),
        arrays.contiguous(m).reshape(shape),
    )


def check_finite(n_grad: int, n_weight: int, size: int) -> None:
    """Check that the numbers of an update are finite.

    Parameters
    ----------
    n_grad, n_weight : int
        Gradients, and weights at active positions, that are not finite.
    size : int
        Of the layer.

    Raises
    ------
    SriglError
        If there are any; the message has the count.
    """
    _check_finite("grad", n_grad, size)
    _check_finite("weight at active positions", n_weight, size)


def checked_condensed_update(
    algorithm: Callable[..., CondensedUpdate],
    weight: CondensedWeight,
    gradient_rows: GradientRows,
    settings: UpdateSettings,
    *,
    block_rows: int,
    **options: Any,
) -> CondensedUpdate:
    """Check the input, and run `algorithm` on rows of the gradient that are checked as they come.

    Raises
    ------
    SriglError
        If a shape, a number or the budget does not fit; nothing is changed.
    ValueTypeError
        If an argument has the wrong type, or a block is not an array of a value type.
    """
    check_condensed(weight)
    check_settings(settings).check_fits(weight.shape, weight.dtype)
    if not callable(gradient_rows):
        raise ValueTypeError(
            f"gradient_rows must be a function of two row numbers, got "
            f"{type(gradient_rows).__name__}; for a dense gradient pass lambda a, b: grad[a:b]"
        )
    block_rows = check_integer(block_rows, "block_rows", least=1)
    n_nonfinite = HOST_ARRAYS.count_nonfinite(weight.values)
    _check_finite("weight", n_nonfinite, weight.nnz)
    rows = _CheckedRows(gradient_rows, weight.shape)
    with honour_subnormals():
        return algorithm(weight, rows, settings, block_rows=block_rows, **options)


class _CheckedRows:
    """Rows of a dense gradient, float32 or float64, once they are found to be finite."""

    def __init__(self, gradient_rows: GradientRows, shape: tuple[int, int]) -> None:
        self._gradient_rows, self._shape = gradient_rows, shape

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        rows = self._rows(start, stop)
        if HOST_ARRAYS.count_nonfinite(rows):
            n_out, n_in = self._shape
            later = range(stop, n_out, stop - start)
            blocks = [rows, *(self._rows(r, min(n_out, r + stop - start)) for r in later)]
            n_nonfinite = sum(HOST_ARRAYS.count_nonfinite(block) for block in blocks)
            _check_finite("grad", n_nonfinite, n_out * n_in)
        return rows

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        what = f"gradient_rows({start}, {stop})"
        rows = as_float_array(self._gradient_rows(start, stop), what)
        expected = (stop - start, self._shape[1])
        if rows.shape != expected:
            raise SriglError(f"{what} has shape {rows.shape}, but must have {expected}")
        return as_float_view(rows)


def _check_finite(what: str, n_nonfinite: int, size: int) -> None:
    if n_nonfinite:
        raise SriglError(
            f"{what} is not finite in {n_nonfinite} of {size} places (NaN or inf); skip this "
            f"update, or find where the loss diverged. Nothing was changed"
        )
