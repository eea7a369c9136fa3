"""From the mean of finitely many tuples to the mean of the population: one-sided confidence bounds.

Every function takes variables in a known range [low, high] and returns :class:`ConfidenceBounds`: with X the sample and
mu its expected mean, P(mu > upper) <= delta and P(mu < lower) <= delta, each for itself, at every sample size.

=====================  ========================================  ==========================================
function               needs                                     variables
=====================  ========================================  ==========================================
hoeffding, chernoff    mean, n                                   independent; or a U-statistic, n effective
empirical_bernstein    mean, sample variance, n                  independent
betting                every value                               independent; or rounds of them, averaged
=====================  ========================================  ==========================================

Independent variables may differ in law; mu is then the average of their expectations (for ``betting``: of every block).
Means, variances and n may be arrays that broadcast; delta, low and high are numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp, xlogy

_HALVINGS = 45
_NEWTON_STEPS = 60
_TOLERANCE = 1e-13  # as a share of the range
_TRUNCATION = 0.75  # the largest share of the capital that is bet


class ConfidenceBounds(NamedTuple):
    """Two one-sided bounds, in the unit of the variables (nats, for losses) and inside [low, high]; floats, or arrays
    of the arguments' common shape.
    """

    lower: Any
    upper: Any


def hoeffding(mean: ArrayLike, n: ArrayLike, *, delta: float, low: float, high: float) -> ConfidenceBounds:
    """mean -+ (high - low) sqrt(log(1 / delta) / 2n).

    For a U-statistic of ``samples`` samples, ``degree`` a tuple, n is :func:`effective_size`.

    Raises ValueError for delta outside (0, 1), low >= high, n < 1 or a mean outside the range.

    Source: Hoeffding 1963, theorem 2; section 5 for U-statistics.
    """
    unit, size = _summary(mean, n, 1, delta, low, high)
    reach = np.sqrt(math.log(1.0 / delta) / (2.0 * size))
    return _in_range(unit - reach, unit + reach, low, high)


def chernoff(mean: ArrayLike, n: ArrayLike, *, delta: float, low: float, high: float) -> ConfidenceBounds:
    """All mu with n kl(x || y) <= log(1 / delta), where x and y are mean and mu as shares of the range.

    Never wider than :func:`hoeffding`, and far tighter for means near an end: it shrinks like 1 / n there. Holds for
    U-statistics as that does. Tight (to the exponent) for variables at the two ends of the range.

    Raises ValueError as :func:`hoeffding` does.

    Source: Hoeffding 1963, theorem 1.
    """
    unit, size = _summary(mean, n, 1, delta, low, high)
    budget = math.log(1.0 / delta) / size
    lower, upper = _kl_gap(1.0 - unit, unit, budget), 1.0 - _kl_gap(unit, 1.0 - unit, budget)
    return _in_range(lower, upper, low, high)


def empirical_bernstein(
    mean: ArrayLike, variance: ArrayLike, n: ArrayLike, *, delta: float, low: float, high: float
) -> ConfidenceBounds:
    """mean -+ [sqrt(2 V log(2 / delta) / n) + 7 (high - low) log(2 / delta) / (3 (n - 1))], V the sample variance
    with divisor n - 1.

    For independent variables only: a U-statistic's sample variance is no estimate of the variance that counts.

    Raises ValueError as :func:`hoeffding` does, for n < 2, and for a negative variance.

    Source: Maurer and Pontil 2009, theorem 4.
    """
    unit, size = _summary(mean, n, 2, delta, low, high)
    spread = np.asarray(variance, dtype=np.float64) / (high - low) ** 2
    if not np.all(spread >= 0.0):
        raise ValueError(f"variance must be >= 0, got {float(np.min(spread)) * (high - low) ** 2!r}")
    log_term = math.log(2.0 / delta)
    reach = np.sqrt(2.0 * spread * log_term / size) + 7.0 * log_term / (3.0 * (size - 1.0))
    return _in_range(unit - reach, unit + reach, low, high)


def betting(values: ArrayLike, *, delta: float, low: float, high: float, block: int = 1) -> ConfidenceBounds:
    """All mu that a gambler who bets against them does not refute: whose capital stays below 1 / delta.

    ``values`` has shape (n,), or (..., rounds, n): rounds of n variables each, of which the variables of one round are
    independent and those of different rounds need not be (such as several ways to cut the same samples into disjoint
    tuples). Against "the mean is m or more" the capital of a round is prod_i (1 + b_i (m - x_i)), with bets b_i that
    only depend on earlier values; its expectation is at most 1 if mu >= m, and so is that of the mean over rounds
    (Markov's inequality then gives the bound). The bets are those of the predictable plug-in,
    b_i = min(sqrt(2 log(1 / delta) / (n v_i)), 3/4 of the largest), with v_i the variance so far.

    ``block``: bets change only every so many values. Variables of different expectations, such as the losses of
    anchors of each class in turn, are legal if every block has the same average expectation mu (a product of
    expectations is at most the power of their average); a block that is not complete is left out.

    Adapts to the variance and beats :func:`hoeffding` on average, from n of about ten on. At most 1 s for 10^5 values.

    Raises ValueError for delta outside (0, 1), low >= high, an empty or non-finite array, values outside the range,
    or a block that is longer than a round.

    Source: Waudby-Smith and Ramdas 2023, section 4 (one-sided; at the end of the sample, without the maximum over
    time); average over rounds and blocks: this project.
    """
    _check_level(delta, low, high)
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if array.size == 0 or not low - 1e-9 * (high - low) <= array.min() <= array.max() <= high + 1e-9 * (high - low):
        extremes = f"from {array.min():.6g} to {array.max():.6g}" if array.size else "none"
        raise ValueError(f"values must be one or more numbers in [{low:.6g}, {high:.6g}], got {extremes}")
    if not 1 <= block <= array.shape[-1]:
        raise ValueError(f"block must be in 1..{array.shape[-1]}, the number of values in a round, got {block}")
    unit = np.clip((array - low) / (high - low), 0.0, 1.0)[..., : array.shape[-1] // block * block]
    bounds = ConfidenceBounds(1.0 - _refuted_from(1.0 - unit, delta, block), _refuted_from(unit, delta, block))
    return _in_range(*bounds, low, high)


def effective_size(samples: int, n_negatives: int) -> int:
    """floor(samples / (K + 2)): what the mean over all tuples of shared samples is worth in independent tuples of
    anchor, positive and K negatives (Hoeffding 1963, section 5), if any K + 2 samples form a tuple.

    Where classes say which samples do, it is fewer: the disjoint legal tuples of one round, which a rare class limits
    (with m of its samples m // 2 as anchors, or m as negatives). Raises ValueError if it is 0.
    """
    size = samples // (n_negatives + 2)
    if size < 1:
        raise ValueError(
            f"{samples} samples form no tuple of an anchor, a positive and {n_negatives} negatives: "
            f"give at least {n_negatives + 2}"
        )
    return size


def _refuted_from(unit: np.ndarray, delta: float, block: int) -> np.ndarray:
    """The least m, to rounding, from which on the capital is at least 1 / delta, or 1; of values (..., rounds, n)."""
    n = unit.shape[-1]
    seen = np.arange(1, n + 1)
    total, squares = np.cumsum(unit, axis=-1), np.cumsum(unit**2, axis=-1)
    mean = (0.5 + total) / (seen + 1.0)
    variance = (0.25 + np.maximum(squares - 2.0 * mean * total + seen * mean**2, 0.0)) / (seen + 1.0)
    before = np.concatenate([np.full((*unit.shape[:-1], 1), 0.25), variance[..., :-1]], axis=-1)
    known = before[..., np.arange(n) // block * block]  # at the beginning of each block
    bets = np.sqrt(2.0 * math.log(1.0 / delta) / (n * known))

    def stands(m: np.ndarray) -> np.ndarray:
        room = np.maximum(1.0 - m, 2.0**-60)[..., None, None]
        capital = np.log1p(np.minimum(bets, _TRUNCATION / room) * (m[..., None, None] - unit)).sum(axis=-1)
        return logsumexp(capital, axis=-1) - math.log(unit.shape[-2]) < math.log(1.0 / delta)

    inner, outer = np.zeros(unit.shape[:-2]), np.ones(unit.shape[:-2])
    for _ in range(_HALVINGS):
        middle = 0.5 * (inner + outer)
        within = stands(middle)
        inner, outer = np.where(within, middle, inner), np.where(within, outer, middle)
    return outer


def _kl_gap(x: np.ndarray, rest: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """1 - y for the largest y with kl(x || y) <= budget, elementwise, rounded downwards; ``rest`` is 1 - x.

    kl is convex in y, so Newton's method from above stays above. It starts at the smaller of two bounds on y, Pinsker's
    and that of kl >= rest log(rest / gap) + x log(x).
    """
    with np.errstate(all="ignore"):  # no rest or a gap that underflows: y = 1
        gap = np.maximum(rest * np.exp((xlogy(x, x) - budget) / rest), rest - np.sqrt(budget / 2.0))
        gap = np.where(rest > 0.0, gap, 0.0)
        for _ in range(_NEWTON_STEPS):
            kl = xlogy(x, x / (1.0 - gap)) + xlogy(rest, rest / gap)
            step = (kl - budget) * (1.0 - gap) * gap / (rest - gap)
            step = np.where(step > 0.0, step, 0.0)  # also of NaN
            gap = np.minimum(gap + step, rest)
            if not np.any(step > _TOLERANCE):
                break
    return np.maximum(gap - _TOLERANCE, 0.0)


def _summary(
    mean: ArrayLike, n: ArrayLike, least: int, delta: float, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    """The mean as a share of the range, and n, broadcast to one shape."""
    _check_level(delta, low, high)
    size = np.asarray(n, dtype=np.float64)
    if not np.all(size >= least):
        raise ValueError(f"n must be at least {least}, got {float(np.min(size)):g}")
    unit = (np.asarray(mean, dtype=np.float64) - low) / (high - low)
    if not np.all((unit >= -1e-6) & (unit <= 1.0 + 1e-6)):
        raise ValueError(f"mean must lie in [{low:.6g}, {high:.6g}], got {np.asarray(mean)!r}")
    shape = np.broadcast_shapes(unit.shape, size.shape)
    return np.broadcast_to(np.clip(unit, 0.0, 1.0), shape), np.broadcast_to(size, shape)


def _check_level(delta: float, low: float, high: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta!r}: it is 1 - confidence, shared by all means")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low and high must be finite with low < high, got {low!r} and {high!r}")


def _in_range(lower: np.ndarray, upper: np.ndarray, low: float, high: float) -> ConfidenceBounds:
    """From shares of the range to values in it, exact at its ends; 0-d arrays to floats."""

    def value(share: np.ndarray) -> np.ndarray:
        inside = np.clip(low + (high - low) * share, low, high)
        return np.where(share <= 0.0, low, np.where(share >= 1.0, high, inside))

    return ConfidenceBounds(*(float(end) if np.ndim(end) == 0 else end for end in (value(lower), value(upper))))
