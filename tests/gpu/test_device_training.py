"""Training with the CuPy backend: weights, gradients and masks stay on the device.

CuPy arrays are real, in the host's memory; CUDA tensors are host tensors that PyTorch's adapter
reports as device tensors. Each copy between host and device is counted, by bytes.
"""

from contextlib import contextmanager
from dataclasses import fields
from unittest import mock

import numpy as np
import pytest

from srigl_core import (
    CondensedWeight,
    SparseTrainer,
    SriglError,
    TrainingConfig,
    ValueTypeError,
    condensed_matmul,
    condensed_matmul_backward,
)
from srigl_core._arrays.libraries.pytorch import PytorchTensors
from srigl_core.errors import BackendUnavailableError
from srigl_core.reference import UpdateSchedule

pytest.importorskip("cupy")

from cupy_on_host import as_cupy, hosted_backend, seen

SHAPES = {"conv": (12, 4, 3, 3), "hidden": (40, 50), "out": (10, 40)}
DENSE_BYTES = min(int(np.prod(shape)) for shape in SHAPES.values())  # a mask's, one byte each
OPTIONS = {
    "sparsity": 0.7,
    "schedule": UpdateSchedule(100, delta_t=3),
    "config": TrainingConfig(gamma_sal=0.9, grad_window=2, seed=3),
}


@pytest.fixture
def backend():
    with hosted_backend() as hosted:
        yield hosted


def assert_no_dense_copies(device):
    assert device.copies, "nothing was counted"
    assert max(size for _, size in device.copies) < DENSE_BYTES, device.copies


def numbers(step, dtype=np.float32):
    rng = np.random.default_rng(step)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def updates_of(trainer, convert, steps=7):
    """Train with weights and gradients that are the same in every library."""
    updates = []
    for step in range(1, steps):
        if trainer.needs_grad:
            for name, grad in numbers((step, 1)).items():
                trainer.accumulate(name, convert(grad))
        updates.append(trainer.step({n: convert(w) for n, w in numbers((step, 2)).items()}))
    return updates


def test_a_trainer_on_the_device_copies_no_dense_array(backend):
    on_host, on_device = (
        SparseTrainer(SHAPES, **OPTIONS),
        SparseTrainer(SHAPES, backend=backend, **OPTIONS),
    )
    assert (on_host.device, on_device.device) == ("cpu", "cuda")
    backend.device.copies.clear()  # the first masks, drawn on the host
    got = updates_of(on_device, as_cupy)
    assert_no_dense_copies(backend.device)
    expected = updates_of(on_host, np.array)
    assert [list(updates) for updates in got] == [list(updates) for updates in expected]
    for mine, theirs in zip(got, expected, strict=True):
        for name, update in mine.items():
            for field in fields(update):
                value = getattr(update, field.name)
                value = seen(value) if field.name in ("mask", "weight") else value
                np.testing.assert_array_equal(value, getattr(theirs[name], field.name))
    assert on_device.itop_rates() == on_host.itop_rates()
    assert on_device.report() == on_host.report()


def test_a_device_trainer_resumes_exactly(backend):
    trainer = SparseTrainer(SHAPES, backend=backend, **OPTIONS)
    updates_of(trainer, as_cupy, steps=3)
    other = SparseTrainer(SHAPES, **OPTIONS)  # a checkpoint does not say where it was taken
    other.load_state_dict(trainer.state_dict())
    again = SparseTrainer(SHAPES, backend=backend, **OPTIONS)
    again.load_state_dict(other.state_dict())
    (_, mine), (_, theirs) = updates_of(again, as_cupy, 3), updates_of(other, np.array, 3)
    assert mine.keys() == theirs.keys()
    for name, update in theirs.items():
        np.testing.assert_array_equal(seen(mine[name].mask), update.mask)


def test_host_arrays_are_refused_by_name_and_change_nothing(backend):
    trainer = SparseTrainer(SHAPES, backend=backend, **OPTIONS)
    with pytest.raises(ValueTypeError, match=r"layer 'out': grad .* is not on a CUDA device"):
        trainer.accumulate("out", np.ones((10, 40), np.float32))
    weights = {name: as_cupy(weight) for name, weight in numbers(0).items()}
    assert trainer.step(weights) == trainer.step(weights) == {}
    with pytest.raises(SriglError, match="no gradient was accumulated"):
        trainer.step(weights)
    assert trainer.step_count == 2


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
def test_methods_without_kernels_refuse_a_device(backend, method):
    options = OPTIONS | {"config": TrainingConfig(method=method)}
    with pytest.raises(SriglError, match=f"'cupy' cannot compute .* method='{method}'.*leave out"):
        SparseTrainer(SHAPES, backend=backend, **options)
    assert SparseTrainer(SHAPES, **options).device == "cpu"


@contextmanager
def tensors_on_the_device(device):
    """Let host tensors count as CUDA tensors, and conversions to NumPy as copies."""
    torch = pytest.importorskip("torch")
    from srigl_core.torch import masked_layers

    def as_numpy(tensor):
        device.copies.append(("to the host", tensor.nbytes))
        return tensor.detach().numpy()

    def to_caller(self, array, like):
        return torch.from_numpy(array.copy() if isinstance(array, np.ndarray) else seen(array))

    def export(self, array):
        return as_cupy(array.detach().numpy()), None

    patches = {"device": lambda self, array: "cuda", "export": export, "to_caller": to_caller}
    with (
        mock.patch.multiple(PytorchTensors, **patches),
        mock.patch.object(masked_layers, "as_numpy", as_numpy),
        mock.patch("srigl_core.backends.cupy_gpu.cuda_arrays._read", lambda array: array),
    ):
        yield torch


def trained_model(torch, backend, steps):
    """Return a model, trained masked for some steps."""
    from srigl_core.torch import SRigL

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 12, 3), torch.nn.Flatten(), torch.nn.Linear(12 * 9, 30)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    srigl = SRigL(model, optimizer, backend=backend, **OPTIONS)
    if backend is not None:
        backend.device.copies.clear()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, 5, 5, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    return model, srigl


def test_srigl_on_the_device_copies_no_dense_array(backend):
    torch = pytest.importorskip("torch")
    expected, host = trained_model(torch, None, 7)
    with tensors_on_the_device(backend.device):
        model, srigl = trained_model(torch, backend, 7)
        assert srigl.trainer.device == "cuda"
        assert_no_dense_copies(backend.device)
        for name in ("0", "2"):
            assert torch.equal(srigl.mask(name), host.mask(name))
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("available", [True, False])
def test_a_model_on_the_device_is_updated_there_if_a_backend_can_run(backend, available):
    torch = pytest.importorskip("torch")
    from srigl_core.torch import masked_layers

    def get_backend(*, operation, device):
        assert (operation, device) == ("update_mask", "cuda")
        if not available:
            raise BackendUnavailableError("no GPU backend can run")
        return backend

    expected, _ = trained_model(torch, None, 7)
    with (
        tensors_on_the_device(backend.device),
        mock.patch.object(masked_layers, "get_backend", get_backend),
    ):
        model, srigl = trained_model(torch, None, 7)
        assert srigl.trainer.device == ("cuda" if available else "cpu")
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def layer_on_the_device(backend):
    """Give tensors of a condensed layer, which say they are elsewhere, and the ops' modules."""
    torch = pytest.importorskip("torch")
    from srigl_core.torch import CondensedLinear, ops, packing

    class DeviceTensor(torch.Tensor):
        is_cpu = property(lambda self: False)

    torch.manual_seed(0)
    layer = CondensedLinear(30, 12, fan_in=5, rng=0)
    tensors = layer.values, layer.indices, layer.active, layer.counts
    there = [tensor.detach().clone().as_subclass(DeviceTensor) for tensor in tensors]
    with (
        tensors_on_the_device(backend.device),
        mock.patch.object(packing, "get_backend", return_value=backend),
    ):
        yield ops, packing, there, DeviceTensor


def numpy_weight(values, indices, active, counts):
    n_active, fan_in = counts.tolist()
    used = slice(n_active * fan_in)
    values, indices = (t[used].numpy().reshape(n_active, fan_in) for t in (values, indices))
    return CondensedWeight(values, indices, active[:n_active].numpy(), (len(active), 30))


@pytest.mark.parametrize("batch", [3, 40])
def test_a_condensed_layer_trains_on_the_device_without_copies_or_waits(
    backend, layer_on_the_device, batch
):
    """However its values are written: PyTorch does not count the writes of fused optimisers."""
    ops, _, (values, *mask), there = layer_on_the_device
    torch, device = pytest.importorskip("torch"), backend.device
    x, grad, bias = (torch.randn(*n).as_subclass(there) for n in ((batch, 30), (batch, 12), (12,)))

    def step():
        y = ops.multiply(x, values, *mask, bias, 30)
        gradients = ops.compute_gradients(grad, x, values, *mask, 30, True, True, True)
        weight = numpy_weight(values, *mask)
        close = {"rtol": 1e-4, "atol": 1e-4}
        wanted = condensed_matmul(x.numpy(), weight, bias.numpy(), backend="reference")
        np.testing.assert_allclose(y.numpy(), wanted, **close)
        wanted = condensed_matmul_backward(grad.numpy(), x.numpy(), weight, backend="reference")
        for got, name in zip(gradients, ("x", "values", "bias"), strict=True):
            expected = getattr(wanted, name).reshape(got.shape)
            np.testing.assert_allclose(got.numpy(), expected, **close)

    step()  # packs the mask
    device.copies.clear()
    device.waits = 0
    with mock.patch.object(torch, "equal", side_effect=AssertionError("the host waits")):
        for factor in (2.0, -1.0):
            values.numpy()[...] *= factor  # which PyTorch does not count
            step()
    assert (device.copies, device.waits) == ([], 0)
    indices = mask[0]
    indices.copy_((indices + 1) % 30)  # which it counts: another mask
    waits = mock.patch.object(torch, "equal", side_effect=AssertionError("the host waits"))
    with waits, pytest.raises(AssertionError, match="waits"):
        step()


def test_values_of_any_strides_are_read(layer_on_the_device):
    ops, _, (values, *mask), there = layer_on_the_device
    torch = pytest.importorskip("torch")
    x, strided = torch.randn(9, 30).as_subclass(there), torch.stack([values, -values], 1)[:, 0]
    assert not strided.is_contiguous()
    expected = ops.multiply(x, values, *mask, None, 30)
    assert torch.equal(ops.multiply(x, strided, *mask, None, 30), expected)


def test_a_frozen_layer_keeps_the_order_of_its_values(backend, layer_on_the_device):
    ops, packing, tensors, there = layer_on_the_device
    torch = pytest.importorskip("torch")
    x = torch.randn(40, 30).as_subclass(there)
    packing.freeze_packing(*tensors, 30)
    try:
        y = ops.multiply(x, *tensors, None, 30)
        launches = backend.device.n_launches
        assert torch.equal(ops.multiply(x, *tensors, None, 30), y)
        assert backend.device.n_launches == launches + 1
    finally:
        packing.unfreeze_packing(*tensors[:2])
    wanted = condensed_matmul(x.numpy(), numpy_weight(*tensors), backend="reference")
    np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_tensors_are_read_on_pytorchs_stream(backend, layer_on_the_device):
    """If they were read before, their stream and the backend's would wait for each other."""
    ops, _, (values, *mask), there = layer_on_the_device
    torch, inside = pytest.importorskip("torch"), []

    @contextmanager
    def context(like):
        assert isinstance(like, torch.Tensor) or inside
        inside.append(True)
        yield
        inside.pop()

    arrays, outside = backend.arrays, []
    read = arrays.as_float_array

    def as_float_array(array, what):
        if not inside:
            outside.append(what)
        return read(array, what)

    x, grad = torch.randn(9, 30).as_subclass(there), torch.randn(9, 12).as_subclass(there)
    with mock.patch.multiple(arrays, execution_context=context, as_float_array=as_float_array):
        ops.multiply(x, values, *mask, torch.randn(12).as_subclass(there), 30)
        ops.compute_gradients(grad, x, values, *mask, 30, True, True, True)
    assert outside == []
