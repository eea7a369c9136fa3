"""What temperature and the number of negatives alone say about every loss of a unit-norm encoder."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """Range of the losses on tuples of one anchor, one positive and ``n_negatives`` negatives.

    Assumption: embeddings have unit norm, so every logit ``s_j = <f(x), f(x_j)> / temperature`` lies in
    ``[-1/temperature, 1/temperature]`` and two logits differ by at most ``max_gap = 2 / temperature``.
    Then every softmax probability lies in ``[p_min, p_max]`` and every ``-log`` of one in ``[floor, ceiling]``
    (natural logarithm, nats). Both ends are attained, so no better range exists.

    Raises ValueError if ``temperature`` is no number in [0.004, 1000] (below, probabilities underflow; above, all
    losses are chance) or ``n_negatives`` no integer in [1, 1e12].
    """

    temperature: float
    n_negatives: int

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, numbers.Real) and 0.004 <= self.temperature <= 1000.0):
            raise ValueError(f"temperature must be a number in [0.004, 1000], got {self.temperature!r}")
        if not (isinstance(self.n_negatives, numbers.Integral) and 1 <= self.n_negatives <= 10**12):
            raise ValueError(f"n_negatives must be an integer in [1, 10^12], got {self.n_negatives!r}")

    @property
    def max_gap(self) -> float:
        """B = 2 / temperature, the largest difference of two logits."""
        return 2.0 / self.temperature

    @property
    def floor(self) -> float:
        """log(1 + K exp(-B)), the smallest contrastive loss."""
        return softplus(math.log(self.n_negatives) - self.max_gap)

    @property
    def chance(self) -> float:
        """log(1 + K), the contrastive loss of a collapsed encoder (all embeddings equal)."""
        return math.log1p(self.n_negatives)

    @property
    def ceiling(self) -> float:
        """log(1 + K exp(B)), the largest contrastive loss: a bound at or above it is vacuous."""
        return softplus(math.log(self.n_negatives) + self.max_gap)

    @property
    def p_min(self) -> float:
        """exp(-ceiling), the smallest probability of a candidate (0.0 where that underflows)."""
        return math.exp(-self.ceiling)

    @property
    def p_max(self) -> float:
        """exp(-floor), the largest probability of a candidate."""
        return math.exp(-self.floor)

    @property
    def log_odds(self) -> tuple[float, float]:
        """log(p / (1 - p)) at p_min and p_max: exact where p_min or 1 - p_max would underflow."""
        log_k = math.log(self.n_negatives)
        return -log_k - self.max_gap, -log_k + self.max_gap

    def clip(self, loss: float) -> float:
        """The loss moved into [floor, ceiling]."""
        return min(max(loss, self.floor), self.ceiling)


def checked(name: str, value: object, low: float, high: float, tolerance: float = 1e-9) -> float:
    """``value`` as a float in [low, high]; values outside by rounding only (``tolerance`` x (1 + end)) are moved in.

    Raises ValueError that names the argument, its value and the legal range.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not low - tolerance * (1.0 + abs(low)) <= number <= high + tolerance * (1.0 + abs(high)):  # also false for NaN
        raise ValueError(f"{name} must lie in [{low:.6g}, {high:.6g}], got {number!r}")
    return min(max(number, low), high)


def checked_array(name: str, values: object, low: float, high: float, tolerance: float = 1e-9) -> np.ndarray:
    """The same as :func:`checked` for a one-dimensional, non-empty array."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty one-dimensional array, got shape {array.shape}")
    for extreme in (array.min(), array.max()):  # NaN propagates to both
        checked(name, extreme, low, high, tolerance)
    return np.clip(array, low, high)


def softplus(x: float) -> float:
    """log(1 + exp(x)) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def expit(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))
