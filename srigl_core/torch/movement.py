"""Weights that an optimiser never changes, although they have gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from srigl_core.errors import SriglError
from srigl_core.torch.optimizers import find_optimizers, groups_of

__all__ = ["MovementCheck"]

_PATIENCE = 3
"""Steps without a change that are an error."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MovementCheck:
    """Watch each weight until the optimiser has changed it once.

    A step counts if the gradient is finite and not zero, and if the learning rate is large enough
    for a change that rounding would not hide. In the steps of a warm-up with a learning rate of
    zero, or of a gradient scaler that skips them, a weight need not change.

    Parameters
    ----------
    names : iterable of str
        Names of the layers.
    optimizer : torch.optim.Optimizer or a wrapper
    """

    def __init__(self, names: Any, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._misses = dict.fromkeys(names, 0)
        self._before: dict[str, Any] = {}

    def before_step(self, parameters: Mapping[str, Any]) -> None:
        """Note the weights before the optimiser's step, after the backward pass."""
        for name in self._misses:
            parameter = parameters[name]
            # The first of several calls in a step counts: LBFGS and SAM change weights in between.
            if name not in self._before and self._must_change(parameter):
                self._before[name] = _checksum(parameter)

    def after_step(self, parameters: Mapping[str, Any]) -> None:
        """Compare the weights after the optimiser's step.

        Raises
        ------
        SriglError
            If a weight has not changed in three steps. The message names the layer.
        """
        before, self._before = self._before, {}
        for name, checksum in before.items():
            if not torch.equal(_checksum(parameters[name]), checksum):
                del self._misses[name]
                continue
            self._misses[name] += 1
            if self._misses[name] >= _PATIENCE:
                raise SriglError(
                    f"layer {name!r} has gradients, but the optimizer has not changed its weight "
                    f"in {_PATIENCE} steps; call after_backward(), optimizer.step() and step() "
                    f"once each, also if gradients are accumulated, and pass the optimizer that "
                    f"updates the layer ({type(self._optimizer).__name__} may update copies)"
                )

    def _must_change(self, parameter: Any) -> bool:
        if parameter.grad is None:
            return False
        weight, grad = _local(parameter), _local(parameter.grad)
        if weight.numel() == 0 or not (torch.isfinite(grad).all() and grad.any()):
            return False
        rates = [
            group.get("lr")
            for group in groups_of(find_optimizers(self._optimizer))
            if any(p is parameter for p in group["params"])
        ]
        rate = max((1.0 if rate is None else float(rate) for rate in rates), default=1.0)
        change = rate * min(1.0, float(grad.abs().max()))
        return change > float(torch.finfo(weight.dtype).eps * weight.abs().max())


def _local(tensor: Any) -> Any:
    """Return a tensor's part on this rank."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _checksum(parameter: Any) -> Any:
    """Return the sum of a tensor's bits, which costs no memory."""
    weight = _local(parameter)
    return weight.view(_INTEGERS[weight.element_size()]).sum(dtype=torch.int64)
