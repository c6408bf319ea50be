"""Masked training: dense weights and gradients that are zero where the mask is False."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from srigl_core._arrays.libraries import device_of, library_of
from srigl_core._registry import get_backend
from srigl_core._training.methods import get_method
from srigl_core._training.sparse_trainer import SparseTrainer
from srigl_core._update import MaskUpdate
from srigl_core.contract import Backend
from srigl_core.errors import BackendUnavailableError, SriglError
from srigl_core.reference.init import sparse_init
from srigl_core.torch.averages import Averages
from srigl_core.torch.model_sparsity import sparsity_of_model
from srigl_core.torch.optimizers import remap_states
from srigl_core.torch.targets import Target
from srigl_core.torch.tensors import as_numpy, from_numpy, on_device_of

__all__ = ["MaskedLayers", "update_backend"]


def update_backend(targets: dict[str, Target], method: str) -> Backend | None:
    """Return a backend for a method's updates of weights that are all on one CUDA device."""
    parameters = [target.parameter for target in targets.values()]
    on_one_device = all(
        device_of(p) == "cuda" and p.device == parameters[0].device for p in parameters
    )
    if not (on_one_device and get_method(method).on_device):
        return None
    try:
        return get_backend(operation="update_mask", device="cuda")
    except BackendUnavailableError:
        return None


class MaskedLayers:
    """The masked weights of a model.

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
        self._seen: dict[str, tuple[int, int]] = {}
        self._averages = Averages()

    def attach(self, init: str | None, rng: np.random.Generator) -> None:
        """Mask the weights; draw new ones first if `init` is not None."""
        if init is not None:
            for name, target in self._targets.items():
                drawn = sparse_init(self._trainer_mask(name), init, rng=rng, dtype=np.float64)
                with torch.no_grad():
                    target.parameter.copy_(target.layout.from_rows(torch.from_numpy(drawn)))
        self._copy_masks()
        self._mask_weights()
        # Momentum of inactive weights would reach the others in an optimiser of matrices.
        changed = [
            (target.parameter, partial(_reset, self._inactive[name]))
            for name, target in self._targets.items()
        ]
        remap_states(self._optimizer, changed)

    def mask(self, name: str) -> Any:
        """Return a layer's mask, a new tensor of bool of the weight's shape."""
        return ~self._inactive[name]

    @property
    def parameters(self) -> dict[str, Any]:
        """The layers' weights."""
        return {name: target.parameter for name, target in self._targets.items()}

    def attached(self) -> list[tuple[Any, str]]:
        """Return modules and parameters that were added to the model: none."""
        return []

    def track(self, average: Any) -> None:
        """Move the numbers of an average with the masks, and mask it now."""
        weights = {_path(target): target.parameter for target in self._targets.values()}
        found = self._averages.add(average, weights, {})
        with torch.no_grad():
            for name, tensor in zip(self._targets, found.values(), strict=True):
                tensor.masked_fill_(self._inactive[name].to(tensor.device), 0)

    def digests(self) -> dict[str, str]:
        """Return a hash of each mask."""
        return {
            name: hashlib.sha256(np.packbits(self._trainer_mask(name)).tobytes()).hexdigest()
            for name in self.trainer.masks
        }

    def total_sparsity(self) -> float:
        """Return the sparsity of all matrices of the model."""
        nnz = self.trainer.nnz
        masked = {id(target.parameter): nnz[name] for name, target in self._targets.items()}
        return sparsity_of_model(self._model, masked)

    def after_backward(self, loss_scale: float, gradient_scale: float) -> bool:
        """Pass the dense gradients to the trainer if it needs them, then mask them.

        `gradient_scale` is the scale that the gradients still have. Returns True.
        """
        self._check_masked()
        sparse = [self._targets[name] for name in self.trainer.sparse_layers]
        for target in sparse:
            target.check_in_place(self._model)
        has_gradient = any(target.parameter.grad is not None for target in sparse)
        if self.trainer.needs_grad and sparse and not has_gradient:
            raise SriglError(
                "no sparse layer has a gradient; call after_backward after loss.backward() and "
                "before zero_grad()"
            )
        for target in sparse:
            gradient = target.parameter.grad
            if self.trainer.needs_grad:
                # A layer that took no part has no gradient, or one that was zeroed in place.
                unscaled = None
                if gradient is not None and gradient.any():
                    unscaled = gradient if gradient_scale == 1 else gradient / gradient_scale
                    unscaled = self._for_trainer(target, unscaled)
                with on_device_of(target.parameter):
                    self.trainer.accumulate(target.name, unscaled)
            if gradient is not None:
                gradient.masked_fill_(self._no_gradient[target.name], 0)
        # The optimiser's step sees all trained weights, so that weight decay reaches them.
        with torch.no_grad():
            for name, hidden in self._hidden.items():
                self._targets[name].parameter.add_(hidden)
        self._hidden.clear()
        return True

    def step(self) -> Mapping[str, MaskUpdate]:
        """Mask the weights. If an update is due, update masks, weights and optimiser state."""
        for target in self._targets.values():
            target.check_in_place(self._model)
        self._hide_weights()
        self._mask_weights()
        weights = {}
        if self.trainer.is_due:
            for name, target in self._targets.items():
                weight = target.parameter.detach()
                hidden = self._hidden.get(name)
                weight = weight if hidden is None else weight + hidden
                weights[name] = self._for_trainer(target, weight)
        with on_device_of(next(iter(self._targets.values())).parameter):
            updates = self.trainer.step(weights)
        if updates:
            before = dict(self._no_gradient)
            self._copy_masks()
            changed = []
            for name, update in updates.items():
                target, weight = self._targets[name], update.weight
                parameter = target.parameter
                weight = from_numpy(weight) if isinstance(weight, np.ndarray) else weight
                with torch.no_grad():
                    parameter.copy_(target.layout.from_rows(weight))
                reset = before[name] | self._no_gradient[name]
                changed.append((parameter, partial(_reset, reset)))
            grown = self.trainer.config.grown_init
            remap_states(self._optimizer, changed, grown)
            remaps = [remap for _, remap in changed]
            paths = (_path(self._targets[name]) for name in updates)
            self._averages.remap(dict(zip(paths, remaps, strict=True)), grown, {})
            self._hidden.clear()
            self._hide_weights()
            self._mask_weights()
        return updates

    def discard_step(self) -> None:
        """Do nothing: a skipped step leaves no gradients here."""

    def skip_step(self) -> None:
        """Mask the weights, in case that the optimiser did not skip the step."""
        self._mask_weights()

    def detach(self) -> None:
        """Track no more averages; the model holds no reference to this object."""
        self._averages.clear()

    def discard_gradients(self) -> None:
        """Discard the gradients of the window."""
        self.trainer.discard_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state and the hidden weights."""
        state = self.trainer.state_dict()
        if self._hidden:
            state["hidden"] = {name: as_numpy(part) for name, part in self._hidden.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the trainer's state. The model's weights must be those of the same step."""
        self.trainer.load_state_dict(state)
        self._hidden = {
            name: from_numpy(part).to(self._targets[name].parameter)
            for name, part in state.get("hidden", {}).items()
        }
        self._copy_masks()

    def _for_trainer(self, target: Target, tensor: Any) -> Any:
        """Return a tensor by rows, as a NumPy array if the trainer computes on another device."""
        tensor = target.layout.to_rows(tensor)
        return tensor if self.trainer.device == device_of(tensor) else as_numpy(tensor)

    def _trainer_mask(self, name: str) -> Any:
        """Return the trainer's mask of a layer as a NumPy array."""
        mask = self.trainer.masks[name]
        like = self._targets[name].parameter
        return mask if isinstance(mask, np.ndarray) else as_numpy(_as_tensor(mask, like))

    def _copy_masks(self) -> None:
        """Copy the trainer's masks to tensors on the devices of the weights."""
        for name, target in self._targets.items():
            like = target.parameter
            mask, backward = self.trainer.masks[name], self.trainer.backward_mask(name)
            to_weight = target.layout.from_rows
            inactive = self._inactive[name] = ~to_weight(_as_tensor(mask, like))
            self._no_gradient[name] = (
                inactive if backward is mask else ~to_weight(_as_tensor(backward, like))
            )

    def _mask_weights(self) -> None:
        with torch.no_grad():
            for name, target in self._targets.items():
                target.parameter.masked_fill_(self._inactive[name], 0)
                self._seen[name] = _state(target.parameter)

    def _check_masked(self) -> None:
        """Check that weights are zero outside their masks, as `step` left them.

        On another device than the CPU this is only looked at if PyTorch has counted a write.
        """
        for name, target in self._targets.items():
            parameter = target.parameter
            if not parameter.is_cpu and self._seen.get(name) == _state(parameter):
                continue
            outside = (parameter.detach() != 0).logical_and_(self._inactive[name])
            if outside.any():
                raise SriglError(
                    f"layer {name!r} has {int(outside.sum())} weights that are not zero outside "
                    f"its mask, so its weights were written since the last step. To resume, call "
                    f"srigl.load_state_dict(...) with the state of the same step as the model's; "
                    f"to train other weights, load them before SRigL is attached (masks='nonzero' "
                    f"keeps their zeros)"
                )

    def _hide_weights(self) -> None:
        """Move weights that only the backward pass uses from the parameters to `_hidden`."""
        for name, target in self._targets.items():
            if self._no_gradient[name] is not self._inactive[name] and name not in self._hidden:
                hidden = target.parameter.detach().masked_fill(~self._inactive[name], 0)
                self._hidden[name] = hidden.masked_fill_(self._no_gradient[name], 0)


def _as_tensor(mask: Any, like: Any) -> Any:
    return library_of(like).to_caller(mask, like).to(like.device)


def _state(parameter: Any) -> tuple[int, int]:
    """Return the address of a parameter, and how many writes PyTorch has counted."""
    return parameter.data_ptr(), parameter._version


def _path(target: Target) -> str:
    return f"{target.owner}.{target.attribute}".removeprefix(".")


def _reset(where: Any, state: Any, start: float) -> Any:
    return state.masked_fill(where.to(state.device), start)
