"""A cache of plans by the connections' key, so that connections are packed once."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.weight import CondensedWeight
from srigl_core._plan import Plan, prepare

__all__ = ["any_plan_for", "evict", "plan_for"]

_MOST = 256
"""The number of cached plans, more than a network has layers."""

_BITS = {size: np.dtype(f"u{size}") for size in (2, 4, 8)}

_cache: dict[tuple[bytes, str], tuple[Plan, NDArray[Any]]] = {}
"""Plans and the bits of their values, by key and dtype. The newest are last."""

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
        Arrays of the weight, copied when a plan is made.
    key : ndarray of uint32, (4,)
        Identifies `shape`, `indices` and `active`.

    Returns
    -------
    Plan
        The cached plan if its values have the same bits. Otherwise a new plan that shares the
        packed connections of a cached one, if there is one.
    """
    name = key.tobytes(), values.dtype.char
    bits = values.view(_BITS[values.itemsize])
    plan, its_bits = _cache.get(name, (None, bits))
    if plan is not None and (bits == its_bits).all():
        return plan
    if plan is None:
        plan = prepare(CondensedWeight(values, indices, active, shape))
    else:
        plan = plan.with_values(values)
    with _lock:
        _cache.pop(name, None)
        _cache[name] = plan, plan.weight.values.view(bits.dtype)
        while len(_cache) > _MOST:
            del _cache[next(iter(_cache))]
    return plan


def any_plan_for(
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    indices: NDArray[Any],
    active: NDArray[Any],
    key: NDArray[np.uint32],
) -> Plan:
    """Return a plan of these connections whose values may be any of `dtype`."""
    plan, _ = _cache.get((key.tobytes(), dtype.char), (None, None))
    if plan is None:
        plan = plan_for(shape, np.zeros(indices.shape, dtype), indices, active, key)
    return plan


def evict(key: Any) -> None:
    """Drop the plans of these connections."""
    wanted = np.asarray(key).tobytes()
    with _lock:
        for name in [name for name in _cache if name[0] == wanted]:
            del _cache[name]
