"""The training runs of each part of the experiment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from srigl_core.benchmarks.reproduce.datasets import DATASETS
from srigl_core.benchmarks.reproduce.settings import ADAMW, METHODS, RECIPES, RunSpec

__all__ = ["CHOICES", "DENSE_CELL", "choice_runs", "grid", "quick_runs", "whole_runs"]

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
SPARSE_METHODS = tuple(method for method in METHODS if method != "dense")
DENSE_CELL = ("dense", 0.0)
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.99)
"""Values of gamma_sal, beside that of the recipe, which is "auto": 0.9 in these networks."""

STEPS_BETWEEN = (5, 20, 50, 100)
"""Values of delta_t, beside that of the recipe."""

_ADAMW = {
    "optimizer": ("adamw",),
    "learning_rate": (1e-3, 3e-3),
    "weight_decay": (1e-2, 1e-1),
}
_SGD = {"learning_rate": (0.02, 0.05, 0.1), "weight_decay": (3e-4, 1e-3, 3e-3)}
CHOICES: tuple[tuple[str, str, Mapping[str, tuple[Any, ...]]], ...] = (
    ("digits-noise", "mlp", _SGD),
    ("digits-noise", "mlp", {"learning_rate": (0.05, 0.1), "weight_decay": (1e-2,)}),
    ("mnist-5k", "mlp", _SGD),
    ("mnist-1d", "mlp", _SGD),
    *((data, "mlp", _ADAMW) for data in ADAMW),
    ("mnist-5k", "convnet", {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}),
    ("mnist-5k", "vit", {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2)}),
)
"""The settings that were tried on validation parts, by data and network."""


def grid(
    data: str,
    network: str,
    cells: Iterable[tuple[str, float]],
    repeats: Sequence[tuple[int, int]],
    **changes: Any,
) -> list[RunSpec]:
    """Return the runs of methods and sparsities, each once for every fold and seed of `repeats`."""
    recipe = RECIPES[data, network]
    return [
        RunSpec(data, network, method, sparsity, fold, seed, recipe).changed(**changes)
        for (method, sparsity), (fold, seed) in product(cells, repeats)
    ]


def repeats_of(data: str) -> list[tuple[int, int]]:
    """Return folds and seeds: every fold is tested, in four folds twice with two seeds."""
    n_folds = DATASETS[data].n_folds
    n_seeds = 2 if n_folds == 4 else 1
    return [(fold, seed) for seed in range(n_seeds) for fold in range(n_folds)]


def whole_runs() -> list[RunSpec]:
    """Return all runs."""
    runs = [*_methods(), *_thresholds(), *_updates(), *_adamw(), *_torch()]
    return list({run.key: run for run in runs}.values())


def _torch() -> Iterator[RunSpec]:
    cells = [DENSE_CELL, *product(SPARSE_METHODS, (0.9, 0.98))]
    for network in ("vit", "convnet"):
        yield from grid("mnist-5k", network, cells, [(fold, 0) for fold in range(3)])


def _methods() -> Iterator[RunSpec]:
    for data in DATASETS:
        # MNIST-1D's network is small: at 99%, neurons would have less than one weight.
        sparsities = [s for s in SPARSITIES if (data, s) != ("mnist-1d", 0.99)]
        cells = [DENSE_CELL, *product(SPARSE_METHODS, sparsities)]
        yield from grid(data, "mlp", cells, repeats_of(data))


def _adamw() -> Iterator[RunSpec]:
    """AdamW with each treatment of its state at grown weights."""
    fixed = [DENSE_CELL, *product(("static",), (0.9, 0.98))]
    moving = list(product(("rigl", "srigl"), (0.9, 0.98)))
    for data, changes in ADAMW.items():
        yield from grid(data, "mlp", fixed, repeats_of(data), **changes)
        for state in ("zeroed", "kept", "own-steps"):
            yield from grid(data, "mlp", moving, repeats_of(data), **changes, grown_state=state)


def _thresholds() -> Iterator[RunSpec]:
    cells = list(product(("srigl",), (0.9, 0.98, 0.99)))
    for data, threshold in product(("digits-noise", "mnist-5k"), THRESHOLDS):
        yield from grid(data, "mlp", cells, repeats_of(data), gamma_sal=threshold)


def _updates() -> Iterator[RunSpec]:
    cells = list(product(("rigl", "srigl"), (0.9, 0.98)))
    for data, delta_t in product(("digits-noise", "mnist-5k"), STEPS_BETWEEN):
        yield from grid(data, "mlp", cells, repeats_of(data), delta_t=delta_t)


def quick_runs() -> list[RunSpec]:
    """Return a part of the runs, which takes three minutes on two cores."""
    chosen = {"digits-noise": (0.0, 0.9, 0.98), "mnist-5k": (0.0, 0.98)}
    return [run for run in _methods() if run.sparsity in chosen.get(run.data, ())]


def choice_runs() -> list[RunSpec]:
    """Return the runs from which the settings were chosen; none looks at a test part."""
    cells = [DENSE_CELL, *product(("static", "rigl", "srigl"), (0.9, 0.98))]
    runs = []
    for data, network, choices in CHOICES:
        repeats = [(0, 0), (1, 0)] if network == "mlp" else [(0, 0)]
        for values in product(*choices.values()):
            changes = dict(zip(choices, values, strict=True))
            runs += grid(data, network, cells, repeats, **changes, validation=True)
    return runs
