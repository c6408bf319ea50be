"""Weights that an optimiser never changes, although they have gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from srigl_core.errors import SriglError
from srigl_core.torch.optimizers import find_optimizers, groups_of
from srigl_core.torch.ranks import agreed
from srigl_core.torch.sharded_tensors import local

__all__ = ["MovementCheck"]

_PATIENCE = 3
"""Steps without a change that are an error, if the optimiser keeps no state for the weight either.

Some optimisers only gather state in their first steps, as variants of RAdam do.
"""

_PATIENCE_WITH_STATE = 100

_MOST_LOOKS = 200
"""Steps that are looked at; then a weight whose change cannot be told is left alone."""

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
    group : torch.distributed process group, or None
    """

    def __init__(self, names: Any, optimizer: Any, group: Any | None = None) -> None:
        self._optimizer, self._group = optimizer, group
        self._misses = dict.fromkeys(names, 0)
        self._before: dict[str, Any] = {}
        self._looks = 0

    def before_step(self, parameters: Mapping[str, Any]) -> None:
        """Note the weights before the optimiser's step, after the backward pass."""
        if not self._misses or self._looks >= _MOST_LOOKS:
            return
        rates: dict[int, float] = {}
        for group in groups_of(find_optimizers(self._optimizer)):
            # The smallest, since a wrapper passes its rate on when it steps.
            rates |= {id(p): min(_rate(group), rates.get(id(p), 1.0)) for p in group["params"]}
        watched = {name: rates.get(id(parameters[name]), 1.0) for name in self._misses}
        self._looks += any(watched.values())
        # The first of several calls in a step counts: LBFGS and SAM change weights in between.
        must_change = {
            name: _must_change(parameters[name], rate)
            for name, rate in watched.items()
            if name not in self._before and rate > 0
        }
        for name, must in agreed(must_change, parameters.values(), self._group).items():
            if must:
                self._before[name] = _checksum(parameters[name])

    def restart_step(self) -> None:
        """Forget the weights before the step, which have been laid out anew."""
        self._before.clear()

    def after_step(self, parameters: Mapping[str, Any]) -> None:
        """Compare the weights after the optimiser's step.

        Raises
        ------
        SriglError
            If a weight has not changed in three steps. The message names the layer.
        """
        before, self._before = self._before, {}
        changed = {
            name: not torch.equal(_checksum(parameters[name]), checksum)
            for name, checksum in before.items()
        }
        for name, has_changed in agreed(changed, parameters.values(), self._group).items():
            if has_changed:
                del self._misses[name]
                continue
            parameter = parameters[name]
            self._misses[name] += 1
            has_state = any(part.state.get(parameter) for part in find_optimizers(self._optimizer))
            if self._misses[name] >= (_PATIENCE_WITH_STATE if has_state else _PATIENCE):
                raise SriglError(
                    f"layer {name!r} has gradients, but the optimizer has not changed its weight "
                    f"in {self._misses[name]} steps; call after_backward(), optimizer.step() and "
                    f"step() once each, also if gradients are accumulated, and pass the optimizer "
                    f"that updates the layer ({type(self._optimizer).__name__} may update copies)"
                )


def _rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a group; 1 if it has none of its own."""
    rate = group.get("lr")
    return 1.0 if rate is None else float(rate)


def _must_change(parameter: Any, rate: float) -> bool:
    """Return whether a step of an optimiser changes a weight by more than rounding hides."""
    if parameter.grad is None:
        return False
    weight, grad = local(parameter), local(parameter.grad)
    if weight.numel() == 0 or not (torch.isfinite(grad).all() and grad.any()):
        return False
    change = rate * min(1.0, float(grad.abs().max()))
    return change > float(torch.finfo(weight.dtype).eps * weight.abs().max())


def _checksum(parameter: Any) -> Any:
    """Return the sum of a tensor's bits, which costs no memory."""
    weight = local(parameter)
    return weight.view(_INTEGERS[weight.element_size()]).sum(dtype=torch.int64)
