"""Averages of weights (EMA, SWA) that follow the connections of the model they average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch.targets import submodule

__all__ = ["Averages"]


class Averages:
    """The averages of one model's sparse weights.

    After a mask update the numbers of an average are moved as optimiser state is (SPEC 4.8).
    """

    def __init__(self) -> None:
        self._tracked: list[dict[str, Any]] = []

    def add(
        self, average: Any, parameters: Mapping[str, Any], buffers: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Track the tensors of an average that has the names of the model's.

        Parameters
        ----------
        average : torch.nn.Module or mapping of str to torch.Tensor
            Names may begin with ``module.``, as in ``torch.optim.swa_utils.AveragedModel``.
        parameters, buffers : mapping of str to torch.Tensor
            The model's, by name. The average must have all the parameters; where it has the
            buffers, they must be equal.

        Returns
        -------
        dict of str to torch.Tensor
            The average's parameters.

        Raises
        ------
        SriglError
            If a parameter is missing or has another shape, or buffers differ.
        ValueTypeError
            If `average` is neither a module nor a mapping.
        """
        if not isinstance(average, nn.Module | Mapping):
            raise ValueTypeError(
                f"average must be a torch.nn.Module, or a mapping of names to tensors, got "
                f"{type(average).__name__}"
            )
        found = {name: _tensor(average, name) for name in parameters}
        for name, parameter in parameters.items():
            if found[name] is None or found[name].shape != parameter.shape:
                raise SriglError(
                    f"the average has no {name!r} of shape {tuple(parameter.shape)}; make it from "
                    f"the model that SRigL is attached to, and then track it"
                )
        others = {name: _tensor(average, name) for name in buffers}
        others = {name: tensor for name, tensor in others.items() if tensor is not None}
        for name, tensor in others.items():
            if not torch.equal(tensor.to(buffers[name].device), buffers[name]):
                raise SriglError(
                    f"{name!r} of the average differs from the model's: it was made before the "
                    f"last mask update; make it from the model as it is, and then track it"
                )
        self._tracked.append({**found, **others})
        return found

    def remap(
        self,
        changed: Mapping[str, Callable[[Any, float], Any]],
        new_weight: float,
        buffers: Mapping[str, Any],
    ) -> None:
        """Move the numbers of each average, in place.

        Parameters
        ----------
        changed : mapping of str to callable
            For a parameter, a function of the old tensor and the number that a new weight starts
            with, which returns the new tensor.
        new_weight : float
        buffers : mapping of str to torch.Tensor
            The model's, after the update.
        """
        with torch.no_grad():
            for tracked in self._tracked:
                for name, remap in changed.items():
                    tracked[name].copy_(remap(tracked[name], new_weight))
                for name, buffer in buffers.items():
                    if name in tracked:
                        tracked[name].copy_(buffer)

    def clear(self) -> None:
        """Track no more averages."""
        self._tracked.clear()


def _tensor(average: Any, name: str) -> Any:
    """Return a tensor of an average by the name that it has in the model, or None."""
    for full_name in (name, f"module.{name}"):
        if isinstance(average, Mapping):
            tensor = average.get(full_name)
        else:
            owner, _, attribute = full_name.rpartition(".")
            tensor = getattr(submodule(average, owner), attribute, None)
        if isinstance(tensor, torch.Tensor):
            return tensor
    return None
