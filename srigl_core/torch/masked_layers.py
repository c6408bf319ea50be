"""Masked training: dense weights and gradients that are zero where the mask is False."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
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
from srigl_core.torch.ranks import agreed
from srigl_core.torch.sharded_tensors import is_sharded, laid_out, local, whole
from srigl_core.torch.targets import Target
from srigl_core.torch.tensors import as_numpy, from_numpy, on_device_of

__all__ = ["MaskedLayers", "update_backend"]


def update_backend(targets: dict[str, Target], method: str) -> Backend | None:
    """Return a backend for a method's updates of weights that are all on one CUDA device.

    Sharded weights are gathered on the host for an update, as there may be no room on the device.
    """
    parameters = [target.parameter for target in targets.values()]
    on_one_device = all(
        not is_sharded(p) and device_of(p) == "cuda" and p.device == parameters[0].device
        for p in parameters
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
    group : torch.distributed process group, or None
    """

    def __init__(
        self,
        model: Any,
        targets: dict[str, Target],
        optimizer: Any,
        trainer: SparseTrainer,
        group: Any | None,
    ) -> None:
        self.trainer, self.optimizer = trainer, optimizer
        self._model, self._group = model, group
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
                    weight = target.layout.from_rows(torch.from_numpy(drawn))
                    weight = weight.to(target.parameter.dtype)
                    target.parameter.copy_(laid_out(weight, target.parameter))
        self._copy_masks()
        self._mask_weights()
        # Momentum of inactive weights would reach the others in an optimiser of matrices.
        changed = [
            (target.parameter, partial(_reset, self._inactive[name]))
            for name, target in self._targets.items()
        ]
        remap_states(self.optimizer, changed)

    @property
    def weights(self) -> dict[str, tuple[Any, str]]:
        """The modules and the attributes of the weights."""
        return {name: (part.module, part.attribute) for name, part in self._targets.items()}

    @property
    def targets(self) -> dict[str, Target]:
        """The weights."""
        return self._targets

    def follow(self, replaced: list[tuple[Any, Any]]) -> None:
        """Take parameters that have replaced others, old and new ones."""
        new_of = {id(old): new for old, new in replaced}
        for name, target in list(self._targets.items()):
            new = new_of.get(id(target.parameter), target.parameter)
            self._targets[name] = replace(target, parameter=new)
            if name in self._hidden:
                self._hidden[name] = laid_out(self._hidden[name], new)
        self._copy_masks()

    def mask(self, name: str) -> Any:
        """Return a layer's mask, a new tensor of bool of the weight's shape."""
        target = self._targets[name]
        mask = _as_tensor(self.trainer.masks[name], target.parameter)
        return target.layout.from_rows(mask).clone()

    @property
    def parameters(self) -> dict[str, Any]:
        """The layers' weights."""
        return {name: target.parameter for name, target in self._targets.items()}

    def track(self, average: Any) -> None:
        """Move the numbers of an average with the masks, and mask it now."""
        weights = {_path(target): target.parameter for target in self._targets.values()}
        found = self._averages.add(average, weights, {})
        with torch.no_grad():
            for name, tensor in zip(self._targets, found.values(), strict=True):
                tensor.masked_fill_(laid_out(self._inactive[name], tensor), 0)

    def digests(self) -> dict[str, str]:
        """Return a hash of each mask."""
        return {
            name: hashlib.sha256(np.packbits(self._trainer_mask(name)).tobytes()).hexdigest()
            for name in self.trainer.masks
        }

    def total_sparsity(self) -> float:
        """Return the sparsity of all matrices of the model."""
        nnz = self.trainer.nnz
        # Not the targets' parameters, which fully_shard replaces.
        masked = {
            id(part._parameters.get(attribute)): nnz[name]
            for name, (part, attribute) in self.weights.items()
        }
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
                unscaled = None if gradient is None else whole(gradient)
                if unscaled is not None and unscaled.any():
                    unscaled = unscaled if gradient_scale == 1 else unscaled / gradient_scale
                    unscaled = self._for_trainer(target, unscaled)
                else:
                    unscaled = None
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
                    parameter.copy_(laid_out(target.layout.from_rows(weight), parameter))
                reset = before[name] | self._no_gradient[name]
                changed.append((parameter, partial(_reset, reset)))
            grown = self.trainer.config.grown_init
            remap_states(self.optimizer, changed, grown)
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
            state["hidden"] = {name: as_numpy(whole(p)) for name, p in self._hidden.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the trainer's state. The model's weights must be those of the same step."""
        self.trainer.load_state_dict(state)
        parameters = self.parameters
        self._hidden = {
            name: laid_out(from_numpy(part).to(parameters[name].dtype), parameters[name])
            for name, part in state.get("hidden", {}).items()
        }
        self._copy_masks()

    def _for_trainer(self, target: Target, tensor: Any) -> Any:
        """Return a tensor by rows, as a NumPy array if the trainer computes on another device."""
        tensor = target.layout.to_rows(whole(tensor))
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
            inactive = laid_out(~to_weight(_as_tensor(mask, like)), like)
            self._inactive[name] = self._no_gradient[name] = inactive
            if backward is not mask:
                inactive = laid_out(~to_weight(_as_tensor(backward, like)), like)
                self._no_gradient[name] = inactive

    def _mask_weights(self) -> None:
        with torch.no_grad():
            for name, target in self._targets.items():
                target.parameter.masked_fill_(self._inactive[name], 0)
                self._seen[name] = _state(target.parameter)

    def _check_masked(self) -> None:
        """Check that weights are zero outside their masks, as `step` left them.

        On another device than the CPU this is only looked at if PyTorch has counted a write, which
        it does not do in the parts of a sharded weight.
        """
        found = {}
        for name, target in self._targets.items():
            parameter = target.parameter
            is_counted = not (parameter.is_cpu or is_sharded(parameter))
            if is_counted and self._seen.get(name) == _state(parameter):
                continue
            found[name] = bool(local(self._outside(name)).any())
        for name, is_found in agreed(found, self.parameters.values(), self._group).items():
            if is_found:
                n_outside = int(whole(self._outside(name).sum()))
                raise SriglError(
                    f"layer {name!r} has {n_outside} weights that are not zero outside its mask, "
                    f"so its weights were written since the last step. To resume, call "
                    f"srigl.load_state_dict(...) with the state of the same step as the model's; "
                    f"to train other weights, load them before SRigL is attached (masks='nonzero' "
                    f"keeps their zeros)"
                )

    def _outside(self, name: str) -> Any:
        """Return where a weight is not zero outside its mask."""
        return (self._targets[name].parameter.detach() != 0).logical_and_(self._inactive[name])

    def _hide_weights(self) -> None:
        """Move weights that only the backward pass uses from the parameters to `_hidden`."""
        for name, target in self._targets.items():
            if self._no_gradient[name] is not self._inactive[name] and name not in self._hidden:
                hidden = target.parameter.detach().masked_fill(~self._inactive[name], 0)
                self._hidden[name] = hidden.masked_fill_(self._no_gradient[name], 0)


def _as_tensor(mask: Any, like: Any) -> Any:
    like = local(like)
    return library_of(like).to_caller(mask, like).to(like.device)


def _state(parameter: Any) -> tuple[int, int]:
    """Return the address of a parameter, and how many writes PyTorch has counted."""
    return parameter.data_ptr(), parameter._version


def _path(target: Target) -> str:
    return f"{target.owner}.{target.attribute}".removeprefix(".")


def _reset(where: Any, state: Any, start: float) -> Any:
    return state.masked_fill(laid_out(where, state), start)
