"""The launch model's counts are those of the kernels, which the harness counts as it runs them."""

from dataclasses import replace
from unittest import mock

import host_device
import numpy as np
import pytest
from simulated import SimulatedDevice

from srigl_core import CondensedWeight, prepare
from srigl_core.backends.cupy_gpu import launch_model
from srigl_core.backends.cupy_gpu.gpu_backend import CAPABILITIES, GpuBackend
from srigl_core.backends.cupy_gpu.launch_model import StreamLaunch
from srigl_core.benchmarks.predict import GPUS

pytestmark = pytest.mark.skipif(
    host_device.unavailable() is not None, reason=str(host_device.unavailable())
)

N_OUT, N_IN, FAN_IN = 256, 1200, 32  # of whole groups and chunks: no padding
H200 = next(gpu.properties for gpu in GPUS if gpu.properties.name == "H200")
SMALL = replace(H200, processors=2, block_shared_bytes=32 << 10, processor_shared_bytes=64 << 10)
DEVICES = {"H200": H200, "small": SMALL}
TYPES = ("float16", "float32", "float64")


@pytest.fixture(params=DEVICES)
def backend(request):
    device = SimulatedDevice(DEVICES[request.param], one_by_one=True, counts=True)
    return GpuBackend(device, "simulated", CAPABILITIES)


def planned(backend, dtype):
    weight = CondensedWeight.random((N_OUT, N_IN), fan_in=FAN_IN, rng=0, dtype=dtype)
    plan = prepare(weight, backend=backend)
    return plan, plan._prepared._products.model


def threads_of(launch):
    return 256 if isinstance(launch, StreamLaunch) else 32 * launch.warps


def assert_counted(counted, counts, *, is_padded):
    """Cut into segments, a neuron's connections are padded in each, which is an estimate."""
    assert (counted.barriers, counted.loads) == (counts.barriers, counts.loads)
    allowed = 0.25 if is_padded else 0
    assert counted.multiply_adds == pytest.approx(counts.multiply_adds, rel=allowed)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_a_product_does_what_the_model_counts(backend, dtype, batch):
    plan, model = planned(backend, dtype)
    chosen = model.forward(batch, np.dtype(dtype))
    counts = model.counts(chosen, batch, np.dtype(dtype))
    x = np.ones((batch, N_IN), dtype)
    plan(x)  # arranges the values
    backend.device.last.clear()
    plan(x)
    ((_, _, block, counted),) = backend.device.last
    assert (counts.launches, block) == (1, (threads_of(chosen),))
    assert_counted(counted, counts, is_padded=counts.barriers > 1)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_tile_of_each_width_is_staged_as_the_model_counts(backend, dtype, lanes):
    plan, model = planned(backend, dtype)
    with mock.patch.object(launch_model, "TILE_LANES", (lanes,)):
        chosen = model.tile(40, np.dtype(dtype))
        plan(np.ones((40, N_IN), dtype))
    counts = model.counts(chosen, 40, np.dtype(dtype))
    _, grid, block, counted = backend.device.last[-1]
    assert (grid, block) == ((chosen.tiles, chosen.splits), (32 * chosen.warps,))
    is_cut = 16 * lanes * (N_IN + 1) > backend.device.properties.block_shared_bytes
    assert (counts.barriers > 1) == is_cut
    assert_counted(counted, counts, is_padded=is_cut)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("batch", [9, 64, 200])
def test_gradients_do_what_the_model_counts(backend, dtype, batch):
    plan, model = planned(backend, dtype)
    x, grad = np.ones((batch, N_IN), dtype), np.ones((batch, N_OUT), dtype)
    plan.backward(grad, x, wrt=("x", "values"))
    backend.device.last.clear()
    plan.backward(grad, x, wrt=("x", "values"))
    columns = model.tile(batch, np.dtype(dtype), of_columns=True)
    of_x = model.counts(columns, batch, np.dtype(dtype), of_columns=True)
    values = model.gradient(batch, np.dtype(dtype))
    of_values = model.counts(values, batch, np.dtype(dtype))
    assert of_x.launches + of_values.launches == len(backend.device.last)
    (_, _, block, first), (_, grid, other, second), _ = backend.device.last
    assert (block, other) == ((threads_of(columns),), (threads_of(values),))
    assert (first.barriers, first.loads) == (of_x.barriers, of_x.loads)
    assert_counted(second, of_values, is_padded=grid[2] > 1)
