"""Means over seeds, paired comparisons and rank correlations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


def mean_and_std(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (divisor n - 1; NaN for n = 1, not drawn) over seeds, the first axis."""
    values = np.asarray(rows, dtype=np.float64)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), spread


@dataclass(frozen=True)
class Paired:
    """Differences of the seeds that two variants share: mean and standard deviation, the 95% t interval of the mean,
    and the p-value of the two-sided paired t-test. Interval and p are NaN for n = 1.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float
    p: float


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Paired | None:
    """one - other over their common seeds; None without any. Equal in all seeds gives p = 1."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    differences = np.array([one[seed] - other[seed] for seed in seeds])
    n, mean = len(seeds), float(differences.mean())
    if n == 1:
        return Paired(n, mean, math.nan, math.nan, math.nan, math.nan)
    std = float(differences.std(ddof=1))
    error = std / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    t = 0.0 if mean == 0.0 else math.inf if error == 0.0 else abs(mean) / error
    p = 2.0 * float(stats.t.sf(t, n - 1))
    return Paired(n, mean, std, mean - reach, mean + reach, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: controls the chance of any false rejection among all. NaN stays NaN and is not counted."""
    known = sorted((p, position) for position, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, position) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[position] = largest
    return adjusted


@dataclass(frozen=True)
class Agreement:
    """How far a bound orders variants as the measured loss does: Spearman's rho and Kendall's tau-b (ties share a rank;
    NaN for fewer than three or if all are equal), and whether one variant has the lowest of both.
    """

    n: int
    spearman: float
    kendall: float
    same_lowest: bool


def agreement(bounds: Sequence[float], measured: Sequence[float]) -> Agreement:
    """Of one bound and one measured loss per variant; infinite bounds tie for the last rank."""
    n = len(bounds)
    if n < 3 or len(set(bounds)) == 1 or len(set(measured)) == 1:
        return Agreement(n, math.nan, math.nan, False)
    lowest = any(b == min(bounds) and m == min(measured) for b, m in zip(bounds, measured, strict=True))
    ranks = stats.rankdata(bounds), stats.rankdata(measured)
    spearman = float(np.corrcoef(*ranks)[0, 1])
    return Agreement(n, spearman, float(stats.kendalltau(*ranks).statistic), lowest)
