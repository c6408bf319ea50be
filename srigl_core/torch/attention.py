"""Attention whose projections are computed by the condensed product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from srigl_core.errors import SriglError
from srigl_core.torch.layer_types import ATTENTION_PROJECTIONS

__all__ = ["PROJECTION_LAYERS", "WEIGHT_NAMES", "CondensedMultiheadAttention"]

PROJECTION_LAYERS = {name: name.removesuffix("_weight") for name in ATTENTION_PROJECTIONS}
"""The name of the condensed layer in place of each projection's weight."""

WEIGHT_NAMES = {layer: name for name, layer in PROJECTION_LAYERS.items()}
"""The name of the projection's weight in place of each condensed layer."""

_SETTINGS = (
    *("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout"),
    *("batch_first", "add_zero_attn"),
)


class CondensedMultiheadAttention(nn.Module):  # type: ignore[misc] # torch is untyped here
    """An ``nn.MultiheadAttention`` with projections that may be condensed.

    Parameters, arguments and results are those of ``nn.MultiheadAttention``. A projection is either
    its dense parameter, or a `CondensedLinear` without a bias that is called ``in_proj``,
    ``q_proj``, ``k_proj`` or ``v_proj``. The attention itself is computed as
    ``nn.MultiheadAttention`` computes it outside of its fast path.

    Parameters
    ----------
    attention : torch.nn.MultiheadAttention
        Its parameters and its ``out_proj`` become those of this module.

    Notes
    -----
    If query, key and value differ, each is multiplied by the whole ``in_proj``, and the part of the
    result that is needed is used.
    """

    _qkv_same_embed_dim = False
    """So that nn.TransformerEncoderLayer does not compute with the weights in its fast path."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        for name in _SETTINGS:
            setattr(self, name, getattr(attention, name))
        self.bias_k: Any = None
        self.bias_v: Any = None
        for name, parameter in attention._parameters.items():
            self.__dict__.pop(name, None)
            self.register_parameter(name, parameter)
        self.out_proj = attention.out_proj
        self.training = attention.training

    def __getattr__(self, name: str) -> Any:
        layer = PROJECTION_LAYERS.get(name)
        if layer is not None and layer in self._modules:
            return self._modules[layer].weight
        return super().__getattr__(name)

    def set_layer(self, name: str, layer: Any) -> None:
        """Set ``out_proj``, or a layer in place of a projection's weight."""
        self._parameters.pop(f"{name}_weight", None)
        setattr(self, name, layer)
        if "out_proj" in self._modules:  # the last of the layers, as in nn.MultiheadAttention
            self._modules["out_proj"] = self._modules.pop("out_proj")

    def to_dense(self) -> Any:
        """Return an ``nn.MultiheadAttention`` with the masked dense weights."""
        dense = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.in_proj_bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        for name in dense._parameters:
            layer = self._modules.get(PROJECTION_LAYERS.get(name, ""))
            if layer is None:
                dense._parameters[name] = self._parameters.get(name)
            else:
                dense._parameters[name] = layer.to_linear().weight
        out = self.out_proj
        linear = out.to_linear() if hasattr(out, "to_linear") else out
        dense.out_proj.weight, dense.out_proj.bias = linear.weight, linear.bias
        dense.out_proj.training = out.training
        dense.training = self.training
        return dense

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any | None = None,
        need_weights: bool = True,
        attn_mask: Any | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any | None]:
        """Return the outputs and, if `need_weights`, the attention weights.

        The arguments are those of ``nn.MultiheadAttention.forward``.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise SriglError(
                "condensed attention takes no nested tensors; pad them, and pass key_padding_mask"
            )
        if is_causal and attn_mask is None:
            raise SriglError("is_causal=True is a hint about attn_mask; pass attn_mask too")
        is_batched = query.ndim == 3
        q, k, v = self._projected(query, key, value)
        if not is_batched:
            q, k, v = (x.unsqueeze(1) for x in (q, k, v))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        n_batch, n_queries = q.shape[1], q.shape[0]
        mask = _merged_mask(attn_mask, key_padding_mask, q, self.num_heads, k.shape[0])
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(1, n_batch, -1)])
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(1, n_batch, -1)])
        if self.add_zero_attn:
            k, v = (nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        if mask is not None and k.shape[0] > mask.shape[-1]:
            mask = nn.functional.pad(mask, (0, k.shape[0] - mask.shape[-1]))
        # (batch, heads, length, head_dim)
        heads = self.num_heads, self.head_dim
        q, k, v = (x.unflatten(-1, heads).permute(1, 2, 0, 3) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = nn.functional.dropout(weights, dropout) if dropout else weights
            heads_out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            heads_out = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal
            )
        joined = heads_out.permute(2, 0, 1, 3).reshape(n_queries, n_batch, self.embed_dim)
        result = self.out_proj(joined)
        if not is_batched:
            return result.squeeze(1), weights
        return (result.transpose(0, 1) if self.batch_first else result), weights

    def _projected(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        """Return the projections of query, key and value, with their biases."""
        biases: Any = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        if "in_proj" in self._modules or self._parameters.get("in_proj_weight") is not None:
            parts = self._packed(*inputs)
        else:
            parts = [self._product(n, x) for n, x in zip("qkv", inputs, strict=True)]
        added = zip(parts, biases, strict=True)
        q, k, v = (x if bias is None else x + bias.to(x.dtype) for x, bias in added)
        return q, k, v

    def _packed(self, query: Any, key: Any, value: Any) -> list[Any]:
        """Return the three products with the packed ``in_proj``."""
        if "in_proj" not in self._modules:
            weights = self.in_proj_weight.chunk(3)
            inputs = (query, key, value)
            return [nn.functional.linear(x, w) for x, w in zip(inputs, weights, strict=True)]
        queries = self.in_proj(query).chunk(3, -1)
        keys = queries if key is query else self.in_proj(key).chunk(3, -1)
        if value is query:
            values = queries
        elif value is key:
            values = keys
        else:
            values = self.in_proj(value).chunk(3, -1)
        return [queries[0], keys[1], values[2]]

    def _product(self, which: str, x: Any) -> Any:
        layer = self._modules.get(f"{which}_proj")
        if layer is not None:
            return layer(x)
        return nn.functional.linear(x, self._parameters[f"{which}_proj_weight"])

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def _merged_mask(
    attn_mask: Any | None, key_padding_mask: Any | None, q: Any, n_heads: int, n_keys: int
) -> Any | None:
    """Return both masks as numbers to add to the scores, (batch, heads, queries, keys)."""
    n_queries, n_batch = q.shape[:2]
    merged = None
    if attn_mask is not None:
        whole = (n_batch * n_heads, n_queries, n_keys)
        if tuple(attn_mask.shape) not in (whole, whole[1:]):
            raise SriglError(
                f"attn_mask has shape {tuple(attn_mask.shape)}, but must be {whole[1:]} or {whole}"
            )
        merged = _additive(attn_mask, q.dtype)
        if attn_mask.ndim == 3:
            merged = merged.unflatten(0, (n_batch, n_heads))
        else:
            merged = merged[None, None]
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (n_batch, n_keys):
            raise SriglError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, but must be "
                f"{(n_batch, n_keys)}"
            )
        padding = _additive(key_padding_mask, q.dtype)[:, None, None]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Any, dtype: Any) -> Any:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise SriglError(f"a mask must be of bool or of floating-point numbers, got {mask.dtype}")
    return mask.to(dtype)
