"""The SRigL mask update on the CPU (SPEC 4); the steps are those of `reference/mask_update.py`.

A selection needs no sort. The magnitude of a finite float, read as an unsigned integer with the
sign bit cleared, orders as the float does; the magnitude that the last chosen position has is found
one byte at a time, by counting (radix select); positions above it are chosen, and of those equal to
it as many as are missing, in index order. That is the total order of SPEC 4.9.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.compiling import frozen, kernel
from srigl_core.backends.numba_cpu.threads import pool
from srigl_core.mask_update import MaskUpdate, UpdateSettings
from srigl_core.reference.mask_update import (
    ablation_threshold,
    make_update,
    new_fan_in,
    prune_counts,
)
from srigl_core.value_types import as_float_view

__all__ = ["srigl_update"]

Mask = NDArray[np.bool_]
Bits = NDArray[Any]

PARTS_PER_THREAD = 4


def srigl_update(
    weight: NDArray[Any],
    grad: NDArray[Any],
    mask: Mask,
    settings: UpdateSettings,
    *,
    threads: int | None,
) -> MaskUpdate:
    """Update one layer; the arguments are checked and two-dimensional."""
    n_in = mask.shape[1]
    magnitudes, gradients = _as_bits(weight), _as_bits(grad)
    with pool(threads, mask.size) as n_threads:
        n_keep, n_prune = prune_counts(weight, mask, settings.drop_fraction)
        by_magnitude = _largest(magnitudes, mask, n_keep, n_threads)
        scope = ~mask if settings.saliency_scope == "inactive" else np.ones_like(mask)
        by_gradient = _largest(gradients, scope, n_prune, n_threads)
        salient_counts = np.count_nonzero(by_magnitude | by_gradient, axis=1)
        threshold = ablation_threshold(salient_counts, settings, n_in)
        survives = salient_counts >= threshold
        fan_in = new_fan_in(salient_counts, threshold, settings, n_in)
        candidates = mask & survives[:, None] & (weight != 0)
        kept = _largest(magnitudes, candidates, n_keep, n_threads)
        kept = _largest_of_rows(magnitudes, kept, np.full(survives.size, fan_in), n_threads)
        missing = np.where(survives, fan_in - np.count_nonzero(kept, axis=1), 0)
        new_mask = kept | _largest_of_rows(gradients, ~kept, missing, n_threads)
    return make_update(
        weight,
        mask,
        new_mask,
        grown_init=settings.grown_init,
        fan_in=fan_in,
        threshold=threshold,
        salient_counts=salient_counts,
    )


def _as_bits(scores: NDArray[Any]) -> Bits:
    wide = as_float_view(scores)
    return frozen(wide.view(np.uint32 if wide.dtype.itemsize == 4 else np.uint64))


def _largest(bits: Bits, candidates: Mask, count: int, n_threads: int) -> Mask:
    """Mark the `count` candidates of largest magnitude in the whole array."""
    chosen = np.zeros(bits.shape, np.bool_)
    arrays = (bits.ravel(), frozen(candidates).ravel(), count, chosen.ravel())
    if n_threads == 1:
        _mark_largest(*arrays)
    else:
        _mark_largest_parallel(*arrays, n_threads * PARTS_PER_THREAD)
    return chosen


def _largest_of_rows(
    bits: Bits, candidates: Mask, counts: NDArray[np.int64], n_threads: int
) -> Mask:
    """Mark in each row its `counts[row]` candidates of largest magnitude."""
    chosen = np.zeros(bits.shape, np.bool_)
    mark = _mark_rows if n_threads == 1 else _mark_rows_parallel
    mark(bits, frozen(candidates), counts, chosen)
    return chosen


@kernel()
def _count_digits(bits, candidates, above, shift, counts):
    """Count, by the byte at `shift`, the candidates whose bytes above it are `above`."""
    one, top = np.uint64(1), np.uint64(bits.itemsize * 8)
    sign_cleared = (one << (top - one)) - one
    for i in range(bits.size):
        if candidates[i]:
            magnitude = np.uint64(bits[i]) & sign_cleared
            if (magnitude >> shift) >> np.uint64(8) == above:
                counts[(magnitude >> shift) & np.uint64(255)] += 1


@kernel()
def _descend(counts, missing):
    """Return the byte that the last chosen has, and how many are missing among its equals."""
    digit = 255
    while counts[digit] < missing:
        missing -= counts[digit]
        digit -= 1
    return np.uint64(digit), missing


@kernel()
def _mark(bits, candidates, last, ties, chosen):
    """Choose the candidates above `last`, and the first `ties` of those equal to it."""
    one, top = np.uint64(1), np.uint64(bits.itemsize * 8)
    sign_cleared = (one << (top - one)) - one
    for i in range(bits.size):
        if candidates[i]:
            magnitude = np.uint64(bits[i]) & sign_cleared
            if magnitude > last:
                chosen[i] = True
            elif magnitude == last and ties > 0:
                chosen[i] = True
                ties -= 1


@kernel()
def _mark_largest(bits, candidates, count, chosen):
    if count <= 0:
        return
    available = 0
    for i in range(candidates.size):
        available += candidates[i]
    if available <= count:
        chosen[:] = candidates
        return
    above, missing = np.uint64(0), count
    counts = np.empty(256, np.int64)
    for byte in range(bits.itemsize - 1, -1, -1):
        counts[:] = 0
        _count_digits(bits, candidates, above, np.uint64(8 * byte), counts)
        digit, missing = _descend(counts, missing)
        above = (above << np.uint64(8)) | digit
    _mark(bits, candidates, above, missing, chosen)


@kernel(parallel=True)
def _mark_largest_parallel(bits, candidates, count, chosen, parts):
    if count <= 0:
        return
    n = bits.size
    available = np.zeros(parts, np.int64)
    for p in prange(parts):
        in_part = 0
        for i in range(n * p // parts, n * (p + 1) // parts):
            in_part += candidates[i]
        available[p] = in_part
    if available.sum() <= count:
        chosen[:] = candidates
        return
    above, missing = np.uint64(0), count
    counts = np.empty((parts, 256), np.int64)
    digit = np.uint64(0)
    for byte in range(bits.itemsize - 1, -1, -1):
        for p in prange(parts):
            first, last = n * p // parts, n * (p + 1) // parts
            counts[p] = 0
            _count_digits(
                bits[first:last], candidates[first:last], above, np.uint64(8 * byte), counts[p]
            )
        digit, missing = _descend(counts.sum(axis=0), missing)
        above = (above << np.uint64(8)) | digit
    # The last pass counted, by its lowest byte, each part's positions equal to the last chosen.
    for p in prange(parts):
        first, last = n * p // parts, n * (p + 1) // parts
        ties_before = counts[:p, np.int64(digit)].sum()
        _mark(
            bits[first:last],
            candidates[first:last],
            above,
            missing - ties_before,
            chosen[first:last],
        )


@kernel()
def _mark_rows(bits, candidates, counts, chosen):
    for row in range(bits.shape[0]):
        _mark_largest(bits[row], candidates[row], counts[row], chosen[row])


@kernel(parallel=True)
def _mark_rows_parallel(bits, candidates, counts, chosen):
    for row in prange(bits.shape[0]):
        _mark_largest(bits[row], candidates[row], counts[row], chosen[row])
