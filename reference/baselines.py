"""The methods SRigL is compared with, on the same primitives (SPEC 5).

They are unstructured: weights are kept and grown over the whole layer, and a row may have any
number of weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import as_float_array, check_generator
from srigl_core._update import MaskUpdate, UpdateSettings, checked_update
from srigl_core.reference.mask_update import make_update, prune_counts
from srigl_core.reference.ranking import largest

__all__ = ["update_rigl", "update_set", "update_static"]


def update_rigl(
    weight: ArrayLike,
    grad: ArrayLike,
    mask: NDArray[np.bool_],
    *,
    drop_fraction: float,
    grown_init: float = 0.0,
) -> MaskUpdate:
    """Return the RigL update: prune the smallest weights, grow where gradients are largest.

    Parameters
    ----------
    weight, grad, mask, drop_fraction, grown_init
        As in `srigl_core.reference.update_mask`.

    Returns
    -------
    MaskUpdate
        With as many active weights as `mask`; `fan_in` is None.

    Raises
    ------
    SriglError
        As in `srigl_core.reference.update_mask`.

    Notes
    -----
    Evci et al. 2020. A position that was just pruned may be grown again.
    """

    def rigl(
        w: NDArray[Any], g: NDArray[Any], m: NDArray[np.bool_], s: UpdateSettings
    ) -> MaskUpdate:
        kept, n_prune = _kept(w, m, s.drop_fraction)
        return make_update(w, m, kept | largest(g, ~kept, n_prune), grown_init=s.grown_init)

    return checked_update(rigl, weight, grad, mask, _settings(drop_fraction, grown_init))


def update_set(
    weight: ArrayLike,
    mask: NDArray[np.bool_],
    *,
    drop_fraction: float,
    rng: np.random.Generator | int,
    grown_init: float = 0.0,
) -> MaskUpdate:
    """Return the SET update: prune the smallest weights, grow at random.

    Parameters
    ----------
    weight, mask, drop_fraction, grown_init
        As in `srigl_core.reference.update_mask`.
    rng : numpy.random.Generator or int
        A generator or a seed. Grown positions are drawn uniformly from all that are not kept.

    Returns
    -------
    MaskUpdate
        With as many active weights as `mask`; `fan_in` is None.

    Raises
    ------
    SriglError
        As in `srigl_core.reference.update_mask`.

    Notes
    -----
    Mocanu et al. 2018.
    """
    generator = check_generator(rng)

    def random_growth(
        w: NDArray[Any], _: NDArray[Any], m: NDArray[np.bool_], s: UpdateSettings
    ) -> MaskUpdate:
        kept, n_prune = _kept(w, m, s.drop_fraction)
        new_mask = kept.copy()
        grown = generator.choice(np.flatnonzero(~kept), n_prune, replace=False)
        new_mask.ravel()[grown] = True
        return make_update(w, m, new_mask, grown_init=s.grown_init)

    weight = as_float_array(weight, "weight")
    return checked_update(
        random_growth, weight, np.zeros_like(weight), mask, _settings(drop_fraction, grown_init)
    )


def update_static(weight: ArrayLike, mask: NDArray[np.bool_]) -> MaskUpdate:
    """Return the update that changes no connection and only zeroes inactive weights.

    Parameters
    ----------
    weight, mask
        As in `srigl_core.reference.update_mask`.

    Returns
    -------
    MaskUpdate
    """

    def unchanged(
        w: NDArray[Any], _: NDArray[Any], m: NDArray[np.bool_], __: UpdateSettings
    ) -> MaskUpdate:
        return make_update(w, m, m.copy())

    weight = as_float_array(weight, "weight")
    return checked_update(unchanged, weight, np.zeros_like(weight), mask, _settings(0.0, 0.0))


def _settings(drop_fraction: float, grown_init: float) -> UpdateSettings:
    return UpdateSettings(1, drop_fraction, gamma_sal=None, grown_init=grown_init)


def _kept(
    weight: NDArray[Any], mask: NDArray[np.bool_], drop_fraction: float
) -> tuple[NDArray[np.bool_], int]:
    n_keep, n_prune = prune_counts(weight, mask, drop_fraction)
    return largest(weight, mask, n_keep), n_prune
