"""Condensed training: no dense weights, and dense gradients a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
from srigl_core.torch.averages import Averages
from srigl_core.torch.layer_types import WeightLayout
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.model_sparsity import sparsity_of_model
from srigl_core.torch.optimizers import remap_states, replace_parameters
from srigl_core.torch.ranks import mean_of_ranks, true_on_a_rank
from srigl_core.torch.replacement import (
    condensed_layer,
    condensed_name,
    linear_of,
    replace_modules,
)
from srigl_core.torch.sharded_tensors import laid_out, local, whole
from srigl_core.torch.targets import Target, submodule
from srigl_core.torch.tensors import as_numpy, from_numpy
from srigl_core.torch.wrappers import refuse_calls, wrappers_of

__all__ = ["CondensedLayers"]

_Pairs = list[tuple[Any, Any]]


class CondensedLayers:
    """The condensed layers of a model.

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
        self.trainer, self.optimizer = trainer, optimizer
        self._model, self._group = model, group
        self._targets = {name: targets[name] for name in trainer.connections}
        self._layouts = {name: target.layout for name, target in targets.items()}
        self._places = {name: condensed_name(target) for name, target in self._targets.items()}
        self._layers: dict[str, CondensedLinear] = {}
        self._capturing: dict[str, capture.Captured] = {}
        self._window: list[tuple[dict[str, _Pairs], float]] = []
        self._seen: dict[str, list[tuple[int, int]]] = {}
        self._averages = Averages()

    def attach(self, init: str | None, rng: np.random.Generator) -> None:
        """Replace the dense layers by condensed ones, in the model and in the optimiser."""
        modules = {}
        stale = wrappers_of(
            target.parameter for target in self._targets.values() if not target.is_condensed
        )
        for name, target in self._targets.items():
            if target.is_condensed:
                self._layers[name] = target.module
                if init is not None:
                    _draw(target.module, init, rng)
                continue
            weight = _initial_weight(target, self.trainer.connections[name], init, rng)
            modules[name] = condensed_layer(target, weight, self.trainer.budgets[name].nnz_budget)
        replace_modules(self._model, {self._places[name]: m for name, m in modules.items()})
        replaced = []
        for name, module in modules.items():
            layer = self._layers[name] = linear_of(module)
            places, layout = _places(self.trainer.connections[name]), self._layouts[name]
            remap = partial(_gathered, places, layout, layer.values)
            replaced.append((self._targets[name].parameter, layer.values, remap))
        replace_parameters(self.optimizer, replaced)
        refuse_calls(stale)
        self._layers = {name: self._layers[name] for name in self._targets}
        self._targets.clear()  # so that the dense weights are freed
        self._capture_if_needed()

    @property
    def weights(self) -> dict[str, tuple[Any, str]]:
        """The modules and the attributes of the values."""
        return {name: (layer, "values") for name, layer in self._layers.items()}

    @property
    def targets(self) -> dict[str, Target]:
        """The values as weights of the model."""
        return {
            name: Target(name, self._path(name), layer, "values", layer.values)
            for name, layer in self._layers.items()
        }

    def follow(self, replaced: list[tuple[Any, Any]]) -> None:
        """Take parameters that have replaced others, old and new ones."""
        captured = self._capturing
        self._capture_if_needed()
        for name, pairs in captured.items():
            self._capturing[name].extend(pairs)

    def mask(self, name: str) -> Any:
        """Return a layer's mask, a new tensor of bool of the dense weight's shape."""
        shape, layout = self.trainer.budgets[name].shape, self._layouts[name]
        if name not in self._layers:
            return layout.from_rows(torch.ones(shape, dtype=torch.bool))
        return layout.from_rows(self._layers[name].mask.reshape(shape))

    @property
    def parameters(self) -> dict[str, Any]:
        """The values of the layers."""
        return {name: layer.values for name, layer in self._layers.items()}

    def track(self, average: Any) -> None:
        """Move the numbers of an average with the connections."""
        values = {f"{self._path(name)}.values": p for name, p in self.parameters.items()}
        self._averages.add(average, values, self._buffers(self._layers))

    def digests(self) -> dict[str, str]:
        """Return a hash of each mask."""
        return {name: mask.digest().hex() for name, mask in self.trainer.connections.items()}

    def total_sparsity(self) -> float:
        """Return the sparsity of all matrices of the model."""
        return sparsity_of_model(self._model, {})

    def after_backward(self, loss_scale: float, gradient_scale: float) -> bool:
        """End a step of the window, after any number of captured backward passes.

        The captured gradients still have the scale of the loss. Returns False if one of them is not
        finite, and discards them. It may have reached no active weight.
        """
        self._check_in_place()
        if self._capturing:
            step = {
                name: [] if self._layers[name].values.grad is None else list(pairs)
                for name, pairs in self._capturing.items()
            }
            if not any(step.values()):
                raise SriglError(
                    "no sparse layer has a gradient; call after_backward after loss.backward() and "
                    "before zero_grad()"
                )
            self.discard_step()
            numbers = (part for pairs in step.values() for pair in pairs for part in pair)
            is_finite = all(torch.isfinite(part).all().item() for part in numbers)
            if true_on_a_rank({"not finite": not is_finite}, self._group)["not finite"]:
                return False
            self._window.append((step, loss_scale))
        return True

    def step(self) -> Mapping[str, CondensedUpdate]:
        """Update connections, values and optimiser state if an update is due."""
        self._check_in_place()
        weights, gradients = {}, {}
        was_due = self.trainer.is_due and bool(self._layers)
        if was_due:
            if not self._window:
                raise SriglError(
                    "no gradient was recorded for this step's update; call after_backward after "
                    "each loss.backward() and before the optimizer's step"
                )
            weights = {name: layer.to_condensed() for name, layer in self._layers.items()}
            took_part = true_on_a_rank({n: self._took_part(n) for n in self._layers}, self._group)
            gradients = {n: self._gradient_rows(n) if took_part[n] else None for n in self._layers}
        updates = self.trainer.step(weights, gradients)
        changed = []
        for name, update in updates.items():
            layer = self._layers[name]
            layer.load_condensed_(update.weight)
            changed.append((layer.values, partial(_remapped, update)))
        if was_due:
            grown = self.trainer.config.grown_init
            remap_states(self.optimizer, changed, grown)
            paths = (f"{self._path(name)}.values" for name in updates)
            remaps = dict(zip(paths, (remap for _, remap in changed), strict=True))
            self._averages.remap(remaps, grown, self._buffers(updates))
            self._window.clear()
        self._capture_if_needed()
        return updates

    def discard_gradients(self) -> None:
        """Discard the inputs and gradients of the window."""
        self._window.clear()
        self.discard_step()

    def skip_step(self) -> None:
        """Do nothing: condensed layers need no masking."""

    def discard_step(self) -> None:
        """Discard the inputs and gradients captured since the last step."""
        for pairs in self._capturing.values():
            pairs.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state and the window."""
        return {**self.trainer.state_dict(), "window": self._window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the trainer's state. The model must have its state already."""
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
            if self.trainer.connections[name] != layer._connections():
                self.trainer.load_state_dict(before)
                raise SriglError(
                    f"layer {name!r} has other connections than the state; load the model's "
                    f"state_dict first, of the same step"
                )
        self._window = window
        self._capture_if_needed()

    def detach(self) -> None:
        """Stop capturing inputs and gradients, and tracking averages."""
        self._capturing = {}
        self._averages.clear()

    def _path(self, name: str) -> str:
        """Return the name of the linear layer in the model."""
        place = self._places[name]
        is_linear = submodule(self._model, place) is self._layers[name]
        return place if is_linear else f"{place}.linear"

    def _buffers(self, names: Iterable[str]) -> dict[str, Any]:
        return {
            f"{self._path(name)}.{buffer}": tensor
            for name in names
            for buffer, tensor in self._layers[name].named_buffers()
        }

    def _capture_if_needed(self) -> None:
        self._capturing = {}
        if self.trainer.needs_grad:
            layers = self._layers.items()
            self._capturing = {name: capture.start(x.indices, x.values) for name, x in layers}

    def _moved(self, name: str, pairs: _Pairs) -> _Pairs:
        device = self._layers[name].values.device
        return [(x.to(device), grad.to(device)) for x, grad in pairs]

    def _check_in_place(self) -> None:
        for name, layer in self._layers.items():
            if linear_of(submodule(self._model, self._places[name])) is not layer:
                raise SriglError(
                    f"layer {name!r} has been replaced since SRigL was attached; change the model "
                    f"first, then attach SRigL"
                )
            state = [(t.data_ptr(), t._version) for t in layer.buffers()]
            if self._seen.get(name) == state:
                continue
            if self.trainer.connections[name] != layer._connections():
                raise SriglError(
                    f"layer {name!r} has other connections than SRigL gave it, so a state was "
                    f"loaded since the last step; to resume, call srigl.load_state_dict(...) with "
                    f"the state of the same step as the model's"
                )
            self._seen[name] = state

    def _took_part(self, name: str) -> bool:
        """Return whether a gradient reached the layer in the window."""
        return any(bool(grad.any()) for step, _ in self._window for _, grad in step[name])

    def _gradient_rows(self, name: str) -> Callable[[int, int], NDArray[Any]]:
        """Return a function of rows of the mean dense gradient of all ranks."""
        steps = [(step[name], 1 / (scale * len(self._window))) for step, scale in self._window]

        layer = self._layers[name]

        def rows(start: int, stop: int) -> NDArray[Any]:
            values = local(layer.values)
            total = values.new_zeros(stop - start, layer.in_features, dtype=_sum_dtype(values))
            for pairs, factor in steps:
                for x, grad in pairs:
                    dtype = _sum_dtype(x, grad)
                    # Converted here, so that there is no second copy of the window.
                    total = total + (grad[:, start:stop].t().to(dtype) @ x.to(dtype)) * factor
            return as_numpy(mean_of_ranks(total, self._group))

        return rows


def _initial_weight(
    target: Target, connections: Connections, init: str | None, rng: np.random.Generator
) -> CondensedWeight:
    """Return the weights of a dense layer at the connections, or new ones if `init` is set."""
    dense = target.layout.to_rows(target.parameter.detach())
    if init is not None:
        mask = connections.to_mask().reshape(target.shape)
        dense = torch.from_numpy(sparse_init(mask, init, rng=rng, dtype=np.float64)).to(dense)
    values = as_numpy(dense.reshape(connections.shape)[_places(connections)])
    return CondensedWeight.from_connections(values, connections)


def _draw(layer: CondensedLinear, init: str, rng: np.random.Generator) -> None:
    """Draw new values for a condensed layer."""
    weight = layer.to_condensed()
    packed = np.ones(weight.values.shape, np.bool_)
    drawn = sparse_init(packed, init, rng=rng, dtype=weight.dtype)
    layer.load_condensed_(weight.with_values(drawn))


def _places(connections: Connections) -> tuple[Any, Any]:
    """Return rows and columns of the connections, for indexing a dense tensor."""
    rows, columns = from_numpy(connections.active), connections.indices.astype(np.int64)
    return rows[:, None], torch.from_numpy(columns)


def _gathered(
    places: tuple[Any, Any], layout: WeightLayout, values: Any, state: Any, start: float
) -> Any:
    """Return a dense layer's optimiser state at the connections, in the shape of `values`."""
    gathered = layout.to_rows(state).flatten(1)[places].reshape(-1)
    flat = torch.full_like(values, start, dtype=state.dtype, requires_grad=False)
    flat[: gathered.numel()] = gathered
    return flat


def _remapped(update: CondensedUpdate, state: Any, start: float) -> Any:
    """Return optimiser state after an update, in the shape of the old state."""
    old = whole(state)
    source = torch.from_numpy(update.source.reshape(-1)).to(old.device)
    flat = torch.full_like(old, start)
    flat[: source.numel()] = torch.where(
        source < 0, flat[: source.numel()], old[source.clamp(min=0)]
    )
    return laid_out(flat, state)


def _sum_dtype(*parts: Any) -> Any:
    """Return the dtype of sums of products."""
    return torch.float64 if torch.float64 in {part.dtype for part in parts} else torch.float32
