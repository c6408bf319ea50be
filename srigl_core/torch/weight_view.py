"""The dense weight of a condensed layer, for code that looks at it."""

from __future__ import annotations

from typing import Any

import torch

from srigl_core.errors import SriglError
from srigl_core.torch.sharded_tensors import whole

__all__ = ["HasDenseWeight", "dense_weight", "is_marker"]

_SETTERS = ("__set__", "__setitem__", "__delete__")
_IN_PLACE = (
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"),
    *("__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
)
_DESCRIPTIONS = {
    *("dim", "element_size", "is_complex", "is_contiguous", "is_floating_point", "is_signed"),
    *("ndimension", "nelement", "numel", "size", "stride", "storage_offset", "get_device"),
    *("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cpu", "is_cuda"),
    *("is_leaf", "is_meta", "is_nested", "is_quantized", "is_sparse", "itemsize", "nbytes"),
    *("grad", "grad_fn", "is_mps", "is_xpu", "is_mkldnn", "names", "is_sparse_csr", "__len__"),
}
"""What is answered without the numbers."""


class _ReadOnly(torch.Tensor):  # type: ignore[misc] # torch is untyped here
    """A tensor that refuses writes, also those to its views."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return _read_only_views(func(*args, **kwargs), args)


class _LazyWeight(_ReadOnly):
    """The masked dense weight of a linear layer, whose numbers are made when they are read."""

    _layer: Any

    @staticmethod
    def __new__(cls, layer: Any, shape: tuple[int, ...]) -> Any:
        device, dtype = layer.values.device, layer.dtype
        weight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        weight._layer = layer
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = _with_numbers(args), _with_numbers(kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return _read_only_views(func(*args, **kwargs), args)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_with_numbers(args), **_with_numbers(kwargs or {}))

    def _numbers(self) -> Any:
        layer = object.__getattribute__(self, "_layer")
        with torch.no_grad():
            dense = layer.dense_of(whole(layer.values))
        with torch._C.DisableTorchFunctionSubclass():
            return dense.view(self.shape)


class HasDenseWeight:
    """Adds the read-only `weight` to a module that has a condensed linear layer."""

    def _weight_of(self) -> tuple[Any, tuple[int, ...]]:
        """Return the linear layer, and the shape of the dense weight."""
        raise NotImplementedError

    @property
    def weight(self) -> Any:
        """The masked dense weight; its numbers are made each time they are read.

        It is read-only and requires no gradient. Its dtype, device and shape cost little. Train and
        change `values` instead.
        """
        layer, shape = self._weight_of()
        if torch.compiler.is_compiling():
            return layer.dense_of(layer.values.detach()).view(shape)
        return _LazyWeight(layer, shape)

    @weight.setter
    def weight(self, new: Any) -> None:
        # torch.func.functional_call sets the marker of a state, and then the weight that was there.
        is_own = isinstance(new, _LazyWeight) and new._layer is self._weight_of()[0]
        if not is_own and not is_marker(new):
            raise SriglError(_READ_ONLY)

    def register_parameter(self, name: str, param: Any) -> None:
        """Add a parameter, but none that is called ``weight``."""
        if name == "weight":
            raise SriglError(_READ_ONLY)
        super().register_parameter(name, param)  # type: ignore[misc] # that of nn.Module


def is_marker(tensor: Any) -> bool:
    """Return whether a tensor is a marker of `state_markers`; a dense weight has two axes."""
    return isinstance(tensor, torch.Tensor) and tensor.shape == (1,)


_READ_ONLY = (
    "the weight of a condensed layer is read-only, as the layer computes with its values; write to "
    "layer.values, call layer.load_condensed_, or convert the model with to_masked_dense first"
)


def dense_weight(values: Any, indices: Any, active: Any, counts: Any, n_in: int) -> Any:
    """Return the masked dense weight of a condensed layer's tensors, (n_out, n_in).

    No shape depends on a number, so fake tensors and compiled graphs can compute it.
    """
    n_weights = active.shape[0] * n_in
    place = torch.arange(values.shape[0], device=values.device)
    neuron = place // counts[1].clamp(min=1)
    row = active[neuron.clamp(max=active.shape[0] - 1)].long()
    # Places behind the last connection go to one number more, which is cut off.
    flat = torch.where(place < counts[0] * counts[1], row * n_in + indices, n_weights)
    dense = values.new_zeros(n_weights + 1, requires_grad=False)
    dense.scatter_(0, flat, values.detach())
    return dense[:-1].view(-1, n_in)


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    name = getattr(func, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    first = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
    written = first if isinstance(first, list | tuple) else [first]
    if not (writes or name in (*_SETTERS, *_IN_PLACE)):
        written = [kwargs.get("out")]
    if any(isinstance(tensor, _ReadOnly) for tensor in written):
        raise SriglError(_READ_ONLY)


def _with_numbers(tree: Any) -> Any:
    """Replace weights in nested arguments by tensors of their numbers."""
    if isinstance(tree, _LazyWeight):
        return tree._numbers()
    if isinstance(tree, tuple | list) and type(tree) in (tuple, list):
        return type(tree)(_with_numbers(part) for part in tree)
    if isinstance(tree, dict):
        return {key: _with_numbers(part) for key, part in tree.items()}
    return tree


def _read_only_views(result: Any, args: Any) -> Any:
    """Make results read-only that share the memory of the first argument."""
    first = args[0] if args else None
    is_traced = torch._C._len_torch_dispatch_stack() > 0
    if is_traced or not isinstance(first, torch.Tensor) or first.is_meta:
        return result
    if type(result).__module__ == "numpy" and hasattr(result, "setflags"):
        result.setflags(write=False)
    elif isinstance(result, tuple | list) and type(result) in (tuple, list):
        return type(result)(_read_only_views(part, args) for part in result)
    elif type(result) is torch.Tensor and _share_memory(result, first):
        return result.as_subclass(_ReadOnly)
    return result


def _share_memory(one: Any, other: Any) -> bool:
    try:
        return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())
    except (NotImplementedError, RuntimeError):
        return False  # there is no storage, in torch.func.vmap for example
