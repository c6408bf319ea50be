"""The quantised layer as a PyTorch module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from srigl_core._activations import activation_named
from srigl_core._arrays.checks import as_float_array, check_choice
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._product_spec import QUANTIZED_INPUTS, check_int8_fan_in
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch.eager import is_eager
from srigl_core.torch.linear import dense_like
from srigl_core.torch.ops import multiply_quantized, quantized_linear
from srigl_core.torch.quantized_plans import quantized_plan_of, quantized_weight
from srigl_core.torch.tensors import as_numpy, from_numpy, numpy_dtype
from srigl_core.torch.weight_view import HasDenseWeight

__all__ = ["QuantizedLinear"]

_WEIGHT = ("values", "scale", "indices", "active")


class QuantizedLinear(HasDenseWeight, nn.Module):  # type: ignore[misc] # torch is untyped here
    """A condensed linear layer with 8-bit values and a scale for each neuron, for inference.

    It computes ``y = activation(x @ (W * M).T + bias)`` with ``W = scale * values``. Nothing in it
    can be trained, and a gradient that passes through it is an error. `srigl_core.torch.quantize`
    makes one of each condensed layer of a model.

    Parameters
    ----------
    weight : QuantizedWeight, (out_features, in_features)
    bias : torch.Tensor or array, (out_features,), or None
        Copied.
    inputs : {"float", "int8"}
        Whether inputs stay as they are, or each row of them is quantised too.
    activation : str or None
        One of `srigl_core.contract.ACTIVATIONS`. The product's kernel applies it.
    dtype : torch.dtype
        Type of the results: ``torch.promote_types(x.dtype, dtype)``.
    device : torch.device or None

    Attributes
    ----------
    values : torch.Tensor of int8, (n_active, fan_in)
        The active weights; a buffer, as the other tensors.
    scale : torch.Tensor of float32, (n_active,)
    indices : torch.Tensor of int32, (n_active, fan_in)
        The column of each value, ascending within a row.
    active : torch.Tensor of int32, (n_active,)
        The rows that are not ablated, ascending.
    bias : torch.Tensor, (out_features,), or None
    dtype : torch.dtype
        Changed by ``model.half()`` and its like, which leave the scale in float32.
    weight : torch.Tensor, (out_features, in_features)
        The masked dense weight for code that looks at it. Read-only, without a gradient.

    Raises
    ------
    SriglError
        If `bias` has the wrong shape, an argument is unknown, or the fan-in is too large for
        quantised inputs.
    ValueTypeError
        If `weight` is no quantised weight.

    Notes
    -----
    SPEC 6. The plan of the product is made again when PyTorch has counted a write to a tensor. It
    does not count writes through ``.data`` or views of other libraries, so these are not seen.

    Examples
    --------
    >>> import torch, srigl_core
    >>> weight = srigl_core.CondensedWeight.random((4, 16), fan_in=3, rng=0)
    >>> layer = QuantizedLinear(weight.quantize(), inputs="int8")
    >>> layer
    QuantizedLinear(in_features=16, out_features=4, fan_in=3, n_active=4, bias=False, inputs=int8)
    >>> layer(torch.ones(2, 16)).shape
    torch.Size([2, 4])
    """

    scale: Any

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Any | None = None,
        *,
        inputs: str = "float",
        activation: str | None = None,
        dtype: Any = torch.float32,
        device: Any | None = None,
    ) -> None:
        if not isinstance(weight, QuantizedWeight):
            raise ValueTypeError(
                f"weight must be a QuantizedWeight, got {type(weight).__name__}; "
                f"CondensedWeight.quantize() makes one"
            )
        check_choice(inputs, "inputs", QUANTIZED_INPUTS)
        if inputs == "int8":
            check_int8_fan_in(weight.fan_in)
        activation_named(activation)
        numpy_dtype(dtype, "results")
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.inputs, self.activation, self.dtype = inputs, activation, dtype
        arrays = {
            **weight.value_arrays,
            "indices": weight.indices.astype(np.int32),
            "active": weight.active.astype(np.int32),
        }
        # PyTorch does not count writes to tensors that are made in inference mode.
        with torch.inference_mode(False):
            for name in _WEIGHT:
                # Copied, since the weight's arrays are read-only.
                self.register_buffer(name, from_numpy(arrays[name].copy()).to(device))
            self.register_buffer("bias", None if bias is None else self._checked_bias(bias))

    def _checked_bias(self, bias: Any) -> Any:
        is_tensor = isinstance(bias, torch.Tensor)
        numbers = from_numpy(as_float_array(as_numpy(bias) if is_tensor else bias, "bias"))
        if numbers.shape != (self.out_features,):
            raise SriglError(
                f"bias has shape {tuple(numbers.shape)}, but must have {(self.out_features,)}"
            )
        return numbers.to(device=self.values.device, copy=True)

    @property
    def n_active(self) -> int:
        """Number of neurons that are not ablated."""
        return int(self.values.shape[0])

    @property
    def fan_in(self) -> int:
        """Inputs of each active neuron, k."""
        return int(self.values.shape[1])

    def to_quantized(self) -> QuantizedWeight:
        """Return a copy of the weight in the host's memory."""
        return quantized_weight(self._tensors(), (self.out_features, self.in_features))

    def to_condensed(self) -> CondensedWeight:
        """Return the weight ``scale * values``, rounded to `dtype`, in the host's memory."""
        return self.to_quantized().dequantize(numpy_dtype(self.dtype))

    def to_linear(self) -> Any:
        """Return a `torch.nn.Linear` with the masked dense weight and without an activation.

        Device and mode are kept, and nothing requires a gradient.
        """
        bias = None if self.bias is None else self.bias.clone()
        return dense_like(self, self.dense_of(self.values), bias)

    def dense_of(self, values: Any) -> Any:
        """Return the masked dense weight of the layer's `values`, rounded to `dtype`."""
        dense = values.new_zeros((self.out_features, self.in_features), dtype=self.dtype)
        numbers = (self.scale.double()[:, None] * values).to(self.dtype)
        dense[self.active.long()[:, None], self.indices.long()] = numbers
        return dense

    def _weight_of(self) -> tuple[Any, tuple[int, ...]]:
        return self, (self.out_features, self.in_features)

    def _tensors(self) -> tuple[Any, ...]:
        return tuple(map(self._buffers.__getitem__, _WEIGHT))  # faster than attribute access

    def plan(self) -> Any:
        """Return the plan of the layer's product."""
        shape = (self.out_features, self.in_features)
        return quantized_plan_of(self._tensors(), shape, self.inputs)

    def product(self, x: Any, activation: str) -> Any:
        """Return the product with `x` and an activation."""
        arguments = (
            x,
            *self._tensors(),
            self._buffers["bias"],
            self.out_features,
            self.in_features,
            self.dtype,
            self.inputs,
            activation,
        )
        has_gradient = torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad
        is_plain = not has_gradient and is_eager(*arguments)
        return (multiply_quantized if is_plain else quantized_linear)(*arguments)

    def forward(self, x: Any) -> Any:
        """Return the product with `x`, (..., in_features), as (..., out_features)."""
        return self.product(x, self.activation or "none")

    def extra_repr(self) -> str:
        """Return sizes, kind of inputs, activation and whether there is a bias."""
        names = ("in_features", "out_features", "fan_in", "n_active")
        sizes = [f"{name}={getattr(self, name)}" for name in names]
        activation = [] if self.activation is None else [f"activation={self.activation}"]
        facts = [f"bias={self.bias is not None}", f"inputs={self.inputs}", *activation]
        return ", ".join([*sizes, *facts])

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        scale = self.scale
        like = fn(torch.empty(0, dtype=self.dtype, device=scale.device))
        super()._apply(fn, recurse)
        self.dtype = like.dtype
        if self.scale.dtype is not torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_state(self, state: Any, prefix: str) -> None:
        """Raise SriglError if the layer would have no valid weight after loading `state`."""
        if not any(prefix + name in state for name in _WEIGHT):
            return  # PyTorch lists the names that are missing
        remedy = "quantize the model in the same way as the one whose state it is"
        tensors = {name: state.get(prefix + name, self._buffers[name]) for name in _WEIGHT}
        for name, tensor in tensors.items():
            own = self._buffers[name]
            # Numbers of another type would be rounded.
            if (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
                raise SriglError(
                    f"{prefix + name} of the state is {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}, but the quantised layer's is {own.dtype} of shape "
                    f"{tuple(own.shape)}; {remedy}"
                )
        if any(tensor.is_meta for tensor in tensors.values()):
            return
        try:
            quantized_weight(tuple(tensors.values()), (self.out_features, self.in_features))
        except SriglError as error:
            raise type(error)(
                f"the state has no valid weight {prefix.rstrip('.')!r}: {error}"
            ) from error
