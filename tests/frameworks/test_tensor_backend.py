"""A backend whose arrays are PyTorch tensors: what `TorchArrays` does for it."""

from dataclasses import replace

import numpy as np
import pytest

from srigl_core import (
    CondensedWeight,
    MatmulGradients,
    SparseTrainer,
    SriglError,
    TrainingConfig,
    ValueTypeError,
    condensed_matmul,
    condensed_matmul_backward,
    prepare,
    update_mask,
)
from srigl_core.contract import Capabilities
from srigl_core.reference import UpdateSchedule
from srigl_core.reference.backend import ReferenceBackend

torch = pytest.importorskip("torch")

from srigl_core.torch import TorchArrays  # noqa: E402
from srigl_core.torch.tensors import as_numpy, from_numpy, torch_dtype  # noqa: E402

DTYPES = ("float16", "bfloat16", "float32", "float64")
BACKEND = {"backend": "reference"}


class TensorPrepared:
    """Computes on the memory of tensors; anything that is not a tensor fails."""

    def __init__(self, prepared):
        self._prepared = prepared

    def describe(self):
        return self._prepared.describe()

    def workspace_bytes(self, batch, dtype):
        return 64

    def matmul(self, x, bias, *, out, workspace=None, **options):
        assert workspace is None or workspace.dtype == torch.uint8
        bias = None if bias is None else as_numpy(bias)
        self._prepared.matmul(as_numpy(x), bias, out=as_numpy(out), **options)

    def backward(self, grad, x, *, out, **options):
        arrays = {n: None if a is None else as_numpy(a) for n, a in vars(out).items()}
        x = None if x is None else as_numpy(x)
        self._prepared.backward(as_numpy(grad), x, out=MatmulGradients(**arrays), **options)


class TensorBackend:
    name = "tensors"
    capabilities = Capabilities()
    arrays = TorchArrays("cpu")
    reference = ReferenceBackend()

    def prepare(self, weight):
        return TensorPrepared(self.reference.prepare(weight))

    def update_mask(self, weight, grad, mask, settings, *, threads):
        arrays = map(as_numpy, (weight, grad, mask))
        update = self.reference.update_mask(*arrays, settings, threads=threads)
        return replace(update, mask=from_numpy(update.mask), weight=from_numpy(update.weight))


def problem(dtype):
    weight = CondensedWeight.random((6, 9), fan_in=3, n_active=4, dtype=dtype, rng=0)
    generator = torch.Generator().manual_seed(1)
    x, grad, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(torch_dtype(weight.dtype))
        for shape in ((2, 5, 9), (2, 5, 6), (6,))
    )
    return weight, x, grad, bias


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_gradients_are_those_of_numpy_arrays(dtype):
    weight, x, grad, bias = problem(dtype)
    plan = prepare(weight, backend=TensorBackend())
    arrays = as_numpy(x), weight, as_numpy(bias)
    for options in ({"activation": "gelu"}, {"compact": True}):
        expected = condensed_matmul(*arrays, **options, **BACKEND)
        y = plan(x, bias, **options)
        assert torch.equal(y, from_numpy(expected))
        out = torch.empty(y.shape[::-1], dtype=y.dtype).permute(2, 1, 0)
        version = out._version
        assert plan(x, bias, **options, out=out) is out
        assert torch.equal(out, y)
        assert out._version > version
    expected = condensed_matmul_backward(as_numpy(grad), as_numpy(x), weight, **BACKEND)
    got = plan.backward(grad, x)
    for name, gradient in vars(got).items():
        assert torch.equal(gradient, from_numpy(getattr(expected, name))), name


def test_a_bias_of_float64_is_rounded_once():
    """A number just above the middle of two of bfloat16's, which float32 takes for the middle."""
    weight = CondensedWeight.random((1, 1), fan_in=1, dtype="bfloat16", rng=0)
    bias = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    y = prepare(weight, backend=TensorBackend())(torch.zeros(1, 1, dtype=torch.bfloat16), bias)
    assert y.item() == 1 + 2.0**-7


def test_arguments_that_do_not_fit_are_errors():
    weight, x, _, bias = problem("float32")
    plan = prepare(weight, backend=TensorBackend())
    wrong = (
        (
            ValueTypeError,
            "x of dtype 'int32' is not",
            lambda: plan(x.numpy().astype("i4")),
        ),
        (ValueTypeError, "x of dtype 'int32' is not supported", lambda: plan(x.int())),
        (SriglError, "out has shape", lambda: plan(x, out=torch.empty(3))),
        (SriglError, "shares memory with x", lambda: plan(x, out=x[..., :6])),
        (SriglError, "share memory", lambda: plan(x, out=torch.empty(6).expand(2, 5, 6))),
        (ValueTypeError, "workspace must be .* uint8", lambda: plan(x, workspace=torch.ones(64))),
        (SriglError, "workspace", lambda: plan(x, workspace=torch.ones(9, 9).byte()[:, ::2])),
    )
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(plan(x, bias, workspace=torch.ones(64).byte()), plan(x, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_updated_as_in_numpy(dtype):
    rng = np.random.default_rng(0)
    weight, grad = (
        torch.from_numpy(rng.standard_normal((8, 12))).to(torch_dtype(np.dtype("float32")))
        for _ in range(2)
    )
    weight, grad = weight.to(getattr(torch, dtype)), grad.to(getattr(torch, dtype))
    mask = torch.from_numpy(rng.random((8, 12)) < 0.4)
    options = {"nnz_budget": 32, "drop_fraction": 0.3}
    got = update_mask(weight, grad, mask, **options, backend=TensorBackend())
    arrays = map(as_numpy, (weight, grad, mask))
    expected = update_mask(*arrays, **options, **BACKEND)
    assert torch.equal(got.mask, from_numpy(expected.mask))
    assert torch.equal(got.weight, from_numpy(expected.weight))
    bad = weight.clone()
    bad[0, 0], mask[0, 0] = torch.nan, True
    with pytest.raises(SriglError, match="weight at active positions is not finite in 1 of 96"):
        update_mask(bad, grad, mask, **options, backend=TensorBackend())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trainer_keeps_tensors(dtype):
    options = {
        "sparsity": 0.6,
        "schedule": UpdateSchedule(100, delta_t=2),
        "config": TrainingConfig(grad_window=2),
    }
    tensors = SparseTrainer({"fc": (8, 12)}, backend=TensorBackend(), **options)
    arrays = SparseTrainer({"fc": (8, 12)}, **BACKEND, **options)
    rng = np.random.default_rng(0)
    for _ in range(4):
        weight, grad = (
            torch.from_numpy(rng.standard_normal((8, 12))).to(getattr(torch, dtype))
            for _ in range(2)
        )
        tensors.accumulate("fc", grad)
        arrays.accumulate("fc", as_numpy(grad))
        mine = tensors.step({"fc": weight})
        theirs = arrays.step({"fc": as_numpy(weight)})
        for name, update in theirs.items():
            assert torch.equal(mine[name].weight, from_numpy(update.weight))
    assert isinstance(tensors.masks["fc"], torch.Tensor)
    np.testing.assert_array_equal(tensors.masks["fc"], arrays.masks["fc"])
    assert tensors.itop_rates() == arrays.itop_rates()
    tensors.load_state_dict(arrays.state_dict())
    assert tensors.report() == arrays.report()
