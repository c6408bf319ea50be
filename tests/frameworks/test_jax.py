"""The JAX adapter: SPEC 2 under jit, grad and vmap, and mask updates of JAX's arrays."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from srigl_core import (
    BackendUnavailableError,
    CondensedWeight,
    SriglError,
    UpdateSettings,
    ValueTypeError,
    condensed_matmul,
    condensed_matmul_backward,
    prepare,
    update_mask,
)
from srigl_core._arrays.dtypes import VALUE_TYPES, value_dtype
from srigl_core._plan import Plan
from srigl_core.contract import ACTIVATIONS, MatmulGradients
from srigl_core.reference import random_mask
from srigl_core.reference.mask_update import remap_state as reference_remap
from srigl_core.testing.bounds import first_violation
from srigl_core.testing.oracles import expected_gradients, expected_product
from srigl_core.testing.problem_sources import SeededSource
from srigl_core.testing.product_problems import matmul_problem


def test_without_jax_it_says_what_to_install():
    program = (
        "import sys; sys.modules['jax'] = None\n"
        "import srigl_core\n"
        "try: import srigl_core.jax\n"
        "except srigl_core.BackendUnavailableError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert "pip install jax" in done.stdout


jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from srigl_core.jax import (  # noqa: E402
    Connections,
    condensed_linear,
    from_condensed,
    host_call,
    plan_cache,
    remap_state,
    srigl_update,
    to_condensed,
)


@pytest.fixture
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(params=["buffers", "arrays"])
def way(request, monkeypatch):
    """Both ways from JAX to Python: by ``buffer_callback``, and as in an older JAX without it."""
    if request.param == "arrays":
        monkeypatch.setattr(host_call, "buffer_callback", None)
    elif host_call.buffer_callback is None:
        pytest.skip("this JAX has no buffer_callback")
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def layer_of(dtype="float32", seed=0, shape=(12, 20), fan_in=5, n_active=10, batch=(3,)):
    """Return a weight with ablated neurons, its JAX arrays, x and a bias."""
    rng, dtype = np.random.default_rng(seed), value_dtype(dtype)
    weight = CondensedWeight.random(shape, fan_in=fan_in, n_active=n_active, dtype=dtype, rng=rng)
    x = rng.standard_normal((*batch, shape[1])).astype(dtype)
    bias = rng.standard_normal(shape[0]).astype(dtype)
    return weight, *from_condensed(weight), jnp.asarray(x), jnp.asarray(bias)


def dense_layer(x, values, connections, bias, activation="none"):
    """Return the masked dense layer, as JAX computes it."""
    functions = {
        "none": lambda z: z,
        "relu": jax.nn.relu,
        "gelu": lambda z: jax.nn.gelu(z, approximate=False),
        "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
        "silu": jax.nn.silu,
    }
    z = x @ connections.scatter(values).T
    return functions[activation](z if bias is None else z + bias)


def assert_same_bits(got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert got.tobytes() == wanted.tobytes()


def assert_close(got, wanted):
    """Compare the arrays of two pytrees in float64."""
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)  # noqa: E731
    jax.tree.map(compare, got, wanted)


def cached_plan(connections):
    """Return the plan of a float32 weight with these connections."""
    return plan_cache._cache[np.asarray(connections.key).tobytes(), "f"][0]


# ---------------------------------------------------------------- the product


@pytest.mark.parametrize("seed", range(14))
def test_products_and_gradients_are_within_the_error_bound(x64, seed):
    """The problems are those of the conformance kit, with subnormal and huge numbers."""
    problem = matmul_problem(SeededSource(seed))
    weight, x = problem.weight, np.ascontiguousarray(problem.x)
    values, connections = from_condensed(weight)
    with np.errstate(all="ignore"):
        bias = None if problem.bias is None else problem.bias.astype(problem.result_dtype)
        grad = np.ascontiguousarray(problem.grad).astype(problem.result_dtype)
    y = jax.jit(condensed_linear, static_argnames="activation")(
        x, values, connections, bias, activation=problem.activation
    )
    assert y.dtype == problem.result_dtype
    expected = expected_product(weight, x, bias, problem.activation)
    assert first_violation(np.asarray(y), expected) is None
    _, pull = jax.vjp(lambda x, v: condensed_linear(x, v, connections), x, values)
    expected = expected_gradients(weight, grad, x)
    for name, gradient in zip(("x", "values"), pull(jnp.asarray(grad)), strict=True):
        if grad.size:
            assert first_violation(np.asarray(gradient), expected[name]) is None, name


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [*((dtype, "gelu") for dtype in VALUE_TYPES), *(("float32", name) for name in ACTIVATIONS)],
)
def test_jitted_or_not_the_bits_are_those_of_the_plan(x64, dtype, activation):
    weight, values, connections, x, bias = layer_of(dtype)
    wanted = condensed_matmul(np.asarray(x), weight, np.asarray(bias), activation=activation)
    eager = condensed_linear(x, values, connections, bias, activation=activation)
    assert_same_bits(eager, wanted)
    jitted = jax.jit(condensed_linear, static_argnames="activation")
    assert_same_bits(jitted(x, values, connections, bias, activation=activation), wanted)
    wanted = condensed_matmul(np.asarray(x), weight, activation=activation)
    assert_same_bits(jitted(x, values, connections, activation=activation), wanted)


@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_both_ways_to_python_give_the_same_bits(x64, way, dtype):
    weight, values, connections, x, bias = layer_of(dtype)
    y, pull = jax.vjp(lambda *a: condensed_linear(a[0], a[1], connections, a[2]), x, values, bias)
    assert_same_bits(y, condensed_matmul(np.asarray(x), weight, np.asarray(bias)))
    wide = MatmulGradients(*(np.empty(a.shape, a.dtype) for a in (x, values, bias)))
    wanted = condensed_matmul_backward(np.asarray(y), np.asarray(x), weight, out=wide)
    for got, gradient in zip(pull(y), (wanted.x, wanted.values, wanted.bias), strict=True):
        assert_same_bits(got, gradient)


def test_a_large_result_is_written_in_place(way):
    weight, values, connections, x, bias = layer_of(shape=(2100, 64), n_active=2000, batch=(2, 70))
    assert x[..., 0].size * weight.shape[0] * 4 > 1 << 20
    wanted = condensed_matmul(np.asarray(x), weight, np.asarray(bias), activation="relu")
    got = condensed_linear(x, values, connections, bias, activation="relu")
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 0)])
def test_leading_axes_are_kept(way, batch):
    weight, values, connections, x, bias = layer_of(batch=batch)
    got = condensed_linear(x, values, connections, bias)
    assert_same_bits(got, condensed_matmul(np.asarray(x), weight, np.asarray(bias)))
    gradients = jax.grad(
        lambda *a: condensed_linear(a[0], a[1], connections, a[2]).sum(), (0, 1, 2)
    )(x, values, bias)
    assert [g.shape for g in gradients] == [x.shape, values.shape, bias.shape]


@pytest.mark.parametrize("pair", [("float32", "float64"), ("bfloat16", "float32"),
                                  ("float32", "float16"), ("float16", "float64")])  # fmt: skip
def test_results_have_the_type_that_holds_both_and_gradients_that_of_their_own(x64, pair):
    _, values, connections, x, bias = layer_of(pair[1])
    x = x.astype(pair[0])
    for activation in ("none", "relu", "gelu"):

        def loss(x, values, bias, activation=activation):
            y = condensed_linear(x, values, connections, bias, activation=activation)
            assert y.dtype == np.result_type(value_dtype(pair[0]), value_dtype(pair[1]))
            return y.astype(jnp.float32).sum()

        gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(x, values, bias)
        assert [g.dtype for g in gradients] == [x.dtype, values.dtype, bias.dtype]


def test_subnormal_numbers_count_within_jit():
    """The product of XLA is 0, because its threads flush subnormal numbers."""
    weight = CondensedWeight(np.float32([[1e-40, 1e-20]]), [[0, 1]], [0], (1, 2))
    values, connections = from_condensed(weight)
    x = jnp.asarray(np.float32([[1.0, 2e-20], [0.0, 1e-20]]))
    dense = jnp.asarray(weight.to_dense())
    assert float(jax.jit(lambda x: x @ dense.T)(x)[1, 0]) == 0
    got = np.asarray(jax.jit(lambda x: condensed_linear(x * 1, values, connections))(x))
    np.testing.assert_allclose(got[:, 0], np.float32([3e-40, 1e-40]), rtol=1e-4)
    bias = jnp.zeros(1)
    relu = lambda b: condensed_linear(x[1:], values, connections, b, activation="relu").sum()  # noqa: E731
    assert float(jax.jit(jax.grad(relu))(bias)[0]) == 1  # the argument is 1e-40


# ---------------------------------------------------------------- transformations


@pytest.mark.parametrize(
    ("activation", "has_bias"), [("none", False), *((name, True) for name in ACTIVATIONS)]
)
def test_gradients_are_those_of_the_masked_dense_product(x64, activation, has_bias):
    _, values, connections, x, bias = layer_of("float64", batch=(2, 4))
    bias = bias if has_bias else None
    weighting = jnp.asarray(np.random.default_rng(5).standard_normal((2, 4, 12)))

    def gradients(layer):
        def loss(x, values, bias):
            return (layer(x, values, connections, bias, activation=activation) * weighting).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2) if has_bias else (0, 1)))(x, values, bias)

    assert_close(gradients(condensed_linear), gradients(dense_layer))


def test_a_smooth_activation_is_derived_where_its_argument_is_not_rounded():
    weight, values, connections, x, bias = layer_of("bfloat16", batch=(1,))
    z = np.empty((1, 12), np.float32)
    condensed_matmul(np.asarray(x), weight, np.asarray(bias), out=z)
    (wanted,) = jax.vjp(lambda z: jax.nn.gelu(z, approximate=False), z)[1](jnp.ones_like(z))
    loss = lambda b: condensed_linear(x, values, connections, b, activation="gelu").sum()  # noqa: E731
    assert_same_bits(jax.jit(jax.grad(loss))(bias), wanted[0].astype("bfloat16"))


def test_vmap_over_x_is_one_call(way, monkeypatch):
    calls = []
    module = importlib.import_module("srigl_core.jax.condensed_matmul")
    monkeypatch.setattr(module, "plan_for", lambda *a: calls.append(a) or plan_cache.plan_for(*a))
    _, values, connections, x, bias = layer_of(batch=(6, 4))
    wanted = condensed_linear(x.reshape(24, 20), values, connections, bias, activation="relu")
    layer = lambda x: condensed_linear(x, values, connections, bias, activation="relu")  # noqa: E731
    for mapped in (jax.vmap(layer), jax.jit(jax.vmap(layer)), jax.vmap(jax.vmap(layer))):
        assert_same_bits(mapped(x), wanted.reshape(6, 4, 12))
    moved = jax.vmap(layer, in_axes=1, out_axes=1)(jnp.swapaxes(x, 0, 1))
    assert_same_bits(jnp.swapaxes(moved, 0, 1), wanted.reshape(6, 4, 12))
    assert len(calls) == 5
    loss = lambda x: (condensed_linear(x, values, connections) ** 2).sum()  # noqa: E731
    assert_same_bits(jax.vmap(jax.grad(loss))(x), jax.grad(loss)(x))
    if jax.__version_info__ >= (0, 6):  # before, vmap maps whatever is kept for a gradient
        assert len(calls) == 9


def test_vmap_of_a_gradient_gives_one_for_each_example(x64, way):
    _, values, connections, x, bias = layer_of("float64", batch=(6,))

    def each(layer):
        def loss(values, bias, x):
            return (layer(x, values, connections, bias, activation="gelu") ** 2).sum()

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), in_axes=(None, None, 0)))

    got, wanted = (each(layer)(values, bias, x) for layer in (condensed_linear, dense_layer))
    assert got[0].shape == (6, *values.shape)
    assert_close(got, wanted)


def test_vmap_over_weights_is_an_ensemble(x64, way):
    layers = [layer_of("float64", seed=seed)[1:4] for seed in range(3)]
    values, connections, x = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)

    def loss(x, values, connections, layer):
        return (layer(x, values, connections, None) ** 2).sum()

    def of(layer):
        mapped = jax.vmap(lambda *a: jax.value_and_grad(loss, (0, 1))(*a, layer))
        return jax.jit(mapped)(x, values, connections)

    assert_close(of(condensed_linear), of(dense_layer))
    for i, (v, c, _) in enumerate(layers):  # over the weights alone, and over both at once
        mapped = jax.vmap(condensed_linear, in_axes=(None, 0, 0))(x[0], values, connections)
        assert_same_bits(mapped[i], condensed_linear(x[0], v, c))
        nested = jax.vmap(jax.vmap(condensed_linear, (0, None, None)), (None, 0, 0))
        assert_same_bits(nested(x, values, connections)[i], condensed_linear(x, v, c))


def test_layers_that_are_scanned_over_find_their_connections():
    layers = [layer_of(seed=seed, shape=(20, 20))[1:3] for seed in range(4)]
    values, connections = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    x = layer_of(shape=(20, 20))[3]

    def step(x, layer):
        return condensed_linear(x, *layer, activation="relu"), None

    got, _ = jax.jit(lambda x: jax.lax.scan(step, x, (values, connections)))(x)
    for v, c in layers:
        x = condensed_linear(x, v, c, activation="relu")
    assert_same_bits(got, x)


def test_unused_gradients_are_not_computed(monkeypatch):
    computed, backward = [], Plan.backward
    monkeypatch.setattr(
        Plan, "backward", lambda *a, **o: computed.append(o["wrt"]) or backward(*a, **o)
    )
    _, values, connections, x, bias = layer_of()
    loss = lambda v, x: condensed_linear(x, v, connections, bias).sum()  # noqa: E731
    jax.jit(jax.grad(loss))(values, x).block_until_ready()
    assert computed == ["values"]


# ---------------------------------------------------------------- packing


def test_connections_and_values_are_packed_once(monkeypatch):
    packed = []
    monkeypatch.setattr(
        plan_cache, "prepare", lambda weight: packed.append(weight) or prepare(weight)
    )
    _, values, connections, x, bias = layer_of(seed=77)
    layer = jax.jit(condensed_linear)
    first = layer(x, values, connections, bias)
    assert_same_bits(layer(x, values, connections, bias), first)
    plan = cached_plan(connections)
    layer(x + 1, values, connections, bias)
    assert cached_plan(connections) is plan
    layer(x, -values, connections, bias)
    assert cached_plan(connections) is not plan
    assert_same_bits(layer(x, values, connections, bias), first)
    assert len(packed) == 1
    plan_cache.evict(connections.key)
    assert_same_bits(layer(x, values, connections, bias), first)
    assert len(packed) == 2


def test_values_are_compared_by_their_bits():
    """Subnormal numbers are equal in a thread that flushes them, and NaN is not equal to NaN."""
    weight = CondensedWeight(np.float32([[1e-40]]), [[0]], [0], (1, 1))
    values, connections = from_condensed(weight)
    layer = jax.jit(condensed_linear)
    for number in (1e-40, 2e-40):
        got = layer(np.ones((1, 1), np.float32), jnp.asarray(np.float32([[number]])), connections)
        np.testing.assert_allclose(got, np.float32(number), rtol=1e-4)
    plans = []
    for _ in range(2):
        layer(np.ones((1, 1), np.float32), values * jnp.nan, connections).block_until_ready()
        plans.append(cached_plan(connections))
    assert plans[0] is plans[1]


def test_the_number_of_cached_plans_is_limited(monkeypatch):
    monkeypatch.setattr(plan_cache, "_MOST", 3)
    for seed in range(100, 105):
        _, values, connections, x, _ = layer_of(seed=seed)
        condensed_linear(x, values, connections).block_until_ready()
    assert len(plan_cache._cache) == 3
    assert cached_plan(connections)


def test_other_connections_of_the_same_shapes_are_not_compiled_anew():
    traced = []

    @jax.jit
    def layer(x, values, connections):
        traced.append(connections)
        return condensed_linear(x, values, connections)

    for seed in range(3):
        weight, values, connections, x, _ = layer_of(seed=seed)
        assert_same_bits(layer(x, values, connections), condensed_matmul(np.asarray(x), weight))
    assert len(traced) == 1


def test_changed_arrays_of_connections_are_an_error():
    _, values, connections, x, _ = layer_of()
    changed = jax.tree.map(lambda array: array * 0, connections)
    with pytest.raises(Exception, match="strictly ascending"):
        condensed_linear(x, values, changed).block_until_ready()


# ---------------------------------------------------------------- connections


@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_a_condensed_weight_comes_back_as_it_was(x64, dtype):
    weight, values, connections, _, _ = layer_of(dtype)
    assert to_condensed(values, connections) == weight
    assert_same_bits(connections.scatter(values), weight.to_dense())
    assert_same_bits(connections.to_mask(), weight.to_mask())
    assert_same_bits(connections.gather(weight.to_dense()), weight.values)
    assert repr(connections) == "Connections((12, 20), n_active=10, fan_in=5)"
    shapes = jax.tree.map(jnp.shape, connections)
    wanted = "Connections((12, 20), indices=(10, 5), active=(10,), key=(4,))"
    assert repr(shapes) == wanted


def test_the_same_connections_have_the_same_key_however_they_were_made():
    weight, _, connections, _, _ = layer_of()
    same = (
        Connections.from_mask(weight.to_mask()),
        Connections.from_mask(jnp.asarray(weight.to_mask())),
        Connections.of(connections.indices, connections.active, (12, 20)),
        Connections.of(weight.indices.tolist(), weight.active.tolist(), weight.shape),
    )
    for others in same:
        jax.tree.map(assert_same_bits, others, connections)
    indices, active = weight.indices.astype(int), weight.active
    moved = np.setdiff1d(np.arange(12), active)[:1]
    for others in (
        (indices, active, (12, 21)),
        (indices, active, (13, 20)),
        (np.sort(19 - indices), active, (12, 20)),
        (indices, np.sort(np.append(active[1:], moved)), (12, 20)),
    ):
        assert (Connections.of(*others).key != connections.key).any()
    convolution = Connections.from_mask(weight.to_mask().reshape(12, 5, 2, 2))
    assert_same_bits(convolution.key, connections.key)


def test_scatter_and_gather_are_differentiable():
    _, values, connections, _, _ = layer_of()
    got = jax.jit(jax.grad(lambda v: (connections.scatter(v) ** 2).sum()))(values)
    np.testing.assert_allclose(got, 2 * values)
    got = jax.grad(lambda dense: connections.gather(dense).sum())(jnp.ones((12, 20)))
    np.testing.assert_array_equal(got, connections.to_mask())


# ---------------------------------------------------------------- refused


def test_wrong_arguments_are_refused_also_in_tracing():
    _, values, connections, x, bias = layer_of()
    cases = {
        "x has shape (3, 19), but its last axis": lambda: (x[:, 1:], values, connections),
        "x has shape ()": lambda: (jnp.ones(()), values, connections),
        "values has shape (5, 10), but must": lambda: (x, values.T, connections),
        "bias has shape (10,), but needs": lambda: (x, values, connections, bias[:10]),
        "connections must be Connections, got": lambda: (x, values, connections.indices),
        "x of dtype 'int32'": lambda: (x.astype(int), values, connections),
        "do not combine": lambda: (x.astype("float16"), values.astype("bfloat16"), connections),
    }
    for message, arguments in cases.items():
        for call in (condensed_linear, jax.jit(lambda *a: condensed_linear(*a))):
            if message.startswith("connections") and call is not condensed_linear:
                continue
            with pytest.raises(SriglError) as caught:
                call(*arguments())
            assert message in str(caught.value)
    with pytest.raises(SriglError, match="activation='tanh' is unknown; use none, relu"):
        condensed_linear(x, values, connections, activation="tanh")


def test_connections_are_made_outside_of_jit():
    _, values, connections, _, _ = layer_of()
    make = (
        lambda c: Connections.of(c.indices, c.active, c.shape),
        lambda c: Connections.from_mask(c.to_mask()),
        lambda c: to_condensed(values + c.indices[0, 0], c),
        lambda c: srigl_update(values + c.indices[0, 0], jnp.ones((12, 20)), c,
                               UpdateSettings(50, 0.3)),
    )  # fmt: skip
    for function in make:
        with pytest.raises(ValueTypeError, match="is a JAX tracer"):
            jax.jit(lambda c, f=function: jax.tree.leaves(f(c)))(connections)
    for bad, message in (
        (([[1, 1]], [0], (2, 3)), "strictly ascending"),
        (([[0, 3]], [0], (2, 3)), "holds 3"),
        (([[0.0]], [0], (2, 3)), "must hold integers"),
        (([[0]], [0], (1, 2**31)), "int32"),
    ):
        with pytest.raises(SriglError, match=message):
            Connections.of(*bad)
    with pytest.raises(SriglError, match="not constant fan-in"):
        Connections.from_mask(np.eye(3, dtype=bool) | np.eye(3, k=1, dtype=bool))
    if not jax.config.jax_enable_x64:
        with pytest.raises(ValueTypeError, match="jax_enable_x64"):
            from_condensed(CondensedWeight.random((3, 4), fan_in=2, dtype=np.float64, rng=0))


def test_another_device_is_refused_with_what_to_do_there(monkeypatch):
    elsewhere = SimpleNamespace(devices=lambda: [SimpleNamespace(platform="gpu")])
    with pytest.raises(BackendUnavailableError, match=r"is on gpu; .* backend='cupy'"):
        host_call.check_on_cpu(elsewhere)

    class Buffer:
        def __array__(self, *arguments, **options):
            raise RuntimeError("UNIMPLEMENTED: Buffer.__array__ is only supported on CPU")

    with pytest.raises(BackendUnavailableError, match=r"is on another device; .*cupy"):
        host_call._OnBuffers(print)(None, Buffer())
    monkeypatch.setattr(host_call, "buffer_callback", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(BackendUnavailableError, match="is on gpu"):
        host_call.host_call(print, (3,), np.dtype(np.float32), jnp.ones(3))


# ---------------------------------------------------------------- updates


UPDATE = {"nnz_budget": 50, "drop_fraction": 0.3}


def test_an_update_of_a_dense_weight_is_that_of_the_reference():
    rng = np.random.default_rng(3)
    mask = random_mask((12, 20), fan_in=5, rng=rng)
    weight, grad, mu = (rng.standard_normal((12, 20)).astype(np.float32) for _ in range(3))
    weight *= mask
    wanted = update_mask(weight, grad, mask, **UPDATE, backend="reference")
    state = (7, {"mu": jnp.asarray(mu), "other": jnp.ones(12)}, None)
    got = srigl_update(*map(jnp.asarray, (weight, grad, mask)), UpdateSettings(**UPDATE), state)
    assert all(isinstance(array, jax.Array) for array in got[:2])
    assert_same_bits(got.weight, wanted.weight)
    assert_same_bits(got.mask, wanted.mask)
    assert got.report.fan_in == wanted.fan_in
    count, moments, nothing = got.state
    assert (count, nothing) == (7, None)
    assert_same_bits(moments["mu"], reference_remap(mu, mask, wanted.mask))
    assert_same_bits(moments["other"], np.ones(12, np.float32))


def test_an_update_of_condensed_values_is_that_of_the_dense_weight():
    settings = UPDATE | {"nnz_budget": 60}
    weight, values, connections, x, _ = layer_of()
    rng = np.random.default_rng(4)
    grad, mu = (jnp.asarray(rng.standard_normal((12, 20)), jnp.float32) for _ in range(2))
    condensed_linear(x, values, connections).block_until_ready()
    dense = connections.scatter(values), grad, connections.to_mask()
    wanted = srigl_update(*dense, UpdateSettings(**settings), {"mu": mu * dense[2]})
    state = {"mu": connections.gather(mu)}
    got = srigl_update(values, grad, connections, UpdateSettings(**settings), state)
    new_values, new_connections, new_state, report = got
    assert not any(name[0] == np.asarray(connections.key).tobytes() for name in plan_cache._cache)
    assert_same_bits(new_connections.to_mask(), wanted.mask)
    assert_same_bits(new_connections.scatter(new_values), wanted.weight)
    assert_same_bits(new_connections.scatter(new_state["mu"]), wanted.state["mu"])
    assert report.n_grown == wanted.report.n_grown > 0
    assert new_values.shape != values.shape  # the fan-in has grown
    kernel = srigl_update(
        values, grad.reshape(12, 5, 2, 2), connections, UpdateSettings(**settings)
    )
    assert_same_bits(kernel.weight, new_values)
    with pytest.raises(SriglError, match=r"weight has shape \(12, 20\), but with Connections"):
        srigl_update(dense[0], grad, connections, UpdateSettings(**settings))
    assert to_condensed(values, connections) == weight


def test_state_of_several_layers_is_remapped_layer_by_layer():
    """The moments of optax, for two layers of one shape and one without a mask."""
    rng = np.random.default_rng(5)
    masks = [random_mask((4, 6), fan_in=2, rng=rng) for _ in range(4)]
    before = {"a": {"w": masks[0], "b": None}, "c": {"w": masks[1], "b": None}}
    after = {"a": {"w": masks[2], "b": None}, "c": {"w": masks[3], "b": None}}
    moments = jax.tree.map(
        lambda mask: jnp.ones(6) if mask is None else jnp.asarray(rng.standard_normal((4, 6))),
        before, is_leaf=lambda leaf: leaf is None,
    )  # fmt: skip
    state = (jnp.int32(3), {"mu": moments, "nu": moments}, ())
    count, both, nothing = remap_state(state, before, after)
    assert (int(count), nothing) == (3, ())
    for name in ("mu", "nu"):
        for layer, old, new in (("a", *masks[::2]), ("c", *masks[1::2])):
            wanted = np.where(old & new, moments[layer]["w"], 0)
            np.testing.assert_array_equal(both[name][layer]["w"], wanted)
            np.testing.assert_array_equal(both[name][layer]["b"], np.ones(6))
    old, new = (jax.tree.map(Connections.from_mask, masks) for masks in (before, after))
    values = {
        name: {**part, "w": old[name]["w"].gather(part["w"])} for name, part in moments.items()
    }
    got = remap_state({"mu": values}, old, new)["mu"]
    for name in ("a", "c"):
        scattered = new[name]["w"].scatter(got[name]["w"])
        np.testing.assert_array_equal(scattered, np.where(
            np.asarray(old[name]["w"].to_mask()) & np.asarray(new[name]["w"].to_mask()),
            moments[name]["w"], 0,
        ))  # fmt: skip
    with pytest.raises(SriglError, match="masks of the same layers"):
        remap_state(state, before, {"a": after["a"]})
    with pytest.raises(SriglError, match="masks of the same layers"):
        remap_state(state, masks[0], masks[1][:3])


def test_a_network_trains_with_momentum_and_moves_its_connections():
    """Two condensed layers, SGD with momentum, updates every 15 steps; the loss falls."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    targets = jnp.tanh(inputs[:, :4] @ jnp.asarray(rng.standard_normal((4, 3)), jnp.float32))
    shapes = {"hidden": (32, 16), "out": (3, 32)}
    params, connections, traced = {}, {}, []
    for name, shape in shapes.items():
        weight = CondensedWeight.random(shape, fan_in=4, rng=rng)
        values, connections[name] = from_condensed(weight)
        params[name] = {"values": values, "bias": jnp.zeros(shape[0])}
    momentum = jax.tree.map(jnp.zeros_like, params)

    def loss(params, connections):
        h = condensed_linear(inputs, params["hidden"]["values"], connections["hidden"],
                             params["hidden"]["bias"], activation="gelu")  # fmt: skip
        y = condensed_linear(h, params["out"]["values"], connections["out"], params["out"]["bias"])
        return ((y - targets) ** 2).mean()

    def dense_loss(dense, params):
        h = jax.nn.gelu(inputs @ dense["hidden"].T + params["hidden"]["bias"], approximate=False)
        return ((h @ dense["out"].T + params["out"]["bias"] - targets) ** 2).mean()

    @jax.jit
    def step(params, momentum, connections):
        traced.append(connections)
        value, grads = jax.value_and_grad(loss)(params, connections)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return value, jax.tree.map(lambda p, m: p - 0.05 * m, params, momentum), momentum

    losses = []
    for number in range(1, 91):
        value, params, momentum = step(params, momentum, connections)
        losses.append(float(value))
        if number % 15 == 0 and number < 70:
            dense = {name: connections[name].scatter(params[name]["values"]) for name in shapes}
            grads = jax.grad(dense_loss)(dense, params)
            for name, shape in shapes.items():
                budget = 4 * shape[0]
                values, new, moments, report = srigl_update(
                    params[name]["values"], grads[name], connections[name],
                    UpdateSettings(budget, 0.3, gamma_sal=None), momentum[name]["values"],
                )  # fmt: skip
                assert report.n_grown == report.n_pruned > 0
                params[name]["values"], momentum[name]["values"] = values, moments
                connections[name] = new
    assert losses[-1] < losses[0] / 4
    assert len(traced) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks at this process's memory")
def test_calls_leave_nothing_behind():
    _, values, connections, x, bias = layer_of(
        shape=(256, 256), fan_in=25, n_active=256, batch=(64,)
    )
    layer = jax.jit(jax.grad(lambda v, x: condensed_linear(x, v, connections, bias).sum()))
    page = os.sysconf("SC_PAGE_SIZE")

    def bytes_in_use():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * page

    def work(n):
        for i in range(n):
            layer(values + i, x).block_until_ready()

    work(50)
    before = bytes_in_use()
    work(300)
    assert bytes_in_use() - before < 20 << 20
