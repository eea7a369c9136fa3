"""What makes a stream harder on purpose: wrong training labels, and classes of unequal size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def noisy_labels(labels: np.ndarray, classes: Sequence[int], share: float, rng: np.random.Generator) -> np.ndarray:
    """The labels (n,) with round(share x n) of them, drawn at random, replaced by another of the ``classes``, each
    equally likely.
    """
    ordered = np.sort(np.asarray(classes))
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    steps = rng.integers(1, len(ordered), len(chosen))
    noisy = labels.copy()
    noisy[chosen] = ordered[(np.searchsorted(ordered, labels[chosen]) + steps) % len(ordered)]
    return noisy


def imbalanced(labels: np.ndarray, classes: Sequence[int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Indices, in order, of a random subset in which class sizes fall geometrically from n to n / ratio in the order of
    ``classes`` (Cui et al. 2019), n as large as the labels allow.

    Raises ValueError if a class would keep fewer than two members.
    """
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in classes]
    shares = ratio ** -np.linspace(0.0, 1.0, len(classes))
    n = min(len(own) / share for own, share in zip(members, shares, strict=True))
    counts = [int(n * share + 1e-9) for share in shares]
    if min(counts) < 2:
        raise ValueError(
            f"imbalance {ratio:g} leaves {min(counts)} of {len(members[int(np.argmin(counts))])} samples of a class: "
            "lower it, so that at least 2 are left"
        )
    return np.sort(np.concatenate([own[:count] for own, count in zip(members, counts, strict=True)]))
