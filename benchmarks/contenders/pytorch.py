"""PyTorch's operations: dense products in all precisions, CSR, gathers, 2:4, and a mask update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.active_rows import without_ablated_rows
from srigl_core.benchmarks.contenders.contender import (
    Bind,
    Call,
    Contender,
    unless,
    unless_ablated,
    unless_compiled,
)
from srigl_core.benchmarks.contenders.scipy_csr import csr_matrix
from srigl_core.benchmarks.problems import BFLOAT16, FLOAT16, FULL, TF32, Batch, Problem

__all__ = ["contenders"]

_SHARE = 0.6
"""Share of the neurons that remain where whole neurons are removed and the rest is dense."""

_MOST_GATHERED = {"cpu": 1 << 21, "gpu": 1 << 30}
"""Most numbers that a gather may hold at once. On a CPU, more take tens of milliseconds."""

_TWO_OF_FOUR_SIDE = 16
"""cuSPARSELt takes weights whose sides are multiples of this."""

# The library may keep partial sums in the type of the result.
_FLOAT16 = replace(FLOAT16, of_products=FLOAT16.of_result)
_BFLOAT16 = replace(BFLOAT16, of_products=BFLOAT16.of_result)
_GPU_DENSE = {
    "dense": ("float32", FULL),
    "tf32": ("TF32", TF32),
    "fp16": ("float16", _FLOAT16),
    "bf16": ("bfloat16", _BFLOAT16),
}

_linear = torch.nn.functional.linear


def contenders(device: str) -> list[Contender]:
    """Return every way that this build of PyTorch has on a device."""
    torch.set_grad_enabled(False)
    made = [*(_on_gpu() if device == "gpu" else _on_cpu()), *_on_both(device)]
    return [replace(each, takes=Problem.tensor) for each in made]


def _on_both(device: str) -> list[Contender]:
    weighted = _einsum if device == "gpu" else _product_and_sum
    compiled = _gather(_product_and_sum, _compiled)
    fits = _unless_gathered_fits(_MOST_GATHERED[device])
    return [
        Contender("torch CSR", "csr", "forward", _csr()),
        Contender("torch CSR", "csr", "backward", _csr_gradients),
        Contender("torch gather", "gather", "forward", _gather(weighted), unfit=fits),
        Contender("torch gather, compiled", "gather", "forward", compiled, unfit=unless_compiled),
        Contender("torch top-k", "other", "update", _update),
    ]


def _on_cpu() -> list[Contender]:
    torch_dense = Contender("torch F.linear", "dense", "forward", _dense())
    made = [
        *_with_some_neurons(torch_dense),
        without_ablated_rows(torch_dense),
        Contender("torch dense", "dense", "backward", _dense_gradients),
    ]
    if torch.backends.mkldnn.is_available():
        product = Contender(
            "oneDNN",
            "dense",
            "forward",
            _dense(_onednn),
            unfit=unless(lambda case: case.dtype != "float64", "has no float64"),
        )
        whole, some = _with_some_neurons(product)
        packed = replace(product, name="oneDNN, packed weight", prepare=_onednn_packed)
        backward = replace(product, operation="backward", prepare=_onednn_gradients)
        made += [whole, packed, without_ablated_rows(packed), some, backward]
    return made


def _with_some_neurons(dense: Contender) -> list[Contender]:
    """Return a dense product, and the same of a share of the neurons."""
    some = replace(
        dense,
        name=f"{dense.name}, {_SHARE:.0%} of the neurons",
        family="fewer neurons",
        problem=_some_neurons,
    )
    return [dense, some]


def _some_neurons(problem: Problem) -> Problem:
    return problem.first_neurons(_SHARE)


def _on_gpu() -> list[Contender]:
    torch.set_float32_matmul_precision("highest")
    # Sums in float32 throughout, as ours.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    made = []
    for family, (label, precision) in _GPU_DENSE.items():
        product = Contender(
            f"torch {label}",
            family,
            "forward",
            _dense(),
            precision=precision,
            around=partial(_matmul_precision, "high" if precision is TF32 else "highest"),
        )
        fewer = replace(
            product,
            name=f"torch {label}, active neurons only",
            family="fewer neurons" if family == "dense" else f"fewer neurons, {family}",
            problem=Problem.active_neurons,
            unfit=unless_ablated,
        )
        made += [product, fewer, replace(product, operation="backward", prepare=_dense_gradients)]
    has_rows = unless(lambda case: case.batch != 1, "one row need not be transposed")
    return [
        *made,
        Contender("torch CSR, x transposed", "csr", "forward", _csr(copied=True), unfit=has_rows),
        Contender(
            "torch 2:4 float16",
            "other",
            "forward",
            _two_of_four,
            precision=_FLOAT16,
            problem=Problem.two_of_four,
            unfit=_unless_two_of_four_fits,
        ),
    ]


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _onednn(x: Any, weight: Any, bias: Any = None) -> Any:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(linear: Callable[..., Any] = _linear) -> Callable[[Problem], Bind]:
    def prepare(problem: Problem) -> Bind:
        weight, bias = problem.tensor(problem.dense), problem.tensor(problem.bias)
        return lambda batch: lambda: linear(batch.x, weight, bias)

    return prepare


def _onednn_packed(problem: Problem) -> Bind:
    """Put the weight into oneDNN's preferred layout for each batch, as frozen models do."""
    weight, bias = problem.tensor(problem.dense), problem.tensor(problem.bias)

    def bind(batch: Batch) -> Call:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(batch.x))
        return lambda: _onednn(batch.x, packed, bias)

    return bind


def _dense_gradients(problem: Problem) -> Bind:
    weight = problem.tensor(problem.dense)
    return lambda batch: lambda: (batch.grad @ weight, batch.grad.t() @ batch.x)


def _onednn_gradients(problem: Problem) -> Bind:
    weight = problem.tensor(problem.dense)
    return lambda batch: (
        lambda: (
            _onednn(batch.grad, weight.t()),
            _onednn(batch.grad.t(), batch.x.t()),
        )
    )


def _csr_tensor(problem: Problem, matrix: Any) -> Any:
    """Return a SciPy matrix as PyTorch's; 32-bit indices are faster by a third than its default."""
    arrays = (matrix.indptr, matrix.indices, matrix.data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            *(problem.tensor(array) for array in arrays), size=matrix.shape, check_invariants=True
        )


def _csr(*, copied: bool = False) -> Callable[[Problem], Bind]:
    """Return the product with x as it is, or transposed into rows of inputs by each call."""

    def prepare(problem: Problem) -> Bind:
        matrix = _csr_tensor(problem, csr_matrix(problem.weight))
        bias = problem.tensor(problem.bias)
        column = bias[:, None]

        def bind(batch: Batch) -> Call:
            x = batch.x
            if len(x) == 1:
                vector = x[0]
                return lambda: torch.addmv(bias, matrix, vector)
            if copied:
                return lambda: torch.addmm(column, matrix, x.t().contiguous()).t()
            transposed = x.t()
            return lambda: torch.addmm(column, matrix, transposed).t()

        return bind

    return prepare


def _csr_gradients(problem: Problem) -> Bind:
    matrix = csr_matrix(problem.weight)
    places, transposed = (_csr_tensor(problem, each) for each in (matrix, matrix.T.tocsr()))

    def bind(batch: Batch) -> Call:
        x, grad = batch.x, batch.grad.t()
        sampled = torch.sparse.sampled_addmm
        return lambda: ((transposed @ grad).t(), sampled(places, grad, x, beta=0.0).values())

    return bind


def _einsum(gathered: Any, values: Any) -> Any:
    return torch.einsum("bok,ok->bo", gathered, values)


def _product_and_sum(gathered: Any, values: Any) -> Any:
    return (values * gathered).sum(-1)


def _compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _gather(
    weighted_sum: Callable[[Any, Any], Any],
    transform: Callable[[Any], Any] = lambda function: function,
) -> Callable[[Problem], Bind]:
    """Gather the inputs of each neuron, as in SRigL's released code."""

    def prepare(problem: Problem) -> Bind:
        indices, bias = problem.tensor(problem.columns), problem.tensor(problem.bias)
        values = problem.tensor(problem.weight.values.copy())
        product = transform(lambda x: weighted_sum(x[:, indices], values) + bias)
        return lambda batch: lambda: product(batch.x)

    return prepare


def _two_of_four(problem: Problem) -> Bind:
    bias = problem.bias
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
        weight = torch.sparse.to_sparse_semi_structured(problem.dense)
    return lambda batch: lambda: _linear(batch.x, weight, bias)


def _update(problem: Problem) -> Bind:
    weight, grad, mask = (problem.tensor(array) for array in problem.update_inputs)
    budget, share = (problem.update_settings[name] for name in ("nnz_budget", "drop_fraction"))
    return lambda batch: lambda: _updated_mask(weight, grad, mask, budget, share)


def _updated_mask(weight: Any, grad: Any, mask: Any, budget: int, share: float) -> Any:
    """Take the steps of the update (SPEC 4) with top-k, without its tie rule and its clamp.

    It waits for a GPU several times.
    """
    n_weights = int(mask.sum())
    n_prune = int(n_weights * share)
    sizes, slopes = weight.abs(), grad.abs()
    salient = torch.zeros_like(mask).view(-1)
    heavy = torch.where(mask, sizes, -1.0).view(-1).topk(n_weights - n_prune, sorted=False)
    steep = torch.where(mask, -1.0, slopes).view(-1).topk(n_prune, sorted=False)
    salient[heavy.indices] = True
    kept = (salient & mask.view(-1)).view_as(mask)
    salient[steep.indices] = True
    survives = salient.view_as(mask).sum(1) >= max(1, int(0.3 * (budget // len(mask))))
    fan_in = budget // int(survives.sum())
    kept &= survives[:, None]
    if int(kept.sum(1).max()) > fan_in:
        heaviest = torch.where(kept, sizes, -1.0).topk(fan_in, dim=1).indices
        kept &= torch.zeros_like(kept).scatter_(1, heaviest, True)
    missing = fan_in - kept.sum(1, keepdim=True)
    order = torch.where(kept, -1.0, slopes).topk(int(missing.max()), dim=1)
    grown = torch.arange(order.indices.shape[1], device=mask.device) < missing
    kept.scatter_(1, order.indices, (grown & survives[:, None]) | kept.gather(1, order.indices))
    return kept


def _unless_gathered_fits(most: int) -> Callable[[Case], str]:
    def unfit(case: Case) -> str:
        if case.layer.is_ablated:
            return "has no ablated neurons"
        gathered = case.batch * case.layer.nnz
        return f"would gather over {most * 4 >> 20} MiB" if gathered > most else ""

    return unfit


def _unless_two_of_four_fits(case: Case) -> str:
    sides = (case.layer.n_out, case.layer.n_in)
    if any(side % _TWO_OF_FOUR_SIDE for side in sides):
        return f"a weight of {sides} has a side that is not a multiple of {_TWO_OF_FOUR_SIDE}"
    return ""
