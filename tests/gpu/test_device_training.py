"""Masked training with the CuPy backend: weights, gradients and masks stay on the device.

CuPy arrays are real, in the host's memory; CUDA tensors are host tensors that PyTorch's adapter
reports as device tensors. Each copy between host and device is counted, by bytes.
"""

from contextlib import contextmanager
from dataclasses import fields
from unittest import mock

import numpy as np
import pytest

from srigl_core import SparseTrainer, SriglError, TrainingConfig, ValueTypeError
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
