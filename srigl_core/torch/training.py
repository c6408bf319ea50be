"""SRigL for a PyTorch model: two calls in the usual training loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
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
from srigl_core.torch.layer_selection import select_layers
from srigl_core.torch.masked_layers import MaskedLayers, update_backend
from srigl_core.torch.model_sparsity import dense_table
from srigl_core.torch.ranks import check_agreement
from srigl_core.torch.selection import Entry
from srigl_core.torch.targets import check_optimizer
from srigl_core.torch.tensors import as_numpy

__all__ = ["MODES", "SRigL"]

MODES = ("masked", "condensed")

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
        A model that is on its device and not yet wrapped for data-parallel training. Connections
        are drawn at random. Weights at the connections are kept, and the others become zero.
    optimizer : torch.optim.Optimizer
        Updates the model's parameters.
    sparsity : float
        Sparsity of all sparse layers together, in [0, 1).
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
        If a setting is out of range, a layer cannot be made sparse, the optimiser lacks a weight,
        or a layer has an SRigL already. The message names the layer, and the model is not changed.

    Notes
    -----
    SPEC 4 and 5; the paper, sec. 3. Neither the model nor the optimiser is patched.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        sparsity: float,
        schedule: UpdateSchedule | int,
        mode: str = "masked",
        include: Iterable[Entry] | Entry | None = None,
        exclude: Iterable[Entry] | Entry = (),
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
                "first, then wrap it"
            )
        selection = select_layers(model, include, exclude, config, condensed=mode == "condensed")
        targets, self._left = selection.targets, selection.left
        for name, target in targets.items():
            if target.attribute in _attached.get(target.module, ()):
                raise SriglError(f"layer {name!r} has an SRigL already; call its detach() first")
        check_optimizer(targets, optimizer)
        shapes = {name: target.shape for name, target in targets.items()}
        settings: dict[str, Any] = {"sparsity": sparsity, "schedule": schedule, "config": config}
        self.mode, self._group = mode, process_group
        self._layers: MaskedLayers | CondensedLayers
        if mode == "masked":
            if backend is None:
                backend = update_backend(targets, getattr(config, "method", TrainingConfig.method))
            trainer = SparseTrainer(shapes, backend=backend, **settings)
            self._layers = MaskedLayers(model, targets, optimizer, trainer)
        else:
            condensed = CondensedTrainer(shapes, backend=backend, **settings)
            self._layers = CondensedLayers(model, targets, optimizer, condensed, process_group)
        self._optimizer = optimizer
        self._was_skipped = False
        check_agreement(self._layers.digests, process_group)
        self._layers.attach(init, np.random.default_rng([self.trainer.config.seed, 1]))
        # Weak references, so that replaced dense modules are freed.
        self._weights = [(weakref.ref(t.module), t.attribute) for t in targets.values()]
        for target in targets.values():
            _attached.setdefault(target.module, weakref.WeakValueDictionary())[target.attribute] = (
                self
            )

    @property
    def trainer(self) -> SparseTrainer | CondensedTrainer:
        """The training driver that computes the masks."""
        return self._layers.trainer

    def mask(self, name: str) -> Any:
        """Return the mask of a sparse layer, a new tensor of bool in the dense weight's shape."""
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
        """
        if scaler is not None and not scaler.is_enabled():
            scaler = None  # a disabled scaler skips no step
        self._was_skipped = scaler is not None and not self._gradients_are_finite()
        if self._was_skipped:
            self._layers.discard_step()
            return
        self._layers.after_backward(1.0 if scaler is None else float(scaler.get_scale()))

    def step(self) -> Mapping[str, MaskUpdate] | Mapping[str, CondensedUpdate]:
        """Count a training step after the optimiser's, and update the masks if an update is due.

        Returns
        -------
        mapping of str to MaskUpdate or CondensedUpdate
            The updates by layer name; empty if none was due.

        Raises
        ------
        SriglError
            If a number is not finite, a gradient is missing, or ranks disagree. The message names
            the layer. Unless ranks disagree nothing is changed, and the step is not counted.
        """
        if self._was_skipped:
            self._was_skipped = False
            return {}
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

    def report(self) -> str:
        """Return a table of the layers: budgets, active weights, fan-in and active neurons.

        Below are the sparsity of these layers together, the sparsity of all matrices of the model,
        and the layers that were left dense, with the reason.
        """
        totals = (
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

    def _gradients_are_finite(self) -> bool:
        """Return whether the scaler will let the optimiser step."""
        groups = self._optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        finite = [torch.isfinite(gradient).all() for gradient in gradients]
        return all(flag.item() for flag in finite)  # all are queued before the first is awaited


def _converted(state: Any, cls: type, convert: Callable[[Any], Any]) -> Any:
    """Convert the objects of a class in nested containers."""
    if isinstance(state, Mapping):
        return {key: _converted(part, cls, convert) for key, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_converted(part, cls, convert) for part in state)
    return convert(state) if isinstance(state, cls) else state
