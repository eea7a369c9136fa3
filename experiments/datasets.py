"""Images as arrays. The embedded one ships with scikit-learn and needs no network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """images (n, channels, height, width) float32, standardised; labels (n,) int64 in 0..n_classes-1."""

    images: np.ndarray
    labels: np.ndarray


def digits() -> Dataset:
    """1,797 handwritten digits, 8 x 8 grey (UCI Optical Recognition of Handwritten Digits, test part), from scikit-
    learn.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images - data.images.mean()) / data.images.std()
    return Dataset(images.astype(np.float32)[:, None], data.target.astype(np.int64))
