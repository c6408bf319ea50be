"""The laws of chains (SPEC 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._chain import Chain, chain
from srigl_core._format.weight import CondensedWeight
from srigl_core._plan import plan_of
from srigl_core.contract import Backend
from srigl_core.testing.bounds import float_limits
from srigl_core.testing.chain_problems import ChainProblem, LayerOfChain, chain_problem
from srigl_core.testing.comparisons import (
    assert_neighbours_untouched,
    assert_same_bits,
    assert_same_numbers,
    assert_unwritten,
    out_array,
)
from srigl_core.testing.kernel_capabilities import capabilities_of
from srigl_core.testing.law import Law, LawViolation, NotApplicable, law_decorator
from srigl_core.testing.problem_arrays import combinable_dtypes
from srigl_core.testing.thread_calls import THREADS, assert_repeatable, assert_same_in_threads

__all__ = ["CHAIN_LAWS"]

CHAIN_LAWS: list[Law] = []
_law = law_decorator(CHAIN_LAWS, "chain", chain_problem)
_AGAINST = "the plans, called one after the other"
_TOLERANCE = "bit for bit, where one NaN is as good as another"


def _chain(backend: Backend, problem: ChainProblem) -> Chain:
    layers = [(each.weight, each.bias, each.activation, each.inputs) for each in problem.layers]
    return chain(layers, backend=backend)


def _one_by_one(backend: Backend, problem: ChainProblem, **options: Any) -> NDArray[Any]:
    """Return what the plans give; the options are for the last one."""
    result = problem.x
    for i, layer in enumerate(problem.layers):
        plan: Callable[..., NDArray[Any]] = plan_of(layer.weight, backend, layer.inputs)
        last = options if i == len(problem.others) else {}
        result = plan(result, layer.bias, activation=layer.activation, **last)
    return result


def _any_numbers(problem: ChainProblem, salt: int) -> ChainProblem:
    """Return a chain of other inputs: rows in another order, some with another sign."""
    rng = problem.rng(salt)
    x = problem.x.reshape(-1, problem.x.shape[-1])
    signs = rng.choice([-1, 1], (len(x), 1)).astype(x.dtype)
    return replace(problem, x=x[rng.permutation(len(x))] * signs)


@_law(_AGAINST, _TOLERANCE)
def a_chain_is_its_plans_one_after_the_other(backend: Backend, problem: ChainProblem) -> None:
    """A chain gives the bits of its plans for the whole batch, each result rounded to its type."""
    whole = _chain(backend, problem)
    assert_same_numbers(whole(problem.x), _one_by_one(backend, problem), "the result")
    rows = problem.x.reshape(-1, problem.x.shape[-1])
    for n in sorted({min(len(rows), size) for size in (1, 2, 3, 4, 5, len(rows))} - {0}):
        for x in (rows[:n], rows[-n:]) if n > 1 else (rows[0], rows[-1:]):
            case = replace(problem, x=x)
            what = f"the result of x of shape {x.shape}"
            assert_same_numbers(whole(x), _one_by_one(backend, case), what)
    if subnormal := _subnormal_between_layers(problem):
        result = _chain(backend, subnormal)(subnormal.x)
        what = "the result by way of subnormal numbers"
        assert_same_numbers(result, _one_by_one(backend, subnormal), what)


def _subnormal_between_layers(problem: ChainProblem) -> ChainProblem | None:
    """Return a chain whose first layer gives subnormal numbers, which the second makes larger."""
    if problem.inputs is not None or not problem.others:
        return None
    first, (second, *others) = problem.weight, problem.others
    dtype = problem.result_dtype
    if first.dtype != dtype or not isinstance(second.weight, CondensedWeight):
        return None
    limits = float_limits(dtype)
    small = np.copysign(4 * limits.smallest, first.values.astype(np.float64)).astype(dtype)
    most = float_limits(second.weight.dtype).largest
    large = np.copysign(most**0.5, second.weight.values.astype(np.float64))
    changed = second.weight.with_values(large.astype(second.weight.dtype))
    return replace(
        problem,
        weight=first.with_values(small),
        x=np.sign(problem.x),
        bias=None,
        others=(replace(second, weight=changed), *others),
    )


@_law("itself", "bit for bit")
def a_chain_gives_the_same_bits_on_any_threads(backend: Backend, problem: ChainProblem) -> None:
    """A repeated result has the same bits, on any number of threads, and in a flushing thread."""
    whole = _chain(backend, problem)
    same = partial(assert_same_bits, what="a repeated result of the chain")
    inputs = [problem.x]
    if problem.seed % 5 == 0:  # a call on more threads than processors may take milliseconds
        inputs.append(_many_rows(problem, capabilities_of(backend).largest_problem))
    for x in inputs:
        assert_repeatable(partial(whole, x), same, problem.rng())


def _many_rows(problem: ChainProblem, most: int) -> NDArray[Any]:
    """Return inputs, the rows of x again and again, with work for several threads in a layer.

    They are fewer where a layer would have more than `most` numbers.
    """
    weights = [layer.weight for layer in problem.layers]
    wanted = _WORK // max(weight.nnz for weight in weights)
    widest = max(max(weight.shape) for weight in weights)
    n_rows = min(max(1, wanted), max(1, min(most, _WORK) // widest))
    return np.resize(problem.x, (n_rows, problem.x.shape[-1]))


_WORK = 2_500_000
"""Products of numbers, which take a fast kernel more than 50 microseconds."""


@_law(_AGAINST, _TOLERANCE)
def a_used_chain_is_as_a_fresh_one(backend: Backend, problem: ChainProblem) -> None:
    """Calls with other batches, types and options before it do not change a result."""
    used, rng = _chain(backend, problem), problem.rng()
    capabilities = capabilities_of(backend)
    x = problem.x.reshape(-1, problem.x.shape[-1])
    sizes = {len(x), min(len(x), 1), len(x) // 2, int(rng.integers(0, len(x) + 1))}
    for size in rng.permutation([*sizes, *sizes]):
        dtypes = [
            problem.x.dtype,
            problem.x.dtype,
            *combinable_dtypes(capabilities, *_types(problem)),
        ]
        dtype = dtypes[rng.integers(len(dtypes))]
        case = _any_numbers(replace(problem, x=x[len(x) - size :].astype(dtype)), int(size))
        options: dict[str, Any] = {
            "compact": bool(rng.random() < 0.3),
            "threads": int(rng.choice(THREADS)),
        }
        what = f"the result of {size} rows of {dtype} by a used chain"
        assert_same_numbers(used(case.x, **options), _one_by_one(backend, case, **options), what)


def _types(problem: ChainProblem) -> list[np.dtype[Any]]:
    return [layer.weight.float_dtype for layer in problem.layers]


@_law(_AGAINST, _TOLERANCE)
def out_and_compact_are_for_the_last_layer(backend: Backend, problem: ChainProblem) -> None:
    """With out= and compact= the last layer's result is written or shortened, no other layer's."""
    whole = _chain(backend, problem)
    shape = (*problem.x.shape[:-1], problem.layers[-1].weight.shape[0])
    for compact in (False, True):
        if compact:
            shape = (*shape[:-1], problem.layers[-1].weight.n_active)
        expected = _one_by_one(backend, problem, compact=compact)
        assert_same_numbers(
            whole(problem.x, compact=compact), expected, f"compact={compact}: the result"
        )
        if not capabilities_of(backend).out:
            continue
        out, its = out_array(shape, problem), out_array(shape, problem)
        if whole(problem.x, out=out, compact=compact) is not out:
            raise LawViolation("the call did not return the array passed as out")
        _one_by_one(backend, problem, out=its, compact=compact)
        assert_same_numbers(out, its, f"out of {out.dtype}, compact={compact},")
        assert_neighbours_untouched(out, problem)


@_law(_AGAINST, _TOLERANCE)
def non_finite_numbers_pass_through_a_chain(backend: Backend, problem: ChainProblem) -> None:
    """NaN and infinity in inputs, values and biases go where the plans let them go."""
    x = problem.x.copy()
    if not x.size:
        raise NotApplicable("there is no row")
    x[..., problem.rng().integers(x.shape[-1])] = problem.special_numbers(x.shape[:-1])
    cases = {"x": replace(problem, x=x)}
    layers = [_poisoned(problem, i, layer) for i, layer in enumerate(problem.layers)]
    first, *others = layers
    case = replace(problem, bias=first.bias, others=tuple(others))
    if isinstance(first.weight, CondensedWeight):
        case = replace(case, weight=first.weight)
    cases["weights and biases"] = case
    for what, case in cases.items():
        expected = _one_by_one(backend, case)
        assert_same_numbers(_chain(backend, case)(case.x), expected, f"with NaN and inf in {what}")


def _poisoned(problem: ChainProblem, number: int, layer: LayerOfChain) -> LayerOfChain:
    """Return a layer with a number that is not finite in its values or its bias, or neither."""
    rng, (special,) = problem.rng(number), problem.special_numbers((1,), number)
    weight, bias, place = layer.weight, layer.bias, rng.random()
    if bias is not None and place < 0.4:
        bias = bias.copy()
        bias[rng.integers(bias.size)] = special
    elif place < 0.7 and isinstance(weight, CondensedWeight):
        values = weight.values.copy()
        values[rng.integers(len(values)), rng.integers(weight.fan_in)] = special
        weight = weight.with_values(values)
    return replace(layer, weight=weight, bias=bias)


@_law("itself", "bit for bit")
def a_chain_keeps_its_own_numbers(backend: Backend, problem: ChainProblem) -> None:
    """Inputs are not written and not kept; later writes to biases, and calls, change no result."""
    biases = [None if each.bias is None else each.bias.copy() for each in problem.layers]
    layers = [replace(each, bias=bias) for each, bias in zip(problem.layers, biases, strict=True)]
    case = replace(problem, bias=biases[0], others=tuple(layers[1:]))
    whole = _chain(backend, case)
    x = np.array(problem.x)
    arrays = (x, *biases, *(each.weight.values for each in layers))
    first = assert_unwritten(arrays, lambda: whole(x))
    kept = first.copy()
    np.negative(x, out=x)
    other = _one_by_one(backend, replace(case, x=x))
    assert_same_numbers(whole(x), other, "the result after x was changed")
    for bias in biases:
        if bias is not None:
            np.negative(bias, out=bias)
    assert_same_bits(whole(problem.x), kept, "the result after the biases were changed")
    whole(_any_numbers(problem, 1).x)
    assert_same_bits(first, kept, "an earlier result")


@_law("itself", "bit for bit")
def threads_may_share_a_chain(backend: Backend, problem: ChainProblem) -> None:
    """Called from several threads at once, a chain gives each the bits of its own result."""
    whole = _chain(backend, problem)
    inputs = (problem.x, -problem.x, np.zeros_like(problem.x), _any_numbers(problem, 1).x)
    calls = [partial(whole, x) for x in inputs]
    assert_same_in_threads(calls, partial(assert_same_bits, what="a result beside other threads"))
