"""The public interface of chains; their laws are in `test_laws.py`."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from srigl_core import CondensedWeight, SriglError, ValueTypeError, chain, get_backend, prepare
from srigl_core.testing import value_dtype
from srigl_core.testing.flush_mode import flushing_subnormals
from srigl_core.testing.kernel_capabilities import capabilities_of
from srigl_core.testing.laws import LAWS
from srigl_core.testing.verification import source_of

RNG = np.random.default_rng(0)
HIDDEN = CondensedWeight.random((8, 6), fan_in=2, rng=0)
OUTPUT = CondensedWeight.random((5, 8), fan_in=3, n_active=4, rng=1)
BIAS = RNG.standard_normal(8).astype(np.float32)
LAYERS = [(HIDDEN, BIAS, "relu"), (OUTPUT, None, None)]
X = RNG.standard_normal((3, 6)).astype(np.float32)
CHAIN_LAWS = [law for law in LAWS if law.operation == "chain"]


def of_dtype(weight, dtype):
    return CondensedWeight.from_connections(
        weight.values.astype(value_dtype(dtype)), weight.connections
    )


def one_by_one(layers, x, backend, **options):
    *others, last = layers
    for weight, bias, activation, *inputs in others:
        plan = prepare(weight, inputs=(inputs or ["float"])[0], backend=backend)
        x = plan(x, bias, activation=activation)
    weight, bias, activation = last
    return prepare(weight, backend=backend)(x, bias, activation=activation, **options)


class WithoutChains:
    """A backend that computes products only, and no chain."""

    def __init__(self, backend):
        self.name, self._backend = backend.name, backend
        self.capabilities = replace(
            backend.capabilities,
            operations=backend.capabilities.operations & {"condensed_matmul", "quantized_matmul"},
            largest_problem=20_000,
        )

    def __getattr__(self, name):
        return getattr(self._backend, name)


@pytest.mark.parametrize("law", CHAIN_LAWS, ids=lambda law: law.name)
def test_the_laws_hold_where_a_backend_has_no_chains_of_its_own(law, matmul_backend):
    backend = WithoutChains(get_backend(matmul_backend))
    for number in range(5):
        problem = law.build(source_of(law, 0, number), capabilities_of(backend))
        with np.errstate(all="ignore"):
            law.holds(backend, problem)


class WithoutThisChain(WithoutChains):
    """A backend that computes chains, but not these."""

    def __init__(self, backend):
        super().__init__(backend)
        operations = self.capabilities.operations | {"chain"}
        self.capabilities = replace(self.capabilities, operations=operations)

    def chain(self, layers):
        assert [layer.code for layer in layers] == [1, 0]
        assert layers[0].bias.tobytes() == BIAS.tobytes()


def test_a_backend_may_leave_a_chain_to_its_plans():
    backend = WithoutThisChain(get_backend("reference"))
    whole = chain(LAYERS, backend=backend)
    assert whole(X).tobytes() == one_by_one(LAYERS, X, "reference").tobytes()
    assert "calls=one for each layer" in str(whole)


def test_layers_may_be_quantized():
    layers = [(HIDDEN.quantize(), BIAS, "relu", "int8"), (OUTPUT, None, None)]
    result = chain(layers, backend="reference")(X)
    assert result.tobytes() == one_by_one(layers, X, "reference").tobytes()
    assert chain(layers)(X).shape == (3, 5)


def test_a_chain_prints_its_layers_and_how_it_calls_them():
    text = str(chain(LAYERS, backend="reference", threads=2))
    assert "backend=reference, threads=2, calls=one for each layer" in text
    assert "0: CondensedWeight((8, 6)" in text
    assert "kernel=NumPy, one connection at a time, bias=True, activation=relu" in text
    assert "1: CondensedWeight((5, 8)" in text


def test_a_chain_cannot_be_changed_pickled_or_differentiated():
    whole = chain(LAYERS)
    with pytest.raises(AttributeError):
        whole.threads = 2
    with pytest.raises(ValueError, match="read-only"):
        whole.layers[0].bias[0] = 1
    assert copy.deepcopy(whole) is whole
    with pytest.raises(ValueTypeError, match="belongs to its process"):
        pickle.dumps(whole)
    with pytest.raises(SriglError, match="is for inference and has no gradients"):
        whole.backward(X)


def test_a_chain_shares_the_layouts_of_its_weights():
    backend = get_backend("numba")
    assert chain(LAYERS, backend=backend).layers[0].plan is chain(LAYERS).layers[0].plan


@pytest.mark.parametrize("number", [1, 2])
def test_errors_name_the_layer(number):
    good = {1: (HIDDEN, BIAS, "relu"), 2: (OUTPUT, None, None)}
    wrong = {
        "activation='tanh' is unknown": lambda w: (w, None, "tanh"),
        "bias has shape": lambda w: (w, np.zeros(3), None),
        "bias of dtype": lambda w: (w, np.zeros(w.shape[0], int), None),
        "needs a quantised weight": lambda w: (w, None, None, "int8"),
        "inputs='int4' is unknown": lambda w: (w, None, None, "int4"),
        r"expected \(weight, bias, activation\)": lambda w: (np.zeros(w.shape), None, None),
        "got \\(CondensedWeight\\)": lambda w: (w,),
    }
    for message, make in wrong.items():
        layers = good | {number: make(good[number][0])}
        with pytest.raises(SriglError, match=f"layer {number - 1}: .*{message}"):
            chain(layers.values())


def test_layers_must_fit_each_other():
    with pytest.raises(SriglError, match="layer 1 has n_in=6, but layer 0 has n_out=5"):
        chain([(OUTPUT, None, None), (HIDDEN, None, None)])
    with pytest.raises(SriglError, match="layers is empty"):
        chain([])
    with pytest.raises(ValueTypeError, match=r"must be a list of tuples .*, got int"):
        chain(3)
    with pytest.raises(SriglError, match="threads=0"):
        chain(LAYERS, threads=0)


def test_arguments_of_a_call_are_checked(product_backend):
    whole = chain(LAYERS, backend=product_backend)
    with pytest.raises(SriglError, match=r"layer 0: x has shape \(3, 7\).*n_in=6"):
        whole(np.ones((3, 7), np.float32))
    with pytest.raises(SriglError, match=r"out has shape \(3, 4\), but the result has \(3, 5\)"):
        whole(X, out=np.zeros((3, 4), np.float32))
    with pytest.raises(ValueTypeError, match="compact must be True or False"):
        whole(X, compact=1)
    with pytest.raises(ValueTypeError, match="x"):
        whole(np.ones((3, 6), int))
    square = chain([(CondensedWeight.random((6, 6), fan_in=2, rng=0), None, None)])
    x = X.copy()
    with pytest.raises(SriglError, match="out shares memory with x"):
        square(x, out=x)
    assert x.tobytes() == X.tobytes()


def test_types_that_do_not_combine_name_the_layer():
    layers = [(of_dtype(HIDDEN, "float16"), None, None), (of_dtype(OUTPUT, "bfloat16"), None, None)]
    whole = chain(layers)
    assert whole(X).dtype == np.float32
    with pytest.raises(ValueTypeError, match="layer 1: float16 and bfloat16 do not combine"):
        whole(X.astype(np.float16))


def test_an_array_interface_gives_a_numpy_array():
    exported = SimpleNamespace(__array_interface__=X.__array_interface__)
    assert chain(LAYERS)(exported).tobytes() == chain(LAYERS)(X).tobytes()


def test_more_batch_sizes_than_programs_are_kept():
    whole = chain(LAYERS)
    for batch in range(1, 100):
        x = RNG.standard_normal((batch, 6)).astype(np.float32)
        assert whole(x).tobytes() == one_by_one(LAYERS, x, None).tobytes()


def test_a_chain_made_in_a_flushing_thread_keeps_its_subnormal_bias(product_backend):
    weight = CondensedWeight(np.zeros((1, 1)), [[0]], [0], (1, 1))
    bias, x = np.array([1e-40], np.float32), np.zeros((1, 1))
    with flushing_subnormals():
        result = chain([(weight, bias, None)], backend=product_backend)(x)
    assert result[0, 0] == np.float64(bias[0]) != 0
