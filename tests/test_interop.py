"""Arrays of other libraries: what goes in comes out, and is read and written where it lies.

`tests/frameworks` has the arrays of PyTorch and JAX.
"""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
from array_library_tests import DTYPES, ArrayLibraryTests, arrays_of, bfloat16

from srigl_core import SriglError, ValueTypeError, condensed_matmul, prepare
from srigl_core._arrays.libraries import device_of, library_of, lookup


class DlpackObject:
    """Exports its memory by DLPack, and does nothing else."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class ArrayApiObject(DlpackObject):
    """Has nothing but what the array API standard says."""

    def __array_namespace__(self):
        return types.SimpleNamespace(
            from_dlpack=lambda exporter: ArrayApiObject(np.from_dlpack(exporter))
        )


class ArrayApiLibrary:
    """A library of the array API standard, which has no bfloat16."""

    cls = make = ArrayApiObject
    dtypes = tuple(dtype for dtype in DTYPES if dtype != bfloat16)

    @staticmethod
    def as_numpy(array):
        return array.array

    @staticmethod
    def address(array):
        return array.array.ctypes.data


class TestArrayApiObjects(ArrayLibraryTests):
    adapter = ArrayApiLibrary


def test_a_result_for_an_object_of_dlpack_alone_is_exported_by_dlpack(product_backend):
    """As for TensorFlow: its ``from_dlpack`` takes the capsule that ``y.__dlpack__()`` returns."""
    weight, x, _, bias = arrays_of(np.float32)
    y = condensed_matmul(DlpackObject(x), weight, DlpackObject(bias), backend=product_backend)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, condensed_matmul(x, weight, bias, backend=product_backend))
    capsule = y.__dlpack__()
    imported = np.from_dlpack(
        types.SimpleNamespace(__dlpack__=lambda **_: capsule, __dlpack_device__=lambda: (1, 0))
    )
    assert imported.ctypes.data == y.ctypes.data
    np.testing.assert_array_equal(imported, y)


class OnDevice:
    """What says that it is on a device, and no more."""

    def __init__(self, device):
        self.device = device

    def __dlpack__(self, **options):
        raise BufferError("not to be had")

    def __dlpack_device__(self):
        return self.device, 0


def test_arrays_on_two_devices_are_refused_by_name():
    weight, x, _, bias = arrays_of(np.float32)
    plan = prepare(weight, backend="reference")
    message = "bias of type OnDevice is on a CUDA device, and x of type ndarray is not; move"
    for cuda in (2, 13):
        with pytest.raises(ValueTypeError, match=message):
            plan(x, OnDevice(cuda))
    message = "bias of type ndarray is not on a CUDA device, and x of type OnDevice is; move"
    with pytest.raises(ValueTypeError, match=message):
        plan(OnDevice(2), bias)


def test_devices_are_named():
    assert device_of(np.ones(3)) == "cpu"
    assert device_of([1.0]) == "cpu"
    assert device_of(OnDevice(2)) == "cuda"
    assert device_of(types.SimpleNamespace(__cuda_array_interface__={})) == "cuda"


def test_no_library_is_imported_for_an_array_of_another(backend_names):
    program = """
import json, sys
import numpy as np, srigl_core
class DlpackObject:
    def __init__(self, array): self.array = array
    def __dlpack__(self, **options): return self.array.__dlpack__(**options)
    def __dlpack_device__(self): return 1, 0
weight = srigl_core.CondensedWeight.random((4, 6), fan_in=2, rng=0)
ones = np.ones((4, 6), np.float32)
x, grad, mask = DlpackObject(ones), DlpackObject(ones[:, :4]), np.eye(4, 6, dtype=bool)
for backend in sys.argv[1:]:
    srigl_core.condensed_matmul(x, weight, out=DlpackObject(ones[:, :4].copy()), backend=backend)
    srigl_core.condensed_matmul_backward(grad, x, weight, backend=backend)
    srigl_core.update_mask(x, x, mask, nnz_budget=8, drop_fraction=0.3, backend=backend)
print(json.dumps([name for name in ("torch", "jax", "cupy") if name in sys.modules]))
"""
    names = [name for name in backend_names("update_mask") if name != "cupy"]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True,
                          timeout=120, check=True)  # fmt: skip
    assert json.loads(done.stdout) == []


def test_exported_memory_is_written_in_place(product_backend):
    weight, x, _, _ = arrays_of(np.float32)
    wanted = condensed_matmul(x, weight, backend=product_backend)
    room = np.zeros((3, 8), np.float32)
    interface = types.SimpleNamespace(__array_interface__=room.__array_interface__)
    for out in (DlpackObject(room), memoryview(room), interface):
        room[:] = 0
        assert condensed_matmul(x, weight, out=out, backend=product_backend) is out
        np.testing.assert_array_equal(room, wanted)
    room[:] = 0
    room.flags.writeable = False
    interface = types.SimpleNamespace(__array_interface__=room.__array_interface__)
    for out in (DlpackObject(room), memoryview(room), interface):
        with pytest.raises(SriglError, match="out is read-only"):
            condensed_matmul(x, weight, out=out, backend=product_backend)
    assert not room.any()


def test_read_only_arrays_are_read(product_backend):
    weight, x, _, bias = arrays_of(np.float32)
    wanted = condensed_matmul(x, weight, bias, backend=product_backend)
    for array in (x, bias):
        array.flags.writeable = False
    for make in (DlpackObject, memoryview, np.asarray):
        got = condensed_matmul(make(x), weight, make(bias), backend=product_backend)
        np.testing.assert_array_equal(got, wanted)


def test_recognition_needs_no_module_that_is_not_there(monkeypatch):
    """Also while one is being imported, in another thread say."""
    lookup._library_of_type.cache_clear()
    for name in ("torch", "jax"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert library_of(DlpackObject(np.ones(3))) is library_of(np.ones(3))
    monkeypatch.undo()
    lookup._library_of_type.cache_clear()
    assert library_of(3.0) is library_of(np.ones(3))
