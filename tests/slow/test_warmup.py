"""What a warm-up uses, so that nothing is left to compile after it."""

import importlib
import itertools
import subprocess
import sys
from collections import Counter

import pytest

import srigl_core
from srigl_core import CondensedWeight, SriglError
from srigl_core.contract import Capabilities
from srigl_core.reference.backend import ReferenceBackend


class Recorder(ReferenceBackend):
    """The reference, and a list of what it was used for."""

    name = "recorder"

    def __init__(self):
        self.uses = []

    def prepare(self, weight):
        return RecordedPrepared(super().prepare(weight), weight, self.uses)

    def update_mask(self, weight, grad, mask, settings, *, threads):
        self.uses.append(("update", weight.shape, weight.dtype.name, grad.dtype.name, threads))
        return super().update_mask(weight, grad, mask, settings, threads=threads)


class RecordedPrepared:
    def __init__(self, prepared, weight, uses):
        self.prepared, self.weight, self.uses = prepared, weight, uses

    def matmul(self, x, bias, *, threads, **settings):
        facts = (x.shape[0], x.dtype.name, x.flags.writeable, bias is not None, threads)
        self.uses.append(("product", bool(self.weight.ablated.size), *facts))
        self.prepared.matmul(x, bias, threads=threads, **settings)

    def backward(self, grad, x, *, out, threads):
        facts = (x.shape[0], grad.dtype.name, x.flags.writeable, threads)
        self.uses.append(("gradients", bool(self.weight.ablated.size), *facts))
        self.prepared.backward(grad, x, out=out, threads=threads)

    describe = with_values = None


@pytest.fixture
def layer():
    return CondensedWeight.random((6, 8), fan_in=2, n_active=5, rng=0)


def test_it_uses_each_combination_of_inputs(monkeypatch):
    module = importlib.import_module("srigl_core._warmup")
    monkeypatch.setattr(module, "_SHAPE", (16, 12))
    monkeypatch.setattr(module, "_FAN_IN", 3)
    monkeypatch.setattr(module, "_SOME_ABLATED", 14)
    backend = Recorder()
    srigl_core.warmup(batch=(1, 5), dtype="float16", backward=True, update=True, backend=backend)
    no_or_yes, threads = (False, True), (1, None)
    products = itertools.product(no_or_yes, (1, 5), ["float16"], no_or_yes, no_or_yes, threads)
    gradients = itertools.product(no_or_yes, (1, 5), ["float16"], no_or_yes, threads)
    updates = itertools.product([(16, 12)], ["float16"], ["float16"], threads)
    assert Counter(backend.uses) == Counter(
        [
            *(("product", *facts) for facts in products),
            *(("gradients", *facts) for facts in gradients),
            *(("update", *facts) for facts in updates for _ in no_or_yes),
        ]
    )


def test_it_uses_the_layer_and_the_threads_given(layer):
    backend = Recorder()
    srigl_core.warmup(batch=3, dtype="float16", threads=2, backend=backend, weight=layer)
    assert backend.uses == [
        ("product", True, 3, "float16", writeable, bias, 2)
        for writeable in (True, False)
        for bias in (False, True)
    ]


def test_it_says_the_seconds_of_each_step(layer):
    options = {"backend": "reference", "weight": layer}
    seconds = srigl_core.warmup(batch=(1, 8), backward=True, update=True, **options)
    assert list(seconds) == [
        "prepare",
        "product, batch 1",
        "gradients, batch 1",
        "product, batch 8",
        "gradients, batch 8",
        "update",
    ]
    assert all(0 < number < 60 for number in seconds.values())
    assert list(srigl_core.warmup(batch=[], **options)) == ["prepare"]


@pytest.mark.parametrize("is_quantized", [False, True])
def test_quantised_products_and_chains_are_warmed_up_on_request(is_quantized, layer, monkeypatch):
    module = importlib.import_module("srigl_core._warmup")
    used = []

    def prepare(weight, **options):
        used.append((type(weight).__name__, options.get("inputs", "float")))
        return srigl_core.prepare(weight, **options)

    monkeypatch.setattr(module, "prepare", prepare)
    weight = layer.quantize() if is_quantized else layer
    options = {"backend": "reference", "weight": weight, "batch": 3, "chains": True}
    assert list(srigl_core.warmup(**options)) == ["prepare", "product, batch 3", "chain, batch 3"]
    assert used == [(type(weight).__name__, "float")]
    used.clear()
    srigl_core.warmup(**options, quantized=("float", "int8"))
    both = [("QuantizedWeight", "float"), ("QuantizedWeight", "int8")]
    assert used == [("CondensedWeight", "float")] * (not is_quantized) + both


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_value_type_can_be_warmed_up(dtype, product_backend, layer):
    options = {"backend": product_backend, "weight": layer}
    assert srigl_core.warmup(batch=1, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"batch": 0}, "batch=0 must be between 1 and"),
        ({"batch": (1, 2.0)}, "batch=2.0 must be an integer"),
        ({"batch": 2.0}, "batch=2.0 must be an integer"),
        ({"batch": "8"}, "batch='8' must be an integer"),
        ({"dtype": "int8"}, "'int8' is not supported"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"backend": "nonesuch"}, "no backend is called 'nonesuch'"),
        ({"weight": 3}, "weight must be a CondensedWeight, got int"),
        ({"quantized": "bytes"}, "quantized='bytes' is unknown; use one of float, int8"),
        ({"quantized": 3}, "quantized=3 is unknown; use one of float, int8"),
        ({"chains": 1}, "chains"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_by_name(wrong, error, layer):
    with pytest.raises(SriglError, match=error):
        srigl_core.warmup(**{"backend": "reference", "weight": layer, "batch": 1, **wrong})


def test_an_operation_that_is_not_offered_is_an_error(layer):
    class ProductsOnly(Recorder):
        capabilities = Capabilities(operations=frozenset({"condensed_matmul"}))

    for operation in ("backward", "update"):
        with pytest.raises(SriglError, match="does not offer"):
            srigl_core.warmup(batch=1, backend=ProductsOnly(), weight=layer, **{operation: True})


def test_after_a_warm_up_nothing_is_compiled_or_loaded(backend_names):
    if "numba" not in backend_names("update_mask"):
        pytest.skip("the numba backend is not under test")
    program = """
srigl_core.warmup(backward=True, update=True, backend="numba")
before = compiled()
assert before
rng = np.random.default_rng(0)
for n_active in (768, 700):
    weight = srigl_core.CondensedWeight.random((768, 3072), fan_in=307, n_active=n_active, rng=rng)
    plan = srigl_core.prepare(weight, backend="numba")
    dense, mask = weight.to_dense(), weight.to_mask()
    for threads in (1, None):
        for batch in (1, 8, 64, 256):
            x, grad = (
                rng.standard_normal((batch, n)).astype(np.float32) for n in (3072, 768)
            )
            for writeable in (True, False):
                x.setflags(write=writeable)
                grad.setflags(write=writeable)
                for bias in (None, grad[0]):
                    plan(x, bias, activation="gelu", threads=threads)
                    plan(x.T.copy().T, bias, threads=threads, compact=True)
                plan.backward(grad, x, threads=threads)
        srigl_core.update_mask(
            dense, dense[::-1], mask, nnz_budget=weight.nnz, drop_fraction=0.3, threads=threads,
            backend="numba",
        )
"""
    assert compiled_later(program) == []


def test_after_a_warm_up_for_int8_nothing_is_compiled_at_any_sparsity(backend_names):
    if "numba" not in backend_names("quantized_matmul"):
        pytest.skip("the numba backend is not under test")
    program = """
srigl_core.warmup(quantized="int8", backend="numba")
before = compiled()
assert before
rng = np.random.default_rng(0)
for fan_in in (307, 31):
    weight = srigl_core.CondensedWeight.random((768, 3072), fan_in=fan_in, rng=rng).quantize()
    plan = srigl_core.prepare(weight, inputs="int8", backend="numba")
    for batch in (1, 8, 64, 256):
        for threads in (1, None):
            plan(rng.standard_normal((batch, 3072)).astype(np.float32), threads=threads)
"""
    assert compiled_later(program) == []


def compiled_later(program):
    """Return what a program has compiled at its end beside what it calls `before`."""
    start = """
import gc
import numpy as np
import srigl_core
from numba.core.dispatcher import Dispatcher

def compiled():
    return {
        kernel.py_func.__qualname__ + str(types)
        for kernel in gc.get_objects() if isinstance(kernel, Dispatcher)
        for types in kernel.overloads
    }
"""
    end = 'print("\\n".join(sorted(compiled() - before)))'
    process = subprocess.run(
        [sys.executable, "-c", f"{start}{program}{end}"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout.split()
