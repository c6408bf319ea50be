"""Markers in the states of Hugging Face models, whose loaders would go on from random weights.

``from_pretrained`` and ``Trainer.train(resume_from_checkpoint=...)`` only log the names that the
model does not have, and leave weights that they do not find as they were drawn. But a tensor of
another shape is an error. So the state of a model with condensed layers has a tensor of one number
under the name of each dense weight that the layers replace.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from srigl_core.torch.attention import WEIGHT_NAMES, CondensedMultiheadAttention
from srigl_core.torch.weight_view import HasDenseWeight, is_marker

__all__ = ["mark_states"]


def mark_states(model: Any) -> None:
    """Let the states of a model's parts that have ``save_pretrained`` have markers."""
    for module in model.modules():
        is_marked = _add_markers in module._state_dict_hooks.values()
        if hasattr(module, "save_pretrained") and not is_marked:
            module.register_state_dict_post_hook(_add_markers)
            module.register_load_state_dict_pre_hook(_remove_markers)


def _add_markers(module: Any, state: Any, prefix: str, _: Any) -> None:
    # A model that is about to be loaded has meta tensors, and needs no marker.
    if not any(tensor.is_meta for tensor in module.parameters()):
        state.update({prefix + name: torch.zeros(1) for name in _dense_names(module)})


def _remove_markers(module: Any, state: Any, prefix: str, *_: Any) -> None:
    for name in _dense_names(module):
        if is_marker(state.get(prefix + name)):
            del state[prefix + name]


def _dense_names(model: Any) -> Iterator[str]:
    """Yield the names of the weights that a dense model has in place of condensed layers."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, HasDenseWeight):
            yield f"{name}.weight"
        elif isinstance(module, CondensedMultiheadAttention):
            present = WEIGHT_NAMES.keys() & module._modules.keys()
            yield from (f"{name}.{WEIGHT_NAMES[layer]}" for layer in present)
