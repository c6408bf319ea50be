"""The layers that an `SRigL` trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from srigl_core._training.config import TrainingConfig
from srigl_core.torch.replacement import why_not_condensed
from srigl_core.torch.selection import Entry
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
        return why_not_condensed(target) if condensed and not target.is_condensed else None

    return find_targets(
        model,
        include,
        exclude,
        unsupported=unsupported,
        named=[*options, *named],
        kept=[name for name, option in options.items() if option.dense],
    )
