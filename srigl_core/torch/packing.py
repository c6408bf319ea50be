"""A cache of the layouts that a backend packs a layer's tensors into.

The connections are packed once for a mask, and the values once for many products. An op receives
plain tensors, so the packing of a layer is found by the address of its indices.

A packing is used only if the tensors hold the numbers that were packed: at each call all numbers
are compared. PyTorch's counts of writes would not do: it does not count those of fused optimisers,
through ``.data``, NumPy and DLPack views, by collectives or by another process.
`srigl_core.torch.freeze` leaves the comparison out.

On a GPU a comparison would make the host wait. There a product reads the values from the tensor
itself at each call, so that only the mask is packed; of the mask, writes that PyTorch counts are
looked for.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray

from srigl_core._format.weight import CondensedWeight
from srigl_core._plan import Plan, prepare
from srigl_core._registry import get_backend
from srigl_core.errors import SriglError
from srigl_core.torch.sharded_tensors import may_be_viewed
from srigl_core.torch.tensors import as_numpy, numpy_dtype

__all__ = [
    "Packing",
    "condensed_weight",
    "copied",
    "freeze_packing",
    "holds",
    "memory_of",
    "packing_of",
    "state_of",
    "unfreeze_packing",
]


# Faster than NumPy, which writes an array of results, and takes longer for a call.
_memcmp = (ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)).memcmp
_memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


@dataclass(eq=False, slots=True)
class Packing:
    """A layer's weight in the layout of its device's backend.

    Parameters
    ----------
    plan : Plan
    mask : tuple of _Bits or torch.Tensor
        The layer's indices, active rows and counts; copies of them on another device than the CPU.
    n_in : int
    values : _Bits or torch.Tensor
        The values that were packed, in the same way.
    evict : weakref.ref
        Removes the packing when the memory of the layer's indices is freed.
    seen : tuple
        The `state_of` the layer's tensors when their numbers were compared last, and the memory of
        values, active rows and counts, so that no other tensor gets their addresses.
    takes_values : bool
        Whether the plan is to be given the layer's values at each call, in place of those packed.
    """

    plan: Plan
    mask: tuple[Any, ...]
    n_in: int
    values: Any
    evict: Any
    seen: tuple[list[tuple[int, int]], list[Any]]
    takes_values: bool

    @property
    def weight(self) -> CondensedWeight:
        """The weight, on the host."""
        return self.plan.weight

    def has_mask(self, mask: tuple[Any, ...], n_in: int) -> bool:
        """Return whether these connections are packed."""
        return n_in == self.n_in and all(map(holds, mask, self.mask))

    def has_counted_mask(self, values: Any, state: list[tuple[int, int]], n_in: int) -> bool:
        """Return whether values of this dtype can be given with a mask that nobody wrote since."""
        of_mask = state[1:]
        return (
            self.takes_values
            and n_in == self.n_in
            and self.seen[0][1:] == of_mask
            and all(count >= 0 for _, count in of_mask)
            and self.weight.dtype == numpy_dtype(values.dtype)
        )


_packings: dict[int, Packing] = {}
"""The last packing of each layer, by the address of its indices."""

_frozen: dict[tuple[int, int], Packing] = {}
"""The packings of frozen layers, by the addresses of values and indices."""


def packing_of(
    values: Any,
    indices: Any,
    active: Any,
    counts: Any,
    n_in: int,
    *,
    compare: bool = True,
    gives_values: bool = False,
) -> Packing:
    """Return a layer's weight, packed for the backend of its device.

    Parameters
    ----------
    values : torch.Tensor, (nnz_budget,)
    indices : torch.Tensor of int32, (nnz_budget,)
    active : torch.Tensor of int32, (n_out,)
    counts : torch.Tensor of int64, (2,)
    n_in : int
    compare : bool
        False in a backward pass, which uses the numbers of the forward pass. Then only writes that
        PyTorch counts are looked for.
    gives_values : bool
        True if the caller gives the plan the values where `Packing.takes_values`, so that those
        that are packed may be others.

    Raises
    ------
    SriglError
        If the tensors do not describe a constant fan-in weight, or a frozen layer was written.
    BackendUnavailableError
        If no backend can run on their device.
    """
    mask, key = (indices, active, counts), indices.data_ptr()
    state = state_of(values, *mask)
    if _frozen and (frozen := _frozen.get((values.data_ptr(), key))) is not None:
        if frozen.seen[0] == state:
            return frozen
        raise SriglError(
            "a frozen layer was written; call srigl_core.torch.unfreeze(model) before you change "
            "it, and freeze it again afterwards"
        )
    # Threads may pack at the same time: each one uses its own packing, and the last one is kept.
    kept = _packings.get(key)
    if kept is not None and not compare and kept.seen[0] == state:
        return kept
    if kept is not None and gives_values and kept.has_counted_mask(values, state, n_in):
        return kept
    values = may_be_viewed(values)
    same_mask = kept is not None and kept.has_mask(mask, n_in)
    # A count that has changed is enough to know that the values have: optimisers write them all.
    if (
        kept is not None
        and same_mask
        and kept.seen[0][0] == state[0]
        and holds(values, kept.values)
    ):
        if kept.seen[0] != state:
            kept.seen = state, memory_of(values, active, counts)
        return kept
    # Copies are packed, so that the next call finds what another thread writes meanwhile.
    source = values if values.is_cpu else values.detach().clone()
    if kept is not None and same_mask and kept.weight.dtype == numpy_dtype(values.dtype):
        weight, copies, evict = kept.weight, kept.mask, kept.evict
        numbers = as_numpy(source)[: weight.nnz].reshape(weight.values.shape)
        plan = kept.plan.with_weight(weight.with_values(numbers))
    else:
        copies = copied(indices), copied(active), copied(counts)
        backend = get_backend(operation="condensed_matmul_backward", device=values.device.type)
        plan = prepare(condensed_weight(source, *copies, n_in), backend=backend)
        evict = weakref.ref(indices.untyped_storage(), lambda _: _packings.pop(key, None))
    weight = plan.weight
    flat = source[: weight.nnz]
    if values.is_cpu:
        flat = _Bits(weight.values.reshape(-1), values.dtype)
    seen = state, memory_of(values, active, counts)
    takes_values = not values.is_cpu and plan.takes_device_values
    _packings[key] = packing = Packing(plan, copies, n_in, flat, evict, seen, takes_values)
    return packing


def freeze_packing(values: Any, indices: Any, active: Any, counts: Any, n_in: int) -> None:
    """Pack a layer's tensors; later calls use that packing without a comparison."""
    unfreeze_packing(values, indices)
    key = values.data_ptr(), indices.data_ptr()
    packing = packing_of(values, indices, active, counts, n_in)
    _frozen[key] = replace(packing, takes_values=False)
    weakref.finalize(indices.untyped_storage(), _frozen.pop, key, None)


def unfreeze_packing(values: Any, indices: Any) -> None:
    """Compare the numbers of a layer's tensors again at each call."""
    _frozen.pop((values.data_ptr(), indices.data_ptr()), None)


def condensed_weight(
    values: Any, indices: Any, active: Any, counts: Any, n_in: int
) -> CondensedWeight:
    """Return a copy of the weight that a layer's tensors, as in `packing_of`, describe.

    Raises
    ------
    SriglError
        If they do not describe a weight. The message names the wrong tensor.
    """
    n_out, room = len(active), min(len(values), len(indices))
    n_active, fan_in = (int(count) for count in _on_host(counts))
    if n_active == fan_in == 0:
        raise SriglError(
            "counts holds zeros: the layer was made without memory (on the meta device) and has no "
            "connections yet; call load_state_dict with a condensed layer's state, or "
            "reset_parameters()"
        )
    if not (1 <= n_active <= n_out and 1 <= fan_in <= n_in and n_active * fan_in <= room):
        raise SriglError(
            f"counts holds n_active={n_active} and fan_in={fan_in}, which a layer of n_out={n_out} "
            f"neurons, n_in={n_in} inputs and room for {room} values cannot have"
        )
    used, shape = n_active * fan_in, (n_active, fan_in)
    return CondensedWeight(
        _on_host(may_be_viewed(values))[:used].reshape(shape),
        _on_host(indices)[:used].reshape(shape),
        _on_host(active)[:n_active],
        (n_out, n_in),
    )


class _Bits:
    """The bits of a tensor on the CPU when it was packed."""

    __slots__ = ("_address", "_dtype", "_nbytes", "numbers")

    def __init__(self, numbers: NDArray[Any], dtype: Any) -> None:
        self.numbers, self._dtype = numbers, dtype
        self._address, self._nbytes = numbers.ctypes.data, numbers.nbytes

    def __len__(self) -> int:
        return len(self.numbers)

    def are_in(self, tensor: Any) -> bool:
        """Return whether a tensor begins with these bits."""
        if tensor.dtype is not self._dtype or not tensor.is_cpu or tensor.nbytes < self._nbytes:
            return False
        tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
        return bool(_memcmp(tensor.data_ptr(), self._address, self._nbytes) == 0)


def copied(tensor: Any) -> Any:
    """Return a copy of a tensor, for `holds`."""
    if tensor.is_cpu:
        return _Bits(as_numpy(tensor).copy(), tensor.dtype)
    return tensor.detach().clone()


def _on_host(numbers: Any) -> NDArray[Any]:
    return numbers.numbers if isinstance(numbers, _Bits) else as_numpy(numbers)


def holds(tensor: Any, kept: Any) -> bool:
    """Return whether a tensor begins with the bits of a copy."""
    if isinstance(kept, _Bits):
        return kept.are_in(tensor)
    if tensor.device != kept.device or tensor.dtype != kept.dtype:
        return False
    tensor = tensor.detach()[: len(kept)].contiguous()
    return bool(torch.equal(tensor.view(torch.uint8), kept.view(torch.uint8)))


def state_of(*tensors: Any) -> list[tuple[int, int]]:
    """Return the address of each tensor, and how many writes PyTorch has counted."""
    return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]


def memory_of(*tensors: Any) -> list[Any]:
    """Return the memory of tensors: while it is held, no other tensor gets their addresses."""
    return [tensor.untyped_storage() for tensor in tensors]
