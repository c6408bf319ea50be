"""Wrong backends: each is the reference with one plausible bug. The laws must reject every one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from srigl_core.contract import MatmulGradients
from srigl_core.mask_update import MaskUpdate
from srigl_core.reference import condensed_matmul, mask_update
from srigl_core.reference.activations import activate
from srigl_core.reference.backend import ReferenceBackend, ReferencePrepared
from srigl_core.reference.ranking import largest
from srigl_core.testing.flush_mode import flushing_subnormals
from srigl_core.value_types import accumulator_dtype, round_to

__all__ = ["MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """A wrong backend, the name of the bug, and the operation that has it."""

    name: str
    backend: ReferenceBackend
    operation: str


MUTANTS: list[Mutant] = []


def _backend(
    name: str, operation: str, prepared: type | None = None, update: Callable | None = None
) -> None:
    class Wrong(ReferenceBackend):
        def prepare(self, weight):
            return (prepared or ReferencePrepared)(weight)

        def update_mask(self, weight, grad, mask, settings, *, threads):
            if update is None:
                return super().update_mask(weight, grad, mask, settings, threads=threads)
            return update(weight, grad, mask, settings, threads)

    backend = Wrong()
    backend.name = f"mutant: {name}"
    MUTANTS.append(Mutant(name, backend, operation))


# Forward. A mutant writes `out`; `right` gives the right product, for changed arguments too.


def forward(mutated: Callable) -> Callable:
    """Register a mutant of the product."""

    class Prepared(ReferencePrepared):
        def matmul(self, x, bias, *, activation, compact, out, threads):
            def right(weight=self.weight, x=x, bias=bias, activation=activation, compact=compact):
                return condensed_matmul.forward(
                    x, weight, bias, activation=activation, compact=compact, dtype=out.dtype
                )

            with np.errstate(all="ignore"):
                mutated(right, self.weight, x, bias, activation, compact, out, threads)

        def with_values(self, weight):
            return type(self)(weight)

    _backend(mutated.__name__, "condensed_matmul", Prepared)
    return mutated


def _sum(weight, x, bias, kind, order=slice(None)):
    """The sum before the activation, in `kind`, connections in `order`."""
    z = np.zeros((x.shape[0], weight.shape[0]), kind)
    with np.errstate(all="ignore"):
        total = np.zeros((x.shape[0], weight.n_active), kind)
        for j in range(weight.fan_in)[order]:
            total = total + weight.values[:, j].astype(kind) * x[:, weight.indices[:, j]].astype(
                kind
            )
        z[:, weight.active] = total
        return z if bias is None else z + bias.astype(kind)


def _finish(z, activation, compact, active, dtype):
    with np.errstate(all="ignore"):
        z = z[:, active] if compact else z
        return round_to(activate(z.astype(np.float64), activation), dtype)


def _reindexed(weight, indices):
    other = object.__new__(type(weight))
    for name in ("values", "active", "shape"):
        object.__setattr__(other, name, getattr(weight, name))
    object.__setattr__(other, "indices", indices)
    return other


@forward
def index_off_by_one(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(weight=_reindexed(weight, (weight.indices + 1) % weight.shape[1]))


@forward
def index_of_last_column_off(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(
        weight=_reindexed(weight, np.minimum(weight.indices, max(0, weight.shape[1] - 2)))
    )


@forward
def index_cut_to_sixteen_bits(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(weight=_reindexed(weight, weight.indices.astype(np.uint16)))


@forward
def index_signed(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(weight=_reindexed(weight, weight.indices.astype(np.int16)))


@forward
def last_connection_skipped(right, weight, x, bias, activation, compact, out, threads):
    values = weight.values.copy()
    values[:, -1] = 0
    out[...] = right(weight=weight.with_values(values))


@forward
def first_input_read_as_padding(right, weight, x, bias, activation, compact, out, threads):
    padding = (x[:, :1] * 0).astype(out.dtype)
    out[...] = right() + padding


@forward
def dropped_bias(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(bias=None)


@forward
def dropped_bias_of_ablated(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right()
    if not compact:
        out[:, weight.ablated] = 0


@forward
def bias_of_compact_position(right, weight, x, bias, activation, compact, out, threads):
    if bias is not None:
        bias = bias.copy()
        bias[weight.active] = bias[: weight.n_active].copy()
    out[...] = right(bias=bias)


@forward
def activation_before_bias(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(bias=None)
    if bias is not None:
        out += (bias[weight.active] if compact else bias).astype(out.dtype)


@forward
def activation_skipped_on_ablated(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right()
    if not compact and bias is not None:
        out[:, weight.ablated] = bias[weight.ablated].astype(out.dtype)


@forward
def relu_swallows_nan(right, weight, x, bias, activation, compact, out, threads):
    z = right(activation="none")
    out[...] = np.fmax(z, 0) if activation == "relu" else right()


@forward
def gelu_in_tanh_form(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(activation="gelu_tanh" if activation == "gelu" else activation)


@forward
def silu_of_minus_infinity_is_zero(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right()
    if activation == "silu":
        out[right(activation="none") == -np.inf] = 0


@forward
def accumulates_in_sixteen_bits(right, weight, x, bias, activation, compact, out, threads):
    kind = x.dtype if x.dtype.itemsize == 2 else accumulator_dtype(x.dtype, weight.dtype)
    out[...] = _finish(_sum(weight, x, bias, kind), activation, compact, weight.active, out.dtype)


@forward
def accumulates_in_float32(right, weight, x, bias, activation, compact, out, threads):
    z = _sum(weight, x, bias, np.dtype(np.float32))
    out[...] = _finish(z, activation, compact, weight.active, out.dtype)


@forward
def rounds_before_the_activation(right, weight, x, bias, activation, compact, out, threads):
    z = right(activation="none", compact=False).astype(np.float64)
    out[...] = _finish(z, activation, compact, weight.active, out.dtype)


@forward
def rounds_by_way_of_the_result_type(right, weight, x, bias, activation, compact, out, threads):
    kind = np.result_type(x, weight.values)
    once = condensed_matmul.forward(
        x, weight, bias, activation=activation, compact=compact, dtype=kind
    )
    with np.errstate(all="ignore"):
        out[...] = once.astype(out.dtype)


@forward
def cuts_off_instead_of_rounding(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right()
    if out.dtype == np.float32:
        out[...] = (right().view(np.uint32) & np.uint32(0xFFFFFFF0)).view(np.float32)


@forward
def unconnected_nan_leaks(right, weight, x, bias, activation, compact, out, threads):
    kind = accumulator_dtype(x.dtype, weight.dtype)
    with np.errstate(all="ignore"):
        z = x.astype(kind) @ weight.to_dense().astype(kind).T
        z = z if bias is None else z + bias.astype(kind)
    out[...] = _finish(z, activation, compact, weight.active, out.dtype)


@forward
def non_finite_replaced(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(x=np.nan_to_num(x.astype(np.float64), posinf=1e3).astype(x.dtype))


@forward
def non_finite_weight_replaced(right, weight, x, bias, activation, compact, out, threads):
    values = weight.values.copy()
    values[~np.isfinite(values)] = 0
    out[...] = right(weight=weight.with_values(values))


@forward
def compact_takes_the_first_rows(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(compact=False)[:, : out.shape[1]] if compact else right()


@forward
def batch_stride_ignored(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(x=np.broadcast_to(x[:1], x.shape))


@forward
def batch_tail_skipped(right, weight, x, bias, activation, compact, out, threads):
    whole = max(1, x.shape[0] // 8 * 8)
    out[...] = 0
    out[:whole] = right()[:whole]


@forward
def strides_ignored(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right(x=x.ravel(order="K").reshape(x.shape))


@forward
def output_added_to(right, weight, x, bias, activation, compact, out, threads):
    held = out.copy()
    out[...] = right()
    out[np.isnan(held)] += held[np.isnan(held)]


@forward
def output_of_ablated_left_alone(right, weight, x, bias, activation, compact, out, threads):
    result = right()
    if compact:
        out[...] = result
    else:
        out[:, weight.active] = result[:, weight.active]


@forward
def output_strides_ignored(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right()
    if out.base is not None and out.base.dtype == out.dtype and not out.flags.c_contiguous:
        out.base[...] = 0
        out[...] = right()


@forward
def input_written(right, weight, x, bias, activation, compact, out, threads):
    out[...] = right()
    if x.flags.writeable:
        x[:, 0] = 0


@forward
def order_depends_on_threads(right, weight, x, bias, activation, compact, out, threads):
    kind = accumulator_dtype(x.dtype, weight.dtype)
    order = slice(None, None, -1 if threads == 2 else 1)
    z = _sum(weight, x, bias, kind, order)
    out[...] = _finish(z, activation, compact, weight.active, out.dtype)


@forward
def subnormals_flushed(right, weight, x, bias, activation, compact, out, threads):
    with flushing_subnormals():
        out[...] = right()


class _StaleValues(ReferencePrepared):
    def with_values(self, weight):
        return self


_backend("with_values_keeps_the_old", "condensed_matmul", _StaleValues)


# Backward. A mutant spoils the right gradients in `out`.


def backward(mutated: Callable) -> Callable:
    """Register a mutant of the gradients."""

    class Prepared(ReferencePrepared):
        def backward(self, grad, x, *, out, threads):
            condensed_matmul.backward(grad, x, self.weight, out=out)
            with np.errstate(all="ignore"):
                mutated(self.weight, grad, x, out, threads)

    _backend(mutated.__name__, "condensed_matmul_backward", Prepared)
    return mutated


@backward
def dx_overwritten_by_later_neurons(weight, grad, x, out, threads):
    if out.x is not None:
        for i, row in enumerate(weight.active):
            product = grad[:, row, None].astype(np.float64) * weight.values[i].astype(np.float64)
            out.x[:, weight.indices[i]] = product.astype(out.x.dtype)


@backward
def dx_of_last_column_skipped(weight, grad, x, out, threads):
    if out.x is not None:
        out.x[:, -1] = 0


@backward
def dx_leaks_from_ablated_rows(weight, grad, x, out, threads):
    if out.x is not None:
        kind = accumulator_dtype(grad.dtype, weight.dtype)
        out.x[...] = round_to(grad.astype(kind) @ weight.to_dense().astype(kind), out.x.dtype)


@backward
def dx_rows_by_compact_position(weight, grad, x, out, threads):
    if out.x is not None:
        shifted = grad.copy()
        shifted[:, weight.active] = grad[:, : weight.n_active]
        condensed_matmul.backward(shifted, None, weight, out=MatmulGradients(x=out.x))


@backward
def dx_swallows_nan(weight, grad, x, out, threads):
    if out.x is not None:
        out.x[np.isnan(out.x)] = 0


@backward
def dvalues_averaged(weight, grad, x, out, threads):
    if out.values is not None:
        out.values[...] = (out.values / grad.shape[0]).astype(out.values.dtype)


@backward
def dvalues_of_last_batch_row_missing(weight, grad, x, out, threads):
    if out.values is not None:
        condensed_matmul.backward(grad[:-1], x[:-1], weight, out=MatmulGradients(values=out.values))


@backward
def dvalues_in_float32(weight, grad, x, out, threads):
    if out.values is not None:
        out.values[...] = out.values.astype(np.float32)


@backward
def dvalues_added_to(weight, grad, x, out, threads):
    if out.values is not None and out.values.strides != out.values.copy().strides:
        out.values[...] += out.values


@backward
def dvalues_leak_unconnected(weight, grad, x, out, threads):
    if out.values is not None:
        dense = (grad.astype(np.float64).T @ x.astype(np.float64)) * weight.to_mask()
        poison = dense.sum() * 0
        out.values[...] = (out.values + poison).astype(out.values.dtype)


@backward
def dbias_of_ablated_zero(weight, grad, x, out, threads):
    if out.bias is not None:
        out.bias[weight.ablated] = 0


@backward
def grad_written(weight, grad, x, out, threads):
    if grad.flags.writeable:
        grad[:, 0] = 0


@backward
def gradient_depends_on_threads(weight, grad, x, out, threads):
    if out.values is not None and threads == 2:
        condensed_matmul.backward(
            grad[::-1], x[::-1], weight, out=MatmulGradients(values=out.values)
        )


# Mask update. A mutant is the whole pipeline, or changes the right result.


def update(mutated: Callable) -> Callable:
    """Register a mutant of the mask update."""
    _backend(mutated.__name__, "update_mask", update=mutated)
    return mutated


def _pipeline(weight, grad, mask, settings, **steps: Any) -> MaskUpdate:
    """The reference's steps, with some replaced."""
    n_in = mask.shape[1]
    n_keep, n_prune = steps.get("counts", mask_update.prune_counts)(
        weight, mask, settings.drop_fraction
    )
    rank = steps.get("rank", largest)
    scope = steps.get("scope", settings.saliency_scope)
    by_gradient = rank(grad, ~mask if scope == "inactive" else np.ones_like(mask), n_prune)
    salient = np.count_nonzero(rank(weight, mask, n_keep) | by_gradient, axis=1)
    threshold = steps.get("threshold", mask_update.ablation_threshold)(salient, settings, n_in)
    survives = steps.get("survives", np.greater_equal)(salient, threshold)
    fan_in = steps.get("fan_in", lambda budget, n_active, n_out: budget // n_active)(
        settings.nnz_budget, np.count_nonzero(survives), survives.size
    )
    kept = steps.get("prune", mask_update.prune)(weight, mask, survives, n_keep, fan_in)
    new_mask = steps.get("grow", mask_update.grow)(grad, kept, survives, fan_in)
    return mask_update.make_update(
        weight,
        mask,
        new_mask,
        grown_init=settings.grown_init,
        fan_in=fan_in,
        threshold=threshold,
        salient_counts=salient,
    )


@update
def ties_to_the_highest_index(weight, grad, mask, settings, threads):
    turned = mask_update.srigl_update(
        weight[::-1, ::-1], grad[::-1, ::-1], mask[::-1, ::-1], settings
    )
    return mask_update.make_update(
        weight,
        mask,
        turned.mask[::-1, ::-1].copy(),
        grown_init=settings.grown_init,
        fan_in=turned.fan_in,
        threshold=turned.threshold,
        salient_counts=turned.salient_counts[::-1].copy(),
    )


@update
def negative_zero_below_zero(weight, grad, mask, settings, threads):
    def rank(scores, candidates, count):
        biased = np.where(np.signbit(scores) & (scores == 0), 0, np.abs(scores) + 1)
        return largest(biased, candidates, count)

    def grow(grad, kept, survives, fan_in):
        new_mask = kept.copy()
        for row in np.flatnonzero(survives):
            missing = fan_in - np.count_nonzero(kept[row])
            new_mask[row] |= rank(grad[row], ~kept[row], missing)
        return new_mask

    return _pipeline(weight, grad, mask, settings, grow=grow)


@update
def weights_ranked_in_float32(weight, grad, mask, settings, threads):
    def prune(weight, mask, survives, n_keep, fan_in):
        with np.errstate(all="ignore"):
            narrow = weight.astype(np.float32)
        return mask_update.prune(narrow, mask & (weight != 0), survives, n_keep, fan_in)

    return _pipeline(weight, grad, mask, settings, prune=prune)


@update
def weights_ranked_with_sign(weight, grad, mask, settings, threads):
    def prune(weight, mask, survives, n_keep, fan_in):
        signed = weight.astype(np.float64) - weight.astype(np.float64).min() + 1
        return mask_update.prune(signed, mask & (weight != 0), survives, n_keep, fan_in)

    return _pipeline(weight, grad, mask, settings, prune=prune)


@update
def boolean_sort(weight, grad, mask, settings, threads):
    def prune(weight, mask, survives, n_keep, fan_in):
        kept = mask_update.prune(weight, mask, survives, n_keep, mask.shape[1])
        return kept & (np.cumsum(kept, axis=1) <= fan_in)

    return _pipeline(weight, grad, mask, settings, prune=prune)


@update
def zeros_not_pruned_first(weight, grad, mask, settings, threads):
    def counts(weight, mask, drop_fraction):
        n = np.count_nonzero(mask)
        return n - int(n * drop_fraction), int(n * drop_fraction)

    return _pipeline(weight, grad, mask, settings, counts=counts)


@update
def prune_count_rounded(weight, grad, mask, settings, threads):
    def counts(weight, mask, drop_fraction):
        n = np.count_nonzero(mask)
        n_keep = min(n - round(n * drop_fraction), np.count_nonzero(mask & (weight != 0)))
        return n_keep, n - n_keep

    return _pipeline(weight, grad, mask, settings, counts=counts)


@update
def scope_ignored(weight, grad, mask, settings, threads):
    return _pipeline(weight, grad, mask, settings, scope="all")


@update
def threshold_itself_ablated(weight, grad, mask, settings, threads):
    def survives(salient, threshold):
        return salient > threshold if (salient > threshold).any() else salient >= threshold

    return _pipeline(weight, grad, mask, settings, survives=survives)


@update
def clamp_forgotten(weight, grad, mask, settings, threads):
    def threshold(salient, settings, n_in):
        clamped = mask_update.ablation_threshold(salient, settings, n_in)
        bare = mask_update.ablation_threshold(salient, settings, settings.nnz_budget + 1)
        kept = np.count_nonzero(salient >= bare)
        return bare if kept and settings.nnz_budget // kept <= n_in else clamped

    return _pipeline(weight, grad, mask, settings, threshold=threshold)


@update
def budget_not_redistributed(weight, grad, mask, settings, threads):
    return _pipeline(
        weight, grad, mask, settings, fan_in=lambda budget, n_active, n_out: budget // n_out
    )


@update
def fan_in_rounded_up(weight, grad, mask, settings, threads):
    return _pipeline(
        weight,
        grad,
        mask,
        settings,
        fan_in=lambda budget, n_active, n_out: min(mask.shape[1], -(-budget // n_active)),
    )


@update
def pruned_never_regrown(weight, grad, mask, settings, threads):
    def grow(grad, kept, survives, fan_in):
        new_mask = kept.copy()
        for row in np.flatnonzero(survives):
            missing = fan_in - np.count_nonzero(kept[row])
            fresh = largest(grad[row], ~kept[row] & ~mask[row], missing)
            rest = missing - np.count_nonzero(fresh)
            new_mask[row] |= fresh | largest(grad[row], ~kept[row] & ~fresh, rest)
        return new_mask

    return _pipeline(weight, grad, mask, settings, grow=grow)


def _changed(change: Callable) -> Callable:
    def mutated(weight, grad, mask, settings, threads):
        right = mask_update.srigl_update(weight, grad, mask, settings)
        return change(right, weight, mask, settings, threads)

    mutated.__name__ = change.__name__
    return update(mutated)


@_changed
def one_row_short(right, weight, mask, settings, threads):
    new_mask = right.mask.copy()
    if right.fan_in > 1:
        row = int(np.flatnonzero(new_mask.any(axis=1))[-1])
        new_mask[row, np.flatnonzero(new_mask[row])[-1]] = False
    return replace(right, mask=new_mask)


@_changed
def regrown_weight_zeroed(right, weight, mask, settings, threads):
    return replace(right, weight=np.where(right.mask, right.weight * 0, right.weight))


@_changed
def grown_weight_left_stale(right, weight, mask, settings, threads):
    return replace(right, weight=np.where(right.mask, weight, 0).astype(weight.dtype))


@_changed
def ablated_rows_of_this_update_only(right, weight, mask, settings, threads):
    before = np.flatnonzero(~mask.any(axis=1))
    return replace(right, ablated=np.setdiff1d(right.ablated, before))


@_changed
def revived_not_reported(right, weight, mask, settings, threads):
    return replace(right, revived=right.revived[:0])


@_changed
def mask_written_in_place(right, weight, mask, settings, threads):
    mask[...] = right.mask
    return right


@_changed
def result_is_the_input(right, weight, mask, settings, threads):
    return replace(right, mask=mask) if np.array_equal(mask, right.mask) else right


@_changed
def update_depends_on_threads(right, weight, mask, settings, threads):
    return replace(right, mask=right.mask[:, ::-1].copy()) if threads == 2 else right
