"""Convolutions computed by the condensed product."""

from __future__ import annotations

from typing import Any

from torch import nn

from srigl_core.errors import SriglError
from srigl_core.torch.linear import CondensedLinear

__all__ = ["GEOMETRY", "CondensedConv2d"]

GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
"""The attributes that `CondensedConv2d` shares with ``torch.nn.Conv2d``."""


class CondensedConv2d(nn.Module):  # type: ignore[misc] # torch is untyped here
    """A 2-D convolution whose output channels have a constant number of inputs each.

    The possible inputs of a channel are the ``in_channels * kh * kw`` numbers of its window, in the
    order of a flattened ``nn.Conv2d`` weight. A 1x1 convolution with stride 1 and no padding is a
    product over the channels. Any other is unfolded first, which makes ``kh * kw`` copies of the
    input.

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

    def __init__(
        self,
        linear: CondensedLinear,
        kernel_size: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        window = kernel_size[0] * kernel_size[1]
        if linear.in_features % window:
            raise SriglError(
                f"kernel_size={kernel_size} has {window} places, which do not divide the layer's "
                f"{linear.in_features} inputs; it needs in_channels * kh * kw inputs"
            )
        self.linear = linear
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        self.in_channels, self.out_channels = linear.in_features // window, linear.out_features

    @classmethod
    def like(cls, conv: Any, linear: CondensedLinear) -> CondensedConv2d:
        """Return a convolution with the geometry of a ``torch.nn.Conv2d``."""
        return cls(linear, **{name: getattr(conv, name) for name in GEOMETRY})

    @property
    def is_product(self) -> bool:
        """Whether the convolution is a product over the channels, with nothing to unfold."""
        return (
            self.kernel_size == (1, 1)
            and self.stride == (1, 1)
            and self.padding in ((0, 0), "same", "valid")
        )

    def forward(self, x: Any) -> Any:
        """Return the convolution of `x`, (batch, in_channels, height, width)."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise SriglError(
                f"x has shape {tuple(x.shape)}, but must be (batch, {self.in_channels}, height, "
                f"width)"
            )
        if self.is_product:
            return self.linear(x.movedim(1, -1)).movedim(-1, 1)
        left, right = self._paddings()
        x = nn.functional.pad(
            x,
            (left[1], right[1], left[0], right[0]),
            mode="constant" if self.padding_mode == "zeros" else self.padding_mode,
        )
        height, width = (
            (x.shape[2 + i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i]
            + 1
            for i in range(2)
        )
        windows = nn.functional.unfold(
            x, self.kernel_size, dilation=self.dilation, stride=self.stride
        )
        result = self.linear(windows.transpose(1, 2))
        return result.transpose(1, 2).unflatten(2, (height, width))

    def _paddings(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the rows and columns to add before the image, and those to add after it."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            total = [self.dilation[i] * (self.kernel_size[i] - 1) for i in range(2)]
            before = (total[0] // 2, total[1] // 2)
            return before, (total[0] - before[0], total[1] - before[1])
        padding: tuple[int, int] = self.padding  # type: ignore[assignment]
        return padding, padding

    def extra_repr(self) -> str:
        """Return the geometry."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
