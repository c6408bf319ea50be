"""The SRigL mask update of one layer on the device, bit for bit that of the reference (SPEC 4).

`srigl_update` has the same steps, in the same order, as `srigl_core.reference.mask_update`. The
host needs only the counts of 4.2 and the salient counts of 4.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.backends.cupy_gpu.conversions import BLOCKS_A_PROCESSOR, THREADS, launch_over
from srigl_core.backends.cupy_gpu.device import Device
from srigl_core.backends.cupy_gpu.variants import BIT_TYPES, Variant
from srigl_core.reference.mask_update import ablation_threshold, keep_and_prune, new_fan_in

__all__ = ["count_nonfinite", "srigl_update"]

DIGIT_BITS = 8

BY_MAGNITUDE, BY_GRADIENT, KEPT = 1, 2, 4
ACTIVE, INACTIVE, ALL, SURVIVING = range(4)


def srigl_update(
    weight: Any, grad: Any, mask: Any, settings: UpdateSettings, *, device: Device
) -> MaskUpdate:
    """Update one layer; the arguments are checked, two-dimensional and contiguous.

    Parameters
    ----------
    weight, grad : device arrays, (n_out, n_in)
    mask : device array of bool, (n_out, n_in)
    settings : UpdateSettings
    device : Device

    Returns
    -------
    MaskUpdate
        `mask` and `weight` are on the device, the arrays about rows on the host.
    """
    layer = _Layer(device, weight, grad, mask)
    n_active, n_nonzero = layer.count_weights()
    n_keep, n_prune = keep_and_prune(n_active, n_nonzero, settings.drop_fraction)
    layer.mark_largest(weight, ACTIVE, n_keep, BY_MAGNITUDE)
    scope = INACTIVE if settings.saliency_scope == "inactive" else ALL
    layer.mark_largest(grad, scope, n_prune, BY_GRADIENT)
    salient_counts = layer.count_marks(BY_MAGNITUDE | BY_GRADIENT)
    threshold = ablation_threshold(salient_counts, settings, layer.n_in)
    fan_in = new_fan_in(salient_counts, threshold, settings, layer.n_in)
    survives = salient_counts >= threshold
    layer.keep_rows(survives)
    layer.mark_largest(weight, SURVIVING, n_keep, KEPT)
    layer.fill_rows(weight, fan_in, grows=False)
    layer.fill_rows(grad, fan_in, grows=True)
    new_mask, new_weight, was_active, n_pruned, n_grown = layer.remap(settings.grown_init)
    return MaskUpdate(
        mask=new_mask,
        weight=new_weight,
        ablated=np.flatnonzero(~survives),
        revived=np.flatnonzero(survives & ~was_active),
        fan_in=fan_in,
        n_pruned=n_pruned,
        n_grown=n_grown,
        threshold=threshold,
        salient_counts=salient_counts,
    )


def count_nonfinite(device: Device, array: Any, mask: Any | None = None) -> int:
    """Return how many numbers are NaN or infinite, where `mask` is True if there is one."""
    bits = _bits(device.contiguous(array))
    infinity = _bits(np.array([np.inf]).astype(array.dtype))[0]
    where = bits if mask is None else device.contiguous(mask)
    total = device.zeros(1, np.uint64)
    variant = Variant("mask_update.cu", f"count_not_finite<{BIT_TYPES[bits.itemsize]}>")
    n, masked = np.int64(array.size), np.int32(mask is not None)
    launch_over(device, variant, array.size, (bits, where, masked, n, infinity, total))
    return int(device.download(total)[0])


@dataclass
class _Layer:
    """A layer on the device, and the marks of its update, one byte for each position."""

    device: Device
    weight: Any
    grad: Any
    mask: Any

    def __post_init__(self) -> None:
        self.n_out, self.n_in = self.weight.shape
        device = self.device
        self._marks = device.zeros((self.n_out, self.n_in), np.uint8)
        self._survives = device.zeros(self.n_out, np.bool_)
        self._counts = device.empty(self.n_out, np.int64)

    def count_weights(self) -> tuple[int, int]:
        """Return the number of active weights, and the number of those that are not zero."""
        totals = self.device.zeros(2, np.uint64)
        n = np.int64(self.weight.size)
        blocks = -(-self.weight.size // THREADS)
        self._launch(
            "count_weights", blocks, self.weight, (_bits(self.weight), self.mask, n, totals)
        )
        n_active, n_nonzero = self.device.download(totals)
        return int(n_active), int(n_nonzero)

    def mark_largest(self, scores: Any, candidates: int, count: int, mark: int) -> None:
        """Mark the `count` candidates of largest magnitude, or all if there are fewer."""
        device = self.device
        selection = device.upload(np.array([0, count], np.uint64))
        histogram = device.zeros(1 << DIGIT_BITS, np.uint64)
        ties = device.empty(self.n_out, np.int64)
        bits = _bits(scores)
        common = (bits, self.mask, self._survives, *self._shape, np.int32(candidates))
        for shift in reversed(range(0, 8 * bits.itemsize, DIGIT_BITS)):
            counted = (*common, np.int32(shift), selection, histogram)
            self._launch("count_digits", self.n_out, scores, counted)
            self._launch("choose_digit", 1, None, (histogram, selection))
        self._launch("count_ties", self.n_out, scores, (*common, selection, ties))
        self._launch("share_ties", 1, None, (ties, self._shape[0], selection))
        arguments = (*common, selection, ties, np.int32(mark), self._marks, self._counts)
        self._launch("mark_largest", self.n_out, scores, arguments)

    def count_marks(self, which: int) -> NDArray[np.int64]:
        """Return the number of positions in each row that have any of these marks."""
        arguments = (self._marks, *self._shape, np.int32(which), self._counts)
        self._launch("count_marks", self.n_out, None, arguments)
        return self.device.download(self._counts)

    def keep_rows(self, survives: NDArray[np.bool_]) -> None:
        """Set which rows survive."""
        self._survives = self.device.upload(survives)

    def fill_rows(self, scores: Any, fan_in: int, *, grows: bool) -> None:
        """Keep at most `fan_in` positions of each row, or grow each row to `fan_in` positions."""
        kept = (np.int64(fan_in), np.int32(grows), self._counts, self._marks)
        arguments = (_bits(scores), self._survives, *self._shape, *kept)
        self._launch("fill_rows", self.n_out, scores, arguments)

    def remap(self, grown_init: float) -> tuple[Any, Any, NDArray[np.bool_], int, int]:
        """Return the new mask and weight, the rows active before, the pruned and grown counts."""
        device = self.device
        new_mask = device.empty(self.mask.shape, np.bool_)
        new_weight = device.empty(self.weight.shape, self.weight.dtype)
        was_active, totals = device.empty(self.n_out, np.bool_), device.zeros(2, np.uint64)
        grown = _bits(np.array([grown_init]).astype(self.weight.dtype))[0]
        arguments = (
            *(_bits(self.weight), self.mask, self._marks, *self._shape, grown),
            *(new_mask, _bits(new_weight), was_active, totals),
        )
        self._launch("remap_weight", self.n_out, self.weight, arguments)
        n_pruned, n_grown = device.download(totals)
        return new_mask, new_weight, device.download(was_active), int(n_pruned), int(n_grown)

    @property
    def _shape(self) -> tuple[np.int64, np.int64]:
        return np.int64(self.n_out), np.int64(self.n_in)

    def _launch(self, kernel: str, blocks: int, scores: Any, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel on the bits of `scores`; None if the kernel takes no scores."""
        most = BLOCKS_A_PROCESSOR * self.device.properties.processors
        name = kernel if scores is None else f"{kernel}<{BIT_TYPES[scores.dtype.itemsize]}>"
        variant = Variant("mask_update.cu", name)
        self.device.launch(variant, (min(blocks, most),), (THREADS,), arguments)


def _bits(array: Any) -> Any:
    """Return a view of an array's bits."""
    return array.view(f"u{array.dtype.itemsize}")
