"""Train dense weights with masks by optax, and resume in the middle to the same bits."""

import tempfile

import jax
import optax
from orbax.checkpoint import StandardCheckpointer

from srigl_core.jax import SRigL

x = jax.random.normal(jax.random.key(0), (1024, 64))
labels = x[:, :8].argmax(-1)  # 8 of the 64 inputs matter
draw, optimizer = jax.nn.initializers.he_normal(), optax.adamw(1e-2)
dense = {"a": draw(jax.random.key(1), (64, 128)), "b": draw(jax.random.key(2), (128, 8))}


@jax.jit
@jax.grad
def gradient(params):
    logits = jax.nn.relu(x @ params["a"]) @ params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(n_steps: int, checkpoint: list[jax.Array] | None = None) -> tuple[SRigL, list[jax.Array]]:
    srigl = SRigL(dense, optimizer, layers=["a", "b"], neuron_axis=-1, sparsity=0.8, schedule=100)
    run = srigl.masked(dense), optimizer.init(dense), srigl.state_dict()
    params, state, own = jax.tree.structure(run).unflatten(checkpoint or jax.tree.leaves(run))
    srigl.load_state_dict(own)
    while srigl.trainer.step_count < n_steps:
        updates, state = optimizer.update(srigl.after_backward(gradient(params)), state, params)
        params, state = srigl.step(optax.apply_updates(params, updates), state)
    return srigl, jax.tree.leaves((params, state, srigl.state_dict()))


with tempfile.TemporaryDirectory() as folder, StandardCheckpointer() as checkpointer:
    checkpointer.save(f"{folder}/half", train(42)[1])
    checkpointer.wait_until_finished()
    srigl, resumed = train(100, checkpointer.restore(f"{folder}/half"))
assert all(map(jax.numpy.array_equal, train(100)[1], resumed))
print(srigl.trainer.report())
