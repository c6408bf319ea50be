"""The layouts that a backend makes of a layer's tensors, kept for as long as these are unchanged.

What depends on the mask is packed once, and values are put in order once for many products. An op
is handed bare tensors, so that what was made of them is found by the identity of the indices.

A tensor is taken to be unchanged if it is the same object with the same memory, and PyTorch has
counted no write to it. Two kinds of writes it does not count:

- Those of its fused optimisers: the step of any optimiser is taken to have written the values.
- Those through ``.data`` or a NumPy view. On the CPU some of the values are compared, where a write
  to all of them shows. Elsewhere, or for a few values, whoever writes like that is to call
  ``torch.autograd.graph.increment_version``.

Where something may have changed, the numbers are compared, and packed if they did change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_post_hook

from srigl_core._format.weight import CondensedWeight
from srigl_core._plan import Plan, prepare
from srigl_core._registry import get_backend
from srigl_core.errors import SriglError
from srigl_core.torch.tensors import as_numpy

__all__ = ["Packing", "condensed_weight", "packing_of"]

_SAMPLES = 64

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class _Seen:
    """A tensor as it was when it was read."""

    __slots__ = ("_address", "_memory", "_tensor", "_version")

    _tensor: Callable[[], Any]

    def __init__(self, tensor: Any) -> None:
        self._tensor = weakref.ref(tensor)
        self._address = tensor.data_ptr()
        self._memory = tensor.untyped_storage()  # kept, so that no other one gets the address
        # Of tensors made in inference mode no writes are counted: they may always have changed.
        self._version = None if tensor.is_inference() else tensor._version

    def is_still(self, tensor: Any) -> bool:
        """Whether `tensor` is that very one, and nothing has been written to it since."""
        return (
            self._tensor() is tensor
            and self._version is not None
            and tensor._version == self._version
            and tensor.data_ptr() == self._address
        )


class _SeenMask:
    """The tensors that say which weights are active, as they were."""

    __slots__ = ("_active", "_counts", "_indices", "_n_in")

    def __init__(self, indices: Any, active: Any, counts: Any, n_in: int) -> None:
        self._indices, self._active, self._counts = _Seen(indices), _Seen(active), _Seen(counts)
        self._n_in = n_in

    def is_still(self, indices: Any, active: Any, counts: Any, n_in: int) -> bool:
        return (
            self._indices.is_still(indices)
            and self._active.is_still(active)
            and self._counts.is_still(counts)
            and self._n_in == n_in
        )


class _SeenValues:
    """The values as they were; on the CPU, with some of their numbers."""

    __slots__ = ("_numbers", "_steps", "_tensor", "_thinned")

    _thinned: NDArray[Any] | None
    _numbers: bytes | None

    def __init__(self, values: Any) -> None:
        self._tensor, self._steps = _Seen(values), _optimizer_steps
        self._thinned = self._numbers = None
        if values.is_cpu:
            self._thinned = as_numpy(values)[:: max(1, len(values) // _SAMPLES)]
            self._numbers = self._thinned.tobytes()

    def is_still(self, values: Any) -> bool:
        return (
            self._tensor.is_still(values)
            and self._steps == _optimizer_steps
            and (self._thinned is None or self._thinned.tobytes() == self._numbers)
        )


@dataclass(frozen=True, eq=False, slots=True)
class Packing:
    """A layer's weight in the layout of its device's backend.

    Parameters
    ----------
    plan : Plan
    device : torch.device
    seen_mask, seen_values
        The tensors that it was made of.
    evict : weakref.ref
        Removes the packing when the layer's indices are freed.
    """

    plan: Plan
    device: Any
    seen_mask: _SeenMask
    seen_values: _SeenValues
    evict: Any

    @property
    def weight(self) -> CondensedWeight:
        """The weight, on the host."""
        return self.plan.weight


_packings: dict[int, Packing] = {}
"""The last packing of each layer, by the ``id`` of its indices."""


def packing_of(values: Any, indices: Any, active: Any, counts: Any, n_in: int) -> Packing:
    """Return a layer's weight as the backend of its device has it.

    Parameters
    ----------
    values : torch.Tensor, (nnz_budget,)
    indices : torch.Tensor of int32, (nnz_budget,)
    active : torch.Tensor of int32, (n_out,)
    counts : torch.Tensor of int64, (2,)
    n_in : int

    Raises
    ------
    SriglError
        If the tensors are no constant fan-in weight; says which one is not right.
    BackendUnavailableError
        If no backend can run on their device.
    """
    # Threads may pack at the same time: each has a packing of what it saw, and the last one stays.
    kept = _packings.get(id(indices))
    same_mask = kept is not None and (
        kept.seen_mask.is_still(indices, active, counts, n_in)
        or (indices.is_inference() and _holds_mask(kept.weight, indices, active, counts, n_in))
    )
    if kept is not None and same_mask and kept.seen_values.is_still(values):
        return kept
    # Noted before the numbers are read, so that a write in between is found the next time.
    seen_values = _SeenValues(values)
    if kept is not None and same_mask and kept.weight.dtype == (numbers := as_numpy(values)).dtype:
        seen_mask, shape = kept.seen_mask, kept.weight.values.shape
        weight = kept.weight.with_values(numbers[: kept.weight.nnz].reshape(shape))
    else:
        seen_mask = _SeenMask(indices, active, counts, n_in)
        weight = condensed_weight(values, indices, active, counts, n_in)
    key = id(indices)
    evict = weakref.ref(indices, lambda _: _packings.pop(key, None))
    plan = _prepare(weight, values.device, kept)
    _packings[key] = packing = Packing(plan, values.device, seen_mask, seen_values, evict)
    return packing


def condensed_weight(
    values: Any, indices: Any, active: Any, counts: Any, n_in: int
) -> CondensedWeight:
    """Return the weight that a layer's tensors describe, a copy; arguments are `packing_of`'s.

    Raises
    ------
    SriglError
        If they describe none; says which tensor is not right.
    """
    n_out, room = len(active), min(len(values), len(indices))
    n_active, fan_in = (int(count) for count in as_numpy(counts))
    if not (1 <= n_active <= n_out and 1 <= fan_in <= n_in and n_active * fan_in <= room):
        raise SriglError(
            f"counts holds n_active={n_active} and fan_in={fan_in}, which a layer of n_out={n_out} "
            f"neurons, n_in={n_in} inputs and room for {room} values cannot have"
        )
    used, shape = n_active * fan_in, (n_active, fan_in)
    return CondensedWeight(
        as_numpy(values)[:used].reshape(shape),
        as_numpy(indices)[:used].reshape(shape),
        as_numpy(active)[:n_active],
        (n_out, n_in),
    )


def _prepare(weight: CondensedWeight, device: Any, kept: Packing | None) -> Plan:
    """Return a plan of `weight`, which shares with a kept one all that is still right."""
    if (
        kept is not None
        and kept.device == device
        and kept.weight.connections == weight.connections
        and kept.weight.dtype == weight.dtype
    ):
        return kept.plan if kept.weight == weight else kept.plan.with_weight(weight)
    backend = get_backend(operation="condensed_matmul_backward", device=device.type)
    return prepare(weight, backend=backend)


def _holds_mask(weight: CondensedWeight, indices: Any, active: Any, counts: Any, n_in: int) -> bool:
    """Return whether tensors describe the connections of `weight`; cheaper than repacking."""
    return (
        weight.shape == (len(active), n_in)
        and as_numpy(counts).tolist() == [weight.n_active, weight.fan_in]
        and np.array_equal(as_numpy(active)[: weight.n_active], weight.active)
        and np.array_equal(as_numpy(indices)[: weight.nnz], weight.indices.reshape(-1))
    )
