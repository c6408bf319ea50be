"""The SRigL mask update on the CPU (SPEC 4); the steps are those of `reference/mask_update.py`.

A selection needs no sort. With the sign bit set, the bits of numbers are ordered as their
magnitudes. These words are compared wherever the specification compares magnitudes; nothing here
computes with floating-point numbers. Counting finds the word of the last chosen position, from its
highest bits down. Positions with a larger word are chosen, then as many positions with the same
word as are missing, in index order: the total order of SPEC 4.9.

The layer is split into one part of whole rows for each thread.

Memory: besides masks, the magnitudes of the active weights take at most one dense layer. They are
freed before the new weight is made. The peak is the result plus less than one dense layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numpy.typing import NDArray

from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.backends.numba_cpu.compiling import frozen, kernel
from srigl_core.backends.numba_cpu.threads import pool
from srigl_core.reference.mask_update import ablation_threshold, keep_and_prune, new_fan_in

__all__ = ["srigl_update"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]

BLOCK = 64
"""Words that are tested together first: most blocks have no candidate left."""

NANOSECONDS = 0.3
"""Single-threaded time of a kernel for one position; an update runs about fifteen kernels."""


class _ActiveWeights(NamedTuple):
    """The active weights row by row: the bits of their magnitudes, and the bounds of each part."""

    magnitudes: Array
    bounds: Counts
    row_counts: Counts
    row_nonzeros: Counts


class _Boundary(NamedTuple):
    """The end of a selection from the whole layer.

    Candidates with a word of at least `level` are chosen. Of the candidates with the next smaller
    word, the first ``ties[part]`` of each part are chosen.
    """

    level: np.uint64
    ties: Counts


def srigl_update(
    weight: Array, grad: Array, mask: Mask, settings: UpdateSettings, *, threads: int | None
) -> MaskUpdate:
    """Update one layer; the arguments are checked and two-dimensional."""
    n_out, n_in = mask.shape
    weights, gradients = _as_bits(weight), _as_bits(grad)
    with pool(threads, NANOSECONDS * mask.size) as n_threads:
        n_parts = min(n_threads, n_out)
        rows = n_out * np.arange(n_parts + 1) // n_parts
        active = _active_weights(weights, mask, rows)
        was_active, n_weights = active.row_counts > 0, active.magnitudes.size
        n_keep, n_prune = keep_and_prune(
            n_weights, int(active.row_nonzeros.sum()), settings.drop_fraction
        )
        boundary = _last_kept(active, np.ones(n_out, np.bool_), n_keep)
        salient = np.zeros(mask.shape, np.bool_)
        _mark(weights, mask, boundary, rows, salient)
        scope = ~mask if settings.saliency_scope == "inactive" else np.ones_like(mask)
        boundary = _boundary(gradients.ravel(), scope.ravel(), n_prune, rows * n_in)
        salient_counts = _mark(gradients, scope, boundary, rows, salient)
        del salient, scope
        threshold = ablation_threshold(salient_counts, settings, n_in)
        survives = salient_counts >= threshold
        fan_in = new_fan_in(salient_counts, threshold, settings, n_in)
        boundary = _last_kept(active, survives, n_keep)
        del active
        kept, kept_counts = _prune(weights, mask, survives, boundary, fan_in, rows)
        missing = np.where(survives, fan_in - kept_counts, 0)
        new_mask = _grow(gradients, kept, missing, rows)
        new_weight, n_grown = _new_weight(weight, mask, new_mask, settings.grown_init, rows)
    return MaskUpdate(
        mask=new_mask,
        weight=new_weight,
        ablated=np.flatnonzero(~survives),
        revived=np.flatnonzero(survives & ~was_active),
        fan_in=fan_in,
        n_pruned=n_weights + n_grown - fan_in * int(np.count_nonzero(survives)),
        n_grown=n_grown,
        threshold=threshold,
        salient_counts=salient_counts,
    )


def _last_kept(active: _ActiveWeights, survives: Mask, n_keep: int) -> _Boundary:
    """Find the boundary of the `n_keep` largest weights of the surviving rows, without zeros."""
    candidates = np.repeat(survives, active.row_counts)
    n_keep = min(n_keep, int(active.row_nonzeros[survives].sum()))
    return _boundary(active.magnitudes, candidates, n_keep, active.bounds)


def _prune(
    weights: Array, mask: Mask, survives: Mask, boundary: _Boundary, fan_in: int, rows: Counts
) -> tuple[Mask, Counts]:
    """Mark the weights within `boundary`, at most the `fan_in` largest of a row (SPEC 4.6).

    Also return the number of marks in each row.
    """
    candidates = mask.copy()
    candidates[~survives] = False
    kept = np.zeros(mask.shape, np.bool_)
    counts = _mark(weights, candidates, boundary, rows, kept)
    over_full = counts > fan_in
    kept[over_full] = False
    _mark_in_rows(weights, candidates, np.where(over_full, fan_in, 0), rows, kept)
    return kept, np.minimum(counts, fan_in)


def _grow(gradients: Array, kept: Mask, missing: Counts, rows: Counts) -> Mask:
    """Mark in `kept` each row's `missing` positions of largest gradient, and return it (SPEC 4.7).

    A position that was just pruned may be grown again.
    """
    _mark_in_rows(gradients, ~kept, missing, rows, kept)
    return kept


def _new_weight(
    weight: Array, mask: Mask, new_mask: Mask, grown_init: float, rows: Counts
) -> tuple[Array, int]:
    """Return the new weight, and the number of its newly active positions (SPEC 4.8)."""
    new_weight, initial = np.empty_like(weight), np.empty(1, weight.dtype)
    initial[0] = grown_init
    old, new = _as_bits(weight), new_weight.view(f"u{weight.itemsize}")
    n_grown = np.empty(rows.size - 1, np.int64)
    _write_weights(rows, old, frozen(mask), frozen(new_mask), _as_bits(initial)[0], new, n_grown)
    return new_weight, int(n_grown.sum())


def _as_bits(numbers: Array) -> Array:
    return frozen(numbers.view(f"u{numbers.itemsize}"))


def _active_weights(weights: Array, mask: Mask, rows: Counts) -> _ActiveWeights:
    sizes = [np.count_nonzero(mask[rows[p] : rows[p + 1]]) for p in range(rows.size - 1)]
    bounds = np.cumsum([0, *sizes])
    row_counts, row_nonzeros = np.empty((2, len(mask)), np.int64)
    active = _ActiveWeights(np.empty(bounds[-1], weights.dtype), bounds, row_counts, row_nonzeros)
    scratch = np.empty((rows.size - 1, mask.shape[1]), weights.dtype)
    _gather_rows(rows, weights, frozen(mask), scratch, *active)
    return active


def _boundary(bits: Array, candidates: Mask, count: int, bounds: Counts) -> _Boundary:
    """Find the boundary of the `count` largest candidates, or of all if there are fewer."""
    n_parts = bounds.size - 1
    # The counts take at most one byte for each word, and fit in the second-level cache.
    digit_bits = max(4, min((bits.size // n_parts).bit_length() - 4, 16))
    unknown = 8 * bits.itemsize - 1
    prefix, missing, equal = 1 << unknown, min(count, int(np.count_nonzero(candidates))), -1
    while unknown and equal != missing:
        width = min(digit_bits, unknown)
        counts = np.empty((n_parts, 1 << width), np.int64)
        known = np.uint64(prefix)
        _count_digits(bounds, frozen(bits), frozen(candidates), known, unknown, width, counts)
        digit, missing, equal = _last_digit(counts, missing)
        unknown -= width
        prefix |= digit << unknown
    if equal == missing:
        return _Boundary(np.uint64(prefix), np.zeros(n_parts, np.int64))
    equals = counts[:, digit]
    return _Boundary(np.uint64(prefix + 1), missing - (np.cumsum(equals) - equals))


def _mark(bits: Array, candidates: Mask, boundary: _Boundary, rows: Counts, chosen: Mask) -> Counts:
    """Mark in `chosen` the candidates within `boundary`, and return the marks of each row."""
    counts = np.empty(len(bits), np.int64)
    _mark_rows(rows, bits, frozen(candidates), *boundary, chosen, counts)
    return counts


def _mark_in_rows(
    bits: Array, candidates: Mask, wanted: Counts, rows: Counts, chosen: Mask
) -> None:
    """Mark in each row its ``wanted[row]`` largest candidates; each row has that many."""
    scratch = np.empty((rows.size - 1, bits.shape[1]), bits.dtype)
    _search_rows(rows, bits, frozen(candidates), wanted, scratch, chosen)


def _each_part(step):
    """Return a function that runs `step`, a kernel of one numbered part, on all parts."""

    @kernel(parallel=True)
    def in_the_pool(bounds, *arguments):
        for part in prange(bounds.size - 1):
            # Without the cast Numba compiles twice, for signed and for unsigned part numbers.
            step(np.int64(part), bounds, *arguments)

    def all_parts(bounds, *arguments):
        if bounds.size == 2:
            step(0, bounds, *arguments)
        else:
            in_the_pool(bounds, *arguments)

    return all_parts


@kernel()
def _sign_bit(bits):
    return bits.dtype.type(np.uint64(1) << np.uint64(8 * bits.itemsize - 1))


@_each_part
@kernel()
def _gather_rows(part, rows, bits, mask, scratch, magnitudes, bounds, row_counts, row_nonzeros):
    magnitude_bits = bits.dtype.type(~_sign_bit(bits))
    gathered = scratch[part]
    start = bounds[part]
    for row in range(rows[part], rows[part + 1]):
        numbers, is_active = bits[row], mask[row]
        count = 0
        for c in range(numbers.size):  # without a branch: inactive numbers are overwritten
            gathered[count] = numbers[c] & magnitude_bits
            count += is_active[c]
        nonzeros = 0
        for i in range(count):
            magnitudes[start + i] = gathered[i]
            nonzeros += gathered[i] != 0
        start += count
        row_counts[row], row_nonzeros[row] = count, nonzeros


@_each_part
@kernel()
def _count_digits(part, bounds, bits, candidates, prefix, unknown, width, counts):
    """Count candidates that agree with `prefix` above `unknown` bits, by the next `width` bits."""
    first, last = bounds[part], bounds[part + 1]
    sign, low = _sign_bit(bits), bits.dtype.type(prefix)
    span = bits.dtype.type((np.uint64(1) << np.uint64(unknown)) - np.uint64(1))
    shift = np.uint64(unknown - width)
    counts[part] = 0
    for start in range(first, last, BLOCK):
        block = bits[start : min(start + BLOCK, last)]
        is_candidate = candidates[start : min(start + BLOCK, last)]
        nearest = bits.dtype.type(~np.uint64(0))
        for i in range(block.size):
            nearest = min(nearest, bits.dtype.type((block[i] | sign) - low))
        if nearest <= span:
            for i in range(block.size):
                offset = bits.dtype.type((block[i] | sign) - low)
                if offset <= span:
                    counts[part, np.uint64(offset) >> shift] += is_candidate[i]


@kernel()
def _last_digit(counts, missing):
    """Return the last chosen digit, how many candidates with it to choose, and how many exist."""
    digit, equal = counts.shape[1], 0
    while digit > 0:
        digit -= 1
        equal = 0
        for part in range(counts.shape[0]):
            equal += counts[part, digit]
        if equal >= missing:
            break
        missing -= equal
    return digit, missing, equal


@kernel()
def _mark_row(bits, candidates, level, ties, chosen):
    """Mark candidates of at least `level`, then up to `ties` right below; return the ties left."""
    sign, level = _sign_bit(bits), bits.dtype.type(level)
    below = bits.dtype.type(level - bits.dtype.type(1))
    for i in range(bits.size):
        chosen[i] |= candidates[i] & ((bits[i] | sign) >= level)
    equal = 0
    if ties > 0:
        for i in range(bits.size):
            equal += candidates[i] & ((bits[i] | sign) == below)
    i = 0
    while min(equal, ties) > 0:
        if candidates[i] and (bits[i] | sign) == below:
            chosen[i] = True
            equal -= 1
            ties -= 1
        i += 1
    return ties


@_each_part
@kernel()
def _mark_rows(part, rows, bits, candidates, level, ties, chosen, counts):
    missing = ties[part]
    for row in range(rows[part], rows[part + 1]):
        marks, count = chosen[row], 0
        missing = _mark_row(bits[row], candidates[row], level, missing, marks)
        for c in range(marks.size):
            count += marks[c]
        counts[row] = count


@kernel()
def _count_from(words, level):
    count = np.uint32(0)  # enough for the columns of SPEC 1, and twice as fast as 64 bits
    for i in range(words.size):
        count = np.uint32(count + (words[i] >= level))
    return np.int64(count)


@_each_part
@kernel()
def _search_rows(part, rows, bits, candidates, wanted, scratch, chosen):
    """Find each row's last chosen word bit by bit; the row stays in the first-level cache."""
    sign, one = _sign_bit(bits), bits.dtype.type(1)
    words = scratch[part]
    for row in range(rows[part], rows[part + 1]):
        count = wanted[row]
        if count == 0:
            continue
        numbers, is_candidate = bits[row], candidates[row]
        for c in range(words.size):
            word = numbers[c] | sign
            words[c] = word if is_candidate[c] else bits.dtype.type(0)
        level, bit, available = sign, sign, -1
        while bit > one and available != count:
            bit = bits.dtype.type(bit >> one)
            trial = bits.dtype.type(level | bit)
            at_least = _count_from(words, trial)
            if at_least >= count:
                level, available = trial, at_least
        ties = 0
        if available != count:
            level = bits.dtype.type(level + one)
            ties = count - _count_from(words, level)
        _mark_row(numbers, is_candidate, np.uint64(level), ties, chosen[row])


@_each_part
@kernel()
def _write_weights(part, rows, bits, mask, new_mask, initial, new_bits, n_grown):
    count = 0
    for row in range(rows[part], rows[part + 1]):
        old, was_active, is_active, new = bits[row], mask[row], new_mask[row], new_bits[row]
        for c in range(old.size):
            number = old[c]
            value = number if was_active[c] else initial
            new[c] = value if is_active[c] else bits.dtype.type(0)
            count += is_active[c] > was_active[c]
    n_grown[part] = count
