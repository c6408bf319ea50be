"""Masked training: dense weights and gradients that are zero where the mask is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from srigl_core._arrays.libraries import device_of, library_of
from srigl_core._registry import get_backend
from srigl_core._training.sparse_trainer import SparseTrainer
from srigl_core._update import MaskUpdate
from srigl_core.contract import Backend
from srigl_core.errors import BackendUnavailableError, SriglError
from srigl_core.reference.init import sparse_init
from srigl_core.torch.optimizer_state import remap_state
from srigl_core.torch.targets import Target
from srigl_core.torch.tensors import as_numpy, from_numpy

__all__ = ["MaskedLayers", "update_backend"]


def update_backend(targets: dict[str, Target]) -> Backend | None:
    """Return a backend that updates weights on their CUDA device; None if there is none.

    The weights must all be on one device.
    """
    parameters = [target.parameter for target in targets.values()]
    if any(device_of(p) != "cuda" or p.device != parameters[0].device for p in parameters):
        return None
    try:
        return get_backend(operation="update_mask", device="cuda")
    except BackendUnavailableError:
        return None


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
        self._no_gradient: dict[str, Any] = {}
        self._hidden: dict[str, Any] = {}

    def attach(self, init: str | None, rng: np.random.Generator) -> None:
        """Mask the weights, having drawn them anew if asked to."""
        for name, target in self._targets.items():
            if init is not None:
                mask = self._trainer_mask(name)
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
            name: hashlib.sha256(np.packbits(self._trainer_mask(name)).tobytes()).hexdigest()
            for name in self.trainer.masks
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
                with _on_device_of(gradient):
                    self.trainer.accumulate(target.name, self._for_trainer(gradient))
            gradient.masked_fill_(self._no_gradient[target.name], 0)

    def step(self) -> Mapping[str, MaskUpdate]:
        """Mask the weights, and update masks, weights and optimiser state if an update is due."""
        for target in self._targets.values():
            target.check_in_place(self._model)
        self._hide_weights()
        self._mask_weights()
        weights = {}
        if self.trainer.is_due:
            for name, target in self._targets.items():
                weight = target.parameter.detach()
                hidden = self._hidden.get(name)
                weights[name] = self._for_trainer(weight if hidden is None else weight + hidden)
        with _on_device_of(next(iter(self._targets.values())).parameter):
            updates = self.trainer.step(weights)
        if updates:
            before = dict(self._no_gradient)
            self._take_over_masks()
            for name, update in updates.items():
                parameter = self._targets[name].parameter
                weight = update.weight
                weight = from_numpy(weight) if isinstance(weight, np.ndarray) else weight
                with torch.no_grad():
                    parameter.copy_(weight)
                gone = before[name] | self._no_gradient[name]
                remap_state(self._optimizer, parameter, partial(_zeroed, gone))
            self._hidden.clear()
            self._hide_weights()
            self._mask_weights()
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
        state = self.trainer.state_dict()
        if self._hidden:
            state["hidden"] = {name: as_numpy(part) for name, part in self._hidden.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a trainer's state, and mask the weights by it."""
        self.trainer.load_state_dict(state)
        self._hidden = {
            name: from_numpy(part).to(self._targets[name].parameter)
            for name, part in state.get("hidden", {}).items()
        }
        self._take_over_masks()
        self._mask_weights()

    def _for_trainer(self, tensor: Any) -> Any:
        """Return a tensor itself, or as an array on the host if the trainer is there."""
        return tensor if self.trainer.device == device_of(tensor) else as_numpy(tensor)

    def _trainer_mask(self, name: str) -> Any:
        """Return a mask of the trainer as a NumPy array."""
        mask = self.trainer.masks[name]
        like = self._targets[name].parameter
        return mask if isinstance(mask, np.ndarray) else as_numpy(_as_tensor(mask, like))

    def _take_over_masks(self) -> None:
        for name, target in self._targets.items():
            like = target.parameter
            mask, backward = self.trainer.masks[name], self.trainer.backward_mask(name)
            inactive = self._inactive[name] = ~_as_tensor(mask, like)
            self._no_gradient[name] = inactive if backward is mask else ~_as_tensor(backward, like)

    def _mask_weights(self) -> None:
        with torch.no_grad():
            for name, target in self._targets.items():
                target.parameter.masked_fill_(self._inactive[name], 0)

    def _hide_weights(self) -> None:
        """Move weights that only the backward pass uses out of the parameters."""
        for name, target in self._targets.items():
            if self._no_gradient[name] is not self._inactive[name]:
                trained = target.parameter.detach().masked_fill(~self._inactive[name], 0)
                trained.masked_fill_(self._no_gradient[name], 0)
                hidden = self._hidden.get(name)
                self._hidden[name] = trained if hidden is None else hidden + trained


def _as_tensor(mask: Any, like: Any) -> Any:
    return library_of(like).to_caller(mask, like).to(like.device)


def _on_device_of(tensor: Any) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _zeroed(where: Any, held: Any) -> Any:
    return held.masked_fill(where, 0)
