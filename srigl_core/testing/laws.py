"""The laws that every backend obeys, each a function of a backend and a problem.

No pytest and no Hypothesis: the test suite, ``srigl verify`` and authors of other kernels all run
these. A law raises `LawViolation` where it is broken, and `NotApplicable` where the problem, or
what the backend declares, leaves it nothing to check.
"""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.condensed_weight import CondensedWeight
from srigl_core.contract import Backend, MatmulGradients
from srigl_core.dispatch import update_mask
from srigl_core.float_mode import subnormals_are_flushed
from srigl_core.mask_update import MaskUpdate
from srigl_core.plan import Plan, prepare
from srigl_core.reference import mask_update as reference
from srigl_core.registry import get_backend
from srigl_core.testing.bounds import Outcome, first_violation
from srigl_core.testing.flush_mode import can_flush_subnormals, flushing_subnormals
from srigl_core.testing.problems import (
    Chooser,
    MatmulProblem,
    SeededChooser,
    UpdateProblem,
    laid_out,
    matmul_problem,
    update_problem,
)
from srigl_core.value_types import accumulator_dtype

__all__ = [
    "LAWS",
    "Law",
    "LawResult",
    "LawViolation",
    "NotApplicable",
    "check",
    "expected_gradients",
    "expected_product",
    "verify",
]


class LawViolation(AssertionError):  # noqa: N818 - what pytest users expect of a failed law
    """A backend breaks a law; the message shows the problem, the expected and the given."""


class NotApplicable(Exception):  # noqa: N818 - an outcome, not an error
    """A law has nothing to check here; the message says why."""


@dataclass(frozen=True)
class Law:
    """One law.

    Parameters
    ----------
    name : str
    statement : str
        One sentence.
    operation : str
        The operation it is about, one of `srigl_core.contract.OPERATIONS`.
    build : callable
        Makes a problem of a `Chooser`.
    holds : callable
        Takes a backend and a problem.
    """

    name: str
    statement: str
    operation: str
    build: Callable[[Chooser], Any]
    holds: Callable[[Backend, Any], None]


@dataclass(frozen=True)
class LawResult:
    """What became of one law for one backend.

    Parameters
    ----------
    law : Law
    status : {"passed", "failed", "not applicable"}
    examples : int
        Problems that were checked.
    detail : str
        The failure, or the reason why nothing was checked.
    """

    law: Law
    status: str
    examples: int
    detail: str = ""


LAWS: list[Law] = []


def _law(operation: str, build: Callable[[Chooser], Any]) -> Callable[..., Any]:
    """Register a function as the law of its name; its docstring is the statement."""

    def register(holds: Callable[[Backend, Any], None]) -> Callable[[Backend, Any], None]:
        statement = (holds.__doc__ or "").strip()
        LAWS.append(Law(holds.__name__, statement, operation, build, holds))
        return holds

    return register


def verify(
    backend: str | Backend,
    *,
    laws: Sequence[Law] | None = None,
    max_examples: int = 100,
    seed: int = 0,
) -> list[LawResult]:
    """Try laws on a backend.

    Parameters
    ----------
    backend : str or Backend
    laws : sequence of Law, or None
        None is all of `LAWS`.
    max_examples : int
        Problems for each law.
    seed : int
        Of the problems; the same on every machine.

    Returns
    -------
    list of LawResult
        One for each law; a law's first failure ends it.

    Raises
    ------
    BackendUnavailableError
        If the backend cannot run here.
    """
    chosen = get_backend(backend)
    return [_verified(chosen, law, max_examples, seed) for law in (LAWS if laws is None else laws)]


def _verified(backend: Backend, law: Law, max_examples: int, seed: int) -> LawResult:
    examples, reason = 0, ""
    for number in range(max_examples):
        problem = law.build(SeededChooser(seed, zlib.crc32(law.name.encode()), number))
        try:
            check(backend, law, problem)
        except NotApplicable as nothing:
            reason = str(nothing)
            if law.operation not in backend.capabilities.operations:
                break
        except LawViolation as violation:
            return LawResult(law, "failed", examples + 1, f"{violation}\n{problem!r}")
        except Exception:
            return LawResult(law, "failed", examples + 1, f"{traceback.format_exc()}{problem!r}")
        else:
            examples += 1
    return LawResult(law, "passed" if examples else "not applicable", examples, reason)


def check(backend: Backend, law: Law, problem: Any) -> None:
    """Check one law on one problem.

    Raises
    ------
    LawViolation
        If it does not hold.
    NotApplicable
        If the backend does not offer the operation or the dtypes, or the problem has nothing to
        check.
    """
    able = backend.capabilities
    if law.operation not in able.operations:
        raise NotApplicable(f"backend {backend.name!r} does not offer {law.operation}")
    if isinstance(problem, MatmulProblem):
        for dtype in (problem.weight.dtype, problem.x.dtype):
            if dtype.name not in able.value_dtypes:
                raise NotApplicable(f"backend {backend.name!r} does not take {dtype.name}")
        if problem.weight.indices.dtype.name not in able.index_dtypes:
            raise NotApplicable(f"backend {backend.name!r} does not take these indices")
    law.holds(backend, problem)


def expected_product(
    weight: CondensedWeight, x: NDArray[Any], bias: NDArray[Any] | None, activation: str
) -> Outcome:
    """Return the product in extended precision, (..., n_out), by SPEC 2.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
    x : ndarray, (..., n_in)
    bias : ndarray, (n_out,), or None
        In the product's dtype.
    activation : str
    """
    with np.errstate(all="ignore"):
        z = np.zeros((*x.shape[:-1], weight.shape[0]), np.longdouble)
        scale = np.zeros_like(z)
        terms = np.zeros(weight.shape[0], np.int64)
        for row, values, columns in zip(
            weight.active, weight.values.astype(np.longdouble), weight.indices, strict=True
        ):
            products = x[..., columns].astype(np.longdouble) * values
            z[..., row] = products.sum(axis=-1)
            scale[..., row] = _magnitudes(products).sum(axis=-1)
            terms[row] = columns.size
        if bias is not None:
            z += bias.astype(np.longdouble)
            scale += _magnitudes(bias.astype(np.longdouble))
        kind = accumulator_dtype(x.dtype, weight.dtype)
        return Outcome(z, scale, terms, kind, activation)


def _magnitudes(products: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    """Return the magnitudes of the finite terms: those that may overflow on the way."""
    return np.where(np.isfinite(products), np.abs(products), 0)


def expected_gradients(
    weight: CondensedWeight, grad: NDArray[Any], x: NDArray[Any]
) -> dict[str, Outcome]:
    """Return dx, dvalues and dbias in extended precision, by SPEC 2, Backward.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
    grad : ndarray, (..., n_out)
    x : ndarray, (..., n_in)
    """
    g = grad.reshape(-1, grad.shape[-1]).astype(np.longdouble)
    rows = x.reshape(-1, x.shape[-1]).astype(np.longdouble)
    dx, dx_scale = np.zeros(rows.shape, np.longdouble), np.zeros(rows.shape, np.longdouble)
    dvalues, values_scale = (np.zeros(weight.values.shape, np.longdouble) for _ in range(2))
    degree = np.bincount(weight.indices.ravel(), minlength=weight.shape[1])
    with np.errstate(all="ignore"):
        for i, (row, columns) in enumerate(zip(weight.active, weight.indices, strict=True)):
            products = g[:, row, None] * weight.values[i].astype(np.longdouble)
            dx[:, columns] += products
            dx_scale[:, columns] += _magnitudes(products)
            products = g[:, row, None] * rows[:, columns]
            dvalues[i], values_scale[i] = products.sum(axis=0), _magnitudes(products).sum(axis=0)
        batch = np.array(g.shape[0])
        kind = accumulator_dtype(grad.dtype, weight.dtype)
        all_kinds = accumulator_dtype(kind, x.dtype)
        bias_kind = accumulator_dtype(grad.dtype)
        return {
            "x": Outcome(dx.reshape(x.shape), dx_scale.reshape(x.shape), degree, kind),
            "values": Outcome(dvalues, values_scale, batch, all_kinds),
            "bias": Outcome(g.sum(axis=0), _magnitudes(g).sum(axis=0), batch, bias_kind),
        }


def _product_of(problem: MatmulProblem) -> Outcome:
    bias = problem.bias
    if bias is not None:
        with np.errstate(all="ignore"):
            bias = bias.astype(problem.result_dtype)
    return expected_product(problem.weight, problem.x, bias, problem.activation)


def _call(plan: Plan, problem: MatmulProblem, **options: Any) -> NDArray[Any]:
    return plan(problem.x, problem.bias, activation=problem.activation, **options)


def _assert_within(got: NDArray[Any], outcome: Outcome, what: str) -> None:
    if got.shape != outcome.z.shape:
        raise LawViolation(f"{what} has shape {got.shape}, expected {outcome.z.shape}")
    violation = first_violation(got, outcome)
    if violation is not None:
        raise LawViolation(f"{what} {violation[1]}")


def _assert_same_bits(got: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise LawViolation(
            f"{what}: {got.dtype} {got.shape} instead of {expected.dtype} {expected.shape}"
        )
    if got.tobytes() != expected.tobytes():
        differs = np.argwhere(_bits(got) != _bits(expected))
        where = tuple(int(i) for i in differs[0])
        raise LawViolation(f"{what}: at {where} {got[where]!r} instead of {expected[where]!r}")


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind in "bi":
        return array
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


@_law("condensed_matmul", matmul_problem)
def product_is_within_the_error_bound(backend: Backend, problem: MatmulProblem) -> None:
    """The product has dtype result_type(x, values), and each element obeys the bound of SPEC 2."""
    got = _call(prepare(problem.weight, backend=backend), problem)
    if got.dtype != problem.result_dtype:
        raise LawViolation(f"the product has dtype {got.dtype}, expected {problem.result_dtype}")
    _assert_within(got, _product_of(problem), "the product")


@_law("condensed_matmul", matmul_problem)
def product_agrees_with_other_oracles(backend: Backend, problem: MatmulProblem) -> None:
    """The reference and SciPy CSR give the same product, within twice the bound."""
    got = _call(prepare(problem.weight, backend=backend), problem)
    outcome = _product_of(problem)
    for oracle in {"reference", "scipy"} - {backend.name}:
        other = _call(prepare(problem.weight, backend=oracle), problem)
        if not _closeness(got, other, outcome):
            raise LawViolation(f"the product differs from that of {oracle} by over two bounds")


def _closeness(got: NDArray[Any], other: NDArray[Any], outcome: Outcome) -> bool:
    with np.errstate(all="ignore"):
        a, b = got.astype(np.float64), other.astype(np.float64)
        near = np.abs(a - b) <= 2 * outcome.bound(got.dtype)
        undecided = ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(outcome.bound(got.dtype))
        return bool((near | undecided).all())


@_law("condensed_matmul", matmul_problem)
def compact_output_is_the_active_columns(backend: Backend, problem: MatmulProblem) -> None:
    """With compact=True the result has the active neurons' columns and no others."""
    outcome = _product_of(problem)
    active = problem.weight.active
    columns = replace(
        outcome,
        z=outcome.z[..., active],
        scale=outcome.scale[..., active],
        terms=outcome.terms[active],
    )
    got = _call(prepare(problem.weight, backend=backend), problem, compact=True)
    _assert_within(got, columns, "the compact product")


@_law("condensed_matmul", matmul_problem)
def ablated_neurons_output_the_activated_bias(backend: Backend, problem: MatmulProblem) -> None:
    """An ablated neuron outputs act(bias), 0 without a bias, whatever the input."""
    ablated = problem.weight.ablated
    if not ablated.size:
        raise NotApplicable("no neuron is ablated")
    poisoned = replace(problem, x=np.full_like(problem.x, np.nan))
    got = _call(prepare(problem.weight, backend=backend), poisoned)[..., ablated]
    outcome = _product_of(problem)
    _assert_within(
        got,
        replace(
            outcome,
            z=outcome.z[..., ablated],
            scale=outcome.scale[..., ablated],
            terms=outcome.terms[ablated],
        ),
        "the output of ablated neurons",
    )


def _special(shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).choice([np.nan, np.inf, -np.inf], shape)


@_law("condensed_matmul", matmul_problem)
def unconnected_inputs_do_not_contribute(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity in columns that no neuron is connected to do not reach the product."""
    unconnected = ~problem.weight.to_mask().any(axis=0)
    if not unconnected.any():
        raise NotApplicable("every column is connected")
    x = problem.x.copy()
    x[..., unconnected] = _special(x[..., unconnected].shape, 1)
    poisoned = replace(problem, x=x)
    got = _call(prepare(problem.weight, backend=backend), poisoned)
    _assert_within(got, _product_of(problem), "with NaN and inf at unconnected inputs, the product")


@_law("condensed_matmul", matmul_problem)
def non_finite_inputs_reach_their_neurons_only(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity spread by IEEE rules to the neurons connected to them, and to no others."""
    for column in {0, problem.x.shape[-1] - 1, problem.x.shape[-1] // 2}:
        x = problem.x.copy()
        x[..., column] = _special(x[..., column].shape, column)
        poisoned = replace(problem, x=x)
        got = _call(prepare(problem.weight, backend=backend), poisoned)
        what = f"with NaN or inf in column {column}, the product"
        _assert_within(got, _product_of(poisoned), what)


@_law("condensed_matmul", matmul_problem)
def non_finite_weights_and_biases_propagate(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity in values or bias reach their own neuron's output, and no other's."""
    values = problem.weight.values.copy()
    values[0, -1] = np.inf
    values[-1, 0] = -np.inf if values.size > 1 else np.nan
    bias = np.zeros(problem.weight.shape[0], problem.result_dtype)
    bias[-1], bias[0] = np.nan, -np.inf
    for what, poisoned in (
        ("the weight", replace(problem, weight=problem.weight.with_values(values))),
        ("the bias", replace(problem, bias=bias)),
    ):
        got = _call(prepare(poisoned.weight, backend=backend), poisoned)
        _assert_within(got, _product_of(poisoned), f"with NaN and inf in {what}, the product")


@_law("condensed_matmul", matmul_problem)
def same_inputs_give_the_same_bits(backend: Backend, problem: MatmulProblem) -> None:
    """A product has the same bits again, on any number of threads, and after other work."""
    plan = prepare(problem.weight, backend=backend)
    first = _call(plan, problem)
    for threads in (1, 2, 3, None):
        again = _call(plan, problem, threads=threads)
        _assert_same_bits(again, first, f"the product on threads={threads}")
        _call(plan, replace(problem, x=-problem.x))
    fresh = _call(prepare(problem.weight, backend=backend), problem)
    _assert_same_bits(fresh, first, "the product of a fresh plan")


@_law("condensed_matmul", matmul_problem)
def inputs_are_not_written(backend: Backend, problem: MatmulProblem) -> None:
    """Neither x nor the bias nor the weight changes."""
    before = problem.x.tobytes(), problem.weight.values.tobytes(), problem.weight.indices.tobytes()
    bias = None if problem.bias is None else problem.bias.tobytes()
    _call(prepare(problem.weight, backend=backend), problem)
    after = problem.x.tobytes(), problem.weight.values.tobytes(), problem.weight.indices.tobytes()
    if before != after or bias != (None if problem.bias is None else problem.bias.tobytes()):
        raise LawViolation("an input was written")


@_law("condensed_matmul", matmul_problem)
def out_is_filled_whatever_it_held(backend: Backend, problem: MatmulProblem) -> None:
    """With out= every element is written, in any value type, rounded once, and nothing else is."""
    outcome = _product_of(problem)
    out = _out_array(outcome.z.shape, problem)
    got = _call(prepare(problem.weight, backend=backend), problem, out=out)
    if got is not out:
        raise LawViolation("the call did not return the array given as out")
    _assert_within(out, outcome, f"out of {problem.out_dtype}, laid out {problem.out_layout!r},")
    _assert_neighbours_untouched(out, problem)


def _out_array(shape: tuple[int, ...], problem: MatmulProblem) -> NDArray[Any]:
    return laid_out(np.full(shape, np.nan, problem.out_dtype), problem.out_layout)


def _assert_neighbours_untouched(out: NDArray[Any], problem: MatmulProblem) -> None:
    if problem.out_layout == "every second" and out.base is not None:
        between = out.base.reshape(-1, out.base.shape[-1])[:, 1::2]
        if not (between == 77).all():
            raise LawViolation("memory between the elements of out was written")


@_law("condensed_matmul", matmul_problem)
def memory_layout_does_not_matter(backend: Backend, problem: MatmulProblem) -> None:
    """Any strides and alignment of x give a product within the bound of the same numbers."""
    plan = prepare(problem.weight, backend=backend)
    for layout in ("C", "F", "reversed", "every second", "offset by a byte"):
        elsewhere = replace(problem, x=laid_out(problem.x, layout))
        _assert_within(_call(plan, elsewhere), _product_of(elsewhere), f"of x laid out {layout!r},")


@_law("condensed_matmul", matmul_problem)
def subnormals_are_honoured_in_any_thread_mode(backend: Backend, problem: MatmulProblem) -> None:
    """A thread that flushes subnormals gets the same bits, and is left in its mode."""
    if not can_flush_subnormals():
        raise NotApplicable("the mode of a thread cannot be set on this platform")
    plan = prepare(problem.weight, backend=backend)
    first = _call(plan, problem)
    _assert_within(first, _product_of(problem), "the product")
    with flushing_subnormals():
        before = subnormals_are_flushed()
        again = _call(plan, problem)
        if subnormals_are_flushed() != before:
            raise LawViolation("the thread was left in another floating-point mode")
    _assert_same_bits(again, first, "the product in a flushing thread")


@_law("condensed_matmul", matmul_problem)
def with_values_is_a_fresh_plan(backend: Backend, problem: MatmulProblem) -> None:
    """plan.with_values(v) has the bits of a plan made anew for v; the old plan stays as it was."""
    plan = prepare(problem.weight, backend=backend)
    first = _call(plan, problem)
    values = problem.weight.values[::-1, ::-1]
    changed = _call(plan.with_values(values), problem)
    fresh = _call(prepare(problem.weight.with_values(values), backend=backend), problem)
    _assert_same_bits(changed, fresh, "the product of with_values")
    _assert_same_bits(_call(plan, problem), first, "the old plan's product")


@_law("condensed_matmul_backward", matmul_problem)
def gradients_are_within_the_error_bound(backend: Backend, problem: MatmulProblem) -> None:
    """dx, dvalues and dbias obey the bound of SPEC 2; those of 16-bit values are float32."""
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    plan = prepare(problem.weight, backend=backend)
    got = plan.backward(problem.grad, problem.x)
    for name, gradient in _each(got):
        if name != "x" and gradient.dtype.itemsize == 2:
            raise LawViolation(f"the gradient of {name} has dtype {gradient.dtype}")
        _assert_within(gradient, expected[name], f"the gradient of {name}")


@_law("condensed_matmul_backward", matmul_problem)
def gradients_agree_with_other_oracles(backend: Backend, problem: MatmulProblem) -> None:
    """The reference and SciPy CSR give the same gradients, within twice the bound."""
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    got = prepare(problem.weight, backend=backend).backward(problem.grad, problem.x)
    for oracle in {"reference", "scipy"} - {backend.name}:
        other = prepare(problem.weight, backend=oracle).backward(problem.grad, problem.x)
        for (name, mine), (_, theirs) in zip(_each(got), _each(other), strict=True):
            if not _closeness(mine, theirs, expected[name]):
                raise LawViolation(f"the gradient of {name} differs from that of {oracle}")


@_law("condensed_matmul_backward", matmul_problem)
def unconnected_places_do_not_reach_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """NaN in grad at ablated rows or in x at unconnected columns reaches neither dx nor dvalues."""
    ablated = problem.weight.ablated
    unconnected = ~problem.weight.to_mask().any(axis=0)
    if not ablated.size and not unconnected.any():
        raise NotApplicable("nothing is ablated or unconnected")
    grad, x = problem.grad.copy(), problem.x.copy()
    grad[..., ablated] = _special(grad[..., ablated].shape, 1)
    x[..., unconnected] = _special(x[..., unconnected].shape, 2)
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    got = prepare(problem.weight, backend=backend).backward(grad, x, wrt=("x", "values"))
    for name, gradient in _each(got):
        _assert_within(gradient, expected[name], f"with NaN elsewhere, the gradient of {name}")


@_law("condensed_matmul_backward", matmul_problem)
def non_finite_gradients_propagate(backend: Backend, problem: MatmulProblem) -> None:
    """NaN and infinity in connected places spread by IEEE rules, and no further."""
    grad, x = problem.grad.copy(), problem.x.copy()
    grad[..., -1] = _special(grad[..., -1].shape, 3)
    x[..., 0] = _special(x[..., 0].shape, 4)
    expected = expected_gradients(problem.weight, grad, x)
    got = prepare(problem.weight, backend=backend).backward(grad, x)
    for name, gradient in _each(got):
        _assert_within(gradient, expected[name], f"with NaN and inf, the gradient of {name}")


@_law("condensed_matmul_backward", matmul_problem)
def same_inputs_give_the_same_gradients(backend: Backend, problem: MatmulProblem) -> None:
    """Gradients have the same bits again, on any number of threads, also in a flushing thread."""
    plan = prepare(problem.weight, backend=backend)
    first = plan.backward(problem.grad, problem.x)
    repeats = [plan.backward(problem.grad, problem.x, threads=t) for t in (1, 2, 3)]
    with flushing_subnormals():
        repeats.append(plan.backward(problem.grad, problem.x))
    for again in repeats:
        for (name, mine), (_, before) in zip(_each(again), _each(first), strict=True):
            _assert_same_bits(mine, before, f"the gradient of {name}")


@_law("condensed_matmul_backward", matmul_problem)
def gradients_are_written_to_out(backend: Backend, problem: MatmulProblem) -> None:
    """With out= each gradient is written there whole, in its type; inputs are not written."""
    expected = expected_gradients(problem.weight, problem.grad, problem.x)
    out = MatmulGradients(
        **{name: _out_array(outcome.z.shape, problem) for name, outcome in expected.items()}
    )
    before = problem.grad.tobytes(), problem.x.tobytes()
    got = prepare(problem.weight, backend=backend).backward(problem.grad, problem.x, out=out)
    for (name, gradient), (_, given) in zip(_each(got), _each(out), strict=True):
        if gradient is not given:
            raise LawViolation(f"the gradient of {name} was not returned as given in out")
        _assert_within(gradient, expected[name], f"out of {problem.out_dtype}, gradient of {name}")
        _assert_neighbours_untouched(gradient, problem)
    if before != (problem.grad.tobytes(), problem.x.tobytes()):
        raise LawViolation("an input was written")


def _each(gradients: MatmulGradients) -> Iterator[tuple[str, NDArray[Any]]]:
    for part in fields(gradients):
        gradient = getattr(gradients, part.name)
        if gradient is not None:
            yield part.name, gradient


def _update(backend: Backend, problem: UpdateProblem, **options: Any) -> MaskUpdate:
    settings = {
        part.name: getattr(problem.settings, part.name) for part in fields(problem.settings)
    }
    return update_mask(
        problem.weight, problem.grad, problem.mask, backend=backend, **settings, **options
    )


@_law("update_mask", update_problem)
def update_is_that_of_the_reference(backend: Backend, problem: UpdateProblem) -> None:
    """Every field of the update is the definition's, bit for bit: ties go to the lowest index."""
    expected = reference.srigl_update(problem.weight, problem.grad, problem.mask, problem.settings)
    _assert_same_update(_update(backend, problem), expected)


@_law("update_mask", update_problem)
def updated_mask_keeps_the_invariants(backend: Backend, problem: UpdateProblem) -> None:
    """Active rows have exactly k weights, at least one is active, and the budget is kept."""
    update = _update(backend, problem)
    counts = np.count_nonzero(update.mask, axis=1)
    active = np.flatnonzero(counts)
    if not active.size or (counts[active] != update.fan_in).any():
        raise LawViolation(f"rows have {counts.tolist()} weights; the fan-in is {update.fan_in}")
    if update.nnz != counts[active[0]] * active.size or update.nnz > problem.settings.nnz_budget:
        raise LawViolation(f"{update.nnz} weights; the budget is {problem.settings.nnz_budget}")
    if update.ablated.tolist() != np.flatnonzero(counts == 0).tolist():
        raise LawViolation(f"ablated is {update.ablated.tolist()}; row counts {counts.tolist()}")
    change = np.count_nonzero(problem.mask) - update.n_pruned + update.n_grown
    if change != update.nnz:
        raise LawViolation("n_pruned and n_grown do not lead from the old mask to the new")
    stays, grown = problem.mask & update.mask, update.mask & ~problem.mask
    due = np.where(stays, problem.weight, 0).astype(problem.weight.dtype)
    due[grown] = problem.settings.grown_init
    if not np.array_equal(update.weight, due):
        raise LawViolation("a weight was not kept, or a new one is not grown_init")


@_law("update_mask", update_problem)
def update_does_not_write_its_inputs(backend: Backend, problem: UpdateProblem) -> None:
    """Neither weight nor gradient nor mask changes, and the results are new arrays."""
    arrays = (problem.weight, problem.grad, problem.mask)
    before = [array.tobytes() for array in arrays]
    update = _update(backend, problem)
    if before != [array.tobytes() for array in arrays]:
        raise LawViolation("an input was written")
    if any(np.shares_memory(new, old) for new in (update.mask, update.weight) for old in arrays):
        raise LawViolation("a result shares memory with an input")


@_law("update_mask", update_problem)
def same_inputs_give_the_same_update(backend: Backend, problem: UpdateProblem) -> None:
    """An update is the same again, on any number of threads, also in a flushing thread."""
    first = _update(backend, problem)
    repeats = [_update(backend, problem, threads=threads) for threads in (1, 2, 3)]
    with flushing_subnormals():
        repeats.append(_update(backend, problem))
    for again in repeats:
        _assert_same_update(again, first)


def _assert_same_update(update: MaskUpdate, expected: MaskUpdate) -> None:
    for part in fields(MaskUpdate):
        mine, due = getattr(update, part.name), getattr(expected, part.name)
        if isinstance(due, np.ndarray):
            _assert_same_bits(mine, due, f"{part.name} of the update")
        elif mine != due:
            raise LawViolation(f"{part.name} of the update is {mine}, expected {due}")
