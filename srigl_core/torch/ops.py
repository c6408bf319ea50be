"""The condensed product as PyTorch operators: kernels, fake kernels, gradients and autocast.

- ``srigl_core::condensed_linear`` has a gradient.
- ``srigl_core::condensed_linear_backward`` is that gradient. It has a gradient, too.
- ``srigl_core::condensed_inference`` applies the activation in the kernel and has no gradient. This
  halves the time to reach the kernel.
- ``srigl_core::quantized_linear`` is the product of a quantised layer. Its gradient is an error.

All tensors of a layer keep their shapes when the mask changes, so compiled graphs stay valid. The
kernels take the arguments of the schemas, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import library
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from srigl_core._product_plan import ProductPlan, merged_rows
from srigl_core._product_spec import gradient_specs, product_spec
from srigl_core.contract import MatmulGradients
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch import capture
from srigl_core.torch.packing import packing_of
from srigl_core.torch.quantized_plans import quantized_plan_of
from srigl_core.torch.sharded_tensors import may_be_viewed
from srigl_core.torch.tensors import as_numpy, numpy_dtype, on_device_of, spec_of, torch_dtype

__all__ = [
    "compute_gradients",
    "condensed_inference",
    "condensed_linear",
    "condensed_linear_backward",
    "double_gradients",
    "gradients",
    "keep_for_backward",
    "multiply",
    "multiply_quantized",
    "quantized_linear",
    "refuse_gradient",
    "refuse_tangents",
    "restore_threads",
]

_WEIGHT = "Tensor values, Tensor indices, Tensor active, Tensor counts"
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    torch.Tag.flexible_layout,  # inputs may have any strides
    # A captured graph would keep using the layout that was packed when it was captured.
    torch.Tag.cudagraph_unsafe,
)
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
_library.define(
    "quantized_linear(Tensor x, Tensor values, Tensor scale, Tensor indices, Tensor active, "
    "Tensor? bias, int out_features, int in_features, ScalarType dtype, str inputs, "
    "str activation) -> Tensor",
    tags=_TAGS,
)
condensed_linear = torch.ops.srigl_core.condensed_linear.default
condensed_linear_backward = torch.ops.srigl_core.condensed_linear_backward.default
condensed_inference = torch.ops.srigl_core.condensed_inference.default
quantized_linear = torch.ops.srigl_core.quantized_linear.default


# ---------------------------------------------------------------- forward


def multiply(x: Any, *layer: Any) -> Any:
    """Return the product in a new tensor: the kernel of CPU and CUDA."""
    values, indices, active, counts, bias, in_features, *activation = layer
    name = activation[0] if activation else "none"
    _check_tensor(x)
    refuse_tangents(x, values, bias)
    if not x.numel():
        return _empty_product(x, *layer)
    with on_device_of(x):
        packing = packing_of(values, indices, active, counts, in_features, gives_values=True)
        bias = None if bias is None else may_be_viewed(bias)
        y = _fast_product(packing.plan, x, bias, name)
        if y is None:
            y = _empty_product(x, *layer)
            given = values if packing.takes_values else None
            _write_product(packing.plan, x, bias, name, y, given)
    return y


def _check_tensor(x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueTypeError(
            f"x must be a torch.Tensor, got {type(x).__name__}; torch.as_tensor(x) makes one"
        )
    if x.is_nested:
        raise ValueTypeError(
            "x is a nested tensor, which condensed layers do not take; pad it with "
            "x.to_padded_tensor(0.0)"
        )


def refuse_tangents(*tensors: Any) -> None:
    """Raise SriglError in forward mode outside of ``torch.func``: kernels drop its derivative."""
    if forward_ad._current_level < 0 or peek_interpreter_stack() is not None:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise SriglError(
            "a condensed layer has no derivative in forward mode outside of torch.func, but an "
            "input has a tangent (torch.autograd.forward_ad); use torch.func.jvp, or reverse mode"
        )


def _fast_product(plan: ProductPlan, x: Any, bias: Any | None, activation: str) -> Any | None:
    """Return the product in a new tensor, or None for tensors that need all the checks."""
    threads = torch.get_num_threads()
    try:
        return plan.fast_product(x, bias, activation, False, threads)
    finally:
        restore_threads(threads)


def _write_product(
    plan: ProductPlan, x: Any, bias: Any | None, activation: str, y: Any, values: Any = None
) -> None:
    threads = torch.get_num_threads()
    try:
        with _stream_of(x, plan):
            plan.write_product(
                merged_rows(_as_array(x, "x", plan)),
                None if bias is None else _as_array(bias, "bias", plan),
                activation=activation,
                out=merged_rows(_as_array(y, "y", plan)),
                threads=threads,
                values=None if values is None else _as_array(values, "values", plan),
            )
    finally:
        restore_threads(threads)


def _empty_product(x: Any, *layer: Any) -> Any:
    """Check the arguments and return an empty result: the kernel of fake tensors."""
    values, _, active, _, bias, in_features, *activation = layer
    spec = product_spec(
        spec_of(x, "x"),
        (active.shape[0], in_features),
        numpy_dtype(values.dtype, "values"),
        bias_shape=None if bias is None else bias.shape,
        activation=activation[0] if activation else "none",
    )
    return x.new_empty(spec.shape, dtype=torch_dtype(spec.dtype))


def multiply_quantized(x: Any, *layer: Any) -> Any:
    """Return the product of a quantised layer in a new tensor: the kernel of CPU and CUDA."""
    values, scale, indices, active, bias, n_out, n_in, dtype, inputs, activation = layer
    _check_tensor(x)
    refuse_tangents(x, bias)
    if not x.numel():
        return _empty_quantized(x, *layer)
    with on_device_of(x):
        plan = quantized_plan_of((values, scale, indices, active), (n_out, n_in), inputs)
        y = _fast_product(plan, x, bias, activation) if x.dtype is dtype else None
        if y is None:
            y = _empty_quantized(x, *layer)
            _write_product(plan, x, bias, activation, y)
    return y


def _empty_quantized(x: Any, *layer: Any) -> Any:
    """Check the arguments and return an empty result: the kernel of fake tensors."""
    *_, bias, n_out, n_in, dtype, inputs, activation = layer
    spec = product_spec(
        spec_of(x, "x"),
        (n_out, n_in),
        numpy_dtype(dtype, "values"),
        bias_shape=None if bias is None else bias.shape,
        activation=activation,
        inputs=inputs,
    )
    return x.new_empty(spec.shape, dtype=torch_dtype(spec.dtype))


def refuse_gradient(*arguments: Any) -> NoReturn:
    """Raise SriglError: the gradient of ``quantized_linear``."""
    raise SriglError(
        "a quantised layer is for inference and has no gradients; call the model under "
        "torch.no_grad(), and train the model that it was made from"
    )


# ---------------------------------------------------------------- backward


def compute_gradients(grad: Any, x: Any, *layer: Any) -> tuple[Any, Any, Any]:
    """Return new tensors with the gradients: the kernel of CPU and CUDA."""
    dx, dvalues, dbias = results = _empty_gradients(grad, x, *layer)
    values, indices, active, counts, in_features, needs_x, needs_values, needs_bias = layer
    if needs_values:
        capture.record(indices, x, grad)
    if not grad.numel():
        for result in results:
            result.zero_()
        return results
    with on_device_of(grad):
        packing = packing_of(
            values, indices, active, counts, in_features, compare=False, gives_values=True
        )
        plan, weight = packing.plan, packing.weight
        dvalues[weight.nnz :].zero_()
        used = dvalues[: weight.nnz].view(weight.values.shape) if needs_values else None
        threads = torch.get_num_threads()
        try:
            with _stream_of(grad, plan):
                out = MatmulGradients(
                    merged_rows(_as_array(dx, "dx", plan)) if needs_x else None,
                    None if used is None else _as_array(used, "dvalues", plan),
                    _as_array(dbias, "dbias", plan) if needs_bias else None,
                )
                given = values if packing.takes_values else None
                plan.write_gradients(
                    merged_rows(_as_array(grad, "grad", plan)),
                    merged_rows(_as_array(x, "x", plan)) if needs_values else None,
                    out=out,
                    threads=threads,
                    values=None if given is None else _as_array(given, "values", plan),
                )
        finally:
            restore_threads(threads)
    return results


def _empty_gradients(grad: Any, x: Any, *layer: Any) -> tuple[Any, Any, Any]:
    """Check the arguments and return the gradients' tensors, empty if they are not needed."""
    values, _, active, _, in_features, needs_x, needs_values, needs_bias = layer
    gradient_specs(
        spec_of(grad, "grad"),
        spec_of(x, "x") if needs_values else None,
        (active.shape[0], in_features),
        spec_of(values, "values"),
    )
    sums = torch.float64 if grad.dtype is torch.float64 else torch.float32
    return (
        x.new_empty((*grad.shape[:-1], in_features) if needs_x else (0,)),
        values.new_empty(values.shape[0] if needs_values else 0),
        grad.new_empty(active.shape[0] if needs_bias else 0, dtype=sums),
    )


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the inputs of ``condensed_linear`` that its gradients need."""
    x, values, indices, active, counts, _, ctx.in_features = inputs
    # Only the gradient of the values needs x, which is often large.
    saved = x if ctx.needs_input_grad[1] else x.new_empty(0)
    ctx.save_for_backward(saved, values, indices, active, counts)


def gradients(ctx: Any, grad: Any, op: Any = condensed_linear_backward) -> tuple[Any, ...]:
    """Return the gradients of ``condensed_linear`` by its arguments, as `op` computes them."""
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5]
    parts = op(grad, *ctx.saved_tensors, ctx.in_features, *needs)
    dx, dvalues, dbias = (
        part if needed else None for part, needed in zip(parts, needs, strict=True)
    )
    return dx, dvalues, None, None, None, dbias, None  # autograd casts dbias to the bias's dtype


def _keep_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.in_features = inputs[6]
    ctx.set_materialize_grads(False)


def double_gradients(ctx: Any, ddx: Any, ddvalues: Any, ddbias: Any) -> tuple[Any, ...]:
    """Return the gradients of the gradients, which are again products and their gradients."""
    grad, x, values, *mask = ctx.saved_tensors
    needs_grad, needs_x, needs_values = ctx.needs_input_grad[:3]
    n_in, parts = ctx.in_features, []
    dx = dvalues = None
    if ddx is not None:
        if needs_grad:
            parts.append(condensed_linear(ddx, values, *mask, None, n_in))
        if needs_values:
            needs = False, True, False
            _, dvalues, _ = condensed_linear_backward(grad, ddx, values, *mask, n_in, *needs)
    if ddvalues is not None:
        if needs_grad:
            parts.append(condensed_linear(x, ddvalues, *mask, None, n_in))
        if needs_x:
            needs = True, False, False
            dx, _, _ = condensed_linear_backward(grad, x, ddvalues, *mask, n_in, *needs)
    if ddbias is not None and needs_grad:
        parts.append(ddbias.to(grad.dtype).expand_as(grad))
    dgrad = sum(parts[1:], parts[0]) if parts else None
    return dgrad, dx, dvalues, *[None] * 7


# ---------------------------------------------------------------- autocast


def _autocast(op: Any, device: str) -> Callable[..., Any]:
    """Return the kernel for autocast.

    `x` and the result are rounded to autocast's dtype. The values are not, because rounding and
    repacking them at each call would take time and lose accuracy.
    """

    def kernel(x: Any, values: Any, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if x.dtype in _FLOATS - {torch.float64}:
                x = x.to(dtype)
            if values.dtype in _HALVES:
                values = values.to(dtype)
            y = op(x, values, *rest)
            return y if y.dtype is torch.float64 else y.to(dtype)

    return kernel


# ---------------------------------------------------------------- arrays and threads


def _as_array(tensor: Any, what: str, plan: ProductPlan) -> Any:
    """Return a tensor as an array of the plan's backend that shares its memory."""
    if tensor.is_cpu:
        return as_numpy(tensor)
    return plan.arrays.as_float_array(tensor.detach(), what)


def _stream_of(tensor: Any, plan: ProductPlan) -> AbstractContextManager[Any]:
    """Return a context with PyTorch's stream, for a tensor that is not on the CPU.

    Tensors are read within it: the backend would make its own stream wait for PyTorch's otherwise.
    """
    return _ON_CPU if tensor.is_cpu else plan.arrays.execution_context(tensor)


def restore_threads(threads: int) -> None:
    """Restore PyTorch's number of threads, which Numba's OpenMP pool overwrites."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- registration

for _name, _kernel, _fake in (
    ("condensed_linear", multiply, _empty_product),
    ("condensed_linear_backward", compute_gradients, _empty_gradients),
    ("condensed_inference", multiply, _empty_product),
    ("quantized_linear", multiply_quantized, _empty_quantized),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    library.register_fake(f"srigl_core::{_name}", _fake, lib=_library)
library.register_autograd(
    "srigl_core::condensed_linear", gradients, setup_context=keep_for_backward, lib=_library
)
library.register_autograd(
    "srigl_core::condensed_linear_backward",
    double_gradients,
    setup_context=_keep_for_double_backward,
    lib=_library,
)
library.register_autograd("srigl_core::quantized_linear", refuse_gradient, lib=_library)
for _op in (condensed_linear, condensed_inference, quantized_linear):
    for _device in ("cpu", "cuda"):
        _library.impl(_op, _autocast(_op, _device), f"Autocast{_device.upper()}")
