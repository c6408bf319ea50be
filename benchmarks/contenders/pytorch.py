"""PyTorch's ways: dense by MKL and oneDNN, CSR by MKL, and gathers as in SRigL's released code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import (
    Bind,
    Call,
    Contender,
    gradients_read,
)
from srigl_core.benchmarks.contenders.scipy_csr import csr_matrix
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["contenders", "csr_tensor", "updated_mask"]

SHARE = 0.6
"""Of the neurons that are left where whole neurons are removed, and the rest is dense."""

_MOST_GATHERED = 1 << 21
"""Numbers that the eager gather may hold at once; it takes tens of milliseconds for more."""

_linear = torch.nn.functional.linear


def contenders() -> list[Contender]:
    """Return every way that this build of PyTorch has."""
    torch.set_grad_enabled(False)
    some = f"{SHARE:.0%} of the neurons"
    found = [
        Contender("torch F.linear", "dense", "forward", _dense(_linear)),
        Contender("torch CSR", "csr", "forward", _csr),
        Contender(
            "torch gather", "gather", "forward", _gather(lambda f: f), unfit=_if_much_is_gathered
        ),
        Contender(
            "torch gather, compiled",
            "gather",
            "forward",
            _gather(_compiled),
            unfit=_if_compiled_is_not_asked,
        ),
        Contender(
            f"torch F.linear, {some}", "fewer neurons", "forward", _dense(_linear), share=SHARE
        ),
        Contender("torch dense", "dense", "backward", _dense_gradients, read=gradients_read),
        Contender("torch CSR", "csr", "backward", _csr_gradients, read=_csr_gradients_read),
        Contender("torch top-k", "other", "update", _update, read=_mask_read),
    ]
    if torch.backends.mkldnn.is_available():
        found += [
            Contender("oneDNN", "dense", "forward", _dense(_onednn), unfit=_if_double),
            Contender(
                "oneDNN, packed weight", "dense", "forward", _onednn_packed, unfit=_if_double
            ),
            Contender(
                f"oneDNN, {some}",
                "fewer neurons",
                "forward",
                _dense(_onednn),
                share=SHARE,
                unfit=_if_double,
            ),
            Contender("oneDNN", "dense", "backward", _onednn_gradients, read=gradients_read),
        ]
    return found


def _onednn(x: Any, weight: Any, bias: Any = None) -> Any:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(linear: Callable[[Any, Any, Any], Any]) -> Any:
    def prepare(problem: Problem) -> Bind:
        weight, bias = torch.from_numpy(problem.dense), torch.from_numpy(problem.bias)

        def bind(batch: Batch) -> Call:
            x = torch.from_numpy(batch.x)
            return lambda: linear(x, weight, bias)

        return bind

    return prepare


def _onednn_packed(problem: Problem) -> Bind:
    """Put the weight into the layout oneDNN likes best at this batch, as frozen models do."""
    weight, bias = torch.from_numpy(problem.dense), torch.from_numpy(problem.bias)

    def bind(batch: Batch) -> Call:
        x = torch.from_numpy(batch.x)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        return lambda: _onednn(x, packed, bias)

    return bind


def csr_tensor(matrix: Any, device: Any = "cpu") -> Any:
    """Return a SciPy matrix as PyTorch's; column numbers stay of 32 bits, a third faster."""
    arrays = (matrix.indptr, matrix.indices, matrix.data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            *(torch.from_numpy(array).to(device) for array in arrays),
            size=matrix.shape,
            check_invariants=True,
        )


def _csr(problem: Problem) -> Bind:
    matrix, bias = csr_tensor(csr_matrix(problem.weight)), torch.from_numpy(problem.bias)
    column = bias[:, None]

    def bind(batch: Batch) -> Call:
        x = torch.from_numpy(batch.x)
        if len(x) == 1:
            vector = x[0]
            return lambda: torch.addmv(bias, matrix, vector)
        transposed = x.t()
        return lambda: torch.addmm(column, matrix, transposed).t()

    return bind


def _gather(treat: Callable[[Any], Any]) -> Any:
    def prepare(problem: Problem) -> Bind:
        weight = problem.weight
        indices = torch.from_numpy(weight.indices.astype(np.int64))
        values, bias = torch.from_numpy(weight.values.copy()), torch.from_numpy(problem.bias)
        product = treat(lambda x: (values * x[:, indices]).sum(-1) + bias)

        def bind(batch: Batch) -> Call:
            x = torch.from_numpy(batch.x)
            return lambda: product(x)

        return bind

    return prepare


def _compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _dense_gradients(problem: Problem) -> Bind:
    weight = torch.from_numpy(problem.dense)

    def bind(batch: Batch) -> Call:
        x, grad = torch.from_numpy(batch.x), torch.from_numpy(batch.grad)
        return lambda: (grad @ weight, grad.t() @ x)

    return bind


def _onednn_gradients(problem: Problem) -> Bind:
    weight = torch.from_numpy(problem.dense)

    def bind(batch: Batch) -> Call:
        x, grad = torch.from_numpy(batch.x), torch.from_numpy(batch.grad)
        return lambda: (_onednn(grad, weight.t()), _onednn(grad.t(), x.t()))

    return bind


def _csr_gradients(problem: Problem) -> Bind:
    matrix = csr_matrix(problem.weight)
    places, transposed = csr_tensor(matrix), csr_tensor(matrix.T.tocsr())

    def bind(batch: Batch) -> Call:
        x, grad = torch.from_numpy(batch.x), torch.from_numpy(batch.grad)
        sampled = torch.sparse.sampled_addmm
        return lambda: ((transposed @ grad.t()).t(), sampled(places, grad.t(), x, beta=0.0))

    return bind


def _csr_gradients_read(result: Any, problem: Problem) -> dict[str, NDArray[Any]]:
    dx, sampled = result
    return gradients_read((dx, sampled.values()), problem)


def _update(problem: Problem) -> Bind:
    weight, grad, mask = (torch.from_numpy(array) for array in problem.update_inputs)
    budget = problem.update_settings["nnz_budget"]
    share = problem.update_settings["drop_fraction"]
    return lambda batch: lambda: updated_mask(weight, grad, mask, budget, share)


def updated_mask(weight: Any, grad: Any, mask: Any, budget: int, share: float) -> Any:
    """Take the steps of the update (SPEC 4) by top-k, ties as they come, the clamp left out.

    Works on any device, and waits for it several times.
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


def _mask_read(result: Any, problem: Problem) -> dict[str, NDArray[Any]]:
    return {"mask": np.asarray(result)}


def _if_double(case: Case) -> str:
    return "has no float64" if case.dtype == "float64" else ""


def _if_much_is_gathered(case: Case) -> str:
    gathered = case.batch * case.layer.n_active * case.layer.fan_in
    if case.layer.n_active < case.layer.n_out:
        return "knows no ablated neurons"
    return "takes long" if gathered > _MOST_GATHERED else ""


def _if_compiled_is_not_asked(case: Case) -> str:
    return "" if case.compiled else "only where contenders compiled for the shape are asked for"
