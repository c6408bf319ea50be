"""Stacks of condensed layers, computed as chains in inference (SPEC 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from srigl_core._arrays.immutable import immutable
from srigl_core._chain import Chain, LayerPlan
from srigl_core.torch.eager import are_plain, is_eager
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.ops import restore_threads
from srigl_core.torch.packing import copied, holds
from srigl_core.torch.quantized_linear import QuantizedLinear
from srigl_core.torch.tensors import as_numpy, numpy_dtype

__all__ = ["CondensedSequential", "use_chains"]

_ACTIVATIONS: dict[type, Callable[[Any], str]] = {
    nn.ReLU: lambda module: "relu",
    nn.GELU: lambda module: "gelu" if module.approximate == "none" else "gelu_tanh",
    nn.SiLU: lambda module: "silu",
}
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

_LAYERS = (CondensedLinear, QuantizedLinear)

_Row = list[tuple[CondensedLinear | QuantizedLinear, str]]


class CondensedSequential(nn.Sequential):  # type: ignore[misc] # torch is untyped here
    """An ``nn.Sequential`` that computes condensed layers in a row in one call, in inference.

    Where no gradient is recorded, a kernel applies the activation module behind its layer, and
    layers in a row, with nothing but activations, identities and idle dropout between them, are a
    `srigl_core.Chain`. Otherwise, and for modules with hooks, under autocast and where PyTorch
    traces or compiles, the modules are called one after the other. `srigl_core.torch.condense` and
    `SRigL` make an ``nn.Sequential`` with such layers one of these.

    Examples
    --------
    >>> import torch
    >>> from srigl_core.torch import CondensedLinear, CondensedSequential
    >>> layers = CondensedLinear(8, 6, fan_in=2, rng=0), CondensedLinear(6, 3, fan_in=2, rng=1)
    >>> model = CondensedSequential(layers[0], torch.nn.ReLU(), layers[1])
    >>> with torch.inference_mode():
    ...     model(torch.ones(4, 8)).shape
    torch.Size([4, 3])
    """

    def forward(self, input: Any) -> Any:
        """Return the result of the last module."""
        is_plain = isinstance(input, torch.Tensor) and is_eager(input)
        if torch.is_grad_enabled() or not is_plain or _has_any_global_hook():
            return super().forward(input)
        modules, at = list(self._modules.values()), 0
        while at < len(modules):
            row, end = _row_from(modules, at)
            input = self._product(at, row, input) if row else modules[at](input)
            at = max(end, at + 1)
        return input

    def _product(self, at: int, row: _Row, x: Any) -> Any:
        """Return the result of the layers in a row, the first of which is module `at`."""
        chain = self._chain(at, row, x) if len(row) > 1 else None
        if chain is None:
            for layer, activation in row:
                x = layer.product(x, activation)
            return x
        threads = torch.get_num_threads()
        try:
            y = chain(x if x.ndim < 3 else x.flatten(0, -2), threads=threads)
        finally:
            restore_threads(threads)
        return y if x.ndim < 3 else y.view(*x.shape[:-1], y.shape[-1])

    def _chain(self, at: int, row: _Row, x: Any) -> Chain | None:
        """Return the chain of the layers with the numbers that they have now.

        The first call with new numbers gets None: in training, they change before the next one.
        """
        layers, biases = [layer for layer, _ in row], [layer.bias for layer, _ in row]
        if not are_plain(*biases, *(layer.values for layer in layers)):
            return None
        plans = [layer.plan() for layer in layers]
        if not _fit_together(layers, plans):
            return None
        activations = [activation for _, activation in row]
        kept: dict[int, _Kept] = self.__dict__.setdefault("_kept", {})
        now = kept.get(at)
        if now is None or not now.is_of(plans, activations, biases):
            copies = [None if bias is None else copied(bias) for bias in biases]
            kept[at] = _Kept(plans, activations, copies)
            return None
        if now.chain is None:
            now.chain = _chain_of(row, plans)
        return now.chain if now.chain.is_native_for(numpy_dtype(x.dtype)) else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: part for name, part in self.__dict__.items() if name != "_kept"}


@dataclass(eq=False)
class _Kept:
    """What the layers in a row were at the last call; from the second one on, their chain."""

    plans: list[Any]
    activations: list[str]
    biases: list[Any]
    chain: Chain | None = None

    def is_of(self, plans: list[Any], activations: list[str], biases: list[Any]) -> bool:
        """Return whether these are the same plans and activations, and biases of the same bits."""
        return (
            activations == self.activations
            and all(plan is own for plan, own in zip(plans, self.plans, strict=True))
            and all(map(_is_same_bias, biases, self.biases))
        )


def _is_same_bias(bias: Any | None, copy: Any | None) -> bool:
    if bias is None or copy is None:
        return bias is copy
    return len(bias) == len(copy) and holds(bias, copy)


def _row_from(modules: Sequence[Any], at: int) -> tuple[_Row, int]:
    """Return the condensed layers in a row from a place on, and the place behind them.

    Each has the activation that follows it. A layer behind it that does not fit begins a new row.
    """
    row: _Row = []
    while at < len(modules) and _is_simple(modules[at], *_LAYERS):
        layer = modules[at]
        if row and layer.in_features != row[-1][0].out_features:
            break
        activation = layer.activation or "none"
        at += 1
        while at < len(modules) and _is_idle(modules[at]):
            at += 1
        if at < len(modules) and activation == "none" and _is_simple(modules[at], *_ACTIVATIONS):
            activation = _ACTIVATIONS[type(modules[at])](modules[at])
            at += 1
            while at < len(modules) and _is_idle(modules[at]):
                at += 1
        row.append((layer, activation))
    return row, at


def _is_simple(module: Any, *types: type) -> bool:
    """Return whether a call of the module does what its type does, and nothing else."""
    return (
        type(module) in types
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
    )


def _is_idle(module: Any) -> bool:
    """Return whether the module passes on what it gets."""
    return _is_simple(module, nn.Identity) or (
        not module.training and _is_simple(module, *_DROPOUT)
    )


def _fit_together(layers: Sequence[Any], plans: Sequence[Any]) -> bool:
    """Return whether a chain of the plans gives what the layers give."""
    # Results of quantised layers may have a wider type than the scale, which a chain does not know.
    is_wide = any(isinstance(x, QuantizedLinear) and x.dtype is torch.float64 for x in layers)
    return not is_wide and len({id(plan.backend) for plan in plans}) == 1


def _chain_of(row: _Row, plans: Sequence[Any]) -> Chain:
    layers = [
        LayerPlan(plan, None if layer.bias is None else immutable(as_numpy(layer.bias)), name)
        for (layer, name), plan in zip(row, plans, strict=True)
    ]
    return Chain(tuple(layers), plans[0].backend, None)


def use_chains(model: Any) -> None:
    """Make each ``nn.Sequential`` with condensed layers a `CondensedSequential`, and back."""
    for module in model.modules():
        if type(module) in (nn.Sequential, CondensedSequential):
            is_condensed = any(isinstance(part, _LAYERS) for part in module.children())
            module.__class__ = CondensedSequential if is_condensed else nn.Sequential
