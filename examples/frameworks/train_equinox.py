"""Train condensed layers of Equinox: no dense weight is kept."""

import equinox as eqx
import jax
import optax

from srigl_core.integrations.equinox import CondensedLinear
from srigl_core.jax import SRigL
from srigl_core.reference import UpdateSchedule

x = jax.random.normal(jax.random.key(0), (1024, 64))
labels = x[:, :8].argmax(-1)  # 8 of the 64 inputs matter
hidden = CondensedLinear(64, 128, fan_in=8, key=jax.random.key(0))
output = CondensedLinear(128, 8, fan_in=32, key=jax.random.key(1))
model = eqx.nn.Sequential([hidden, eqx.nn.Lambda(jax.nn.relu), output])
params, rest = eqx.partition(model, eqx.is_inexact_array)


@eqx.filter_jit
@jax.grad
def gradient(params, rest):
    logits = jax.vmap(eqx.combine(params, rest))(x)
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
logits = jax.vmap(eqx.combine(params, rest))(x)
assert (logits.argmax(-1) == labels).mean() > 0.8
