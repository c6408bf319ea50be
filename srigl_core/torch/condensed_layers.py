"""Condensed training: no dense weight, and of the dense gradient one block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srigl_core._format.connections import Connections
from srigl_core._format.weight import CondensedWeight
from srigl_core._training.condensed_trainer import CondensedTrainer
from srigl_core._update import CondensedUpdate
from srigl_core.errors import SriglError
from srigl_core.reference.init import sparse_init
from srigl_core.torch import capture
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.optimizer_state import remap_state, replace_parameter
from srigl_core.torch.ranks import mean_of_ranks
from srigl_core.torch.replacement import (
    check_can_be_condensed,
    condensed_layer,
    linear_of,
    replace_modules,
)
from srigl_core.torch.targets import Target
from srigl_core.torch.tensors import as_numpy

__all__ = ["CondensedLayers"]

_Pairs = list[tuple[Any, Any]]


class CondensedLayers:
    """The sparse layers of a model, condensed.

    Parameters
    ----------
    model : torch.nn.Module
    targets : dict of str to Target
    optimizer : torch.optim.Optimizer
    trainer : CondensedTrainer
    group : torch.distributed process group, or None
    """

    def __init__(
        self,
        model: Any,
        targets: dict[str, Target],
        optimizer: Any,
        trainer: CondensedTrainer,
        group: Any | None,
    ) -> None:
        self.trainer = trainer
        self._model, self._optimizer, self._group = model, optimizer, group
        self._targets = {name: targets[name] for name in trainer.connections}
        for target in self._targets.values():
            check_can_be_condensed(target)
        self._layers: dict[str, CondensedLinear] = {}
        self._capturing: dict[str, capture.Captured] = {}
        self._window: list[tuple[dict[str, _Pairs], float]] = []

    def attach(self, init: str | None, rng: np.random.Generator) -> None:
        """Put condensed layers in place of the dense ones, in the model and in the optimiser."""
        made = {}
        for name, target in self._targets.items():
            mask = self.trainer.connections[name]
            weight = _initial_weight(target, mask, init, rng)
            made[name] = condensed_layer(target, weight, self.trainer.budgets[name].nnz_budget)
        replace_modules(self._model, made)
        for name, module in made.items():
            layer = self._layers[name] = linear_of(module)
            places = _places(self.trainer.connections[name])
            replace_parameter(
                self._optimizer,
                self._targets[name].parameter,
                layer.values,
                partial(_gathered, places, layer.values),
            )
        self._targets.clear()  # with the dense weights
        self._capture_if_needed()

    def mask(self, name: str) -> Any:
        """Return a layer's mask, a new tensor of bool of the dense weight's shape."""
        shape = self.trainer.budgets[name].shape
        if name not in self._layers:
            return torch.ones(shape, dtype=torch.bool)
        return self._layers[name].mask.reshape(shape)

    def digests(self) -> dict[str, str]:
        """Return a hash of each mask."""
        return {name: mask.digest().hex() for name, mask in self.trainer.connections.items()}

    def after_backward(self, loss_scale: float) -> None:
        """End a step of the window, in which any number of backward passes was captured.

        What was captured is scaled with the loss still.
        """
        self._check_in_place()
        if self._capturing:
            for name, pairs in self._capturing.items():
                if not pairs or self._layers[name].values.grad is None:
                    raise SriglError(
                        f"layer {name!r} has no gradient; call after_backward after "
                        f"loss.backward() and before zero_grad(), and exclude layers that are "
                        f"frozen or take no part"
                    )
            step = {name: list(pairs) for name, pairs in self._capturing.items()}
            self.discard_step()
            self._window.append((step, loss_scale))

    def step(self) -> Mapping[str, CondensedUpdate]:
        """Update connections, values and optimiser state if it is due."""
        self._check_in_place()
        weights, gradients = {}, {}
        if self.trainer.is_due:
            if not self._window:
                raise SriglError(
                    "no gradient was kept for this step's update; call after_backward after each "
                    "loss.backward() and before the optimizer's step"
                )
            weights = {name: layer.to_condensed() for name, layer in self._layers.items()}
            gradients = {name: self._gradient_rows(name) for name in self._layers}
        updates = self.trainer.step(weights, gradients)
        for name, update in updates.items():
            layer = self._layers[name]
            layer.load_condensed_(update.weight)
            remap_state(
                self._optimizer,
                layer.values,
                partial(_remapped, update),
            )
        if updates:
            self._window.clear()
        self._capture_if_needed()
        return updates

    def discard_gradients(self) -> None:
        """Forget the window's inputs and gradients."""
        self._window.clear()
        self.discard_step()

    def discard_step(self) -> None:
        """Forget what was captured since the last step."""
        for pairs in self._capturing.values():
            pairs.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state and the window; all else is the model's and optimiser's."""
        return {**self.trainer.state_dict(), "window": self._window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a trainer's state; the layers are to have theirs from the model's."""
        if "window" not in state:
            raise SriglError("state is not a whole state_dict(): it lacks window")
        try:
            window = [
                ({name: self._moved(name, step[name]) for name in self._layers}, float(scale))
                for step, scale in state["window"]
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SriglError(f"state is not a whole state_dict(): {error!r}") from error
        before = self.trainer.state_dict()
        self.trainer.load_state_dict(state)
        for name, layer in self._layers.items():
            if self.trainer.connections[name] != layer.to_condensed().connections:
                self.trainer.load_state_dict(before)
                raise SriglError(
                    f"layer {name!r} has other connections than the state; load the model's "
                    f"state_dict first, of the same step"
                )
        self._window = window
        self._capture_if_needed()

    def detach(self) -> None:
        """Keep nothing of what passes the layers any more."""
        self._capturing = {}

    def _capture_if_needed(self) -> None:
        self.detach()
        if self.trainer.needs_grad:
            self._capturing = {
                n: capture.start(x.indices, x.values) for n, x in self._layers.items()
            }

    def _moved(self, name: str, pairs: _Pairs) -> _Pairs:
        device = self._layers[name].values.device
        return [(x.to(device), grad.to(device)) for x, grad in pairs]

    def _check_in_place(self) -> None:
        for name, layer in self._layers.items():
            try:
                found = self._model.get_submodule(name)
            except AttributeError:
                found = None
            if linear_of(found) is not layer:
                raise SriglError(
                    f"layer {name!r} is another one than SRigL attached; change the model first "
                    f"and attach then"
                )

    def _gradient_rows(self, name: str) -> Callable[[int, int], NDArray[Any]]:
        """Return what forms rows of the mean dense gradient, on all ranks together."""
        steps = [(step[name], 1 / (scale * len(self._window))) for step, scale in self._window]

        def rows(start: int, stop: int) -> NDArray[Any]:
            total = None
            for pairs, factor in steps:
                for x, grad in pairs:
                    dtype = _sum_dtype(x, grad)
                    # Converted here, so that no second window of another type is ever held.
                    part = (grad[:, start:stop].t().to(dtype) @ x.to(dtype)) * factor
                    total = part if total is None else total.add_(part)
            return as_numpy(mean_of_ranks(total, self._group))

        return rows


def _initial_weight(
    target: Target, mask: Connections, init: str | None, rng: np.random.Generator
) -> CondensedWeight:
    """Return a dense layer's weights at the connections, drawn anew if asked to."""
    dense = target.parameter.detach()
    if init is not None:
        drawn = sparse_init(mask.to_mask().reshape(target.shape), init, rng=rng, dtype=np.float64)
        dense = torch.from_numpy(drawn).to(dense)
    values = as_numpy(dense.reshape(mask.shape)[_places(mask)])
    return CondensedWeight.from_connections(values, mask)


def _places(mask: Connections) -> tuple[Any, Any]:
    """Return the rows and columns of a mask's connections, to index a dense tensor with."""
    return torch.from_numpy(mask.active)[:, None], torch.from_numpy(mask.indices.astype(np.int64))


def _gathered(places: tuple[Any, Any], like: Any, held: Any) -> Any:
    """Return a dense layer's optimiser state at the connections, as long as the budget."""
    flat = torch.zeros_like(like, dtype=held.dtype, requires_grad=False)
    found = held.reshape(len(held), -1)[places].reshape(-1)
    flat[: found.numel()] = found
    return flat


def _remapped(update: CondensedUpdate, held: Any) -> Any:
    """Return optimiser state after an update, as long as the budget."""
    source = torch.from_numpy(update.source.reshape(-1)).to(held.device)
    flat = torch.zeros_like(held)
    flat[: source.numel()] = torch.where(source < 0, 0, held[source.clamp(min=0)])
    return flat


def _sum_dtype(*parts: Any) -> Any:
    """Return the type that sums are kept in."""
    return torch.float64 if torch.float64 in {part.dtype for part in parts} else torch.float32
