"""Tensors that are spread over processes: DTensors, as `fully_shard` makes them of parameters.

PyTorch's reductions of a DTensor are often those of one rank. So numbers are looked at in a rank's
own part, or after they have been gathered.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from srigl_core.errors import SriglError

__all__ = ["check_not_sharded", "is_sharded", "laid_out", "local", "may_be_viewed", "whole"]


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # its import takes long
    return module is not None and isinstance(tensor, module.DTensor)


def check_not_sharded(model: Any) -> None:
    """Raise SriglError if a model's parameters are sharded."""
    parameters = model.named_parameters() if isinstance(model, nn.Module) else ()
    for name, parameter in parameters:
        if is_sharded(parameter):
            raise SriglError(
                f"parameter {name!r} is sharded over processes (fully_shard); load the whole state "
                f"(torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                f"full_state_dict=True) into a model that is not sharded, and pass that one"
            )


def local(tensor: Any) -> Any:
    """Return a tensor's part on this rank, without a graph; other tensors are whole."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Any:
    """Return a tensor with all its parts. Every rank must call this."""
    if not is_sharded(tensor):
        return tensor
    # Parameters that are offloaded to the host are gathered on the device.
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


def laid_out(tensor: Any, like: Any) -> Any:
    """Return a tensor on the device of another one of its shape, and spread as that one is.

    Every rank must call this, with the same numbers.
    """
    if is_sharded(like) and not _are_alike(tensor, like):
        from torch.distributed.tensor import distribute_tensor

        device = like.device_mesh.device_type
        spread = whole(tensor).detach().to(device)
        tensor = distribute_tensor(spread, like.device_mesh, like.placements, src_data_rank=None)
    elif not is_sharded(like):
        tensor = whole(tensor)
    return tensor.to(like.device)


def may_be_viewed(tensor: Any) -> Any:
    """Return a tensor on the same memory of which NumPy may have views.

    A view locks the size of a tensor's storage, but `fully_shard` frees storages by resizing them.
    """
    if tensor.is_cpu and dist.is_available() and dist.is_initialized():
        return torch.from_dlpack(tensor.detach())  # has a storage of its own
    return tensor


def _are_alike(one: Any, other: Any) -> bool:
    return (
        is_sharded(one)
        and one.device_mesh == other.device_mesh
        and one.placements == other.placements
    )
