"""Hugging Face Transformers: sparse training with `Trainer`, and files of condensed models."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from srigl_core._files import checked_path, write_whole
from srigl_core._install import install_command
from srigl_core.errors import BackendUnavailableError, SriglError, ValueTypeError
from srigl_core.torch import SRigL, load_model
from srigl_core.torch.model_file import model_as_bytes

try:
    import torch
    from torch import nn
    from transformers import AutoConfig, GenerationConfig, PreTrainedModel, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise BackendUnavailableError(
        f"srigl_core.integrations.transformers needs Hugging Face Transformers ({error}); install "
        f"it: {install_command('transformers')}"
    ) from error

__all__ = ["SRigLCallback", "from_pretrained", "save_pretrained"]

_FILE = "srigl.safetensors"
_GENERATION = "generation_config.json"
_WEIGHTS_OF_OTHERS = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")


class SRigLCallback(TrainerCallback):  # type: ignore[misc] # the package's types are not followed
    """Train the model of a Hugging Face ``Trainer`` sparse.

    ::

        trainer = Trainer(model, args, train_dataset=data)
        callback = SRigLCallback(trainer, sparsity=0.9, schedule=n_steps, mode="condensed")
        trainer.train()

    It adds itself to the trainer, records gradients before they are clipped, updates the masks
    after the optimiser's steps, logs `SRigL.log_dict` where the trainer logs, and saves its state
    in each checkpoint. To resume, make model, trainer and callback as before, and call
    ``trainer.train(resume_from_checkpoint=...)``.

    Parameters
    ----------
    trainer : transformers.Trainer
        It has a model, and has not trained yet. Its ``create_optimizer`` is called.
    **options
        As in `SRigL`.

    Attributes
    ----------
    srigl : SRigL

    Raises
    ------
    SriglError
        If the trainer has ``model_init`` in place of a model, or as in `SRigL`.

    Notes
    -----
    A ``Trainer`` clips gradients before it calls its callbacks, when masked mode still has the
    gradients of inactive weights. So the callback clips, by ``args.max_grad_norm``, and the trainer
    gets a copy of its arguments in which that is 0.
    """

    def __init__(self, trainer: Any, **options: Any) -> None:
        if trainer.model_init is not None:
            raise SriglError(
                "the Trainer has model_init, which makes another model when training starts; pass "
                "model= to the Trainer"
            )
        self.srigl = SRigL(trainer.model, trainer.create_optimizer(), **options)
        self._trainer = trainer
        self._max_norm = trainer.args.max_grad_norm
        trainer.args = copy.copy(trainer.args)
        trainer.args.max_grad_norm = 0.0
        trainer.add_callback(self)
        self._resumed_from: str | None = None
        self._train = trainer.train
        trainer.train = self._train_from

    def _train_from(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Call the trainer's ``train``, which does not tell its callbacks the checkpoint."""
        self._resumed_from = resume_from_checkpoint
        if resume_from_checkpoint is True:
            self._resumed_from = get_last_checkpoint(self._trainer.args.output_dir)
        return self._train(resume_from_checkpoint, *args, **options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Load the state of SRigL if the trainer has loaded a checkpoint."""
        if self._resumed_from or state.global_step:  # the trainer may resume by itself
            self._load(self._resumed_from or _checkpoint(args, state), args)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record and mask the gradients, and clip them."""
        self.srigl.after_backward(scaler=self._trainer.accelerator.scaler)
        if self._max_norm:
            nn.utils.clip_grad_norm_(self._trainer.model.parameters(), self._max_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step, and update the masks if an update is due."""
        self.srigl.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the numbers of SRigL where the trainer logs its own."""
        if control.should_log:
            self._trainer.log(self.srigl.log_dict())
            control.should_log = True  # a log sets it to False, and the trainer's own is still due

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the numbers of SRigL where the trainer logs its own."""
        self.on_step_end(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the state of SRigL in the checkpoint."""
        torch.save(self.srigl.state_dict(), Path(_checkpoint(args, state), _state_file(args)))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Load the masks of the best model if the trainer has loaded that."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load(state.best_model_checkpoint, args)

    def _load(self, folder: str, args: Any) -> None:
        path = Path(folder, _state_file(args))
        if not path.is_file():
            raise SriglError(
                f"the checkpoint has no state of SRigL: there is no file {str(path)!r}; resume "
                f"from a checkpoint that was saved with this callback"
            )
        try:
            self.srigl.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except SriglError as error:
            raise type(error)(f"{str(path)!r}: {error}") from error


def _checkpoint(args: Any, state: Any) -> str:
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")


def _state_file(args: Any) -> str:
    """Return the file's name; each process has one, since windows of gradients differ."""
    return "srigl.pt" if args.world_size == 1 else f"srigl_{args.process_index}.pt"


# ---------------------------------------------------------------- models


def save_pretrained(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write a Hugging Face model, condensed and quantised layers included, to a folder.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    folder : path-like
        Made if it does not exist. It gets the configuration, and the weights as `save_model` writes
        them.

    Raises
    ------
    ValueTypeError
        If `model` is not a model of Transformers.
    SriglError
        If its parameters have several dtypes, the folder holds weights in another format, or as in
        `save_model`.
    ValueError
        If Transformers refuses to save the configuration. After any of these errors nothing is
        written.

    Notes
    -----
    The model's own ``from_pretrained`` finds no weights in such a folder, which is an error. Read
    it with `srigl_core.integrations.transformers.from_pretrained`.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueTypeError(
            f"model must be a transformers.PreTrainedModel, got {type(model).__name__}; other "
            f"models are written by srigl_core.torch.save_model"
        )
    dtypes = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()})
    if len(dtypes) > 1:
        raise SriglError(
            f"the model has parameters of {', '.join(dtypes)}, and a configuration has one dtype; "
            f"convert the model with model.to(dtype), or use srigl_core.torch.save_model"
        )
    folder = checked_path(folder)
    others = sorted(file.name for kind in _WEIGHTS_OF_OTHERS for file in folder.glob(kind))
    if others:
        raise SriglError(
            f"folder {str(folder)!r} holds weights in another format ({', '.join(others)}), which "
            f"the model's own from_pretrained would load in place of these; choose an empty one"
        )
    content = model_as_bytes(model)
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as written:
        config.save_pretrained(written)
        if model.can_generate():
            model.generation_config.save_pretrained(written)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _FILE, content)
        shutil.copytree(written, folder, dirs_exist_ok=True)


def from_pretrained(model_class: Any, folder: str | os.PathLike[str]) -> Any:
    """Read a model that `srigl_core.integrations.transformers.save_pretrained` wrote.

    Parameters
    ----------
    model_class : type
        The model's class, or an ``AutoModel`` class.
    folder : path-like

    Returns
    -------
    transformers.PreTrainedModel
        A new model on the CPU, of the saved one's dtype and in evaluation mode. Every weight is one
        of the file's.

    Raises
    ------
    SriglError
        If the folder was not written by ``save_pretrained`` of this module, or the class has other
        layers than the file.
    ValueTypeError
        If `model_class` is no class of Transformers.
    FileFormatError
        As in `load_model`.
    """
    if not (hasattr(model_class, "from_config") or hasattr(model_class, "_from_config")):
        raise ValueTypeError(
            f"model_class must be a class of transformers, such as AutoModel, got {model_class!r}"
        )
    path = checked_path(folder) / _FILE
    if not path.is_file():
        raise SriglError(
            f"folder {os.fspath(folder)!r} has no {_FILE}, so it was not written by "
            f"srigl_core.integrations.transformers.save_pretrained; {model_class.__name__}"
            f".from_pretrained reads dense and masked models"
        )
    config_class = getattr(model_class, "config_class", None) or AutoConfig
    make = getattr(model_class, "from_config", None) or model_class._from_config
    model = load_model(path, make(config_class.from_pretrained(folder)))
    if Path(folder, _GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
