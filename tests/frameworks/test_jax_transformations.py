"""JAX's transformations of `condensed_linear`, against the masked dense layer in JAX."""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from srigl_core import CondensedWeight, SriglError, ValueTypeError

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from srigl_core.jax import Connections, condensed_linear, from_condensed  # noqa: E402

ACTIVATIONS = {"none": lambda z: z, "relu": jax.nn.relu, "silu": jax.nn.silu}


@pytest.fixture(autouse=True)
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def dense_linear(x, values, connections, bias=None, *, activation="none"):
    z = x @ connections.scatter(values).T
    return ACTIVATIONS[activation](z if bias is None else z + bias)


def layer_of(dtype=np.float64):
    """Return values and connections of a layer with an ablated neuron, x and a bias."""
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((5, 8), fan_in=3, n_active=4, dtype=dtype, rng=rng)
    x, bias = rng.standard_normal((4, 8)), rng.standard_normal(5)
    return *from_condensed(weight), jnp.asarray(x, dtype), jnp.asarray(bias, dtype)


def assert_close(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)  # noqa: E731
    jax.tree.map(close, got, wanted)


# ---------------------------------------------------------------- derivatives

BY_ALL = (0, 1, 2)
DERIVATIVES = {
    "jvp": lambda f, *at: jax.jvp(f, at, jax.tree.map(jnp.sin, at)),
    "jacfwd": lambda f, *at: jax.jacfwd(f, BY_ALL)(*at),
    "hessian": lambda f, *at: jax.hessian(f, BY_ALL)(*at),
    "reverse over reverse": lambda f, *at: jax.jacrev(jax.grad(f, BY_ALL), BY_ALL)(*at),
    "forward over forward": lambda f, *at: jax.jacfwd(jax.jacfwd(f, BY_ALL), 1)(*at),
    "product with the Hessian": lambda f, *at: jax.jvp(jax.grad(f, BY_ALL), at, at)[1],
    "third": lambda f, *at: jax.jacfwd(jax.jacrev(jax.grad(f, 1)), 1)(*at),
    "checkpoint": lambda f, *at: jax.grad(jax.checkpoint(f), BY_ALL)(*at),
    "linearize": lambda f, *at: jax.linearize(f, *at)[1](*at),
    "scan": lambda f, x, v, b: jax.grad(
        lambda v: jax.lax.scan(lambda sum_, row: (sum_ + f(row, v, b), None), 0.0, x)[0]
    )(v),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("which", DERIVATIVES)
def test_derivatives_in_both_modes_and_of_any_order_are_the_dense_ones(which, activation):
    if activation != "silu" and which in ("third", "checkpoint", "linearize"):
        pytest.skip("the smooth activation tells enough")
    values, connections, x, bias = layer_of()

    def derived(layer):
        def loss(x, v, b):
            return jnp.sin(layer(x, v, connections, b, activation=activation)).sum()

        return jax.jit(lambda *at: DERIVATIVES[which](loss, *at))(x, values, bias)

    assert_close(derived(condensed_linear), derived(dense_linear))


def test_derivatives_of_a_mapped_layer_are_the_dense_ones():
    """Over each array alone and over two; of the map, and the map of the derivative."""
    values, connections, x, bias = layer_of()
    several = x[:, None] * jnp.arange(1, 3)[:, None], values * jnp.ones((4, 1, 1))
    at = {0: several[0], 1: several[1] + jnp.arange(4)[:, None, None], 2: bias + jnp.ones((4, 1))}

    def derived(layer, mapped):
        def loss(x, v, b):
            return jnp.sin(layer(x, v, connections, b, activation="silu")).sum()

        axes = [0 if place in mapped else None for place in range(3)]
        arguments = [at[i] if i in mapped else a for i, a in enumerate((x, values, bias))]
        summed = lambda *a: jax.vmap(loss, axes)(*a).sum()  # noqa: E731
        of_map = jax.jit(jax.grad(summed, BY_ALL))(*arguments)
        map_of = jax.jit(jax.vmap(jax.grad(loss, BY_ALL), axes))(*arguments)
        return of_map, map_of

    for mapped in ({0}, {2}, {0, 1}):
        assert_close(derived(condensed_linear, mapped), derived(dense_linear, mapped))


def test_a_layer_without_a_bias_is_linear_to_jax():
    values, connections, x, bias = layer_of()
    grad = jnp.ones((4, 5))
    got, wanted = (
        jax.linear_transpose(lambda x, f=f: f(x, values, connections), x)(grad)
        for f in (condensed_linear, dense_linear)
    )
    assert_close(got, wanted)
    with jax.disable_jit():
        assert_close(condensed_linear(x, values, connections, bias),
                     dense_linear(x, values, connections, bias))  # fmt: skip


def test_donated_values_are_updated():
    values, connections, x, _ = layer_of()
    step = lambda f: lambda v: v - jax.grad(lambda v: (f(x, v, connections) ** 2).sum())(v)  # noqa: E731
    donating, got, wanted = jax.jit(step(condensed_linear), donate_argnums=0), values + 0, values
    for _ in range(3):
        got, wanted = donating(got), step(dense_linear)(wanted)
    assert_close(got, wanted)


# ---------------------------------------------------------------- several devices

SEVERAL_DEVICES = """
import sys
from functools import partial

sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_jax_transformations import assert_close, condensed_linear, dense_linear, layer_of

jax.config.update("jax_enable_x64", True)
values, connections, x, bias = layer_of()
mesh = Mesh(np.array(jax.devices()), ("d",))
two = jnp.stack([values, 2 * values])
every, split = P(), P("d")


def loss(layer, v, x, b, activation="silu"):
    return jnp.mean(layer(x, v, connections, b, activation=activation) ** 2)


def averaged(derive):
    return lambda *a: jax.lax.pmean(derive(*a), "d")


def of_split_values(f, v, x, b):
    return f(v[0], x, b)


def cases(f):
    by_all, hvp = jax.grad(f, (0, 1, 2)), lambda *a: jax.jvp(jax.grad(f, (0, 2)), a, a)[1]
    yield "batch", averaged(jax.grad(f, (0, 2))), (every, split, every), every, values
    yield "batch, of x", jax.grad(f, 1), (every, split, every), split, values
    yield "values", jax.grad(partial(of_split_values, f)), (split, every, every), split, two
    of_x = jax.grad(partial(of_split_values, f), (1, 2))
    yield "values, of x", averaged(of_x), (split, every, every), every, two
    yield "Hessian", averaged(hvp), (every, split, every), every, values
    each = averaged(jax.vmap(jax.grad(f), (None, 0, None)))
    yield "vmap", each, (every, split, every), every, values


def results(layer):
    unchecked = partial(jax.shard_map, check_vma=False)
    for activation, shard_map in (
        ("none", jax.shard_map),
        ("relu", jax.shard_map),
        ("silu", jax.shard_map),
        ("silu", unchecked),
    ):
        f = partial(loss, layer, activation=activation)
        for name, function, specs, out, v in list(cases(f))[: 6 if activation == "silu" else 3]:
            mapped = shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)
            yield (name, activation, str(shard_map)), jax.jit(mapped)(v, x, bias)
    mean = jax.shard_map(
        averaged(partial(loss, layer)), mesh=mesh, in_specs=(every, split, every), out_specs=every
    )
    yield "outer gradient", jax.grad(mean, (0, 1, 2))(values, x, bias)
    take = partial(jax.grad(partial(loss, layer), (0, 2)))
    for axes, arguments in (
        ((None, 0, None), (values, x.reshape(2, 2, 8), bias)),
        ((0, None, None), (two, x, bias)),
    ):
        yield ("pmap", str(axes)), jax.pmap(take, in_axes=axes)(*arguments)
    for specs in ((every, split), (split, every)):
        put = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((values, x), specs)]
        yield ("jit", str(specs)), jax.jit(take)(*put, bias)
    yield "device_put", take(*jax.device_put((values, x, bias), jax.devices()[1]))
    if hasattr(jax.sharding, "AxisType"):
        explicit = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(explicit):
            put = jax.device_put(x, NamedSharding(explicit, P("d", None)))
            yield "explicit", jax.jit(jax.grad(partial(loss, layer), (0, 1)))(values, put, bias)


got, wanted = dict(results(condensed_linear)), dict(results(dense_linear))
for name in wanted:
    try:
        assert_close(got[name], wanted[name])
    except AssertionError as error:
        raise AssertionError(name) from error
print(len(got), "cases")
"""


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
def test_on_several_devices_gradients_are_the_dense_ones():
    """With the batch or the values on several devices, whether or not JAX checks which they are."""
    variables = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    folder = os.path.dirname(__file__)
    command = [sys.executable, "-c", SEVERAL_DEVICES, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cases" in done.stdout


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_exported_function_and_its_gradient_need_no_callback(activation):
    export = pytest.importorskip("jax.export")
    values, connections, x, bias = layer_of()
    (batch,) = export.symbolic_shape("batch")
    like = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)  # noqa: E731
    arguments = (
        jax.ShapeDtypeStruct((batch, 8), x.dtype),
        *jax.tree.map(like, (values, connections, bias)),
    )
    layer = jax.jit(lambda *a: condensed_linear(*a, activation=activation))
    exported = export.export(layer, platforms=["cpu", "cuda"])(*arguments)
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    wanted = dense_linear(x, values, connections, bias, activation=activation)
    assert_close(loaded.call(x, values, connections, bias), wanted)
    gradient = lambda f: jax.grad(  # noqa: E731
        lambda x, v, b: (f(x, v, connections, b) ** 2).sum(), BY_ALL
    )(x, values, bias)
    wanted = gradient(lambda *a: dense_linear(*a, activation=activation))
    assert_close(gradient(loaded.call), wanted)
    mapped = jax.jit(
        jax.vmap(jax.grad(lambda v, x: layer(x, v, connections, bias).sum()), (0, None))
    )
    two = jnp.stack([values, 2 * values])
    assert_close(export.export(mapped)(two, x).call(two, x), mapped(two, x))


# ---------------------------------------------------------------- the pytree


def test_an_abstract_layer_has_the_shape_and_dtype_of_the_real_one():
    values, connections, x, bias = layer_of()
    got = jax.eval_shape(condensed_linear, x, values, connections, bias)
    assert (got.shape, got.dtype) == ((4, 5), np.float64)
    shapes = jax.eval_shape(lambda c: c, connections)
    assert repr(shapes) == repr(connections) == "Connections((5, 8), n_active=4, fan_in=3)"


@pytest.mark.parametrize(
    "copied",
    [
        lambda tree: pickle.loads(pickle.dumps(tree)),
        copy.deepcopy,
        copy.copy,
        jax.device_get,
        lambda tree: jax.device_put(tree, jax.devices()[0]),
        lambda tree: jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(tree)),
        lambda tree: jax.jit(lambda tree: tree)(tree),
    ],
)
def test_a_copy_of_a_layer_is_equal_and_computes_the_same(copied):
    values, connections, x, bias = layer_of()
    new_values, new_connections = copied((values, connections))
    assert new_connections == connections
    assert hash(new_connections) == hash(connections)
    got = condensed_linear(x, new_values, new_connections, bias)
    assert_close(got, condensed_linear(x, values, connections, bias))


class Anything:
    def __repr__(self):
        return "Anything()"


@pytest.mark.parametrize(
    "leaf",
    [
        lambda array: None,
        lambda array: array.dtype,
        jnp.shape,
        jnp.sum,
        lambda array: array.sharding,
        lambda array: "an array",
        lambda array: array.ndim,
        lambda array: Anything,
        lambda array: Anything(),
        lambda array: [array.shape],
        lambda array: np.zeros(3),
        lambda array: array.reshape(-1),
    ],
)
def test_connections_may_hold_anything(leaf):
    """The results of ``jax.tree.map`` are printed, compared, flattened and mapped again."""
    _, connections, *_ = layer_of()
    mapped = jax.tree.map(leaf, {"layer": connections})
    assert repr(mapped).startswith("{'layer': Connections((5, 8), indices=")
    assert repr(leaf(connections.key)) in repr(mapped)
    assert mapped == jax.tree.map(lambda leaf: leaf, mapped)
    assert mapped["layer"] != connections
    assert jax.tree.structure(connections) == jax.tree.structure(connections)
    leaves, structure = jax.tree.flatten(mapped)
    assert repr(jax.tree.unflatten(structure, leaves)) == repr(mapped)


def test_connections_are_compared_by_their_arrays():
    values, connections, x, bias = layer_of()
    columns = np.sort((np.asarray(connections.indices) + 1) % 8)
    other = Connections.of(columns, connections.active, (5, 8))
    assert connections != other
    assert connections != "connections"
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), connections)
    assert stacked != connections
    assert repr(stacked) == repr(connections)
    seen = []
    jax.jit(lambda c: seen.append((repr(c), c == c, c == connections)))(connections)
    assert seen == [(repr(connections), True, False)]
    layer = jax.jit(condensed_linear, static_argnums=2)
    assert_close(
        layer(x, values, connections, bias), layer(x, values, copy.copy(connections), bias)
    )


def test_connections_without_arrays_are_refused():
    values, connections, x, _ = layer_of()
    for leaf in (None, "indices", np.dtype(int), jax.ShapeDtypeStruct((4, 3), np.int32)):
        changed = Connections(leaf, connections.active, connections.key, connections.shape)
        with pytest.raises(ValueTypeError, match=f"indices must be .*got {type(leaf).__name__}"):
            condensed_linear(x, values, changed)


def test_flax_writes_and_reads_connections():
    flax = pytest.importorskip("flax.serialization")
    values, connections, x, bias = layer_of()
    tree = {"values": values, "connections": connections, "step": 3}
    restored = flax.from_bytes(tree, flax.to_bytes(tree))
    assert restored["connections"] == connections
    got = condensed_linear(x, restored["values"], restored["connections"], bias)
    assert_close(got, condensed_linear(x, values, connections, bias))
    other, state = Connections.of([[0, 1], [1, 2]], [0, 2], (5, 8)), flax.to_state_dict(connections)
    assert flax.from_state_dict(other, state) == connections
    with pytest.raises(SriglError, match=r"no.* connections of shape \(5, 9\)"):
        flax.from_state_dict(Connections.of([[0]], [0], (5, 9)), state)
