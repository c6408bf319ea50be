"""What is known of layer types: their weights, where these have the neurons, what has none."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = [
    "ATTENTION_PROJECTIONS",
    "ROWS",
    "WeightLayout",
    "is_gpt_conv1d",
    "is_lazy",
    "is_transposed",
    "layout_of",
    "weight_names",
    "why_no_neurons",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

ATTENTION_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The weights that ``nn.MultiheadAttention`` has besides its layer ``out_proj``."""


@dataclass(frozen=True)
class WeightLayout:
    """Where a weight has its neurons.

    Parameters
    ----------
    transposed : bool
        Whether the weight is stored as (n_in, n_out / groups, ...), and not as (n_out, n_in, ...).
    groups : int
    """

    transposed: bool = False
    groups: int = 1

    def to_rows(self, tensor: Any) -> Any:
        """Return a tensor of the weight's shape with the neurons on the first axis."""
        if not self.transposed:
            return tensor
        n_in, n_out, *kernel = tensor.shape
        grouped = tensor.reshape(self.groups, n_in // self.groups, n_out, *kernel)
        rows = grouped.transpose(1, 2).reshape(-1, n_in // self.groups, *kernel)
        return rows.contiguous()

    def from_rows(self, rows: Any) -> Any:
        """Return a tensor with the neurons on the first axis in the weight's shape."""
        if not self.transposed:
            return rows
        n_out, n_in, *kernel = rows.shape
        grouped = rows.reshape(self.groups, n_out // self.groups, n_in, *kernel)
        return grouped.transpose(1, 2).reshape(-1, n_out // self.groups, *kernel).contiguous()


_A_WEIGHT = "a sparse weight is a matrix or a convolution's kernel"
_STORED_TRANSPOSED = (
    "({type}) has a weight of shape {shape}, which is (in_features, out_features), but a neuron "
    "must be a row; store the weight as (out_features, in_features), or exclude it"
)

ROWS = WeightLayout()
"""The layout of ``nn.Linear`` and of convolutions: each row of the weight is a neuron."""


def is_gpt_conv1d(module: Any) -> bool:
    """Return whether a module is GPT-2's ``Conv1D``, a linear layer whose weight is (in, out).

    The class of ``transformers`` is recognised, and any other of that name with a matrix as weight.
    """
    utilities = sys.modules.get("transformers.pytorch_utils")
    if utilities is not None and isinstance(module, getattr(utilities, "Conv1D", ())):
        return True
    if not any(cls.__name__ == "Conv1D" for cls in type(module).__mro__):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and not is_lazy(weight) and weight.ndim == 2


def is_lazy(parameter: Any) -> bool:
    """Return whether a parameter has no shape yet."""
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def weight_names(module: Any) -> tuple[str, ...]:
    """Return the names of the parameters that are made sparse by default; none for most types."""
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION_PROJECTIONS
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)) or is_gpt_conv1d(module):
        return ("weight",)
    is_quantised = "quantized" in type(module).__module__
    return ("weight",) if is_quantised and callable(getattr(module, "weight", None)) else ()


def layout_of(module: Any, attribute: str) -> WeightLayout:
    """Return where a parameter of a module has its neurons; in unknown types these are the rows."""
    if attribute == "weight" and isinstance(module, _TRANSPOSED):
        return WeightLayout(transposed=True, groups=module.groups)
    if attribute == "weight" and is_gpt_conv1d(module):
        return WeightLayout(transposed=True)
    return ROWS


def is_transposed(module: Any) -> bool:
    """Return whether a module is a transposed convolution."""
    return isinstance(module, _TRANSPOSED)


def why_no_neurons(module: Any, attribute: str, shape: tuple[int, ...]) -> str | None:
    """Return why a parameter cannot have a constant fan-in, or None.

    The reason continues a sentence that begins with the layer.
    """
    what = type(module).__name__
    if isinstance(module, _EMBEDDINGS):
        return f"is a table of embeddings ({what}), which has no neurons; exclude it"
    if len(shape) not in (2, 3, 4, 5):
        return (
            f"has a weight of shape {shape}; a sparse weight is a matrix or a convolution's kernel"
        )
    if 0 in shape:
        return f"has a weight of shape {shape}, which is empty; exclude it"
    is_bias = isinstance(module, nn.MultiheadAttention) and attribute in ("bias_k", "bias_v")
    if is_bias or attribute == "bias":
        return f"is a bias of shape {shape}; {_A_WEIGHT}"
    if what.endswith("Norm") or isinstance(module, nn.LayerNorm | nn.PReLU):
        return f"({what}) scales its inputs one by one and has no neurons; exclude it"
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    has_other_layout = bool(weight_names(module)) and not isinstance(module, nn.Linear)
    is_stored_transposed = attribute == "weight" and shape == sizes and sizes[0] != sizes[1]
    if is_stored_transposed and not has_other_layout:
        return _STORED_TRANSPOSED.format(type=what, shape=shape)
    return None
