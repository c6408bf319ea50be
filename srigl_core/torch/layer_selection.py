"""The layers that an `SRigL` trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from srigl_core._training.config import TrainingConfig
from srigl_core.errors import SriglError
from srigl_core.torch.replacement import why_not_condensed
from srigl_core.torch.selection import Entry
from srigl_core.torch.sharded_tensors import is_sharded
from srigl_core.torch.targets import Selection, Target, find_targets

__all__ = ["select_layers"]


def select_layers(
    model: Any,
    include: Iterable[Entry] | Entry | None,
    exclude: Iterable[Entry] | Entry,
    config: TrainingConfig | None,
    named: Iterable[str] = (),
    *,
    condensed: bool,
) -> Selection:
    """Return the layers to train, and why the model's other matrices are left dense.

    Parameters
    ----------
    model, include, exclude, config
        As in `SRigL`. The layers for which `config` has options must be trainable.
    named : iterable of str
        Other layers that must be trainable: those with given masks.
    condensed : bool
        Whether they are replaced by condensed ones.

    Raises
    ------
    SriglError
        If a layer that is named cannot be trained, an entry matches nothing, or no layer is left.
    """
    options = config.layers if isinstance(config, TrainingConfig) else {}

    def unsupported(target: Target) -> str | None:
        if not target.parameter.requires_grad:
            return "is frozen (requires_grad=False); it cannot be trained"
        if not condensed and target.is_condensed:
            return (
                "is condensed; train it with mode='condensed', or call to_masked_dense(model) first"
            )
        is_ready = not condensed or target.is_condensed or is_sharded(target.parameter)
        return None if is_ready else why_not_condensed(target)

    selection = find_targets(
        model,
        include,
        exclude,
        unsupported=unsupported,
        named=[*options, *named],
        kept=[name for name, option in options.items() if option.dense],
    )
    for name, target in selection.targets.items() if condensed else ():
        if is_sharded(target.parameter) and not target.is_condensed:
            raise SriglError(
                f"layer {name!r} is sharded (its weight is a DTensor of fully_shard, or of tensor "
                f"parallelism), and cannot be replaced by a condensed layer; attach SRigL first, "
                f"then call fully_shard, or use mode='masked'"
            )
    return selection
