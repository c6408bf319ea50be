"""Train a small network with SRigL in NumPy, with the whole training loop in view."""

import numpy as np

from srigl_core import CondensedWeight, SparseTrainer, TrainingConfig, condensed_matmul
from srigl_core.reference import UpdateSchedule, dense_gradient, remap_state, sparse_init

STEPS, BATCH, RATE, MOMENTUM = 1000, 256, 0.05, 0.9


def main() -> None:
    rng = np.random.default_rng(0)
    teacher = np.zeros((1, 20), np.float32)
    teacher[0, :4] = 0.5  # 4 of the 20 inputs matter
    shapes = {"hidden": (64, 20), "output": (1, 64)}
    schedule = UpdateSchedule(t_end=750, delta_t=20)
    trainer = SparseTrainer(shapes, sparsity=0.8, schedule=schedule, config=TrainingConfig(seed=0))

    weights = {name: sparse_init(mask, rng=rng) for name, mask in trainer.masks.items()}
    momenta = {name: np.zeros_like(weight) for name, weight in weights.items()}
    bias = np.zeros(64, np.float32)

    for step in range(1, STEPS + 1):
        x = rng.standard_normal((BATCH, 20), dtype=np.float32)
        target = np.abs(x @ teacher.T)

        # The forward and the backward pass. The trainer needs dense gradients in its window.
        z = x @ weights["hidden"].T + bias
        hidden = np.maximum(z, 0)
        error = hidden @ weights["output"].T - target
        g_output = 2 * error / BATCH
        g_hidden = (g_output @ weights["output"]) * (z > 0)
        grads = {"hidden": dense_gradient(g_hidden, x), "output": dense_gradient(g_output, hidden)}
        if trainer.needs_grad:
            for name, grad in grads.items():
                trainer.accumulate(name, grad)

        # The optimiser sees masked gradients.
        for name, mask in trainer.masks.items():
            momenta[name] = MOMENTUM * momenta[name] + grads[name] * mask
            weights[name] -= RATE * (1 - step / STEPS) * momenta[name]
        bias -= RATE * (1 - step / STEPS) * g_hidden.sum(axis=0)

        # The trainer's step. An update returns new weights, and optimiser state is remapped.
        before = dict(trainer.masks)
        for name, update in trainer.step(weights).items():
            weights[name] = update.weight
            momenta[name] = remap_state(momenta[name], before[name], update.mask)
        if step % 100 == 0:
            print(f"step {step:>4}   loss {np.mean(error**2):8.4f}")

    print(trainer.report())
    useful = trainer.masks["hidden"][:, :4].sum() / trainer.nnz["hidden"]
    print(f"{useful:.0%} of the hidden layer's weights sit on the 4 of 20 inputs that matter")
    condensed = CondensedWeight.from_dense(weights["hidden"], trainer.masks["hidden"])
    same = condensed_matmul(x, condensed, bias, activation="relu")
    np.testing.assert_allclose(
        same, np.maximum(x @ weights["hidden"].T + bias, 0), rtol=1e-4, atol=1e-4
    )
    print(condensed)


if __name__ == "__main__":
    main()
