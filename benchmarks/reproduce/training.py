"""One training run, dense or sparse, from its settings to its test accuracy."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core import LayerOptions, SparseTrainer, TrainingConfig
from srigl_core._machine import cpu_name
from srigl_core.benchmarks.reproduce.datasets import Dataset, load_dataset
from srigl_core.benchmarks.reproduce.mlp import Masks, Mlp, layer_shapes
from srigl_core.benchmarks.reproduce.optimizers import AdamW, Sgd
from srigl_core.benchmarks.reproduce.settings import METHODS, WIDTHS, Recipe, RunSpec
from srigl_core.reference import UpdateSchedule

__all__ = ["Kept", "RunResult", "batches", "mlp_trainer", "schedule_of", "train", "training_config"]


@dataclass(frozen=True, eq=False)
class Kept:
    """A trained network, its masks, and how the first layer's connections moved.

    Parameters
    ----------
    network : Mlp
    masks : mapping of str to ndarray of bool
    input_counts : ndarray of int64, shape (1 + n_updates, n_in)
        The connections of each input, at the start and after each update.
    """

    network: Mlp
    masks: Masks
    input_counts: NDArray[np.int64]


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run.

    Parameters
    ----------
    accuracy : float
        Test accuracy, in [0, 1].
    nnz, n_active : dict of str to int
        Weights and active neurons of each layer, at the end.
    itop : float
        The share of all positions that were active at some time.
    seconds : float
        Of processor time.
    cpu : str
        The processor.
    """

    spec: RunSpec
    accuracy: float
    nnz: dict[str, int]
    n_active: dict[str, int]
    n_updates: int
    itop: float
    seconds: float
    cpu: str

    def entry(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        return asdict(self)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> RunResult:
        """Return the result that `entry` gave."""
        return cls(**{**entry, "spec": RunSpec.from_entry(entry["spec"])})


def train(spec: RunSpec, *, keep: bool = False) -> tuple[RunResult, Kept | None]:
    """Train one network, and test it once, at the end.

    Parameters
    ----------
    spec : RunSpec
    keep : bool
        Return the network, too, which must be an "mlp".
    """
    started = time.process_time()
    data = load_dataset(spec.data, spec.fold, validation=spec.validation)
    kept = None
    trainer: Any
    with warnings.catch_warnings():
        # A run may be meant to have few updates or none, and small layers.
        warnings.filterwarnings("ignore", ".*mask updates|.*ablation only", UserWarning)
        if spec.network == "mlp":
            accuracy, trainer, kept = _train_mlp(spec, data)
        else:
            from srigl_core.benchmarks.reproduce.torch_networks import train_torch

            accuracy, _, srigl = train_torch(spec, data)
            trainer = srigl.trainer
    sizes = {name: math.prod(budget.shape) for name, budget in trainer.budgets.items()}
    seen = sum(rate * sizes[name] for name, rate in trainer.itop_rates().items())
    result = RunResult(
        spec=spec,
        accuracy=accuracy,
        nnz=trainer.nnz,
        n_active=trainer.n_active,
        n_updates=trainer.schedule.n_updates if METHODS[spec.method].moves else 0,
        itop=seen / sum(sizes.values()),
        seconds=time.process_time() - started,
        cpu=cpu_name(),
    )
    return result, kept if keep else None


def _train_mlp(spec: RunSpec, data: Dataset) -> tuple[float, SparseTrainer, Kept]:
    recipe = spec.recipe
    rng = np.random.default_rng([spec.seed, 1])
    n_steps = recipe.epochs * (data.train_y.size // recipe.batch_size)
    trainer = mlp_trainer(spec, n_steps)
    network = Mlp.initialised(trainer.masks, rng)
    optimizer = _optimizer(network, recipe)
    counts = [_input_counts(trainer)]
    for step, rows in enumerate(batches(data.train_y.size, recipe, rng)):
        gradients = network.gradients(data.train_x[rows], data.train_y[rows])
        if trainer.needs_grad:
            for name, gradient in gradients.weights.items():
                trainer.accumulate(name, gradient)
        masks = dict(trainer.masks)
        optimizer.step(network, gradients, masks, learning_rate(recipe, step, n_steps))
        updates = trainer.step(network.weights)
        if updates:
            network.weights.update({name: update.weight for name, update in updates.items()})
            optimizer.remap(masks, {name: update.mask for name, update in updates.items()})
            counts.append(_input_counts(trainer))
    predicted = np.argmax(network.forward(data.test_x)[-1], axis=1)
    kept = Kept(network, dict(trainer.masks), np.array(counts))
    return float(np.mean(predicted == data.test_y)), trainer, kept


def _input_counts(trainer: SparseTrainer) -> NDArray[np.int64]:
    first = next(iter(trainer.masks.values()))
    return np.asarray(first.sum(axis=0), np.int64)


def mlp_trainer(spec: RunSpec, n_steps: int) -> SparseTrainer:
    """Return the trainer of a run."""
    shapes = layer_shapes(WIDTHS[spec.data])
    schedule = schedule_of(spec, n_steps)
    without_ablation = SparseTrainer(
        shapes,
        sparsity=spec.sparsity,
        schedule=schedule,
        config=TrainingConfig(gamma_sal=None),
    )
    config = training_config(spec, without_ablation.nnz)
    return SparseTrainer(shapes, sparsity=spec.sparsity, schedule=schedule, config=config)


def schedule_of(spec: RunSpec, n_steps: int) -> UpdateSchedule:
    """Return the steps with a mask update, of which a method whose masks stay has none."""
    recipe = spec.recipe
    schedule = UpdateSchedule.for_training(n_steps, delta_t=recipe.delta_t, alpha=recipe.alpha)
    return schedule if METHODS[spec.method].moves else replace(schedule, t_end=0)


def training_config(spec: RunSpec, n_weights: Mapping[str, int]) -> TrainingConfig:
    """Return the settings of a run, with the number of weights that all sparse methods share.

    Constant fan-in rounds the ERK budget of a layer down to whole rows. No method gets more weights
    than another, so the budget of each is what SRigL without ablation makes of ERK's.

    Parameters
    ----------
    spec : RunSpec
    n_weights : mapping of str to int
        Those of SRigL without ablation, by layer.
    """
    recipe, method = spec.recipe, METHODS[spec.method]
    if spec.method == "dense":
        options = {name: LayerOptions(dense=True) for name in n_weights}
    else:
        options = {name: LayerOptions(nnz_budget=count) for name, count in n_weights.items()}
    threshold = "auto" if recipe.gamma_sal is None else recipe.gamma_sal
    return TrainingConfig(
        method=method.trainer_method,
        gamma_sal=threshold if method.ablate else None,
        layers=options,
        seed=spec.seed,
    )


def _optimizer(network: Mlp, recipe: Recipe) -> Sgd | AdamW:
    if recipe.optimizer == "sgd":
        return Sgd(network, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    return AdamW(network, weight_decay=recipe.weight_decay, grown_state=recipe.grown_state)


def learning_rate(recipe: Recipe, step: int, n_steps: int) -> float:
    """Return the rate of a step, which decays to 0 along half a cosine."""
    return recipe.learning_rate * (1 + math.cos(math.pi * step / n_steps)) / 2


def batches(
    n_examples: int, recipe: Recipe, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each minibatch; an epoch leaves out the examples that do not fill one."""
    for _ in range(recipe.epochs):
        order = rng.permutation(n_examples)
        for start in range(0, n_examples - recipe.batch_size + 1, recipe.batch_size):
            yield order[start : start + recipe.batch_size]
