"""The condensed product as PyTorch ops: kernels, what tracing sees of them, gradients, autocast.

- ``srigl_core::condensed_linear``, which has a gradient;
- ``srigl_core::condensed_linear_backward``, that gradient, which has one as well;
- ``srigl_core::condensed_inference``, with the activation in the kernel, for where no gradient is
  asked for. It has none: an op with a gradient of its own takes twice as long to reach its kernel.

Every tensor of a layer has the same shape whatever its mask, so that compiled graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import library

from srigl_core.contract import ACTIVATIONS, MatmulGradients
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch import capture
from srigl_core.torch.packing import Packing, packing_of
from srigl_core.torch.tensors import as_numpy

__all__ = ["condensed_inference", "condensed_linear", "condensed_linear_backward"]

_WEIGHT = "Tensor values, Tensor indices, Tensor active, Tensor counts"
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    torch.Tag.flexible_layout,  # any strides are taken: none need to be changed for us
    # A captured graph would go on with values put in order when it was captured.
    torch.Tag.cudagraph_unsafe,
)
_FEW = 1 << 15
"""Numbers in a result that are copied sooner than a kernel is called the general way."""

_ON_CPU = nullcontext()
_HALVES = {torch.float16, torch.bfloat16}
_FLOATS = {*_HALVES, torch.float32, torch.float64}

_library = library.Library("srigl_core", "DEF")
_library.define(
    f"condensed_linear(Tensor x, {_WEIGHT}, Tensor? bias, int in_features) -> Tensor", tags=_TAGS
)
_library.define(
    f"condensed_linear_backward(Tensor grad, Tensor x, {_WEIGHT}, int in_features, "
    f"bool needs_x, bool needs_values, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    f"condensed_inference(Tensor x, {_WEIGHT}, Tensor? bias, int in_features, str activation) "
    f"-> Tensor",
    tags=_TAGS,
)
condensed_linear = torch.ops.srigl_core.condensed_linear.default
condensed_linear_backward = torch.ops.srigl_core.condensed_linear_backward.default
condensed_inference = torch.ops.srigl_core.condensed_inference.default


def _check_input(x: Any, values: Any, in_features: int) -> Any:
    """Return the result's dtype.

    Raises
    ------
    SriglError
        If the last axis of `x` is not as long as the layer has inputs.
    ValueTypeError
        If `x` or `values` is of no value type, or the two do not combine.
    """
    if not x.ndim or x.shape[-1] != in_features:
        raise SriglError(
            f"x has shape {tuple(x.shape)}, but its last axis must be the layer's in_features="
            f"{in_features}"
        )
    kinds = {x.dtype, values.dtype}
    if not kinds <= _FLOATS:
        raise ValueTypeError(
            f"x is of {x.dtype} and the layer's values of {values.dtype}, but they must be "
            f"floating point of 16, 32 or 64 bits; convert with .to(torch.float32)"
        )
    if kinds == _HALVES:
        raise ValueTypeError(
            f"x of {x.dtype} and values of {values.dtype} do not combine: neither holds the "
            f"other's numbers; convert one of them, for example to float32"
        )
    return x.dtype if len(kinds) == 1 else torch.promote_types(*kinds)


def _check_neurons(what: str, shape: tuple[int, ...], active: Any) -> None:
    n_out = active.shape[0]
    if not shape or shape[-1] != n_out:
        raise SriglError(
            f"{what} has shape {tuple(shape)}, but its last axis must be the layer's "
            f"out_features={n_out}"
        )


# ---------------------------------------------------------------- forward


def _multiply(
    x: Any,
    values: Any,
    indices: Any,
    active: Any,
    counts: Any,
    bias: Any | None,
    in_features: int,
    activation: str = "none",
) -> Any:
    """Return the product in a new tensor: the kernel of CPU and CUDA."""
    y = _empty_product(x, values, indices, active, counts, bias, in_features, activation)
    if y.numel():
        with _on_device_of(x):
            packing = packing_of(values, indices, active, counts, in_features)
            threads = torch.get_num_threads()
            try:
                _write_product(packing, x, bias, activation, y, threads)
            finally:
                _keep_threads(threads)
    return y


def _write_product(
    packing: Packing, x: Any, bias: Any | None, activation: str, y: Any, threads: int
) -> None:
    rows, out = _rows(_lent(x, "x", packing)), _rows(_lent(y, "y", packing))
    offset = None if bias is None else _lent(bias, "bias", packing)
    if out.size <= _FEW and packing.quick_matmul is not None:
        found = packing.quick_matmul(rows, offset, activation, False, threads)
        if found is not None:
            out[...] = found
            return
    with packing.arrays.computing(x):
        packing.prepared.matmul(
            rows,
            None if offset is None else packing.arrays.round_to(offset, out.dtype),
            activation=activation,
            compact=False,
            out=out,
            threads=threads,
        )


def _empty_product(
    x: Any,
    values: Any,
    indices: Any,
    active: Any,
    counts: Any,
    bias: Any | None,
    in_features: int,
    activation: str = "none",
) -> Any:
    """Return the product's tensor, its arguments checked: all that tracing needs."""
    kind = _check_input(x, values, in_features)
    if bias is not None and bias.ndim != 1:
        raise SriglError(f"bias has shape {tuple(bias.shape)}, but needs one number per neuron")
    if bias is not None:
        _check_neurons("bias", bias.shape, active)
    if activation not in ACTIVATIONS:
        raise SriglError(f"activation={activation!r} is unknown; use {', '.join(ACTIVATIONS)}")
    return x.new_empty((*x.shape[:-1], active.shape[0]), dtype=kind)


# ---------------------------------------------------------------- backward


def _gradients(
    grad: Any,
    x: Any,
    values: Any,
    indices: Any,
    active: Any,
    counts: Any,
    in_features: int,
    needs_x: bool,
    needs_values: bool,
    needs_bias: bool,
) -> tuple[Any, Any, Any]:
    """Return new tensors with the gradients: the kernel of CPU and CUDA."""
    needs = needs_x, needs_values, needs_bias
    dx, dvalues, dbias = results = _empty_gradients(
        grad, x, values, indices, active, counts, in_features, *needs
    )
    if needs_values:
        capture.record(indices, x, grad)
    if not grad.numel():
        for result in results:
            result.zero_()
        return results
    with _on_device_of(grad):
        packing = packing_of(values, indices, active, counts, in_features)
        weight = packing.weight
        dvalues[weight.nnz :].zero_()
        out = MatmulGradients(
            _rows(_lent(dx, "dx", packing)) if needs_x else None,
            _lent(dvalues[: weight.nnz].view(weight.values.shape), "dvalues", packing)
            if needs_values
            else None,
            _lent(dbias, "dbias", packing) if needs_bias else None,
        )
        rows = _rows(_lent(x, "x", packing)) if needs_values else None
        threads = torch.get_num_threads()
        try:
            with packing.arrays.computing(grad):
                packing.prepared.backward(
                    _rows(_lent(grad, "grad", packing)), rows, out=out, threads=threads
                )
        finally:
            _keep_threads(threads)
    return results


def _empty_gradients(
    grad: Any,
    x: Any,
    values: Any,
    indices: Any,
    active: Any,
    counts: Any,
    in_features: int,
    needs_x: bool,
    needs_values: bool,
    needs_bias: bool,
) -> tuple[Any, Any, Any]:
    """Return the gradients' tensors, empty where not asked for; `x` matters for `needs_values`."""
    _check_neurons("grad", grad.shape, active)
    if needs_values:
        _check_input(x, values, in_features)
        if x.shape[:-1] != grad.shape[:-1]:
            raise SriglError(
                f"x has shape {tuple(x.shape)}, but grad {tuple(grad.shape)}: their axes but the "
                f"last must be the same"
            )
    sums = torch.float64 if grad.dtype is torch.float64 else torch.float32
    return (
        x.new_empty((*grad.shape[:-1], in_features) if needs_x else (0,)),
        values.new_empty(values.shape[0] if needs_values else 0),
        grad.new_empty(active.shape[0] if needs_bias else 0, dtype=sums),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, values, indices, active, counts, _, ctx.in_features = inputs
    # x itself is needed for the gradient of the values alone, and often large.
    kept = x if ctx.needs_input_grad[1] else x.new_empty(0)
    ctx.save_for_backward(kept, values, indices, active, counts)


def _backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5]
    found = condensed_linear_backward(grad, *ctx.saved_tensors, ctx.in_features, *needs)
    dx, dvalues, dbias = (
        part if needed else None for part, needed in zip(found, needs, strict=True)
    )
    return dx, dvalues, None, None, None, dbias, None  # autograd casts it to the bias's dtype


def _keep_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.in_features = inputs[6]
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, ddx: Any, ddvalues: Any, ddbias: Any) -> tuple[Any, ...]:
    """Return the gradients of the gradients, which are products of the same kinds again."""
    grad, x, values, *mask = ctx.saved_tensors
    needs_grad, needs_x, needs_values = ctx.needs_input_grad[:3]
    n_in, parts = ctx.in_features, []
    dx = dvalues = None
    if ddx is not None:
        if needs_grad:
            parts.append(condensed_linear(ddx, values, *mask, None, n_in))
        if needs_values:
            asked = False, True, False
            _, dvalues, _ = condensed_linear_backward(grad, ddx, values, *mask, n_in, *asked)
    if ddvalues is not None:
        if needs_grad:
            parts.append(condensed_linear(x, ddvalues, *mask, None, n_in))
        if needs_x:
            asked = True, False, False
            dx, _, _ = condensed_linear_backward(grad, x, ddvalues, *mask, n_in, *asked)
    if ddbias is not None and needs_grad:
        parts.append(ddbias.to(grad.dtype).expand_as(grad))
    dgrad = sum(parts[1:], parts[0]) if parts else None
    return dgrad, dx, dvalues, *[None] * 7


# ---------------------------------------------------------------- autocast


def _autocast(op: Any, device: str) -> Callable[..., Any]:
    """Return the kernel for where autocast is on.

    `x` is rounded to autocast's type, and so is the result. The values are not: they would have to
    be rounded, and put in order, each time, and a product with them as they are is the better one.
    """

    def kernel(x: Any, values: Any, *rest: Any) -> Any:
        kind = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if x.dtype in _FLOATS - {torch.float64}:
                x = x.to(kind)
            if values.dtype in _HALVES:
                values = values.to(kind)
            y = op(x, values, *rest)
            return y if y.dtype is torch.float64 else y.to(kind)

    return kernel


# ---------------------------------------------------------------- arrays and threads


def _lent(tensor: Any, what: str, packing: Packing) -> Any:
    """Return a tensor as an array of its memory, for the backend that has the packing."""
    if tensor.is_cpu:
        return as_numpy(tensor)
    return packing.arrays.as_float_array(tensor.detach(), what)


def _rows(array: Any) -> Any:
    """Return an array with its leading axes as one."""
    return array if array.ndim == 2 else array.reshape(-1, array.shape[-1])


def _keep_threads(threads: int) -> None:
    """Give PyTorch its threads back: Numba's pool, if it is OpenMP's, leaves as many as it has."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _on_device_of(tensor: Any) -> AbstractContextManager[Any]:
    return _ON_CPU if tensor.is_cpu else torch.cuda.device(tensor.device)


# ---------------------------------------------------------------- registration

for _name, _kernel, _fake in (
    ("condensed_linear", _multiply, _empty_product),
    ("condensed_linear_backward", _gradients, _empty_gradients),
    ("condensed_inference", _multiply, _empty_product),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    library.register_fake(f"srigl_core::{_name}", _fake, lib=_library)
library.register_autograd(
    "srigl_core::condensed_linear", _backward, setup_context=_keep_for_backward, lib=_library
)
library.register_autograd(
    "srigl_core::condensed_linear_backward",
    _double_backward,
    setup_context=_keep_for_double_backward,
    lib=_library,
)
for _op in (condensed_linear, condensed_inference):
    for _device in ("cpu", "cuda"):
        _library.impl(_op, _autocast(_op, _device), f"Autocast{_device.upper()}")
