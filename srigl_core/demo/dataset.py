"""The handwritten digits that ship inside scikit-learn, split and standardised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from srigl_core.errors import BackendUnavailableError

__all__ = ["Digits", "load_digits"]

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Digits:
    """Images of 8 x 8 pixels as rows, and the digits they show.

    Parameters
    ----------
    train_x, test_x : ndarray of float32, (n, 64)
        Standardised by the training images.
    train_y, test_y : ndarray of int64, (n,)
    """

    train_x: FloatArray
    train_y: NDArray[np.int64]
    test_x: FloatArray
    test_y: NDArray[np.int64]


def load_digits(*, test_share: float = 0.25, split_seed: int = 0) -> Digits:
    """Load the digits from scikit-learn; nothing is downloaded.

    Parameters
    ----------
    test_share : float
        Share of the images that is kept for testing, the same share of each digit.
    split_seed : int
        Of the split. The same for all runs, so that they differ in training alone.

    Returns
    -------
    Digits

    Raises
    ------
    BackendUnavailableError
        If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise BackendUnavailableError(
            f"the digits come with scikit-learn, which cannot be imported ({error}); install it "
            f'with: pip install "srigl-core[demo]"'
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=test_share, random_state=split_seed, stratify=labels
    )
    mean = train_x.mean(axis=0)
    # Pixels at the border are blank in nearly all images. Dividing by their tiny deviation would
    # turn the one image that does use them into an outlier; one grey level (of 16) is the least.
    scale = np.maximum(train_x.std(axis=0), 1.0)
    return Digits(
        ((train_x - mean) / scale).astype(np.float32),
        train_y.astype(np.int64),
        ((test_x - mean) / scale).astype(np.float32),
        test_y.astype(np.int64),
    )
