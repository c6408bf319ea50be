"""SRigL for a PyTorch model: two calls in the usual training loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from srigl_core._training.condensed_trainer import CondensedTrainer
from srigl_core._training.config import TrainingConfig
from srigl_core._training.sparse_trainer import SparseTrainer
from srigl_core._update import CondensedUpdate, MaskUpdate
from srigl_core.contract import Backend
from srigl_core.errors import SriglError
from srigl_core.reference.init import INITS
from srigl_core.reference.schedule import UpdateSchedule
from srigl_core.torch.condensed_layers import CondensedLayers
from srigl_core.torch.masked_layers import MaskedLayers, update_backend
from srigl_core.torch.ranks import check_agreement
from srigl_core.torch.targets import check_optimizer, find_targets
from srigl_core.torch.tensors import as_numpy

__all__ = ["MODES", "SRigL"]

MODES = ("masked", "condensed")

_attached: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[str, SRigL]] = (
    weakref.WeakKeyDictionary()
)
"""Of each module the weights that have an SRigL, by what they are called there."""


class SRigL:
    """Train a model sparse, with constant fan-in.

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
        On its device, and not yet wrapped for data-parallel training. Layers keep their weights at
        the connections drawn; all others become zero.
    optimizer : torch.optim.Optimizer
        Of the model's parameters.
    sparsity : float
        Of all sparse layers together, in [0, 1).
    schedule : UpdateSchedule or int
        When to update; an int is the number of training steps.
    mode : {"masked", "condensed"}
        "masked" keeps dense weights and gradients, with zeros, as the released code does.
        "condensed" puts `CondensedLinear` and `CondensedConv2d` into the model: memory and time are
        those of the active weights. Both have the same masks, but for rounding.
    include : iterable of str, or None
        Names of modules, or of parameters such as ``attn.in_proj_weight``; None is every linear and
        convolutional layer.
    exclude : iterable of str
        Names of layers to leave dense.
    config : TrainingConfig or None
        Method, distribution, settings of the updates, layers that differ, seed. Condensed layers
        need method "srigl". With a gradient window longer than one step they keep the inputs and
        output gradients of its steps.
    init : str or None
        Draw the weights anew by `srigl_core.reference.sparse_init`, whose `init` this is.
    backend : str, Backend or None
        For the updates, as in `srigl_core.get_backend`. By default a model on a CUDA device is
        updated there if the backend "cupy" can run. Other backends get copies on the host.
    process_group : torch.distributed process group, or None
        Of data-parallel training; None is the default group, if there is one.

    Attributes
    ----------
    trainer : SparseTrainer or CondensedTrainer
        Budgets, fan-ins, active neurons, ITOP rates.
    mode : str

    Raises
    ------
    SriglError
        If a setting is out of range, a layer cannot be sparse as asked for, the optimiser holds
        other parameters, or the model has an SRigL already. Names the layer; the model is left as
        it was.

    Notes
    -----
    SPEC 4 and 5; the paper, sec. 3. Nothing of the model or the optimiser is patched.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        sparsity: float,
        schedule: UpdateSchedule | int,
        mode: str = "masked",
        include: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        config: TrainingConfig | None = None,
        init: str | None = None,
        backend: str | Backend | None = None,
        process_group: Any | None = None,
    ) -> None:
        if mode not in MODES:
            raise SriglError(f"mode={mode!r} is unknown; use one of {', '.join(MODES)}")
        if init is not None and init not in INITS:
            raise SriglError(f"init={init!r} is unknown; use one of {', '.join(INITS)}")
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise SriglError(
                "model is wrapped in DistributedDataParallel; attach SRigL to the model itself "
                "first, and wrap it then"
            )
        targets = find_targets(model, include, exclude)
        for name, target in targets.items():
            if target.attribute in _attached.get(target.module, ()):
                raise SriglError(
                    f"layer {name!r} has an SRigL already; call that one's detach() first"
                )
        check_optimizer(targets, optimizer)
        shapes = {name: target.shape for name, target in targets.items()}
        settings: dict[str, Any] = {"sparsity": sparsity, "schedule": schedule, "config": config}
        self.mode, self._group = mode, process_group
        self._layers: MaskedLayers | CondensedLayers
        if mode == "masked":
            chosen = backend or update_backend(targets)
            trainer = SparseTrainer(shapes, backend=chosen, **settings)
            self._layers = MaskedLayers(model, targets, optimizer, trainer)
        else:
            condensed = CondensedTrainer(shapes, backend=backend, **settings)
            self._layers = CondensedLayers(model, targets, optimizer, condensed, process_group)
        self._optimizer = optimizer
        self._was_skipped = False
        check_agreement(self._layers.digests, process_group)
        self._layers.attach(init, np.random.default_rng([self.trainer.config.seed, 1]))
        # A dense module that a condensed layer replaced is not to be kept alive.
        self._weights = [(weakref.ref(t.module), t.attribute) for t in targets.values()]
        for target in targets.values():
            _attached.setdefault(target.module, weakref.WeakValueDictionary())[target.attribute] = (
                self
            )

    @property
    def trainer(self) -> SparseTrainer | CondensedTrainer:
        """The driver, free of PyTorch, that decides on the masks."""
        return self._layers.trainer

    def mask(self, name: str) -> Any:
        """Return the mask of a sparse layer: a new tensor of bool of the dense weight's shape."""
        return self._layers.mask(name)

    def after_backward(self, scaler: Any | None = None) -> None:
        """Take what the update needs of this step's gradients; mask the gradients.

        Call it when all of a step's gradients are there: after ``loss.backward()``, or the last one
        of an accumulation, and before clipping and ``optimizer.step()``.

        Parameters
        ----------
        scaler : torch.amp.GradScaler or None
            The loss's, if there is one; call ``scaler.unscale_(optimizer)`` before. If a gradient
            is not finite, so that the scaler will skip the optimiser's step, nothing is taken and
            the coming `step` is not counted.

        Raises
        ------
        SriglError
            If a layer has no gradient, or is another one by now.
        """
        if scaler is not None and not scaler.is_enabled():
            scaler = None  # it scales nothing, and skips no step
        self._was_skipped = scaler is not None and not self._gradients_are_finite()
        if self._was_skipped:
            self._layers.discard_step()
            return
        self._layers.after_backward(1.0 if scaler is None else float(scaler.get_scale()))

    def step(self) -> Mapping[str, MaskUpdate] | Mapping[str, CondensedUpdate]:
        """Count a training step after the optimiser's, and update masks if it is due.

        Returns
        -------
        mapping of str to MaskUpdate or CondensedUpdate
            Empty where no update was due.

        Raises
        ------
        SriglError
            If a number is not finite, a gradient is missing, or ranks disagree; names the layer.
            But for the last, nothing is changed and the step not counted.
        """
        if self._was_skipped:
            self._was_skipped = False
            return {}
        updates = self._layers.step()
        if updates:
            check_agreement(self._layers.digests, self._group)
        return updates

    def discard_gradients(self) -> None:
        """Forget the gradients of the window so far."""
        self._layers.discard_gradients()

    def report(self) -> str:
        """Return a table of the layers: weights asked for and realised, fan-in, active neurons."""
        return self.trainer.report()

    def detach(self) -> None:
        """Let go of the model, which stays as it is, masked or condensed."""
        for held, attribute in self._weights:
            module = held()
            if module is not None and _attached[module].get(attribute) is self:
                del _attached[module][attribute]  # and not that of one that this is a copy of
        self._layers.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs beside the model's and the optimiser's states.

        Returns
        -------
        dict
            Plain containers, numbers, strings and tensors: ``torch.load(weights_only=True)`` reads
            it.
        """
        state: dict[str, Any] = _as_tensors(self._layers.state_dict())
        return {"mode": self.mode, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; load the model's and the optimiser's states before.

        Raises
        ------
        SriglError
            If it is of something else, or was taken with other settings; nothing is changed.
        """
        if not isinstance(state, Mapping) or state.get("mode") != self.mode:
            came = state.get("mode") if isinstance(state, Mapping) else type(state).__name__
            raise SriglError(f"state is not of an SRigL with mode={self.mode!r}, but of {came!r}")
        tensors = ("window",) if self.mode == "condensed" else ()
        self._layers.load_state_dict(
            {k: v if k in tensors else _as_arrays(v) for k, v in state.items() if k != "mode"}
        )

    def _gradients_are_finite(self) -> bool:
        """Whether the optimiser will step, of all ranks that share the gradients."""
        groups = self._optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        finite = [torch.isfinite(gradient).all() for gradient in gradients]
        return all(flag.item() for flag in finite)  # all of them asked for, then waited for


def _as_tensors(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _as_tensors(part) for key, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_as_tensors(part) for part in state)
    return torch.from_numpy(state) if isinstance(state, np.ndarray) else state


def _as_arrays(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _as_arrays(part) for key, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_as_arrays(part) for part in state)
    return as_numpy(state) if isinstance(state, torch.Tensor) else state
