"""The operators under the transforms of ``torch.func``: ``grad``, ``vmap``, ``jvp`` and others.

An operator's registered gradient is not available to these transforms, but that of an
``autograd.Function`` is. The functions here are the kernels of the dispatch key that is active only
within a transform, so that other calls do not take longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import library
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import Function

from srigl_core.errors import SriglError
from srigl_core.torch.activations import ACTIVATION_FUNCTIONS
from srigl_core.torch.ops import (
    condensed_linear,
    condensed_linear_backward,
    double_gradients,
    gradients,
    quantized_linear,
    refuse_gradient,
)

__all__: list[str] = []


class _Linear(Function):  # type: ignore[misc] # torch is untyped here
    """``condensed_linear``."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return condensed_linear(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, _, ctx.in_features = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return gradients(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dvalues: Any, *others: Any) -> Any:
        x, values, *mask = ctx.saved_tensors
        dbias, n_in = others[3], ctx.in_features
        parts = []
        if dx is not None:
            parts.append(condensed_linear(dx, values, *mask, None, n_in))
        if dvalues is not None:
            parts.append(condensed_linear(x, dvalues, *mask, None, n_in))
        if dbias is not None:
            shape = *x.shape[:-1], len(dbias)
            parts.append(dbias.to(torch.promote_types(x.dtype, values.dtype)).expand(shape))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, *layer: Any) -> Any:
        if all(dim is None for dim in in_dims[1:]):  # the mapped axis becomes one of the batch
            return condensed_linear(x.movedim(in_dims[0], 0), *layer), 0
        return _one_by_one(condensed_linear, info, in_dims, x, *layer)


class _Gradients(Function):  # type: ignore[misc] # torch is untyped here
    """``condensed_linear_backward``."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return condensed_linear_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        tensors, (ctx.in_features, *ctx.needs) = inputs[:6], inputs[6:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return double_gradients(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, dgrad: Any, dx: Any, dvalues: Any, *_: Any) -> Any:
        grad, x, values, *mask = ctx.saved_tensors
        needs_x, needs_values, needs_bias = ctx.needs

        def of(grad: Any, x: Any, values: Any, *needs: bool) -> Any:
            return condensed_linear_backward(grad, x, values, *mask, ctx.in_features, *needs)

        tangents = [
            torch.zeros_like(part)
            for part in of(grad, x, values, needs_x, needs_values, needs_bias)
        ]
        for present, arguments, needs in (
            (dgrad, (dgrad, x, values), (needs_x, needs_values, needs_bias)),
            (dvalues, (grad, x, dvalues), (needs_x, False, False)),
            (dx, (grad, dx, values), (False, needs_values, False)),
        ):
            if present is not None:
                parts = of(*arguments, *needs)
                for i in range(3):
                    if needs[i]:
                        tangents[i] = tangents[i] + parts[i]
        return tuple(tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _one_by_one(condensed_linear_backward, info, in_dims, *inputs)


class _Quantized(Function):  # type: ignore[misc] # torch is untyped here
    """``quantized_linear``, which has no gradient."""

    backward = jvp = staticmethod(refuse_gradient)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return quantized_linear(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, *layer: Any) -> Any:
        if all(dim is None for dim in in_dims[1:]):
            return quantized_linear(x.movedim(in_dims[0], 0), *layer), 0
        return _one_by_one(quantized_linear, info, in_dims, x, *layer)


def _one_by_one(op: Any, info: Any, in_dims: Any, *inputs: Any) -> Any:
    """Call an operator for each index of the mapped axis; return results and their axes."""
    parts = [
        op(*(
            tensor if dim is None else tensor.select(dim, i)
            for tensor, dim in zip(inputs, in_dims, strict=True)
        ))
        for i in range(info.batch_size)
    ]  # fmt: skip
    if isinstance(parts[0], tuple):
        return tuple(torch.stack(part) for part in zip(*parts, strict=True)), (0, 0, 0)
    return torch.stack(parts), 0


def _call_linear(*inputs: Any) -> Any:
    _check_levels()
    return _Linear.apply(*inputs)


def _call_gradients(*inputs: Any) -> Any:
    _check_levels()
    return _Gradients.apply(*inputs)


def _call_inference(*inputs: Any) -> Any:
    """``condensed_inference``, of which forward mode may take a derivative."""
    *inputs_of_product, activation = inputs
    return ACTIVATION_FUNCTIONS[activation](_call_linear(*inputs_of_product))


def _call_quantized(*inputs: Any) -> Any:
    return _Quantized.apply(*inputs)


def _check_levels() -> None:
    """Refuse forward mode within forward mode, where PyTorch drops terms of the derivative."""
    stack = get_interpreter_stack() or ()
    if sum(level.key() == TransformType.Jvp for level in stack) > 1:
        raise SriglError(
            "a condensed layer has no derivative of forward mode within forward mode (jvp of jvp, "
            "jacfwd of jacfwd); take one of the two in reverse mode, as torch.func.hessian does"
        )


_library = library.Library("srigl_core", "IMPL", "FuncTorchDynamicLayerFrontMode")
_library.impl("condensed_linear", _call_linear)
_library.impl("condensed_linear_backward", _call_gradients)
_library.impl("condensed_inference", _call_inference)
_library.impl("quantized_linear", _call_quantized)
