"""What a bound may conclude from a logged mean: the mean itself (plug-in), the mean with a margin, or a confidence
bound on the population mean.

A chain of steps asks a :class:`Mean` for the end that it needs, ``lower`` or ``upper``; which number it gets is the
business of a :class:`Reading`. So the same chain gives an estimate, a check with margins and a certificate, and it is
known exactly which ends a bound rests on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy.special import ndtr, stdtrit

from cila_bound.concentration import ConfidenceBounds, betting, chernoff, empirical_bernstein, hoeffding
from cila_bound.records import Measurement, Statistic

Side = Literal["lower", "upper"]
Inequality = Literal["auto", "hoeffding", "chernoff", "empirical-bernstein", "betting"]


@dataclass(frozen=True)
class ConfidenceStatement:
    """One mean that a certificate rests on: the population mean is not beyond ``bound`` on one ``side``, but for a
    probability of the certificate's ``delta``.

    ``statistic`` is a field of the measurement (after_task, task, split), or "pointwise lower" or "pointwise upper" for
    the mean of a tuple's own bounds; ``mean`` is its sample mean over tuples worth ``n_effective``. In nats, unless it
    is a miss probability.
    """

    after_task: int
    task: int
    split: str
    statistic: str
    side: Side
    mean: float
    bound: float
    n_effective: int
    inequality: str


@dataclass(frozen=True)
class Mean:
    """A logged mean of variables in [low, high], and how it is to be read."""

    record: Measurement
    name: str
    statistic: Statistic
    low: float
    high: float
    reading: Reading
    column: tuple[float, ...] | None = None

    @property
    def lower(self) -> float:
        return self.reading.end(self, "lower")

    @property
    def upper(self) -> float:
        return self.reading.end(self, "upper")

    @property
    def within(self) -> float:
        """The sample mean, without the rounding that may take it out of the range."""
        return min(max(self.statistic.mean, self.low), self.high)

    @property
    def block(self) -> int | None:
        """So many consecutive values of a round have the mean that is sought on average, if that is known."""
        return self.record.tuples.block if self.record.tuples is not None else None

    @property
    def rounds(self) -> np.ndarray | None:
        """(rounds, n_effective): the logged values of the single tuples, if they are there and come in whole rounds."""
        n, size = self.record.n, self.record.n_effective
        if self.column is None or n % size:
            return None
        return np.clip(np.reshape(self.column, (n // size, size)), self.low, self.high)


class Reading(Protocol):
    def end(self, mean: Mean, side: Side) -> float:
        """What to take for the population mean when a bound needs its ``side``."""
        ...


@dataclass(frozen=True)
class Margin:
    """The mean moved outwards by so many standard errors and a share of 1 + mean; with neither, the mean itself."""

    standard_errors: float = 0.0
    rounding: float = 0.0

    def end(self, mean: Mean, side: Side) -> float:
        reach = allowance(mean.statistic, mean.record.n_effective, self.standard_errors)
        reach += self.rounding * (1.0 + abs(mean.statistic.mean))
        moved = mean.statistic.mean - reach if side == "lower" else mean.statistic.mean + reach
        return min(max(moved, mean.low), mean.high)


class Inventory:
    """The mean itself; remembers which ends of which means were asked for."""

    def __init__(self) -> None:
        self.asked: dict[tuple[object, ...], None] = {}

    def end(self, mean: Mean, side: Side) -> float:
        self.asked[*mean.record.key, mean.name, side] = None
        return mean.within


class Confidence:
    """A one-sided confidence bound at level ``delta``, by one inequality; remembers every one that it gave."""

    def __init__(self, delta: float, inequality: Inequality) -> None:
        self.delta, self.inequality = delta, inequality
        self.statements: dict[tuple[object, ...], ConfidenceStatement] = {}
        self._bounds: dict[tuple[object, ...], tuple[ConfidenceBounds, str]] = {}

    def end(self, mean: Mean, side: Side) -> float:
        record, key = mean.record, (*mean.record.key, mean.name)
        if key not in self._bounds:
            chosen = self._choose(mean)
            self._bounds[key] = _BOUNDS[chosen](mean, self.delta), chosen
        bounds, name = self._bounds[key]
        end = float(bounds.lower if side == "lower" else bounds.upper)
        self.statements[*key, side] = ConfidenceStatement(
            record.after_task,
            record.task,
            record.split,
            mean.name,
            side,
            mean.statistic.mean,
            end,
            record.n_effective,
            name,
        )
        return end

    def _choose(self, mean: Mean) -> Inequality:
        """The choice must not depend on the values: it would have to be paid for."""
        if self.inequality == "auto":
            return "chernoff" if mean.rounds is None or mean.block is None else "betting"
        return self.inequality


@dataclass(frozen=True)
class Hypothetical:
    """The Chernoff bound as if the logged mean were one of ``n`` independent tuples: for planning, no statement."""

    delta: float
    n: int

    def end(self, mean: Mean, side: Side) -> float:
        bounds = chernoff(mean.within, self.n, delta=self.delta, low=mean.low, high=mean.high)
        return float(bounds.lower if side == "lower" else bounds.upper)


def standard_error(statistic: Statistic, n_effective: int) -> float:
    """sqrt(variance / n_effective), nats."""
    return math.sqrt(statistic.variance / n_effective)


def allowance(statistic: Statistic, n_effective: int, standard_errors: float) -> float:
    """``standard_errors`` of a mean, enlarged as Student's t is against the normal law for so few tuples; infinite for
    a single one, whose spread is unknown.
    """
    if standard_errors == 0.0:
        return 0.0
    if n_effective == 1:
        return math.inf
    return _student(standard_errors, n_effective - 1) * standard_error(statistic, n_effective)


@functools.lru_cache(maxsize=1024)
def _student(standard_errors: float, degrees: int) -> float:
    """The quantile of Student's t that is exceeded as rarely as ``standard_errors`` are by a normal variable."""
    return max(-float(stdtrit(degrees, ndtr(-standard_errors))), standard_errors)


def _from_hoeffding(mean: Mean, delta: float) -> ConfidenceBounds:
    return hoeffding(mean.within, mean.record.n_effective, delta=delta, low=mean.low, high=mean.high)


def _from_chernoff(mean: Mean, delta: float) -> ConfidenceBounds:
    return chernoff(mean.within, mean.record.n_effective, delta=delta, low=mean.low, high=mean.high)


def _from_empirical_bernstein(mean: Mean, delta: float) -> ConfidenceBounds:
    record = mean.record
    if record.n > record.n_effective:
        raise ValueError(
            f"empirical-bernstein needs independent tuples, but {record.n} tuples of task {record.task} are worth "
            f"{record.n_effective}: log one round of disjoint tuples (tuple_rounds 1), or use betting or chernoff"
        )
    if record.n < 2:
        raise ValueError(f"empirical-bernstein needs 2 tuples, task {record.task} has {record.n}: use chernoff")
    statistic = mean.statistic
    return empirical_bernstein(mean.within, statistic.variance, record.n, delta=delta, low=mean.low, high=mean.high)


def _from_betting(mean: Mean, delta: float) -> ConfidenceBounds:
    rounds, record = mean.rounds, mean.record
    if rounds is None:
        raise LookupError(
            f"betting needs the {mean.name} of every tuple after task {record.after_task} on task {record.task}, in "
            f"rounds of n_effective tuples each: log tuples (log_tuples all), or use chernoff"
        )
    if mean.block is None:
        raise ValueError(
            f"betting needs the number of consecutive tuples that have the task's mean on average, but tuples.block of "
            f"task {record.task} after task {record.after_task} is not given: use chernoff"
        )
    return betting(rounds, delta=delta, low=mean.low, high=mean.high, block=min(mean.block, rounds.shape[1]))


_BOUNDS: dict[str, Callable[[Mean, float], ConfidenceBounds]] = {
    "hoeffding": _from_hoeffding,
    "chernoff": _from_chernoff,
    "empirical-bernstein": _from_empirical_bernstein,
    "betting": _from_betting,
}
