"""SRigL for a PyTorch model: two calls in the usual training loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from srigl_core._format.connections import Connections
from srigl_core._training.condensed_trainer import CondensedTrainer
from srigl_core._training.config import AUTO, LayerOptions, TrainingConfig
from srigl_core._training.skeleton import error_context
from srigl_core._training.sparse_trainer import SparseTrainer
from srigl_core._update import CondensedUpdate, MaskUpdate
from srigl_core.contract import Backend
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.init import INITS
from srigl_core.reference.schedule import UpdateSchedule
from srigl_core.torch.condensed_layers import CondensedLayers
from srigl_core.torch.given_masks import check_not_sparse, given_masks, masks_by_layer
from srigl_core.torch.layer_selection import select_layers
from srigl_core.torch.masked_layers import MaskedLayers, update_backend
from srigl_core.torch.model_sparsity import dense_table
from srigl_core.torch.movement import MovementCheck
from srigl_core.torch.optimizers import (
    check_optimizer,
    find_optimizers,
    groups_of,
    replace_parameters,
)
from srigl_core.torch.ranks import agreed, check_agreement
from srigl_core.torch.selection import Entry
from srigl_core.torch.sharded_tensors import laid_out, local
from srigl_core.torch.targets import Target, check_module
from srigl_core.torch.tensors import as_numpy
from srigl_core.torch.wrappers import (
    ParameterWatch,
    check_wrappers,
    refuse_without_numbers,
    steps_of,
)

__all__ = ["MODES", "SRigL"]

MODES = ("masked", "condensed")
_MOST_MISSED = 2
"""Calls in a row that may be missed: one may be a step that a training loop leaves out."""

_MOST_SKIPPED = 200
"""Steps in a row without finite gradients; a GradScaler has reached any sensible scale earlier."""

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)

_attached: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[str, SRigL]] = (
    weakref.WeakKeyDictionary()
)
"""The SRigL of each weight, by module and attribute."""


class SRigL:
    """Train a model with sparse weights of constant fan-in.

    ::

        srigl = SRigL(model, optimizer, sparsity=0.9, schedule=n_steps)
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            srigl.after_backward()
            optimizer.step()
            srigl.step()

    Parameters
    ----------
    model : torch.nn.Module
        A model that is on its device and not yet wrapped in DistributedDataParallel. Connections
        are drawn at random. Weights at the connections are kept, and the others become zero.
    optimizer : torch.optim.Optimizer
        Updates the model's parameters. May be a wrapper of an optimiser, or a list of optimisers.
    sparsity : float or None
        Sparsity of all sparse layers together, in [0, 1). None, if all have given masks, which then
        keep their sizes.
    schedule : UpdateSchedule or int
        The training steps with a mask update; an int is the total number of training steps.
    mode : {"masked", "condensed"}
        "masked" keeps dense weights and gradients with zeros, like the released code. "condensed"
        replaces layers by `CondensedLinear` and its like, whose memory and time are proportional to
        the active weights. The masks are the same, apart from rounding.
    include : iterable of str or type, or None
        Layers to make sparse: names of modules and parameters, patterns (``"*.out_proj"``), and
        types of modules (``nn.Conv2d``); a module stands for all layers in it. None means every
        linear and convolutional layer, and the projections of ``nn.MultiheadAttention``. Layers
        that cannot be made sparse are left dense, unless one is named.
    exclude : iterable of str or type
        Layers to leave dense, in the same way.
    masks : mapping of str to tensor or ndarray of bool, "nonzero", or None
        First masks by layer name, in the shapes of the weights. "nonzero" keeps the weights that
        are not zero, in all layers. A layer whose mask is all True stays dense. Other masks are
        drawn.
    gamma_sal, grad_window, seed
        As in `TrainingConfig`; they replace those of `config`.
    config : TrainingConfig or None
        Method, distribution, update settings, options of single layers, seed. Condensed layers need
        the method "srigl". They keep the inputs and output gradients of all steps of the gradient
        window.
    init : str or None
        Draws new weights; one of the `init` of `srigl_core.reference.sparse_init`.
    backend : str, Backend or None
        Computes the updates; see `srigl_core.get_backend`. By default "cupy" updates a model on a
        CUDA device, if it is available. Other backends get copies on the host.
    process_group : torch.distributed process group, or None
        The group of data-parallel training. None is the default group.

    Attributes
    ----------
    trainer : SparseTrainer or CondensedTrainer
        Has budgets, fan-ins, active neurons and ITOP rates.
    mode : str

    Raises
    ------
    SriglError
        If a setting is out of range, a layer cannot be made sparse or is sparse already (without
        `masks` and `init`), the optimiser lacks a weight, or a layer has an SRigL already. The
        message names the layer, and the model is not changed.

    Notes
    -----
    SPEC 4 and 5; the paper, sec. 3. Neither the model nor the optimiser is patched.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        sparsity: float | None = None,
        schedule: UpdateSchedule | int,
        mode: str = "masked",
        include: Iterable[Entry] | Entry | None = None,
        exclude: Iterable[Entry] | Entry = (),
        masks: Mapping[str, Any] | str | None = None,
        gamma_sal: float | str | None = AUTO,
        grad_window: int | None = None,
        seed: int | None = None,
        config: TrainingConfig | None = None,
        init: str | None = None,
        backend: str | Backend | None = None,
        process_group: Any | None = None,
    ) -> None:
        if mode not in MODES:
            raise SriglError(f"mode={mode!r} is unknown; use one of {', '.join(MODES)}")
        if init is not None and init not in INITS:
            raise SriglError(f"init={init!r} is unknown; use one of {', '.join(INITS)}")
        check_module(model)
        check_wrappers(model)
        config = _with_settings(config, gamma_sal=gamma_sal, grad_window=grad_window, seed=seed)
        named = () if masks is None or isinstance(masks, str) else masks_by_layer(masks)
        selection = select_layers(
            model, include, exclude, config, named, condensed=mode == "condensed"
        )
        targets, self._left = selection.targets, selection.left
        for name, target in targets.items():
            if target.attribute in _attached.get(target.module, ()):
                raise SriglError(f"layer {name!r} has an SRigL already; call its detach() first")
        refuse_without_numbers(targets)
        check_optimizer(targets, optimizer, mode)
        shapes = {name: target.shape for name, target in targets.items()}
        given: dict[str, Any] = {} if masks is None else given_masks(targets, masks)
        if masks is None and init is None:
            check_not_sparse(targets)
        config, given = _with_given(config, targets, given)
        settings: dict[str, Any] = {"sparsity": sparsity, "schedule": schedule, "config": config}
        self.mode, self._group = mode, process_group
        self._layers: MaskedLayers | CondensedLayers
        if mode == "masked":
            if backend is None:
                backend = update_backend(targets, config.method)
            trainer = SparseTrainer(shapes, backend=backend, masks=given, **settings)
            self._layers = MaskedLayers(model, targets, optimizer, trainer, process_group)
        else:
            connections = {
                name: target.module.to_condensed().connections
                for name, target in targets.items()
                if target.is_condensed
            }
            for name, mask in given.items():
                with error_context(name):
                    connections[name] = Connections.from_mask(mask)
            condensed = CondensedTrainer(
                shapes, backend=backend, connections=connections, **settings
            )
            self._layers = CondensedLayers(model, targets, optimizer, condensed, process_group)
        self._optimizer = optimizer
        self._was_skipped, self._n_skipped = False, 0
        self._movement = MovementCheck(self.trainer.sparse_layers, optimizer, process_group)
        check_agreement(self._layers.digests, process_group)
        self._layers.attach(init, np.random.default_rng([self.trainer.config.seed, 1]))
        self._recorded_at: int | None = None
        self._n_missed = self._n_alone = 0
        self._watch = ParameterWatch(model, self._layers.weights)
        self._has_followed, self._steps_before = False, 0
        replaced = [(target.module, target.attribute) for target in targets.values()]
        self._register(dict.fromkeys([*replaced, *self._layers.weights.values()]))

    def _register(self, weights: Iterable[tuple[Any, str]]) -> None:
        """Note that these weights, modules with the names of parameters, have this SRigL."""
        self._weights = []
        for module, attribute in weights:
            # Weak references, so that replaced dense modules are freed.
            self._weights.append((weakref.ref(module), attribute))
            _attached.setdefault(module, weakref.WeakValueDictionary())[attribute] = self

    def __getstate__(self) -> dict[str, Any]:
        alive = ((reference(), attribute) for reference, attribute in self._weights)
        weights = [(module, attribute) for module, attribute in alive if module is not None]
        weights = weights if self.mode == "masked" else list(self._layers.weights.values())
        return {**self.__dict__, "_weights": weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register(state["_weights"])

    @property
    def trainer(self) -> SparseTrainer | CondensedTrainer:
        """The training driver that computes the masks."""
        return self._layers.trainer

    def mask(self, name: str) -> Any:
        """Return the mask of a sparse layer, a new tensor of bool in the dense weight's shape.

        Raises
        ------
        SriglError
            If no layer has that name.
        """
        if name not in self.trainer.budgets:
            raise SriglError(
                f"no layer is called {name!r}; the layers are: {', '.join(self.trainer.budgets)}"
            )
        return self._layers.mask(name)

    def after_backward(self, scaler: Any | None = None) -> None:
        """Record the gradients that an update needs, and mask them.

        Call it after the last ``loss.backward()`` of a step and before clipping and
        ``optimizer.step()``.

        Parameters
        ----------
        scaler : torch.amp.GradScaler or None
            The scaler of the loss, if there is one. Call ``scaler.unscale_(optimizer)`` before. If
            a gradient is not finite the scaler skips the optimiser's step. Then no gradients are
            recorded, and the next `step` is not counted.

        Raises
        ------
        SriglError
            If a layer has no gradient, or has been replaced.

        Notes
        -----
        Without `scaler` only steps whose gradients an update needs are looked at. If their
        gradients are not finite they are not counted either.
        """
        if self._recorded_at is not None and self._recorded_at != _optimizer_steps:
            self._n_missed += 1
            if self._n_missed >= _MOST_MISSED:
                raise SriglError(
                    f"srigl.step() was not called after the last {_MOST_MISSED} steps of an "
                    f"optimizer; call it after optimizer.step() in each training step"
                )
        if scaler is not None and not scaler.is_enabled():
            scaler = None  # a disabled scaler skips no step
        if self._follow() and scaler is not None:
            raise SriglError(
                "parameters were sharded since the last step, after SRigL was attached, so the "
                "scaler has not unscaled their gradients; call srigl.set_optimizer(optimizer) "
                "right after fully_shard"
            )
        self._steps_before, _ = steps_of([])
        optimizers = find_optimizers(self._optimizer)
        found = {} if scaler is None else _infinities(scaler, [self._optimizer, *optimizers])
        is_looked_at = scaler is not None or self.trainer.needs_grad
        self._was_skipped = is_looked_at and not _gradients_are_finite(
            optimizers, found, self._group
        )
        if self._was_skipped:
            self._layers.discard_step()
            return
        loss_scale = 1.0 if scaler is None else float(scaler.get_scale())
        # The scaler unscales gradients in unscale_, or in its step.
        gradient_scale = 1.0 if found else loss_scale
        self._was_skipped = not self._layers.after_backward(loss_scale, gradient_scale)
        self._movement.before_step(self._layers.parameters)
        self._recorded_at = _optimizer_steps

    def step(self) -> Mapping[str, MaskUpdate] | Mapping[str, CondensedUpdate]:
        """Count a training step after the optimiser's, and update the masks if an update is due.

        Returns
        -------
        mapping of str to MaskUpdate or CondensedUpdate
            The updates by layer name; empty if none was due.

        Raises
        ------
        SriglError
            If a number is not finite, a gradient is missing, the optimiser does not change a
            weight, or ranks disagree. The message names the layer. Unless ranks disagree nothing is
            changed, and the step is not counted.
        """
        self._follow()
        self._check_steps()
        self._movement.after_step(self._layers.parameters)
        recorded_at, self._recorded_at = self._recorded_at, None
        self._n_missed = 0
        if self._was_skipped:
            self._was_skipped = False
            self._skip_step()
            return {}
        self._n_alone = self._n_alone + 1 if recorded_at is None else 0
        if self._n_alone >= _MOST_MISSED and self.mode == "masked":
            self._layers.skip_step()
            raise SriglError(
                f"after_backward() was not called before the last {_MOST_MISSED} calls of step; "
                f"call it after loss.backward() and before optimizer.step() in each training step"
            )
        self._n_skipped = 0
        updates = self._layers.step()
        if updates:
            check_agreement(self._layers.digests, self._group)
        return updates

    def discard_gradients(self) -> None:
        """Discard the gradients of the window."""
        self._layers.discard_gradients()

    @property
    def left_dense(self) -> dict[str, str]:
        """Why each other matrix of the model is not sparse, by layer name."""
        return dict(self._left)

    @property
    def total_sparsity(self) -> float:
        """Sparsity of all matrices of the model: of its parameters with more than one axis."""
        return self._layers.total_sparsity()

    def log_dict(self, prefix: str = "srigl/") -> dict[str, float]:
        """Return numbers to log, as TensorBoard, CSV files and Weights & Biases take them.

        Parameters
        ----------
        prefix : str
            Begins each name.

        Returns
        -------
        dict of str to float
            ``sparsity`` of the sparse layers together and ``total_sparsity`` of all matrices,
            ``active_neurons`` as a share of the sparse layers' neurons, ``updates`` so far,
            ``planned_updates`` of the whole schedule, and ``itop_rate``, the share of the sparse
            layers' positions that was ever active.
        """
        trainer = self.trainer
        sizes = {name: trainer.budgets[name].n_weights for name in trainer.sparse_layers}
        neurons = {name: trainer.budgets[name].shape[0] for name in sizes}
        n_weights, n_neurons = max(1, sum(sizes.values())), max(1, sum(neurons.values()))
        n_active, rates = trainer.n_active, trainer.itop_rates()
        numbers = {
            "sparsity": trainer.sparsity,
            "total_sparsity": self.total_sparsity,
            "active_neurons": sum(n_active[name] for name in neurons) / n_neurons,
            "updates": trainer.n_updates,
            "planned_updates": trainer.schedule.n_updates,
            "itop_rate": sum(rates[name] * n for name, n in sizes.items()) / n_weights,
        }
        return {f"{prefix}{name}": float(number) for name, number in numbers.items()}

    def __repr__(self) -> str:
        trainer = self.trainer
        return (
            f"SRigL(mode={self.mode!r}, method={trainer.config.method!r}, "
            f"{len(trainer.sparse_layers)} sparse layers, sparsity={trainer.sparsity:.4f} (of all "
            f"matrices {self.total_sparsity:.4f}), step {trainer.step_count}, "
            f"{trainer.n_updates} of {trainer.schedule.n_updates} updates)"
        )

    def track(self, average: Any) -> None:
        """Let an average of the model's weights (EMA, SWA) follow the mask updates.

        At a mask update the numbers of the average are treated as optimiser state is: a new weight
        starts anew, and an inactive one is zero. In condensed layers a place in `values` may belong
        to another connection after an update, so an average that is not tracked mixes connections.

        Parameters
        ----------
        average : torch.nn.Module or mapping of str to torch.Tensor
            A copy of the model, an ``AveragedModel``, or tensors by the names of the model's
            ``state_dict``. It is kept until `detach`.

        Raises
        ------
        SriglError
            If it lacks a weight, or was made before the last mask update.
        ValueTypeError
            If it is neither a module nor a mapping.
        """
        self._follow()
        self._layers.track(average)

    def set_optimizer(self, optimizer: Any) -> None:
        """Say which optimiser updates the parameters from now on.

        ``fully_shard`` replaces a model's parameters. If SRigL was attached before, the optimiser
        that it was given gets the new parameters and keeps its state, at this call or at the next
        one of `after_backward`. If you make a new optimiser, pass it here.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            Or a wrapper, or a list, as when SRigL was attached.

        Raises
        ------
        SriglError
            If it lacks a weight, or cannot train it. The old optimiser stays in use.
        """
        self._follow(optimizer)
        check_optimizer(self._layers.targets, optimizer, self.mode)
        self._optimizer = self._layers.optimizer = optimizer
        self._movement = MovementCheck(self.trainer.sparse_layers, optimizer, self._group)
        self._has_followed = False

    def _follow(self, optimizer: Any | None = None) -> bool:
        """Follow `fully_shard`, which replaces parameters, and return whether it did so."""
        replaced = self._watch.replaced()
        if not replaced:
            return False
        changed = [(old, new, partial(_as_sharded, new)) for old, new in replaced]
        for each in (self._optimizer, optimizer):
            if each is not None:
                replace_parameters(each, changed)
        self._layers.follow(replaced)
        self._movement.restart_step()
        self._has_followed = True
        return True

    def _check_steps(self) -> None:
        """After the parameters were sharded, check that the optimiser is still in use."""
        n_steps, last = steps_of(find_optimizers(self._optimizer))
        if self._has_followed and last <= self._steps_before < n_steps:
            raise SriglError(
                "the parameters were sharded after SRigL was attached, and the optimizer that "
                "SRigL was given does not step any more; pass the new one to "
                "srigl.set_optimizer(...)"
            )

    def report(self) -> str:
        """Return a table of the layers: budgets, active weights, fan-in and active neurons.

        Below are the number of mask updates, the sparsity of these layers together, that of all
        matrices of the model, and the layers that were left dense, with the reason.
        """
        trainer = self.trainer
        totals = (
            f"mask updates: {trainer.n_updates} of {trainer.schedule.n_updates} planned",
            f"sparsity of these layers: {self.trainer.sparsity:.2%}",
            f"sparsity of all matrices of the model: {self.total_sparsity:.2%}",
        )
        return "\n".join([self.trainer.report(), *totals, *dense_table(self._left)])

    def detach(self) -> None:
        """Detach from the model, which remains masked or condensed."""
        for reference, attribute in self._weights:
            module = reference()
            # A deep copy of this object must not detach the original.
            if module is not None and _attached[module].get(attribute) is self:
                del _attached[module][attribute]
        self._layers.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that an exact resume needs besides the model's and the optimiser's.

        Returns
        -------
        dict
            Plain containers, numbers, strings and tensors, which ``torch.load(weights_only=True)``
            reads.
        """
        state = _converted(self._layers.state_dict(), np.ndarray, torch.from_numpy)
        return {"mode": self.mode, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`; load the model's and the optimiser's states first.

        Raises
        ------
        SriglError
            If it is not a state of an SRigL, or has other settings. Nothing is changed.
        """
        if not isinstance(state, Mapping) or state.get("mode") != self.mode:
            other = state.get("mode") if isinstance(state, Mapping) else type(state).__name__
            raise SriglError(f"state is not of an SRigL with mode={self.mode!r}, but of {other!r}")
        tensors = ("mode", "window") if self.mode == "condensed" else ("mode",)
        arrays = {name: part for name, part in state.items() if name not in tensors}
        arrays = _converted(arrays, torch.Tensor, as_numpy)
        self._layers.load_state_dict({**state, **arrays})

    def _skip_step(self) -> None:
        """Check that a step whose gradients were not finite did no harm."""
        self._layers.skip_step()
        parameters = self._layers.parameters
        wrong = {name: not torch.isfinite(local(p)).all() for name, p in parameters.items()}
        for name, is_wrong in agreed(wrong, parameters.values(), self._group).items():
            if is_wrong:
                raise SriglError(
                    f"layer {name!r}: weight is not finite after a step whose gradients were not "
                    f"finite; skip such steps, as torch.amp.GradScaler does"
                )
        self._n_skipped += 1
        if self._n_skipped > _MOST_SKIPPED:
            raise SriglError(
                f"no step was counted, because the gradients of {self._n_skipped} steps in a row "
                f"were not finite; look for infinities in the inputs or the loss"
            )


def _gradients_are_finite(optimizers: list[Any], found: dict[Any, Any], group: Any | None) -> bool:
    """Return whether all gradients of the optimisers' parameters are finite.

    `found` are the infinities that a scaler found.
    """
    parameters = [p for part in groups_of(optimizers) for p in part["params"]]
    finite = [torch.isfinite(local(p.grad)).all() for p in parameters if p.grad is not None]
    has_infinity = any(local(flag).item() for flag in found.values())
    # All are queued before the first is awaited.
    has_infinity = has_infinity or not all(flag.item() for flag in finite)
    return not agreed({"infinity": has_infinity}, parameters, group)["infinity"]


def _as_sharded(parameter: Any, state: Any, start: float) -> Any:
    return laid_out(state, parameter)


def _infinities(scaler: Any, optimizers: list[Any]) -> dict[Any, Any]:
    """Return what `unscale_` of a scaler found, by device; empty if it was not called."""
    states = getattr(scaler, "_per_optimizer_states", {})
    known = [states[id(part)] for part in optimizers if id(part) in states]
    return {k: flag for state in known for k, flag in state["found_inf_per_device"].items()}


def _with_given(
    config: TrainingConfig, targets: Mapping[str, Target], given: Mapping[str, Any]
) -> tuple[TrainingConfig, dict[str, Any]]:
    """Return a config in which full masks make layers dense, and the other masks.

    Condensed layers keep the budgets that their tensors have room for.
    """
    layers = dict(config.layers)
    for name, target in targets.items():
        options = layers.get(name, LayerOptions())
        if target.is_condensed:
            layers[name] = replace(options, nnz_budget=target.module.nnz_budget)
        elif name in given and given[name].all():
            layers[name] = replace(options, dense=True)
    sparse = {name: mask for name, mask in given.items() if not mask.all()}
    return replace(config, layers=layers), sparse


def _with_settings(config: TrainingConfig | None, **settings: Any) -> TrainingConfig:
    """Return a config with the settings that differ from their defaults."""
    config = TrainingConfig() if config is None else config
    if not isinstance(config, TrainingConfig):
        raise ValueTypeError(f"config must be a TrainingConfig, got {type(config).__name__}")
    defaults = {"gamma_sal": AUTO}
    given = {name: value for name, value in settings.items() if value != defaults.get(name)}
    return replace(config, **given)


def _converted(state: Any, cls: type, convert: Callable[[Any], Any]) -> Any:
    """Convert the objects of a class in nested containers."""
    if isinstance(state, Mapping):
        return {key: _converted(part, cls, convert) for key, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_converted(part, cls, convert) for part in state)
    return convert(state) if isinstance(state, cls) else state
