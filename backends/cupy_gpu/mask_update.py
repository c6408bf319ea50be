"""The SRigL mask update of one layer on the device, bit for bit that of the reference (SPEC 4).

`srigl_update` has the same steps, in the same order, as `srigl_core.reference.mask_update`. The
host waits twice: for the salient counts of 4.4, with the counts of what is not finite, and for the
counts of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from srigl_core._update import MaskUpdate, UpdateSettings, check_finite
from srigl_core.backends.cupy_gpu.conversions import BLOCKS_A_PROCESSOR, THREADS
from srigl_core.backends.cupy_gpu.device import Device
from srigl_core.backends.cupy_gpu.variants import BIT_TYPES, Variant
from srigl_core.reference.mask_update import ablation_threshold, new_fan_in

__all__ = ["srigl_update"]

DIGIT_BITS = 8

BY_MAGNITUDE, BY_GRADIENT, KEPT = 1, 2, 4
ACTIVE, INACTIVE, ALL, SURVIVING = range(4)
N_SELECTIONS = 3
TOTALS_BYTES = 16
"""Bytes of the two totals of `remap_weight`."""


def srigl_update(
    weight: Any, grad: Any, mask: Any, settings: UpdateSettings, *, device: Device
) -> MaskUpdate:
    """Update one layer; the arguments are checked but for finiteness, flat and contiguous.

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

    Raises
    ------
    SriglError
        If a gradient, or a weight at an active position, is not finite.
    """
    layer = _Layer(device, weight, grad, mask)
    layer.count_weights(settings.drop_fraction)
    scope = INACTIVE if settings.saliency_scope == "inactive" else ALL
    salient_counts, n_weight, n_grad = layer.mark_salient(scope)
    check_finite(n_grad, n_weight, weight.size)
    threshold = ablation_threshold(salient_counts, settings, layer.n_in)
    fan_in = new_fan_in(salient_counts, threshold, settings, layer.n_in)
    survives = salient_counts >= threshold
    layer.keep_rows(survives)
    layer.mark_kept()
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


class _Selection(NamedTuple):
    """A choice of candidates of largest magnitude; its number is its place in the arrays."""

    number: int
    scores: Any
    candidates: int
    mark: int


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
        self._counted = device.zeros(N_SELECTIONS + self.n_out, np.int64)  # downloaded in one go
        self._not_finite, self._counts = np.split(self._counted, [N_SELECTIONS])
        self._ties = device.empty((N_SELECTIONS, self.n_out), np.int64)
        self._selections = device.empty((N_SELECTIONS, 2), np.uint64)
        self._histograms = device.zeros((N_SELECTIONS, 1 << DIGIT_BITS), np.uint64)
        self._arrived = device.zeros(N_SELECTIONS, np.uint32)

    def count_weights(self, drop_fraction: float) -> None:
        """Count active weights, and set how many weights each selection chooses (SPEC 4.2)."""
        totals = self.device.zeros(2, np.uint64)
        n, blocks = np.int64(self.weight.size), -(-self.weight.size // THREADS)
        counted = totals, self._arrived, self._selections
        arguments = (_bits(self.weight), self.mask, n, np.float64(drop_fraction), *counted)
        self._launch("count_weights", blocks, self.weight, arguments)

    def mark_salient(self, scope: int) -> tuple[NDArray[np.int64], int, int]:
        """Mark salient weights, and gradients among the candidates `scope`.

        Returns the number of salient positions in each row, and how many weights and gradients are
        not finite.
        """
        by_magnitude = _Selection(0, self.weight, ACTIVE, BY_MAGNITUDE)
        by_gradient = _Selection(1, self.grad, scope, BY_GRADIENT)
        self._mark_largest((by_magnitude, by_gradient), BY_MAGNITUDE | BY_GRADIENT)
        counted = self.device.download(self._counted)
        return counted[N_SELECTIONS:], int(counted[0]), int(counted[1])

    def mark_kept(self) -> None:
        """Mark the largest weights of the rows that survive."""
        self._mark_largest((_Selection(2, self.weight, SURVIVING, KEPT),), KEPT)

    def _mark_largest(self, selections: Sequence[_Selection], counted: int) -> None:
        """Mark the candidates of each selection, and count the marks `counted` of each row."""
        sizes = {selection.scores.dtype.itemsize for selection in selections}
        for group in [selections] if len(sizes) == 1 else [[each] for each in selections]:
            first, last = group[0], group[-1]
            number, scores = first.number, first.scores
            chosen, ties = self._selections[number:], self._ties[number:]
            arrived, histograms = self._arrived[number:], self._histograms[number:]
            not_finite = self._not_finite[number:]
            candidates = np.int32(first.candidates), np.int32(last.candidates)
            infinities = _infinity(scores), _infinity(last.scores)
            bits, rows = (_bits(scores), _bits(last.scores)), (self.mask, self._survives)
            common = (*bits, *rows, *self._shape, *candidates)
            for shift in reversed(range(0, 8 * scores.dtype.itemsize, DIGIT_BITS)):
                digit = (*infinities, np.int32(shift), chosen, histograms, not_finite, arrived)
                arguments = (*common, *digit)
                self._launch("count_digits", self.n_out, scores, arguments, len(group))
            counting = (*common, chosen, ties, arrived)
            self._launch("count_ties", self.n_out, scores, counting, len(group))
            marks = np.int32(first.mark), np.int32(counted), self._marks, self._counts
            marking = (*common, np.int32(len(group)), chosen, ties, *marks)
            self._launch("mark_largest", self.n_out, scores, marking)

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
        counted = device.zeros(TOTALS_BYTES + self.n_out, np.uint8)  # downloaded in one go
        totals, was_active = counted[:TOTALS_BYTES].view(np.uint64), counted[TOTALS_BYTES:]
        grown = _bits(np.array([grown_init]).astype(self.weight.dtype))[0]
        arguments = (
            *(_bits(self.weight), self.mask, self._marks, *self._shape, grown),
            *(new_mask, _bits(new_weight), was_active, totals),
        )
        self._launch("remap_weight", self.n_out, self.weight, arguments)
        counts = device.download(counted)
        n_pruned, n_grown = (int(n) for n in counts[:TOTALS_BYTES].view(np.uint64))
        return new_mask, new_weight, counts[TOTALS_BYTES:].astype(np.bool_), n_pruned, n_grown

    @property
    def _shape(self) -> tuple[np.int64, np.int64]:
        return np.int64(self.n_out), np.int64(self.n_in)

    def _launch(
        self,
        kernel: str,
        blocks: int,
        scores: Any,
        arguments: tuple[Any, ...],
        n_selections: int = 1,
    ) -> None:
        """Launch a kernel on the bits of `scores`."""
        most = BLOCKS_A_PROCESSOR * self.device.properties.processors
        name = f"{kernel}<{BIT_TYPES[scores.dtype.itemsize]}>"
        variant, grid = Variant("mask_update.cu", name), (min(blocks, most), n_selections)
        self.device.launch(variant, grid, (THREADS,), arguments)


def _infinity(array: Any) -> Any:
    """Return the bits of infinity of an array's type, as a scalar."""
    return _bits(np.array([np.inf]).astype(array.dtype))[0]


def _bits(array: Any) -> Any:
    """Return a view of an array's bits."""
    return array.view(f"u{array.dtype.itemsize}")
