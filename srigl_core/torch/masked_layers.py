"""Masked training: dense weights and gradients that are zero where the mask is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from srigl_core._training.trainer import SparseTrainer
from srigl_core._update import MaskUpdate
from srigl_core.errors import SriglError
from srigl_core.reference.init import sparse_init
from srigl_core.torch.optimizer_state import remap_state
from srigl_core.torch.targets import Target
from srigl_core.torch.tensors import as_numpy, from_numpy

__all__ = ["MaskedLayers"]


class MaskedLayers:
    """The sparse weights of a model, masked.

    Parameters
    ----------
    model : torch.nn.Module
    targets : dict of str to Target
    optimizer : torch.optim.Optimizer
    trainer : SparseTrainer
    """

    def __init__(
        self, model: Any, targets: dict[str, Target], optimizer: Any, trainer: SparseTrainer
    ) -> None:
        self.trainer = trainer
        self._model, self._optimizer = model, optimizer
        self._targets = targets
        self._inactive: dict[str, Any] = {}

    def attach(self, init: str | None, rng: np.random.Generator) -> None:
        """Mask the weights, having drawn them anew if asked to."""
        for name, target in self._targets.items():
            if init is not None:
                mask = self.trainer.masks[name]
                drawn = sparse_init(mask, init, rng=rng, dtype=np.float64)
                with torch.no_grad():
                    target.parameter.copy_(torch.from_numpy(drawn))
        self._take_over_masks()
        self._mask_weights()

    def mask(self, name: str) -> Any:
        """Return a layer's mask, a new tensor of bool of the weight's shape."""
        return ~self._inactive[name]

    def digests(self) -> dict[str, str]:
        """Return a hash of each mask."""
        return {
            name: hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
            for name, mask in self.trainer.masks.items()
        }

    def after_backward(self, loss_scale: float) -> None:
        """Hand dense gradients, unscaled by now, to the trainer if it needs them; mask them."""
        sparse = [self._targets[name] for name in self.trainer.sparse_layers]
        for target in sparse:
            target.check_in_place(self._model)
            if target.parameter.grad is None and self.trainer.needs_grad:
                raise SriglError(
                    f"layer {target.name!r} has no gradient; call after_backward after "
                    f"loss.backward() and before zero_grad(), and exclude frozen layers"
                )
        for target in sparse:
            gradient = target.parameter.grad
            if gradient is None:
                continue
            if self.trainer.needs_grad:
                self.trainer.accumulate(target.name, as_numpy(gradient))
            gradient.masked_fill_(self._inactive[target.name], 0)

    def step(self) -> Mapping[str, MaskUpdate]:
        """Mask the weights, and update masks, weights and optimiser state if it is due."""
        for target in self._targets.values():
            target.check_in_place(self._model)
        self._mask_weights()
        due = self.trainer.is_due
        weights = {n: as_numpy(t.parameter.detach()) for n, t in self._targets.items() if due}
        updates = self.trainer.step(weights)
        if updates:
            before = self._inactive
            self._take_over_masks()
            for name, update in updates.items():
                parameter = self._targets[name].parameter
                with torch.no_grad():
                    parameter.copy_(from_numpy(update.weight))
                gone = before[name] | self._inactive[name]
                remap_state(self._optimizer, parameter, partial(_zeroed, gone))
        return updates

    def discard_step(self) -> None:
        """Take nothing of a step that the optimiser skips."""

    def detach(self) -> None:
        """Let go of the model, in which nothing was put."""

    def discard_gradients(self) -> None:
        """Forget the window's gradients."""
        self.trainer.discard_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state; weights and optimiser state are the caller's."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a trainer's state, and mask the weights by it."""
        self.trainer.load_state_dict(state)
        self._take_over_masks()
        self._mask_weights()

    def _take_over_masks(self) -> None:
        self._inactive = {
            name: ~torch.from_numpy(mask.copy()).to(self._targets[name].parameter.device)
            for name, mask in self.trainer.masks.items()
        }

    def _mask_weights(self) -> None:
        with torch.no_grad():
            for name, target in self._targets.items():
                target.parameter.masked_fill_(self._inactive[name], 0)


def _zeroed(where: Any, held: Any) -> Any:
    return held.masked_fill(where, 0)
