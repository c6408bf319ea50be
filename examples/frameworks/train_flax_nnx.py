"""Train condensed layers of Flax NNX: no dense weight is kept."""

import jax
import optax
from flax import nnx

from srigl_core.integrations.flax_nnx import CondensedLinear
from srigl_core.jax import SRigL
from srigl_core.reference import UpdateSchedule

x = jax.random.normal(jax.random.key(0), (1024, 64))
labels = x[:, :8].argmax(-1)  # 8 of the 64 inputs matter
rngs = nnx.Rngs(0)
hidden = CondensedLinear(64, 128, fan_in=8, rngs=rngs)
model = nnx.Sequential(hidden, jax.nn.relu, CondensedLinear(128, 8, fan_in=32, rngs=rngs))
graph, params, rest = nnx.split(model, nnx.Param, ...)


@jax.jit
@jax.grad
def gradient(params, rest):
    logits = nnx.merge(graph, params, rest)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


optimizer = optax.adamw(1e-2)
state, update = optimizer.init(params), jax.jit(optimizer.update)
schedule = UpdateSchedule(t_end=75, delta_t=40)
srigl = SRigL(params, optimizer, layers=["*.values"], connections=rest, schedule=schedule)
for _ in range(100):
    grads = srigl.after_backward(gradient(srigl.for_gradient(params), rest))
    updates, state = update(grads, state, params)
    params, state = srigl.step(optax.apply_updates(params, updates), state)
    rest = srigl.connect(rest)

print(srigl.trainer.report())
logits = nnx.merge(graph, params, rest)(x)
assert (logits.argmax(-1) == labels).mean() > 0.8
