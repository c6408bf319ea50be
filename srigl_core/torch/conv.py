"""Convolutions computed by the condensed product."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from srigl_core.errors import SriglError
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.weight_view import HasDenseWeight

__all__ = ["GEOMETRY", "CondensedConv", "CondensedConv1d", "CondensedConv2d"]

GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
"""The attributes that a condensed convolution shares with a dense one."""


class CondensedConv(HasDenseWeight, nn.Module):  # type: ignore[misc] # torch is untyped here
    """The part that condensed convolutions of one and two dimensions share."""

    _axes: tuple[str, ...]
    groups = 1
    transposed = False

    def __init__(
        self,
        linear: CondensedLinear,
        kernel_size: tuple[int, ...],
        *,
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | str | None = None,
        dilation: tuple[int, ...] | None = None,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        ones = (1,) * len(self._axes)
        window = math.prod(kernel_size)
        if linear.in_features % window:
            sizes = " * ".join(["in_channels", *(f"k{axis[0]}" for axis in self._axes)])
            raise SriglError(
                f"kernel_size={kernel_size} has {window} places, which do not divide the layer's "
                f"{linear.in_features} inputs; it needs {sizes} inputs"
            )
        self.linear = linear
        self.kernel_size = kernel_size
        self.stride = ones if stride is None else stride
        self.padding = (0,) * len(ones) if padding is None else padding
        self.dilation = ones if dilation is None else dilation
        self.padding_mode = padding_mode
        self.in_channels, self.out_channels = linear.in_features // window, linear.out_features

    @classmethod
    def like(cls, conv: Any, linear: CondensedLinear) -> Any:
        """Return a convolution with the geometry of a dense one."""
        return cls(linear, **{name: getattr(conv, name) for name in GEOMETRY})

    @property
    def bias(self) -> Any:
        """The bias of the linear layer."""
        return self.linear.bias

    def _weight_of(self) -> tuple[Any, tuple[int, ...]]:
        return self.linear, (self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def is_product(self) -> bool:
        """Whether the convolution is a product over the channels, with nothing to unfold."""
        return math.prod(self.kernel_size) == 1

    def forward(self, x: Any) -> Any:
        """Return the convolution of `x`, (batch, in_channels, ...)."""
        n_axes = len(self._axes)
        if x.ndim != n_axes + 2 or x.shape[1] != self.in_channels:
            raise SriglError(
                f"x has shape {tuple(x.shape)}, but must be (batch, {self.in_channels}, "
                f"{', '.join(self._axes)})"
            )
        before, after = self._paddings()
        if any((*before, *after)):
            sides = zip(reversed(before), reversed(after), strict=True)
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = nn.functional.pad(x, [n for side in sides for n in side], mode=mode)
        if self.is_product:
            x = x[(slice(None), slice(None), *(slice(None, None, step) for step in self.stride))]
            return self.linear(x.movedim(1, -1)).movedim(-1, 1)
        sizes = [
            (x.shape[2 + i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i]
            + 1
            for i in range(n_axes)
        ]
        # unfold takes images; a signal is an image of height 1.
        ones = (1,) * (2 - n_axes)
        windows = nn.functional.unfold(
            x.unsqueeze(2) if ones else x,
            (*ones, *self.kernel_size),
            dilation=(*ones, *self.dilation),
            stride=(*ones, *self.stride),
        )
        result = self.linear(windows.transpose(1, 2))
        return result.transpose(1, 2).unflatten(2, sizes)

    def _paddings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how much to add before each axis, and how much after it."""
        if self.padding == "valid":
            return (0,) * len(self._axes), (0,) * len(self._axes)
        if self.padding == "same":
            axes = zip(self.dilation, self.kernel_size, strict=True)
            total = [dilation * (size - 1) for dilation, size in axes]
            before = tuple(n // 2 for n in total)
            return before, tuple(n - first for n, first in zip(total, before, strict=True))
        padding: tuple[int, ...] = self.padding  # type: ignore[assignment]
        return padding, padding

    def extra_repr(self) -> str:
        """Return the geometry."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class CondensedConv1d(CondensedConv):
    """A 1-D convolution whose output channels have a constant number of inputs each.

    The possible inputs of a channel are the ``in_channels * k`` numbers of its window, in the order
    of a flattened ``nn.Conv1d`` weight. With a kernel of one place it is a product over the
    channels. Any other is unfolded first, which makes ``k`` copies of the input.

    Parameters
    ----------
    linear : CondensedLinear
        Maps the ``in_channels * k`` numbers of a window to the output channels.
    kernel_size, stride, dilation : tuple of int
    padding : tuple of int, or {"same", "valid"}
    padding_mode : {"zeros", "reflect", "replicate", "circular"}

    Raises
    ------
    SriglError
        If `linear` has no whole number of input channels.

    Notes
    -----
    SPEC 1: a convolution's weight is flattened to (out, in * k).
    """

    _axes = ("length",)


class CondensedConv2d(CondensedConv):
    """A 2-D convolution whose output channels have a constant number of inputs each.

    The possible inputs of a channel are the ``in_channels * kh * kw`` numbers of its window, in the
    order of a flattened ``nn.Conv2d`` weight. A 1x1 convolution is a product over the channels. Any
    other is unfolded first, which makes ``kh * kw`` copies of the input.

    Parameters
    ----------
    linear : CondensedLinear
        Maps the ``in_channels * kh * kw`` numbers of a window to the output channels.
    kernel_size, stride, dilation : tuple of int
    padding : tuple of int, or {"same", "valid"}
    padding_mode : {"zeros", "reflect", "replicate", "circular"}

    Raises
    ------
    SriglError
        If `linear` has no whole number of input channels.

    Notes
    -----
    SPEC 1: a convolution's weight is flattened to (out, in * kh * kw).
    """

    _axes = ("height", "width")
