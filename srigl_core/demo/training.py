"""One training run: minibatch SGD with momentum, and a SparseTrainer beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from srigl_core import CondensedWeight, LayerOptions, MaskUpdate, SparseTrainer
from srigl_core.demo.dataset import Digits
from srigl_core.demo.mlp import Mlp, layer_shapes
from srigl_core.reference import UpdateSchedule, remap_state

__all__ = ["METHODS", "Method", "Recipe", "RunResult", "RunSpec", "train"]


@dataclass(frozen=True)
class Method:
    """A way to train, as a person and as `SparseTrainer` call it.

    Parameters
    ----------
    label : str
    trainer_method : str
    ablate : bool
        Whether neurons may be ablated.
    form : {"dense", "CSR", "condensed"}
        The smallest form in which its weights can be deployed.
    """

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
    """How all methods alike are trained.

    Parameters
    ----------
    widths : tuple of int
        Numbers of inputs, of the neurons of each hidden layer, and of classes.
    epochs, batch_size : int
    learning_rate : float
        At the start; it falls to 0 along half a cosine.
    momentum, weight_decay : float
    delta_t : int
        Steps from one mask update to the next; the last quarter of training has none.
    alpha : float
        Share of the weights pruned at the start.
    gamma_sal : float
        SRigL's ablation threshold.

    Notes
    -----
    Hidden layers of 768: at 99% sparsity ERK then gives their neurons 2.2 and 4.1 weights, which
    constant fan-in rounds down to 2 and 4. In layers of 512 it would be 1.6 and 2.8: a quarter of
    the network's weights would be lost to rounding, and a fan-in of 1 leaves nothing to choose.

    Learning rate and weight decay were chosen once, for all methods alike, on a validation part of
    the training images. Of the learning rates 0.03, 0.06 and 0.1 the middle one was best both for
    dense alone and for the mean of dense, static, RigL and SRigL, and was rounded to 0.05; of the
    weight decays 1e-4, 5e-4 and 3e-3 the last was best for dense. The number of epochs is what
    leaves the demonstration well below five minutes on two cores.
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

    def schedule(self, n_steps: int) -> UpdateSchedule:
        """Return when masks are updated in a training of `n_steps`."""
        return UpdateSchedule.for_training(n_steps, delta_t=self.delta_t, alpha=self.alpha)


@dataclass(frozen=True)
class RunSpec:
    """What to train.

    Parameters
    ----------
    method : str
        A key of `METHODS`.
    sparsity : float
        0 for dense.
    seed : int
        Of the initial mask and weights, of SET's growth, and of the order of the images.
    recipe : Recipe
    keep_network : bool
        Whether the result carries the trained network.
    """

    method: str
    sparsity: float
    seed: int
    recipe: Recipe
    keep_network: bool = False


@dataclass(frozen=True, eq=False)
class RunResult:
    """What came out.

    Parameters
    ----------
    spec : RunSpec
    accuracy : float
        On the test images, in [0, 1].
    nnz, n_active : dict of str to int
        Weights and active neurons of each layer.
    memory : int
        Bytes of weights and biases in the method's form.
    n_updates : int
        Mask updates of the run.
    itop : float
        Share of the network's positions that was ever active.
    seconds : float
    network : Mlp or None
    masks : dict of str to ndarray of bool, or None
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
    masks: dict[str, NDArray[np.bool_]] | None = None


def train(spec: RunSpec, data: Digits) -> RunResult:
    """Train one network and test it once, at the end.

    Parameters
    ----------
    spec : RunSpec
    data : Digits

    Returns
    -------
    RunResult
        The same for the same arguments, number of BLAS threads and machine, but for `seconds`.
    """
    started = time.perf_counter()
    recipe = spec.recipe
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
        learning_rate = recipe.learning_rate * (1 + math.cos(math.pi * step / n_steps)) / 2
        masks = dict(trainer.masks)
        _descend(network, gradients, velocity, masks, learning_rate, recipe)
        updates = trainer.step(network.weights)
        _take_over(updates, masks, network, velocity)
        n_updates += bool(updates)
    return _result(spec, trainer, network, data, n_updates, time.perf_counter() - started)


def make_trainer(spec: RunSpec, n_steps: int) -> SparseTrainer:
    """Return the driver of a run, with the number of weights that all sparse methods share.

    Constant fan-in rounds a layer's ERK budget down to whole rows. So that no method gets more
    weights than another, each has for its budget what SRigL without ablation makes of ERK's.
    """
    recipe, method = spec.recipe, METHODS[spec.method]
    shapes = layer_shapes(recipe.widths)
    schedule = recipe.schedule(n_steps)
    if spec.method == "dense":
        options = {name: LayerOptions(dense=True) for name in shapes}
    else:
        rounded = SparseTrainer(
            shapes, sparsity=spec.sparsity, schedule=schedule, method="srigl", gamma_sal=None
        )
        options = {name: LayerOptions(nnz_budget=count) for name, count in rounded.nnz.items()}
    return SparseTrainer(
        shapes,
        sparsity=spec.sparsity,
        schedule=schedule,
        method=method.trainer_method,
        gamma_sal=recipe.gamma_sal if method.ablate else None,
        layers=options,
        seed=spec.seed,
    )


def _batches(
    n_images: int, recipe: Recipe, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each minibatch; what does not fill one sits this epoch out."""
    for _ in range(recipe.epochs):
        order = rng.permutation(n_images)
        for start in range(0, n_images - recipe.batch_size + 1, recipe.batch_size):
            yield order[start : start + recipe.batch_size]


def _descend(
    network: Mlp,
    gradients: Mlp,
    velocity: Mlp,
    masks: dict[str, NDArray[np.bool_]],
    learning_rate: float,
    recipe: Recipe,
) -> None:
    """Take one step of SGD with momentum; inactive weights stay zero, and so does their momentum.

    Writes all three networks.
    """
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


def _take_over(
    updates: dict[str, MaskUpdate],
    masks: dict[str, NDArray[np.bool_]],
    network: Mlp,
    velocity: Mlp,
) -> None:
    """Replace weights by the update's, and forget the momentum of what was pruned or grown."""
    for name, update in updates.items():
        network.weights[name] = update.weight
        velocity.weights[name] = remap_state(velocity.weights[name], masks[name], update.mask)


def _result(
    spec: RunSpec,
    trainer: SparseTrainer,
    network: Mlp,
    data: Digits,
    n_updates: int,
    seconds: float,
) -> RunResult:
    sizes = {name: mask.size for name, mask in trainer.masks.items()}
    seen = sum(rate * sizes[name] for name, rate in trainer.itop_rates().items())
    return RunResult(
        spec=spec,
        accuracy=float(np.mean(network.predict(data.test_x) == data.test_y)),
        nnz=trainer.nnz,
        n_active=trainer.n_active,
        memory=_memory(METHODS[spec.method].form, network, trainer.masks),
        n_updates=n_updates,
        itop=1.0 if spec.method == "dense" else seen / sum(sizes.values()),
        seconds=seconds,
        network=network if spec.keep_network else None,
        masks=dict(trainer.masks) if spec.keep_network else None,
    )


def _memory(form: str, network: Mlp, masks: dict[str, NDArray[np.bool_]]) -> int:
    """Return the bytes of the network with its weights stored in `form`."""
    total = sum(bias.nbytes for bias in network.biases.values())
    for name, weight in network.weights.items():
        if form == "condensed":
            total += CondensedWeight.from_dense(weight, masks[name]).nbytes
        elif form == "CSR":
            # Of the mask: an active weight may be exactly zero, and is stored all the same.
            csr = scipy.sparse.csr_array(masks[name].astype(weight.dtype))
            total += csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes
        else:
            total += weight.nbytes
    return total
