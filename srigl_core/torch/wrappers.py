"""Wrappers that spread a model over processes: DistributedDataParallel, FSDP1, FSDP2."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from srigl_core.errors import SriglError
from srigl_core.torch.sharded_tensors import is_sharded
from srigl_core.torch.targets import Target

__all__ = [
    "ParameterWatch",
    "check_wrappers",
    "refuse_calls",
    "refuse_without_numbers",
    "steps_of",
    "wrappers_of",
]

_FSDP1 = (
    "is wrapped in FullyShardedDataParallel (FSDP1), which flattens weights, so that no neuron is "
    "a row any more; use torch.distributed.fsdp.fully_shard (FSDP2)"
)


def check_wrappers(model: Any) -> None:
    """Raise SriglError if a wrapper keeps SRigL from being attached to a model."""
    for name, module in model.named_modules():
        what = f"submodule {name!r}" if name else "model"
        if isinstance(module, DistributedDataParallel):
            raise SriglError(
                f"{what} is wrapped in DistributedDataParallel; attach SRigL to the model itself "
                f"first, then wrap it"
            )
        if _is_fsdp1(module):
            raise SriglError(f"{what} {_FSDP1}")
    _reshard(model)


def refuse_without_numbers(targets: Mapping[str, Target]) -> None:
    """Raise SriglError for weights on the device meta."""
    for name, target in targets.items():
        if target.parameter.is_meta:
            raise SriglError(
                f"layer {name!r} has a weight on the device meta, which has no numbers; call "
                f"model.to_empty(device=...), initialise or load its weights, make the optimizer, "
                f"and then attach SRigL"
            )


def wrappers_of(parameters: Iterable[Any]) -> list[Any]:
    """Return the DistributedDataParallel wrappers that average gradients of some parameters."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    ids = {id(parameter) for parameter in parameters}
    # Nothing leads from a module to its wrapper.
    found = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return [wrapper for wrapper in found if any(id(p) in ids for p in wrapper.parameters())]


def refuse_calls(wrappers: Iterable[Any]) -> None:
    """Let wrappers raise SriglError when they are called."""
    for wrapper in wrappers:
        wrapper.register_forward_pre_hook(_refuse_call)


def _refuse_call(*_: object) -> None:
    raise SriglError(
        "this DistributedDataParallel was made before SRigL replaced layers by condensed ones, "
        "and would not average their gradients; attach SRigL to the model first, then wrap it"
    )


# ---------------------------------------------------------------- parameters that are replaced


class ParameterWatch:
    """Notices that `fully_shard` has replaced parameters of a model.

    Parameters
    ----------
    model : torch.nn.Module
    weights : mapping of str to (torch.nn.Module, str)
        The module and the attribute of each weight of SRigL, by layer name.
    """

    def __init__(self, model: Any, weights: Mapping[str, tuple[Any, str]]) -> None:
        self._model, self._places = model, dict(weights)
        self._note()

    def _note(self) -> None:
        self._known = dict(self._model.named_parameters(remove_duplicate=False))
        self._weights = {name: _parameter(*place) for name, place in self._places.items()}

    def replaced(self) -> list[tuple[Any, Any]]:
        """Return the parameters of the model that DTensors have replaced since the last call.

        Returns
        -------
        list of (old, new)

        Raises
        ------
        SriglError
            If FSDP1 has flattened a weight, or FSDP2 has gathered one and cannot be told to let go.
        """
        if not self._has_changed():
            return []
        _reshard(self._model)
        for name, place in self._places.items():
            now = _parameter(*place)
            if _is_fsdp1(place[0]) or (now is None and any(map(_is_fsdp1, self._model.modules()))):
                raise SriglError(f"layer {name!r} {_FSDP1}")
            if is_sharded(self._weights[name]) and not is_sharded(now):
                raise SriglError(
                    f"layer {name!r}: fully_shard has gathered its weight for a forward pass; call "
                    f"step() before the next forward pass, or reshard() of the model before step()"
                )
        if not self._has_changed():
            return []
        known = self._known
        self._note()
        return [
            (known[name], now)
            for name, now in self._known.items()
            if is_sharded(now) and name in known and now is not known[name]
        ]

    def _has_changed(self) -> bool:
        for name, place in self._places.items():
            now = _parameter(*place)
            if now is not self._weights[name] or getattr(now, "_fsdp_flattened", False):
                return True
        return False


def _parameter(module: Any, attribute: str) -> Any | None:
    return module._parameters.get(attribute)


def _reshard(model: Any) -> None:
    """Let FSDP2 show a model's sharded parameters, as it does except around forward passes."""
    fsdp = _imported_fsdp()
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _is_fsdp1(module: Any) -> bool:
    """Return whether FSDP1 wraps a module, or has flattened its parameters."""
    fsdp = _imported_fsdp()
    return (
        (fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel))
        or "_flat_param" in module._parameters
        or any(getattr(p, "_fsdp_flattened", False) for p in module._parameters.values())
    )


def _imported_fsdp() -> Any:
    """Return PyTorch's module of FSDP if it has been imported, which takes long."""
    return sys.modules.get("torch.distributed.fsdp")


# ---------------------------------------------------------------- which optimisers step

_n_steps = 0
_last_steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _note_step(optimizer: Any, *_: object) -> None:
    global _n_steps
    _n_steps += 1
    _last_steps[optimizer] = _n_steps


register_optimizer_step_post_hook(_note_step)


def steps_of(optimizers: Iterable[Any]) -> tuple[int, int]:
    """Return the number of optimiser steps so far, and the last of them by one of these."""
    return _n_steps, max((_last_steps.get(part, 0) for part in optimizers), default=0)
