"""The plans of the connections that were used last, so that a call packs nothing anew."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.weight import CondensedWeight
from srigl_core._plan import Plan, prepare

__all__ = ["forget", "plan_for"]

_MOST = 256
"""Connections to keep plans of: more than the layers of a network."""

_BITS = {size: np.dtype(f"u{size}") for size in (2, 4, 8)}

_kept: dict[tuple[bytes, str], tuple[Plan, NDArray[Any]]] = {}
"""By connections and type: a plan, and the bits of its values. The newest are last."""

_lock = threading.Lock()


def plan_for(
    shape: tuple[int, int],
    values: NDArray[Any],
    indices: NDArray[Any],
    active: NDArray[Any],
    key: NDArray[np.uint32],
) -> Plan:
    """Return a plan of a weight.

    Parameters
    ----------
    shape : tuple of int
        Dense shape, (n_out, n_in).
    values, indices, active : ndarray
        Of the weight; copied where they are kept.
    key : ndarray of uint32, (4,)
        Says what `shape`, `indices` and `active` are.

    Returns
    -------
    Plan
        The one kept, if its values are these to the bit; else one that shares all that is packed
        of the connections.
    """
    name = key.tobytes(), values.dtype.char
    bits = values.view(_BITS[values.itemsize])
    plan, its_bits = _kept.get(name, (None, bits))
    if plan is not None and (bits == its_bits).all():
        return plan
    if plan is None:
        plan = prepare(CondensedWeight(values, indices, active, shape))
    else:
        plan = plan.with_values(values)
    with _lock:
        _kept.pop(name, None)
        _kept[name] = plan, plan.weight.values.view(bits.dtype)
        while len(_kept) > _MOST:
            del _kept[next(iter(_kept))]
    return plan


def forget(key: Any) -> None:
    """Drop the plans of these connections."""
    wanted = np.asarray(key).tobytes()
    with _lock:
        for name in [name for name in _kept if name[0] == wanted]:
            del _kept[name]
