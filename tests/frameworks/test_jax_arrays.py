"""JAX's arrays as arguments: what goes in comes out, and is read where it lies."""

import subprocess
import sys

import numpy as np
import pytest
from array_library_tests import DTYPES, UPDATE, ArrayLibraryTests, arrays_of

from srigl_core import MatmulGradients, ValueTypeError, condensed_matmul, prepare, update_mask
from srigl_core._arrays.libraries import library_of

jax = pytest.importorskip("jax")


class JaxArrays:
    """JAX's arrays, as the tests need them."""

    cls = jax.Array
    dtypes = DTYPES

    @staticmethod
    def make(array):
        return jax.device_put(array)

    @staticmethod
    def as_numpy(array):
        return np.asarray(array)

    @staticmethod
    def address(array):
        return array.unsafe_buffer_pointer()


class TestJaxArrays(ArrayLibraryTests):
    adapter = JaxArrays

    @pytest.fixture(autouse=True)
    def _with_64_bit_types(self):
        with jax.enable_x64(True):
            yield


def test_jax_arrays_are_read_only_and_refused_as_out():
    weight, x, grad, _ = arrays_of(np.float32)
    given = jax.device_put(x)
    assert not np.asarray(given).flags.writeable
    assert not np.from_dlpack(given, copy=True).flags.writeable
    plan = prepare(weight)
    out = jax.device_put(np.zeros((3, 8), np.float32))
    remedy = r"out of type \w+ cannot be written; leave out out, or pass all arrays as NumPy, "
    with pytest.raises(ValueTypeError, match=remedy):
        plan(given, out=out)
    with pytest.raises(ValueTypeError, match="cannot be written"):
        plan.backward(jax.device_put(grad), given, out=MatmulGradients(x=given))
    assert not np.asarray(out).any()


def assert_refused(call, *words):
    with pytest.raises(ValueTypeError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_a_jax_tracer_is_refused():
    weight, x, grad, _ = arrays_of(np.float32)
    plan, reference = prepare(weight), prepare(weight, backend="reference")
    update = lambda w: update_mask(w, w, w > 0, **UPDATE).weight  # noqa: E731
    for call in (
        lambda: jax.jit(plan)(x),
        lambda: jax.jit(reference)(x),
        lambda: jax.vmap(plan)(jax.device_put(x)),
        lambda: jax.grad(lambda t: plan(t).sum())(jax.device_put(x)),
        lambda: jax.jit(lambda t: condensed_matmul(t, weight))(x),
        lambda: jax.jit(lambda b: plan(jax.device_put(x), b))(np.ones(8, np.float32)),
        lambda: jax.jit(lambda g: plan.backward(g, wrt="x").x)(grad),
        lambda: jax.jit(update)(np.ones((8, 12), np.float32)),
    ):
        assert_refused(call, "is a JAX tracer", "srigl_core.jax.condensed_linear")


def test_jax_gets_no_float64_that_it_would_round_silently():
    if jax.config.jax_enable_x64:
        pytest.skip("this JAX has float64")
    weight, x, _, _ = arrays_of(np.float64)
    given = jax.device_put(x)
    assert given.dtype == np.float32
    for backend in (None, "reference"):
        assert_refused(lambda b=backend: condensed_matmul(given, weight, backend=b), "enable_x64")


def test_jax_takes_memory_over_without_a_copy():
    array = prepare(arrays_of(np.float32)[0]).arrays.empty((5000, 8), np.dtype(np.float32))
    array[:] = 1
    made = library_of(jax.numpy.ones(3)).to_caller(array, jax.numpy.ones(3))
    assert made.unsafe_buffer_pointer() == array.ctypes.data


def test_a_result_is_on_the_jax_device_of_its_input():
    program = """
import jax, numpy as np, srigl_core
jax.config.update("jax_num_cpu_devices", 2)
weight = srigl_core.CondensedWeight.random((4, 6), fan_in=2, rng=0)
x, devices = np.ones((2, 6), np.float32), jax.devices()
assert len(devices) == 2
for backend in ("reference", None):
    for device in devices:
        given = jax.device_put(x, device)
        got = srigl_core.condensed_matmul(given, weight, backend=backend)
        assert got.devices() == {device} and got.committed
    got = srigl_core.condensed_matmul(jax.numpy.asarray(x), weight, backend=backend)
    assert got.devices() == {devices[0]} and not got.committed
    with jax.default_device(devices[1]):
        given = jax.numpy.asarray(x)
    got = srigl_core.condensed_matmul(given, weight, backend=backend)
    assert got.devices() == {devices[1]}
    mesh = jax.sharding.Mesh(np.array(devices), "a")
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    try:
        srigl_core.condensed_matmul(jax.device_put(x, rows), weight, backend=backend)
    except srigl_core.ValueTypeError as error:
        assert "x is spread over 2 JAX devices" in str(error)
    else:
        raise AssertionError("it was gathered")
"""
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)
