"""The condensed layers of flax and equinox: one product, three modules."""

import re
import subprocess
import sys

import numpy as np
import pytest

from srigl_core import CondensedWeight, SriglError, ValueTypeError

jax = pytest.importorskip("jax")
linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")

import flax.serialization  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import orbax.checkpoint  # noqa: E402

from srigl_core.integrations import equinox, flax_linen, flax_nnx  # noqa: E402
from srigl_core.jax import Connections, condensed_linear  # noqa: E402

N_IN, N_OUT, FAN_IN = 9, 6, 3


class Linen:
    """A layer with its variables; the layers of the other libraries hold theirs."""

    def __init__(self, layer, variables):
        self.layer, self.variables = layer, variables

    def __call__(self, x):
        return self.layer.apply(self.variables, x)

    @property
    def parts(self):
        params = self.variables["params"]
        return (
            params["values"],
            self.variables["connections"]["connections"],
            params.get("bias"),
        )


def parts_of(layer):
    """Return values, connections and bias of a layer."""
    if isinstance(layer, Linen):
        return layer.parts
    parts = layer.values, layer.connections, layer.bias
    return tuple(p.get_value() if isinstance(p, nnx.Variable) else p for p in parts)


def draw_linen(seed, **options):
    layer = flax_linen.CondensedLinear(N_IN, N_OUT, fan_in=FAN_IN, **options)
    return Linen(layer, layer.init(jax.random.key(seed), jnp.ones(N_IN)))


def draw_nnx(seed, **options):
    rngs = nnx.Rngs(jax.random.key(seed))
    return flax_nnx.CondensedLinear(N_IN, N_OUT, fan_in=FAN_IN, rngs=rngs, **options)


def draw_equinox(seed, **options):
    key = jax.random.key(seed)
    return equinox.CondensedLinear(N_IN, N_OUT, fan_in=FAN_IN, key=key, **options)


DRAW = {"linen": draw_linen, "nnx": draw_nnx, "equinox": draw_equinox}
LAYERS = {
    "linen": lambda *made: Linen(*flax_linen.CondensedLinear.from_condensed(*made)),
    "nnx": flax_nnx.CondensedLinear.from_condensed,
    "equinox": equinox.CondensedLinear.from_condensed,
}
JIT = {"linen": jax.jit, "nnx": nnx.jit, "equinox": eqx.filter_jit}


@pytest.fixture(params=LAYERS)
def library(request):
    return request.param


def problem():
    """Return a weight with two ablated neurons, a bias and a batch."""
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((N_OUT, N_IN), fan_in=FAN_IN, n_active=4, rng=rng)
    bias, x = (rng.standard_normal(shape).astype(np.float32) for shape in (N_OUT, (5, N_IN)))
    return CondensedWeight.from_connections(weight.values.astype("f4"), weight.connections), bias, x


def call(layer, x):
    return layer(x)


def test_a_layer_of_a_condensed_weight_has_its_product(library):
    weight, bias, x = problem()
    layer = LAYERS[library](weight, bias)
    values, connections, own_bias = parts_of(layer)
    wanted = condensed_linear(x, values, connections, own_bias)
    np.testing.assert_array_equal(np.asarray(connections.to_mask()), weight.to_mask())
    np.testing.assert_array_equal(values, weight.values)
    np.testing.assert_array_equal(layer(x), wanted)
    np.testing.assert_allclose(wanted, x @ weight.to_dense().T + bias, rtol=1e-5, atol=1e-6)
    function = layer if library == "linen" else None
    jitted = jax.jit(function) if function else (lambda x: JIT[library](call)(layer, x))
    np.testing.assert_array_equal(jitted(x), wanted)
    np.testing.assert_array_equal(jax.vmap(layer)(x), wanted)
    without = LAYERS[library](weight)
    np.testing.assert_array_equal(without(x), condensed_linear(x, values, connections))


def dense_layer(library, weight, bias):
    """Return a dense layer of the library with these weights, and the constructor from it."""
    if library == "linen":
        params = {"kernel": jnp.asarray(weight.T)} | ({} if bias is None else {"bias": bias})
        return params, lambda *made: Linen(*flax_linen.CondensedLinear.from_dense(*made))
    if library == "nnx":
        layer = nnx.Linear(N_IN, N_OUT, use_bias=bias is not None, rngs=nnx.Rngs(0))
        layer.kernel = nnx.Param(jnp.asarray(weight.T))
        layer.bias = None if bias is None else nnx.Param(jnp.asarray(bias))
        return layer, flax_nnx.CondensedLinear.from_dense
    layer = eqx.nn.Linear(N_IN, N_OUT, use_bias=bias is not None, key=jax.random.key(0))
    at = lambda layer: (layer.weight, layer.bias)  # noqa: E731
    new = jnp.asarray(weight), None if bias is None else jnp.asarray(bias)
    layer = eqx.tree_at(at, layer, new, is_leaf=lambda leaf: leaf is None)
    return layer, equinox.CondensedLinear.from_dense


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_of_a_dense_one_has_its_weights_where_the_mask_is_true(library, has_bias):
    weight, bias, x = problem()
    dense = np.random.default_rng(1).standard_normal((N_OUT, N_IN)).astype(np.float32)
    mask = weight.to_mask()
    layer, condensed = dense_layer(library, dense, bias if has_bias else None)
    shaped = mask if library == "equinox" else mask.T
    wanted = x @ (dense * mask).T + (bias if has_bias else 0)
    np.testing.assert_allclose(condensed(layer, shaped)(x), wanted, rtol=1e-5, atol=1e-6)
    message = f"mask has shape {shaped.T.shape}, but must have {shaped.shape}"
    with pytest.raises(SriglError, match=re.escape(message)):
        condensed(layer, shaped.T)
    with pytest.raises(ValueTypeError, match="mask must be an array of bool, got list"):
        condensed(layer, shaped.tolist())
    with pytest.raises(SriglError, match="constant fan-in"):
        condensed(layer, np.triu(np.ones(shaped.shape, bool)))


def test_layers_that_are_not_linear_are_refused():
    convolution = nnx.Conv(4, 6, (3,), rngs=nnx.Rngs(0))
    with pytest.raises(SriglError, match=r"weight has shape \(3, 4, 6\), but.*a linear layer"):
        flax_nnx.CondensedLinear.from_dense(convolution, np.ones((3, 4, 6), bool))
    weight, bias, _ = problem()
    with pytest.raises(SriglError, match=r"bias has shape \(5,\), but must be \(6,\)"):
        equinox.CondensedLinear.from_condensed(weight, bias[:5])


def test_a_key_decides_the_layer(library):
    one, same, other = (parts_of(DRAW[library](seed)) for seed in (0, 0, 1))
    values, connections, bias = one
    assert (connections.shape, connections.fan_in) == ((N_OUT, N_IN), FAN_IN)
    assert values.shape == (N_OUT, FAN_IN)
    assert bias.shape == (N_OUT,)
    assert connections == same[1] != other[1]
    np.testing.assert_array_equal(values, same[0])
    most = FAN_IN**-0.5
    for numbers in (values, bias):
        assert 0.5 * most < jnp.abs(numbers).max() <= most
        assert (numbers < 0).any()
    small = parts_of(DRAW[library](0, use_bias=False, dtype=jnp.bfloat16))
    assert (small[0].dtype, small[2]) == (jnp.bfloat16, None)


def test_a_layer_is_not_drawn_by_a_tracer(library):
    with pytest.raises(ValueTypeError, match="key is a JAX tracer"):
        jax.eval_shape(lambda seed: parts_of(DRAW[library](seed))[0], 0)
    with pytest.raises(SriglError, match="fan_in=10"):
        {
            "linen": lambda: flax_linen.CondensedLinear(9, 6, fan_in=10).init(
                jax.random.key(0), jnp.ones(9)
            ),
            "nnx": lambda: flax_nnx.CondensedLinear(9, 6, fan_in=10, rngs=nnx.Rngs(0)),
            "equinox": lambda: equinox.CondensedLinear(9, 6, fan_in=10, key=jax.random.key(0)),
        }[library]()


def gradients(library, layer, x):
    """Return the gradient of a layer as its library gives it, and its values' and bias' parts."""
    square = lambda y: (y**2).sum()  # noqa: E731
    if library == "linen":
        rest = {"connections": layer.variables["connections"]}
        loss = lambda params: square(layer.layer.apply({"params": params, **rest}, x))  # noqa: E731
        found = jax.grad(loss)(layer.variables["params"])
        return found, found["values"], found["bias"]
    if library == "nnx":
        found = nnx.grad(lambda layer: square(layer(x)))(layer)
        return found, found["values"].get_value(), found["bias"].get_value()
    found = eqx.filter_grad(lambda layer: square(layer(x)))(layer)
    return found, found.values, found.bias


def test_values_and_bias_have_gradients_and_connections_have_none(library):
    weight, bias, x = problem()
    layer = LAYERS[library](weight, bias)
    values, connections, _ = parts_of(layer)
    loss = lambda v, b: (condensed_linear(x, v, connections, b) ** 2).sum()  # noqa: E731
    whole, *found = gradients(library, layer, x)
    for got, wanted in zip(found, jax.grad(loss, (0, 1))(values, bias), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert len(jax.tree.leaves(whole)) == 2


@pytest.mark.parametrize(("activation", "mapped"), [(None, False), ("relu", True), ("silu", False)])
def test_a_dense_weight_in_place_of_values_has_the_gradient_of_all_positions(activation, mapped):
    weight, bias, x = problem()
    values, connections, _ = parts_of(LAYERS["nnx"](weight, bias))
    function = {None: lambda z: z, "relu": jax.nn.relu, "silu": jax.nn.silu}[activation]

    def loss(values, bias):
        layer = lambda x: condensed_linear(x, values, connections, bias, activation=activation)  # noqa: E731
        return (jax.vmap(layer)(x) if mapped else layer(x) ** 2).sum()

    def dense_loss(dense, bias):
        y = function(x @ dense.T + bias)
        return (y if mapped else y**2).sum()

    dense = connections.scatter(values)
    other = jnp.where(connections.to_mask(), dense, 7.0)  # only the connections are read
    found = jax.value_and_grad(loss, (0, 1))(other, bias)
    wanted = jax.value_and_grad(dense_loss, (0, 1))(dense, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, wanted)
    active = jax.grad(loss)(values, bias)
    np.testing.assert_allclose(connections.gather(found[1][0]), active, rtol=2e-5, atol=1e-5)


def test_linen_layers_are_parts_of_modules():
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(flax_linen.CondensedLinear(N_IN, 8, fan_in=2)(x))
            return flax_linen.CondensedLinear(8, 3, fan_in=4, use_bias=False)(x)

    _, _, x = problem()
    variables = Network().init(jax.random.key(0), x)
    assert set(variables["params"]["CondensedLinear_1"]) == {"values"}
    assert Network().apply(variables, x).shape == (5, 3)
    with pytest.raises(Exception, match="values"):
        Network().apply({"params": {}}, x)


def trees(library, layer):
    """Return the layer's state as a pytree, and a function that makes a layer of it."""
    if library == "linen":
        return layer.variables, lambda tree: Linen(layer.layer, tree)
    if library == "nnx":
        graph, state = nnx.split(layer)
        return state, lambda tree: nnx.merge(graph, tree)
    return layer, lambda tree: tree


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("tool", ["flax", "orbax"])
def test_a_layer_is_saved_and_restored_by_its_leaves(library, tool, tmp_path):
    weight, bias, x = problem()
    layer = LAYERS[library](weight, bias)
    tree, _ = trees(library, layer)
    fresh, remade = trees(library, DRAW[library](3))  # of another number of neurons
    leaves, structure = jax.tree.leaves(tree), jax.tree.structure(fresh)
    if tool == "flax":
        data = flax.serialization.to_bytes(leaves)
        restored = flax.serialization.from_bytes(jax.tree.leaves(fresh), data)
    else:
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "layer", leaves)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "layer")
    again = remade(jax.tree.unflatten(structure, restored))
    assert parts_of(again)[1] == parts_of(layer)[1]
    np.testing.assert_array_equal(again(x), layer(x))


def test_variables_of_linen_and_pure_dicts_of_nnx_are_written_by_flax_as_they_are():
    weight, bias, _ = problem()
    variables = LAYERS["linen"](weight, bias).variables
    pure = nnx.to_pure_dict(nnx.state(LAYERS["nnx"](weight, bias)))
    for tree in (variables, pure):
        again = flax.serialization.from_bytes(tree, flax.serialization.to_bytes(tree))
        leaves, structure = jax.tree.flatten(again)
        assert structure == jax.tree.structure(tree)
        assert all(map(np.array_equal, leaves, jax.tree.leaves(tree)))


def test_a_layer_is_exported(library):
    weight, bias, x = problem()
    layer = LAYERS[library](weight, bias)
    exported = jax.export.export(jax.jit(lambda x: layer(x)))(x)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(loaded.call(x), layer(x), rtol=1e-5, atol=1e-6)


def test_an_equinox_layer_takes_the_key_of_a_sequential():
    weight, bias, x = problem()
    layer = LAYERS["equinox"](weight, bias)
    model = eqx.nn.Sequential([layer, eqx.nn.Lambda(jax.nn.relu)])
    got = jax.vmap(model)(x)
    np.testing.assert_array_equal(got, jax.nn.relu(layer(x)))


def test_connections_of_a_layer_are_replaced():
    weight, bias, x = problem()
    layer = LAYERS["equinox"](weight, bias)
    drawn = DRAW["equinox"](1)
    moved = eqx.tree_at(
        lambda layer: (layer.values, layer.connections), layer, (drawn.values, drawn.connections)
    )
    assert isinstance(moved.connections, Connections)
    wanted = condensed_linear(x, drawn.values, drawn.connections, bias)
    np.testing.assert_array_equal(eqx.filter_jit(call)(moved, x), wanted)


PROGRAM = """
import importlib, sys
sys.modules.update(flax=None, equinox=None)
for module in ("flax_nnx", "flax_linen", "equinox"):
    try:
        importlib.import_module(f"srigl_core.integrations.{module}")
    except ImportError as error:
        print(type(error).__name__, error)
"""


def test_a_missing_package_is_an_error_that_says_what_to_install():
    run = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    lines = done.stdout.splitlines()
    assert [line.rpartition("install it: ")[2] for line in lines] == [
        "pip install flax",
        "pip install flax",
        "pip install equinox",
    ]
    assert all(line.startswith("BackendUnavailableError srigl_core.integ") for line in lines)
