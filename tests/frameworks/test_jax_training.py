"""SRigL for a training loop of optax: the masks of SparseTrainer, in both kinds of layers."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from two_masks import registered  # noqa: F401

from srigl_core import LayerOptions, SparseTrainer, SriglError, TrainingConfig, ValueTypeError
from srigl_core.reference import UpdateSchedule, sparse_init

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from srigl_core.jax import Connections, SRigL, condensed_linear  # noqa: E402

N_IN, N_HIDDEN, N_OUT = 12, 16, 4
SCHEDULE = UpdateSchedule(t_end=1000, delta_t=3, alpha=0.5)
CONFIG = TrainingConfig(grad_window=2, gamma_sal=0.9, seed=1)
N_STEPS, N_BEFORE = 7, 5  # updates at steps 3 and 6; step 5 is within a window
LEAF = {"masked": "weight", "condensed": "values"}


def batch(step):
    rng = np.random.default_rng(step)
    return (jnp.asarray(rng.standard_normal((8, n)), jnp.float32) for n in (N_IN, N_OUT))


def trainer_like(**options):
    shapes = {"hidden": (N_HIDDEN, N_IN), "output": (N_OUT, N_HIDDEN)}
    return SparseTrainer(shapes, sparsity=0.7, schedule=SCHEDULE, config=CONFIG, **options)


def first_weights():
    """Return the dense weights and the masks of both layers, by SparseTrainer's draw."""
    rng = np.random.default_rng(0)
    masks = trainer_like().masks
    return {n: sparse_init(mask, rng=rng, dtype=np.float32) for n, mask in masks.items()}, masks


def network(product):
    def loss(params, rest, x, y):
        hidden = jax.nn.relu(product("hidden", params, rest, x))
        return ((product("output", params, rest, hidden) - y) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))


def dense_product(name, params, rest, x):
    return x @ params[name]["weight"].T + params[name]["bias"]


def condensed_product(name, params, rest, x):
    values, bias = params[name]["values"], params[name]["bias"]
    return condensed_linear(x, values, rest[name]["connections"], bias)


PRODUCTS = {"masked": network(dense_product), "condensed": network(condensed_product)}


def start(kind, optimizer):
    """Return parameters, connections, state and SRigL, at the first step."""
    weights, masks = first_weights()
    rest = None
    if kind == "masked":
        params = {name: {"weight": jnp.asarray(w)} for name, w in weights.items()}
    else:
        rest = {name: {"connections": Connections.from_mask(m)} for name, m in masks.items()}
        params = {n: {"values": c["connections"].gather(weights[n])} for n, c in rest.items()}
    for name, weight in weights.items():
        params[name]["bias"] = jnp.zeros(len(weight))
    options = {"sparsity": 0.7, "schedule": SCHEDULE, "config": CONFIG}
    srigl = SRigL(
        params,
        optimizer,
        layers=[f"{name}.{LEAF[kind]}" for name in params],
        connections=rest,
        **options,
    )
    return srigl.masked(params), rest, optimizer.init(params), srigl


@functools.cache
def update_of(optimizer):
    return jax.jit(optimizer.update)


def train(kind, optimizer, run, steps):
    params, rest, state, srigl = run
    for step in steps:
        _, gradient = PRODUCTS[kind](srigl.for_gradient(params), rest, *batch(step))
        updates, state = update_of(optimizer)(srigl.after_backward(gradient), state, params)
        params, state = srigl.step(optax.apply_updates(params, updates), state)
        rest = srigl.connect(rest)
    return params, rest, state, srigl


def dense_of(kind, run):
    """Return the dense weights and masks of a run."""
    params, rest, _, _ = run
    if kind == "masked":
        return {n: np.asarray(p["weight"]) for n, p in params.items()}, {
            n: np.asarray(run[3].masks[n]["weight"]) for n in params
        }
    at = {name: part["connections"] for name, part in rest.items()}
    return {n: np.asarray(at[n].scatter(params[n]["values"])) for n in params}, {
        n: np.asarray(at[n].to_mask()) for n in params
    }


def numpy_run(steps):
    """Return weights and masks of SGD with momentum, by SparseTrainer in NumPy."""
    trainer = trainer_like()
    weights, _ = first_weights()
    weights = {name: weight.copy() for name, weight in weights.items()}
    moments = {name: np.zeros_like(weight) for name, weight in weights.items()}
    biases = {name: np.zeros(len(weight), np.float32) for name, weight in weights.items()}
    bias_moments = {name: np.zeros_like(bias) for name, bias in biases.items()}
    for step in steps:
        params = {n: {"weight": weights[n], "bias": biases[n]} for n in weights}
        _, gradient = PRODUCTS["masked"](params, None, *batch(step))
        for name in weights:
            grad = np.asarray(gradient[name]["weight"])
            trainer.accumulate(name, grad)
            moments[name] = grad * trainer.masks[name] + np.float32(0.9) * moments[name]
            weights[name] = weights[name] - np.float32(0.1) * moments[name]
            bias_grad = np.asarray(gradient[name]["bias"])
            bias_moments[name] = bias_grad + np.float32(0.9) * bias_moments[name]
            biases[name] = biases[name] - np.float32(0.1) * bias_moments[name]
        before = dict(trainer.masks)
        for name, update in trainer.step(weights).items():
            weights[name] = update.weight
            moments[name] = np.where(before[name] & update.mask, moments[name], 0)
    return weights, trainer


@pytest.fixture(params=PRODUCTS)
def kind(request):
    return request.param


def test_masks_and_weights_are_those_of_sparse_trainer_in_numpy(kind):
    optimizer = optax.sgd(0.1, momentum=0.9)
    run = train(kind, optimizer, start(kind, optimizer), range(N_STEPS))
    wanted, trainer = numpy_run(range(N_STEPS))
    weights, masks = dense_of(kind, run)
    for name in wanted:
        np.testing.assert_array_equal(masks[name], trainer.masks[name])
        np.testing.assert_allclose(weights[name], wanted[name], rtol=1e-3, atol=1e-5)
        assert not weights[name][~masks[name]].any()
    assert run[3].trainer.n_updates == trainer.n_updates == 2
    _, first = first_weights()
    assert any((first[name] != masks[name]).any() for name in masks)


def everything(run):
    """Return all that a checkpoint needs, as one pytree."""
    params, rest, state, srigl = run
    return params, rest, state, srigl.state_dict()


@pytest.mark.parametrize(("kind", "tool"), [("masked", "orbax"), ("condensed", "flax")])
def test_a_run_resumes_to_the_same_bits(kind, tool, tmp_path):
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.05))
    half = train(kind, optimizer, start(kind, optimizer), range(N_BEFORE))
    leaves = jax.tree.leaves(everything(half))
    if tool == "flax":
        serialization = pytest.importorskip("flax.serialization")
        restored = serialization.from_bytes(leaves, serialization.to_bytes(leaves))
    else:
        checkpoint = pytest.importorskip("orbax.checkpoint")
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "run", leaves)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "run")
    _, first, _, srigl = again = start(kind, optimizer)
    structure = jax.tree.structure(everything(again))
    params, _, state, saved = jax.tree.unflatten(structure, restored)
    srigl.load_state_dict(saved)
    assert srigl.trainer.step_count == N_BEFORE
    if kind == "condensed":  # those of the first step do not fit the values, or are others
        with pytest.raises(SriglError, match=r"srigl\.connect\(connections\)"):
            srigl.for_gradient(params)
    again = params, srigl.connect(first), state, srigl
    again = train(kind, optimizer, again, range(N_BEFORE, N_STEPS))
    whole = train(kind, optimizer, half, range(N_BEFORE, N_STEPS))
    found, wanted = (jax.tree.leaves(everything(run)) for run in (again, whole))
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert again[-1].trainer.n_updates == 2


STATES = {
    "adam": (optax.adam(0.05), 0.0),
    "adagrad": (optax.adagrad(0.05, initial_accumulator_value=0.25), 0.25),
    "multi_transform": (
        optax.multi_transform(
            {"weights": optax.sgd(0.1, momentum=0.9), "biases": optax.sgd(0.1)},
            lambda params: jax.tree.map(lambda p: "weights" if p.ndim > 1 else "biases", params),
        ),
        0.0,
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", "condensed"), ("adagrad", "masked"), ("multi_transform", "condensed")],
)
def test_new_connections_have_the_state_that_the_optimiser_starts_with(name, kind):
    optimizer, first = STATES[name]
    run = train(kind, optimizer, start(kind, optimizer), range(2))
    params, rest, state, srigl = run
    before = srigl.masks["hidden"][LEAF[kind]]
    _, gradient = PRODUCTS[kind](srigl.for_gradient(params), rest, *batch(2))
    updates, state = optimizer.update(srigl.after_backward(gradient), state, params)
    _, new_state = srigl.step(optax.apply_updates(params, updates), state)
    after = srigl.masks["hidden"][LEAF[kind]]

    def dense_states(state, mask):
        """Return the arrays of the hidden layer's weight, dense, and its mask."""
        if kind == "masked":
            return [leaf for leaf in jax.tree.leaves(state) if leaf.shape == mask.shape], mask
        found = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == mask.indices.shape]
        return list(map(mask.scatter, found)), mask.to_mask()

    old, old_mask = dense_states(state, before)
    new, new_mask = dense_states(new_state, after)
    assert len(old) == len(new) == (2 if name == "adam" else 1)
    kept, grown = old_mask & new_mask, ~old_mask & new_mask
    assert grown.any()
    for array, new_array in zip(old, new, strict=True):
        assert (new_array[grown] == first).all()
        np.testing.assert_array_equal(new_array[kept], array[kept])
        assert (array[kept] != first).any()


def test_the_neurons_of_a_kernel_are_on_its_last_axis():
    """Flax has (n_in, n_out), and (height, width, n_in, n_out) for convolutions."""
    rng = np.random.default_rng(0)
    conv, dense = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 3, 4, 8), (8, 5)))
    params = {"conv": {"kernel": conv}, "dense": {"kernel": dense}, "free": jnp.ones((2, 3))}
    options = {
        "sparsity": 0.7,
        "schedule": SCHEDULE,
        "config": TrainingConfig(distribution="uniform"),
    }
    srigl = SRigL(params, optax.sgd(1.0), layers=["*.kernel"], **options)
    assert srigl.trainer.budgets["conv.kernel"].shape == (8, 3, 3, 4)
    assert srigl.masks["free"] is None
    state, gradient = optax.sgd(1.0).init(params), jax.tree.map(jnp.cos, params)
    for _ in range(3):
        masked = srigl.after_backward(gradient)
        assert (masked["free"] == gradient["free"]).all()
        params, state = srigl.step(params, state)  # they have all weights at the first
        assert not params["dense"]["kernel"][~srigl.masks["dense"]["kernel"]].any()
    for name in ("conv", "dense"):
        mask, weight = np.asarray(srigl.masks[name]["kernel"]), np.asarray(params[name]["kernel"])
        counts = mask.reshape(-1, mask.shape[-1]).sum(axis=0)
        assert len(set(counts[counts > 0])) == 1
        assert not weight[~mask].any()
        trained = srigl.trainer.masks[f"{name}.kernel"]
        np.testing.assert_array_equal(mask, np.moveaxis(trained, 0, -1))


SHARDED = """
import sys

sys.path[:0] = sys.argv[1:]
import jax, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_jax_training import start, train

optimizer, found = optax.sgd(0.1, momentum=0.9), []
whole = start("masked", optimizer)
mesh = Mesh(np.array(jax.devices()), ("d",))
axes = lambda leaf: NamedSharding(mesh, P("d") if leaf.ndim == 2 else P())
split = jax.device_put((whole[0], whole[2]), jax.tree.map(axes, (whole[0], whole[2])))
sharded = split[0], None, split[1], start("masked", optimizer)[3]
for run in (whole, sharded):
    params, _, state, srigl = train("masked", optimizer, run, range(6))  # the last one updates
    found.append((params, srigl.masks))
assert all(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((params, state)))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *found)
assert srigl.trainer.n_updates == 2
"""


def test_dense_weights_may_be_on_several_devices():
    """They stay there at an update, and the masks are the same."""
    variables = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    folder = Path(__file__).parent
    command = [sys.executable, "-c", SHARDED, str(folder), str(folder.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "layers", [["b.kernel", "c.kernel", "a.kernel"], ["[bc].kernel", "a.*"], ["*", "a.kernel"]]
)
def test_the_last_layer_that_is_named_is_the_output_and_is_not_ablated(layers):
    params = {name: {"kernel": jnp.ones((32, 32))} for name in "bac"}
    config = TrainingConfig(gamma_sal=1.0, seed=1)
    srigl = make(params, layers=layers, sparsity=0.8, config=config)
    assert srigl.trainer.sparse_layers == ["b.kernel", "c.kernel", "a.kernel"]
    state, gradient = optax.sgd(0.1).init(params), jax.tree.map(jnp.zeros_like, params)
    gradient = {name: {"kernel": g["kernel"].at[0].set(1.0)} for name, g in gradient.items()}
    for _ in range(3):
        srigl.after_backward(gradient)
        params, state = srigl.step(params, state)
    n_active = srigl.trainer.n_active
    assert max(n_active["b.kernel"], n_active["c.kernel"]) < 32
    assert n_active["a.kernel"] == 32


def test_a_dense_layer_is_left_alone():
    params = {name: {"kernel": jnp.ones((8, 8))} for name in "ab"}
    config = TrainingConfig(layers={"a.kernel": LayerOptions(dense=True)})
    options = {"sparsity": 0.3, "schedule": SCHEDULE, "config": config}
    srigl = SRigL(params, optax.sgd(1.0), layers=["a.kernel", "b.kernel"], **options)
    masked = srigl.masked(params)
    assert srigl.masks["a"]["kernel"] is None
    assert masked["a"]["kernel"].all()
    assert not masked["b"]["kernel"].all()


def make(params, **options):
    options = {"layers": ["*"], "sparsity": 0.5, "schedule": SCHEDULE, **options}
    return SRigL(params, optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": "a.kernel"}, ValueTypeError, r"write \['a.kernel'\]"),
        (
            {"layers": ["c.kernel"]},
            SriglError,
            "has an entry 'c.kernel', but the parameters are: a.bias, a.kernel, w",
        ),
        ({"layers": ["a.*"]}, SriglError, "'a.bias' is not a weight of two or more axes"),
        ({"layers": ["w"]}, SriglError, "neuron_axis=None must be the axis of the neurons in 'w'"),
        ({"layers": ["w"], "neuron_axis": 1}, SriglError, "neuron_axis=1 must be"),
        ({"layers": ["w"], "neuron_axis": 0, "sparsity": 2}, SriglError, "sparsity"),
    ],
)
def test_wrong_arguments_are_errors(options, error, message):
    params = {"a": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}, "w": jnp.ones((8, 4))}
    with pytest.raises(error, match=message):
        make(params, **options)


def test_connections_that_an_update_has_changed_must_be_taken():
    optimizer = optax.sgd(0.1)
    params, rest, state, srigl = train(
        "condensed", optimizer, start("condensed", optimizer), [0, 1]
    )
    _, gradient = PRODUCTS["condensed"](srigl.for_gradient(params), rest, *batch(2))
    params, _ = srigl.step(srigl.after_backward(gradient), state)
    with pytest.raises(SriglError, match=r"connections = srigl.connect\(connections\)"):
        srigl.for_gradient(params)
    with pytest.raises(SriglError, match=r"no connections of layer output\.values"):
        srigl.connect({"hidden": rest["hidden"], "other": None})
    as_linen = srigl.connect({"connections": rest, "batch_stats": {"n": 3}})  # with collections
    assert as_linen == {"connections": srigl.connect(rest), "batch_stats": {"n": 3}}
    assert as_linen["connections"] != rest
    assert as_linen["connections"]["hidden"]["connections"] == srigl.masks["hidden"]["values"]
    srigl.for_gradient(params)
    wrong = {name: {"values": jnp.ones((2, 2))} for name in rest}
    with pytest.raises(SriglError, match=r"has shape \(2, 2\), but its connections are of"):
        make(wrong, layers=["*.values"], connections=rest)
    with pytest.raises(SriglError, match="if it is the values of a condensed layer, pass the conn"):
        make(wrong, layers=["*.values"])


def test_nothing_is_changed_by_an_error(kind):
    optimizer = optax.adam(0.05)
    params, rest, state, srigl = train(kind, optimizer, start(kind, optimizer), range(1))
    before = srigl.state_dict()
    with pytest.raises(SriglError, match="gradient must have the structure of the parameters"):
        srigl.after_backward({"hidden": params["hidden"]})
    if kind == "condensed":
        with pytest.raises(SriglError, match=r"take the gradient at srigl.for_gradient\(params\)"):
            srigl.after_backward(params)
    jax.tree.map(np.testing.assert_array_equal, srigl.state_dict(), before)
    params, rest, state, srigl = train(kind, optimizer, (params, rest, state, srigl), range(1, 2))
    before = srigl.state_dict()
    with pytest.raises(SriglError, match="state must have the structure of the state that"):
        srigl.step(params, optax.sgd(0.1).init(params))
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    with pytest.raises(SriglError, match="layer 'hidden"):
        srigl.step(bad, state)
    for wrong in ({}, {**before, "trainer": before["trainer"][:5]}, None):
        with pytest.raises(SriglError, match="state is not a whole state_dict"):
            srigl.load_state_dict(wrong)
    jax.tree.map(np.testing.assert_array_equal, srigl.state_dict(), before)


@pytest.mark.usefixtures("registered")
def test_methods_that_need_other_drivers_are_refused():
    _, rest, _, _ = start("condensed", optax.sgd(0.1))
    params = {"hidden": {"values": jnp.ones(rest["hidden"]["connections"].indices.shape)}}
    config = TrainingConfig(method="rigl")
    with pytest.raises(SriglError, match="method='rigl' cannot train condensed layers"):
        make(params, layers=["hidden.values"], connections=rest, sparsity=None, config=config)
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)}
    config = TrainingConfig(method="two_masks")
    srigl = make(params, neuron_axis=0, config=config)
    for _ in range(2):
        srigl.step(params, optax.sgd(0.1).init(params))
    with pytest.raises(SriglError, match="has another mask for the backward pass"):
        srigl.step(params, optax.sgd(0.1).init(params))


def test_unstructured_methods_train_dense_weights():
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)}
    srigl = make(params, neuron_axis=0, config=TrainingConfig(method="set", seed=1))
    state, first = optax.sgd(0.1).init(params), srigl.masks["w"]
    for _ in range(3):
        params, state = srigl.step(srigl.masked(params), state)
    assert (srigl.masks["w"] != first).any()
    assert srigl.masks["w"].sum() == first.sum() == 32
    assert not params["w"][~srigl.masks["w"]].any()
