"""Condensed products in eager mode, past PyTorch's dispatcher.

For an operator that is written in Python, the dispatcher and its registered gradient take longer
than the kernels of a small batch. Nothing but compilers, tracers, transforms, modes and subclasses
of tensors needs them; a product of plain tensors is an `autograd.Function` that calls the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import Function, forward_ad

from srigl_core.torch.ops import (
    compute_gradients,
    condensed_inference,
    condensed_linear,
    condensed_linear_backward,
    gradients,
    keep_for_backward,
    multiply,
    refuse_tangents,
)

__all__ = ["are_plain", "condensed_product", "inference_product", "is_eager"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def condensed_product(*inputs: Any) -> Any:
    """Return the product that has a gradient; the arguments are those of ``condensed_linear``."""
    x, values, *_, bias, _ = inputs
    refuse_tangents(x, values, bias)  # here, because kernels under a gradient do not see them
    return (CondensedLinearFunction.apply if is_eager(*inputs) else condensed_linear)(*inputs)


def inference_product(*inputs: Any) -> Any:
    """Return the product without a gradient, by the arguments of ``condensed_inference``."""
    return (multiply if is_eager(*inputs) else condensed_inference)(*inputs)


class CondensedLinearFunction(Function):  # type: ignore[misc] # torch is untyped here
    """``condensed_linear`` of plain tensors."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """Return the product."""
        keep_for_backward(ctx, inputs, None)
        return multiply(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Return the gradients, which have a gradient themselves where grad mode is on."""
        is_plain = not torch.is_grad_enabled() and is_eager(grad)
        return gradients(ctx, grad, compute_gradients if is_plain else condensed_linear_backward)


def is_eager(*inputs: Any) -> bool:
    """Return whether the inputs are plain tensors on the CPU, and nothing traces or changes ops."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or not are_plain(*inputs)
    )


def are_plain(*inputs: Any) -> bool:
    """Return whether all tensors among the inputs are of no subclass, and in the CPU's memory.

    A tensor such as ``x.conj().imag`` has its sign elsewhere.
    """
    for each in inputs:  # faster than a generator
        if type(each) in _PLAIN:
            if not each.is_cpu or each.is_neg():
                return False
        elif isinstance(each, torch.Tensor):
            return False
    return True
