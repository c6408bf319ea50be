"""PyTorch's ways: dense by cuBLAS in all its precisions, CSR by cuSPARSE, gathers, 2:4.

All take the device, so that the same code is checked on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.pytorch import csr_tensor, updated_mask
from srigl_core.benchmarks.contenders.scipy_csr import csr_matrix
from srigl_core.benchmarks.on_gpu.contenders.contender import (
    Bind,
    Call,
    DeviceContender,
    gradients_read,
)
from srigl_core.benchmarks.on_gpu.problems import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    TF32,
    DeviceProblem,
    Precision,
)
from srigl_core.benchmarks.problems import Batch

__all__ = ["contenders"]

_MOST_GATHERED = 1 << 30
"""Numbers that a gather may hold at once."""

_GROUP = 16
"""cuSPARSELt takes weights whose sides are multiples of this."""

_linear = torch.nn.functional.linear

_DENSE = {
    "dense": ("float32", FLOAT32),
    "tf32": ("TF32", TF32),
    "fp16": ("float16", FLOAT16.added_up()),
    "bf16": ("bfloat16", BFLOAT16.added_up()),
}


def contenders(device: str) -> list[DeviceContender]:
    """Return every way that PyTorch has on `device`."""
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("highest")
    # Sums in float32 throughout, as ours.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    found = []
    for family, (label, precision) in _DENSE.items():
        found += _dense_contenders(family, label, precision)
    return [
        *found,
        DeviceContender("torch CSR", "csr", "forward", FLOAT32, _csr(device, copied=False)),
        DeviceContender(
            "torch CSR, x transposed",
            "csr",
            "forward",
            FLOAT32,
            _csr(device, copied=True),
            unfit=_if_one_row,
        ),
        DeviceContender(
            "torch gather", "gather", "forward", FLOAT32, _gather_einsum, unfit=_if_much_is_gathered
        ),
        DeviceContender(
            "torch gather, compiled",
            "gather",
            "forward",
            FLOAT32,
            _gather_compiled,
            unfit=_if_compiled_is_not_asked,
        ),
        DeviceContender(
            "torch 2:4 float16",
            "other",
            "forward",
            FLOAT16.added_up(),
            _two_of_four,
            problem=DeviceProblem.two_of_four,
            unfit=_unless_two_of_four_fits(device),
        ),
        DeviceContender(
            "torch CSR",
            "csr",
            "backward",
            FLOAT32,
            _csr_gradients(device),
            read=_csr_gradients_read,
        ),
        DeviceContender(
            "torch top-k", "other", "update", FLOAT32, _update, read=lambda mask: {"mask": mask}
        ),
    ]


def _dense_contenders(family: str, label: str, precision: Precision) -> list[DeviceContender]:
    around = _tf32 if precision is TF32 else _ieee
    fewer = "fewer neurons" if family == "dense" else f"fewer neurons, {family}"
    product = _dense(precision.dtype)
    return [
        DeviceContender(f"torch {label}", family, "forward", precision, product, around=around),
        DeviceContender(
            f"torch {label}, active neurons only",
            fewer,
            "forward",
            precision,
            product,
            problem=DeviceProblem.active_only,
            around=around,
            unfit=_unless_ablated,
        ),
        DeviceContender(
            f"torch {label}",
            family,
            "backward",
            precision,
            _dense_gradients(precision.dtype),
            read=gradients_read,
            around=around,
        ),
    ]


@contextmanager
def _tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def _ieee() -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    yield


def _dense(dtype: str) -> Callable[[DeviceProblem], Bind]:
    def prepare(problem: DeviceProblem) -> Bind:
        weight, bias = problem.dense(dtype), problem.bias(dtype)

        def bind(batch: Batch) -> Call:
            x = batch.x.to(weight.dtype)
            return lambda: _linear(x, weight, bias)

        return bind

    return prepare


def _dense_gradients(dtype: str) -> Callable[[DeviceProblem], Bind]:
    def prepare(problem: DeviceProblem) -> Bind:
        weight = problem.dense(dtype)

        def bind(batch: Batch) -> Call:
            x, grad = batch.x.to(weight.dtype), batch.grad.to(weight.dtype)
            return lambda: (grad @ weight, grad.t() @ x)

        return bind

    return prepare


def _csr(device: str, *, copied: bool) -> Callable[[DeviceProblem], Bind]:
    """Return the product with x as it comes, or turned into rows of inputs first."""

    def prepare(problem: DeviceProblem) -> Bind:
        matrix, bias = csr_tensor(csr_matrix(problem.weight), device), problem.bias("float32")
        column = bias[:, None]

        def bind(batch: Batch) -> Call:
            x = batch.x
            if len(x) == 1:
                vector = x[0]
                return lambda: torch.addmv(bias, matrix, vector)
            if copied:
                return lambda: torch.addmm(column, matrix, x.t().contiguous()).t()
            return lambda: torch.addmm(column, matrix, x.t()).t()

        return bind

    return prepare


def _csr_gradients(device: str) -> Callable[[DeviceProblem], Bind]:
    def prepare(problem: DeviceProblem) -> Bind:
        matrix = csr_matrix(problem.weight)
        places, transposed = (csr_tensor(each, device) for each in (matrix, matrix.T.tocsr()))

        def bind(batch: Batch) -> Call:
            x, grad = batch.x, batch.grad
            sampled = torch.sparse.sampled_addmm
            return lambda: ((transposed @ grad.t()).t(), sampled(places, grad.t(), x, beta=0.0))

        return bind

    return prepare


def _csr_gradients_read(result: Any) -> dict[str, Any]:
    dx, sampled = result
    return {"dx": dx, "dvalues": sampled.values()}


def _gather_einsum(problem: DeviceProblem) -> Bind:
    indices, values, bias = _gather_arrays(problem)

    def bind(batch: Batch) -> Call:
        x = batch.x
        return lambda: torch.einsum("bok,ok->bo", x[:, indices], values) + bias

    return bind


def _gather_compiled(problem: DeviceProblem) -> Bind:
    """Write the sum as a product and a sum, which the compiler makes one kernel of."""
    indices, values, bias = _gather_arrays(problem)
    torch._dynamo.reset()
    product = torch.compile(lambda x: (values * x[:, indices]).sum(-1) + bias, dynamic=False)

    def bind(batch: Batch) -> Call:
        x = batch.x
        return lambda: product(x)

    return bind


def _gather_arrays(problem: DeviceProblem) -> tuple[Any, Any, Any]:
    bias = problem.bias("float32")
    values = torch.from_numpy(problem.weight.values.copy()).to(bias.device)
    return problem.columns, values, bias


def _two_of_four(problem: DeviceProblem) -> Bind:
    bias = problem.bias("float16")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
        weight = torch.sparse.to_sparse_semi_structured(problem.dense("float16"))

    def bind(batch: Batch) -> Call:
        x = batch.x.to(bias.dtype)
        return lambda: _linear(x, weight, bias)

    return bind


def _update(problem: DeviceProblem) -> Bind:
    weight, grad, mask = problem.update_tensors
    settings = problem.update.update_settings
    budget, share = settings["nnz_budget"], settings["drop_fraction"]
    return lambda batch: lambda: updated_mask(weight, grad, mask, budget, share)


def _unless_ablated(case: Case) -> str:
    return "" if case.layer.n_active < case.layer.n_out else "no neuron is ablated"


def _if_one_row(case: Case) -> str:
    return "one row need not be transposed" if case.batch == 1 else ""


def _if_much_is_gathered(case: Case) -> str:
    if case.layer.n_active < case.layer.n_out:
        return "knows no ablated neurons"
    gathered = case.batch * case.layer.n_active * case.layer.fan_in
    return f"would gather over {_MOST_GATHERED * 4 >> 30} GiB" if gathered > _MOST_GATHERED else ""


def _if_compiled_is_not_asked(case: Case) -> str:
    return "" if case.compiled else "compiles for each shape; measured for a few cases only"


def _unless_two_of_four_fits(device: str) -> Callable[[Case], str]:
    def unfit(case: Case) -> str:
        if not device.startswith("cuda"):
            return "runs on CUDA devices only"
        sides = (case.layer.n_out, case.layer.n_in)
        if any(side % _GROUP for side in sides):
            return f"a weight of {sides} has a side that is no multiple of {_GROUP}"
        return ""

    return unfit
