"""Data-parallel training: checks that all ranks have the same masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from srigl_core.errors import SriglError
from srigl_core.torch.sharded_tensors import is_sharded

__all__ = ["agreed", "check_agreement", "mean_of_ranks", "n_ranks", "true_on_a_rank"]


def n_ranks(group: Any | None) -> int:
    """Return how many processes train together: 1 without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return int(dist.get_world_size(group))


def check_agreement(digest: Callable[[], dict[str, str]], group: Any | None) -> None:
    """Compare the masks of all ranks by digests; the ranks exchange eight bytes for each layer.

    Raises
    ------
    SriglError
        On all ranks if a rank differs from rank 0. The message names the ranks and the first layer.
    """
    if n_ranks(group) == 1:
        return
    digests = digest()
    numbers = [
        int.from_bytes(hashlib.sha256(d.encode()).digest()[:8], "little", signed=True)
        for d in digests.values()
    ]
    own = torch.tensor(numbers, dtype=torch.int64, device=_device(group))
    by_rank = [torch.empty_like(own) for _ in range(n_ranks(group))]
    dist.all_gather(by_rank, own, group=group)
    wrong = [rank for rank, other in enumerate(by_rank) if not torch.equal(other, by_rank[0])]
    if wrong:
        first = int((by_rank[wrong[0]] != by_rank[0]).nonzero()[0, 0])
        raise SriglError(
            f"the masks of rank {', '.join(map(str, wrong))} differ from those of rank 0, first in "
            f"layer {list(digests)[first]!r}; every rank needs the same weights, seed, settings "
            f"and averaged gradients (is the model wrapped in DistributedDataParallel?)"
        )


def mean_of_ranks(block: Any, group: Any | None) -> Any:
    """Return the mean of a tensor over all ranks, with equal bits on each; may overwrite it."""
    ranks = n_ranks(group)
    if ranks > 1:
        dist.all_reduce(block, group=group)
        block /= ranks
    return block


def true_on_a_rank(conditions: dict[str, bool], group: Any | None) -> dict[str, bool]:
    """Return which conditions are true on at least one rank."""
    if n_ranks(group) == 1:
        return conditions
    flags = torch.tensor(list(conditions.values()), dtype=torch.int32, device=_device(group))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(conditions, (bool(flag) for flag in flags), strict=True))


def agreed(
    conditions: dict[str, bool], tensors: Iterable[Any], group: Any | None
) -> dict[str, bool]:
    """Return which conditions on a rank's parts of tensors are true; of whole tensors, if sharded.

    So ranks with different parts of a tensor decide alike.
    """
    if conditions and any(map(is_sharded, tensors)):
        return true_on_a_rank(conditions, group)
    return conditions


def _device(group: Any | None) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"
