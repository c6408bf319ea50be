"""One training run: SGD with momentum on minibatches, and a SparseTrainer for the masks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse
from digits import load_digits
from network import Masks, Mlp, layer_shapes
from numpy.typing import NDArray

from srigl_core import CondensedWeight, LayerOptions, SparseTrainer, TrainingConfig
from srigl_core.reference import UpdateSchedule, remap_state


class Method(NamedTuple):
    """A training method, and the smallest form ("dense", "CSR", "condensed") of its weights."""

    label: str
    trainer_method: str
    ablate: bool = False
    form: str = "CSR"


METHODS = {
    "dense": Method("dense", "static", form="dense"),
    "static": Method("static", "static"),
    "set": Method("SET", "set"),
    "rigl": Method("RigL", "rigl"),
    "srigl-no-ablation": Method("SRigL w/o ablation", "srigl", form="condensed"),
    "srigl": Method("SRigL", "srigl", ablate=True, form="condensed"),
}


@dataclass(frozen=True)
class Recipe:
    """Settings that all methods share.

    The learning rate decays to 0 along half a cosine. Masks are updated every `delta_t` steps, but
    not in the last quarter of training. `alpha` is the share of the weights that the first update
    prunes, and `gamma_sal` SRigL's ablation threshold.

    Notes
    -----
    Hidden layers have 768 neurons: at 99% sparsity, ERK gives a neuron 2.2 and 4.1 weights, which
    constant fan-in rounds down to 2 and 4. With 512 neurons it would be 1.6 and 2.8: rounding would
    lose a quarter of the weights, and a fan-in of 1 leaves nothing to choose.

    Learning rate and weight decay were chosen once, for all methods, on a validation part of the
    training images. Of the learning rates 0.03, 0.06 and 0.1, the middle one was best both for
    dense alone and for the mean of dense, static, RigL and SRigL; it was rounded to 0.05. Of the
    weight decays 1e-4, 5e-4 and 3e-3, the last was best for dense. The number of epochs keeps the
    demo well below five minutes on two cores.
    """

    widths: tuple[int, ...] = (64, 768, 768, 10)
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 3e-3
    delta_t: int = 20
    alpha: float = 0.3
    gamma_sal: float = 0.3


@dataclass(frozen=True)
class RunSpec:
    """A training run; its seed determines the initial network and the order of the images."""

    method: str
    sparsity: float
    seed: int
    recipe: Recipe
    keep_network: bool = False


@dataclass(frozen=True, eq=False)
class RunResult:
    """The outcome of a run, with the trained network where the spec says so.

    `memory` is in bytes, with weights in the method's form. `itop` is the share of all positions
    that were active at some time.
    """

    spec: RunSpec
    accuracy: float
    nnz: dict[str, int]
    n_active: dict[str, int]
    memory: int
    n_updates: int
    itop: float
    seconds: float
    network: Mlp | None = None
    masks: Masks | None = None


def train(spec: RunSpec) -> RunResult:
    """Train one network, and test it once, at the end."""
    started = time.perf_counter()
    recipe, data = spec.recipe, load_digits()
    rng = np.random.default_rng([spec.seed, 1])
    n_steps = recipe.epochs * (data.train_y.size // recipe.batch_size)
    trainer = make_trainer(spec, n_steps)
    network = Mlp.initialised(trainer.masks, rng)
    velocity = Mlp(
        {name: np.zeros_like(weight) for name, weight in network.weights.items()},
        {name: np.zeros_like(bias) for name, bias in network.biases.items()},
    )
    n_updates = 0
    for step, rows in enumerate(_batches(data.train_y.size, recipe, rng)):
        gradients = network.gradients(data.train_x[rows], data.train_y[rows])
        if trainer.needs_grad:
            for name, gradient in gradients.weights.items():
                trainer.accumulate(name, gradient)
        masks = dict(trainer.masks)
        learning_rate = recipe.learning_rate * (1 + math.cos(math.pi * step / n_steps)) / 2
        _descend(network, gradients, velocity, masks, learning_rate, recipe)
        updates = trainer.step(network.weights)
        for name, update in updates.items():
            network.weights[name] = update.weight
            velocity.weights[name] = remap_state(velocity.weights[name], masks[name], update.mask)
        n_updates += bool(updates)

    predicted = np.argmax(network.forward(data.test_x)[-1], axis=1)
    sizes = {name: mask.size for name, mask in trainer.masks.items()}
    seen = sum(rate * sizes[name] for name, rate in trainer.itop_rates().items())
    return RunResult(
        spec=spec,
        accuracy=float(np.mean(predicted == data.test_y)),
        nnz=trainer.nnz,
        n_active=trainer.n_active,
        memory=_memory(METHODS[spec.method].form, network, trainer.masks),
        n_updates=n_updates,
        itop=1.0 if spec.method == "dense" else seen / sum(sizes.values()),
        seconds=time.perf_counter() - started,
        network=network if spec.keep_network else None,
        masks=dict(trainer.masks) if spec.keep_network else None,
    )


def make_trainer(spec: RunSpec, n_steps: int) -> SparseTrainer:
    """Return the trainer of a run, with the number of weights that all sparse methods share.

    Constant fan-in rounds the ERK budget of a layer down to whole rows. No method gets more weights
    than another, so the budget of each is what SRigL without ablation makes of ERK's.
    """
    recipe, method = spec.recipe, METHODS[spec.method]
    shapes = layer_shapes(recipe.widths)
    schedule = UpdateSchedule.for_training(n_steps, delta_t=recipe.delta_t, alpha=recipe.alpha)
    if spec.method == "dense":
        options = {name: LayerOptions(dense=True) for name in shapes}
    else:
        rounded = SparseTrainer(
            shapes,
            sparsity=spec.sparsity,
            schedule=schedule,
            config=TrainingConfig(method="srigl", gamma_sal=None),
        )
        options = {name: LayerOptions(nnz_budget=count) for name, count in rounded.nnz.items()}
    return SparseTrainer(
        shapes,
        sparsity=spec.sparsity,
        schedule=schedule,
        config=TrainingConfig(
            method=method.trainer_method,
            gamma_sal=recipe.gamma_sal if method.ablate else None,
            layers=options,
            seed=spec.seed,
        ),
    )


def _batches(
    n_images: int, recipe: Recipe, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each minibatch; an epoch leaves out the images that do not fill one."""
    for _ in range(recipe.epochs):
        order = rng.permutation(n_images)
        for start in range(0, n_images - recipe.batch_size + 1, recipe.batch_size):
            yield order[start : start + recipe.batch_size]


def _descend(
    network: Mlp, gradients: Mlp, velocity: Mlp, masks: Masks, learning_rate: float, recipe: Recipe
) -> None:
    """Take one SGD step in place; inactive weights and their momentum stay zero."""
    for name, weight in network.weights.items():
        slope, speed = gradients.weights[name], velocity.weights[name]
        slope += recipe.weight_decay * weight
        slope *= masks[name]
        speed *= recipe.momentum
        speed += slope
        weight -= learning_rate * speed
        bias_speed = velocity.biases[name]
        bias_speed *= recipe.momentum
        bias_speed += gradients.biases[name]
        network.biases[name] -= learning_rate * bias_speed


def _memory(form: str, network: Mlp, masks: Masks) -> int:
    """Return the bytes of the network with its weights stored in `form`."""
    total = sum(bias.nbytes for bias in network.biases.values())
    for name, weight in network.weights.items():
        if form == "condensed":
            total += CondensedWeight.from_dense(weight, masks[name]).nbytes
        elif form == "CSR":
            # Made from the mask, since an active weight that happens to be zero is stored, too.
            csr = scipy.sparse.csr_array(masks[name].astype(weight.dtype))
            total += csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes
        else:
            total += weight.nbytes
    return total
