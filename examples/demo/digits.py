"""The handwritten digits that come with scikit-learn, split and standardised."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.model_selection import train_test_split


@dataclass(frozen=True, eq=False)
class Digits:
    """Images of 8 x 8 pixels, one in each row, and the digits that they show."""

    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]


@cache
def load_digits() -> Digits:
    """Load the digits from the scikit-learn package; the split is the same for all runs."""
    images, labels = datasets.load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, random_state=0, stratify=labels
    )
    mean = train_x.mean(axis=0)
    # Pixels at the border are blank in nearly all images. Dividing by their tiny deviation would
    # turn the one image that uses them into an outlier, so divide by at least one of 16 levels.
    scale = np.maximum(train_x.std(axis=0), 1.0)
    train_x, test_x = (((x - mean) / scale).astype(np.float32) for x in (train_x, test_x))
    return Digits(train_x, train_y, test_x, test_y)
