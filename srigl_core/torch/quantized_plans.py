"""A cache of the plans of quantised layers, which an op finds by the address of a layer's indices.

These layers are for inference: only loading a state writes to them. So unlike those of
`srigl_core.torch.packing` their numbers are not compared at each call, which would take as long as
the product. Writes that PyTorch counts are noticed.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from srigl_core._format.weight import QuantizedWeight
from srigl_core._plan import QuantizedPlan, prepare
from srigl_core._registry import get_backend
from srigl_core.torch.packing import copied, holds, memory_of, state_of
from srigl_core.torch.tensors import as_numpy

__all__ = ["quantized_plan_of", "quantized_weight"]


@dataclass(eq=False, slots=True)
class _Kept:
    """A layer's plan.

    Parameters
    ----------
    plan : QuantizedPlan
    made_of : tuple
        Shape, kind of inputs, and the `state_of` of the layer's tensors.
    memory : list
        That of all tensors but the indices, so that no other tensor gets their addresses.
    copies : list
        Copies of the tensors that were made in inference mode, whose writes PyTorch does not count.
    evict : weakref.ref
        Removes the plan when the memory of the layer's indices is freed.
    """

    plan: QuantizedPlan
    made_of: tuple[Any, ...]
    memory: list[Any]
    copies: list[Any]
    evict: Any


_plans: dict[int, _Kept] = {}
"""The last plan of each layer, by the address of its indices."""


def quantized_plan_of(
    tensors: tuple[Any, ...], shape: tuple[int, int], inputs: str
) -> QuantizedPlan:
    """Return the plan of a quantised layer for the backend of its device.

    Parameters
    ----------
    tensors : tuple of torch.Tensor
        Values (int8), scale (float32), indices and active rows (int32), in the shapes of a
        `srigl_core.QuantizedWeight`.
    shape : tuple of int
        (n_out, n_in).
    inputs : {"float", "int8"}

    Raises
    ------
    SriglError
        If the tensors do not describe a quantised weight.
    BackendUnavailableError
        If no backend has the product on their device.
    """
    values, scale, indices, active = tensors
    key, made_of = indices.data_ptr(), (shape, inputs, state_of(*tensors))
    uncounted = [tensor for tensor in tensors if tensor.is_inference()]
    kept = _plans.get(key)
    if kept is not None and kept.made_of == made_of and all(map(holds, uncounted, kept.copies)):
        return kept.plan
    copies = list(map(copied, uncounted))
    backend = get_backend(operation="quantized_matmul", device=values.device.type, inputs=inputs)
    plan = prepare(quantized_weight(tensors, shape), inputs=inputs, backend=backend)
    evict = weakref.ref(indices.untyped_storage(), lambda _: _plans.pop(key, None))
    _plans[key] = _Kept(plan, made_of, memory_of(values, scale, active), copies, evict)
    return plan


def quantized_weight(tensors: tuple[Any, ...], shape: tuple[int, int]) -> QuantizedWeight:
    """Return a copy of the weight that a layer's tensors describe, in the host's memory."""
    values, scale, indices, active = map(as_numpy, tensors)
    return QuantizedWeight(values, scale, indices, active, shape)
