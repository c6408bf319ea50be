"""Lightning: sparse training of a `LightningModule`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from srigl_core._install import install_command
from srigl_core.errors import BackendUnavailableError, SriglError
from srigl_core.torch import SRigL

try:
    import torch
    from lightning.pytorch import Callback
except ImportError as error:
    raise BackendUnavailableError(
        f"srigl_core.integrations.lightning needs Lightning ({error}); install it: "
        f"{install_command('lightning')}"
    ) from error

__all__ = ["SRigLCallback"]


class SRigLCallback(Callback):  # type: ignore[misc] # the package's types are not followed
    """Train a ``LightningModule`` sparse.

    ::

        callback = SRigLCallback(sparsity=0.9, schedule=n_steps, mode="condensed")
        trainer = lightning.Trainer(max_steps=n_steps, callbacks=[callback])
        trainer.fit(module, data)

    It attaches `SRigL` to the module and to what its ``configure_optimizers`` returns, records
    gradients before Lightning clips them, updates the masks after the optimiser's steps, logs
    `SRigL.log_dict`, and saves its state in each checkpoint. To resume, or to validate or test a
    checkpoint, make module, trainer and callback as before, and pass ``ckpt_path``.

    Parameters
    ----------
    **options
        As in `SRigL`.

    Attributes
    ----------
    srigl : SRigL or None
        None until training starts.

    Raises
    ------
    SriglError
        When training starts: if the module optimises manually, the callback has trained another
        module, a checkpoint has no state of SRigL, or as in `SRigL`.

    Notes
    -----
    The module has its layers after ``__init__``: Lightning calls its ``setup`` and
    ``configure_model`` later. Its ``configure_optimizers`` is called once, and from then on gives
    the same optimisers. On one device the state of the random generators of Python, NumPy and
    PyTorch is saved and loaded too, which Lightning does not do.
    """

    def __init__(self, **options: Any) -> None:
        self.srigl: SRigL | None = None
        self._options = options
        self._module: Any = None
        self._has_stepped = False
        self._random_states: dict[str, Any] | None = None
        self._numbers: dict[str, float] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach SRigL before Lightning loads a checkpoint, which needs the condensed layers."""
        self._random_states = None
        if self._module is pl_module:
            return
        if self._module is not None:
            raise SriglError("this SRigLCallback has trained another module; make a new one")
        if not pl_module.automatic_optimization:
            raise SriglError(
                "the module optimises manually (automatic_optimization=False), so the callback "
                "does not see its steps; use srigl_core.torch.SRigL in its training_step"
            )
        pl_module.to(trainer.strategy.root_device)
        optimizers = pl_module.configure_optimizers()
        self.srigl = SRigL(pl_module, optimizers, **self._options)
        self._module = pl_module
        pl_module.configure_optimizers = partial(_returned, optimizers)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the random generators as they were at the checkpoint.

        Lightning makes the iterator of the training data next, which draws from them.
        """
        if self._random_states is not None and trainer.world_size == 1:
            _set_random_states(self._random_states)
        self._numbers = self._attached().log_dict()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Record and mask the gradients; Lightning clips them next."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        if all(parameter.grad is None for parameter in parameters):
            return  # training_step has returned None, so the optimiser does not step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._attached().after_backward(scaler=scaler)
        self._has_stepped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Update the masks if the optimiser has stepped and an update is due, and log."""
        if self._has_stepped:  # not where gradients are only accumulated
            srigl = self._attached()
            if srigl.step():
                self._numbers = srigl.log_dict()
        self._has_stepped = False
        pl_module.log_dict(self._numbers)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of SRigL and of the random generators."""
        return {"srigl": self._attached().state_dict(), "random": _get_random_states()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Load the state of SRigL, after the module's."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not isinstance(state, Mapping):
            raise SriglError(
                "the checkpoint has no state of this SRigLCallback; resume from one that was saved "
                "with it"
            )
        self._attached().load_state_dict(state["srigl"])
        self._random_states = state["random"]

    def _attached(self) -> SRigL:
        if self.srigl is None:
            raise SriglError("SRigL is attached when training starts; call trainer.fit(...) first")
        return self.srigl


def _returned(optimizers: Any) -> Any:
    return optimizers


def _get_random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 # that of the global generator
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
