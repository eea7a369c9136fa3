"""One task's chain of steps: from the contrastive loss of a model on the task, step by step, to that of the last model.

For task i a chain starts from the contrastive loss of f_i on D_i and applies one step for every later task
(``chain="full"``), or starts from the loss of f_{T-1}, which the log of the last step holds, and applies that step
alone (``chain="refreshed"``).

The upper side needs the upper side of the step before and no more; the lower side needs both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from cila_bound._moment import solve_lower, solve_upper
from cila_bound.geometry import Geometry
from cila_bound.losslog import LossLog
from cila_bound.means import Margin, Mean, Reading
from cila_bound.records import Measurement, Split, Statistic
from cila_bound.rigorous import rigorous_moment_step
from cila_bound.steps import MomentStep, linear_step, pinsker_step, pointwise_step, saturating_step

ChainStep = Literal["linear", "saturating", "pinsker", "moment", "best", "pointwise", "direct"]
Chain = Literal["full", "refreshed"]
Data = Literal["heldout", "training"]


class Interval(NamedTuple):
    """lower <= L_con(f_T; D_i) <= upper in nats, clipped to [floor, ceiling]; ``unclipped`` is the upper side as the
    formulas give it.
    """

    lower: float
    upper: float
    unclipped: float


class _State(NamedTuple):
    """Upper bounds on the contrastive loss of f_t on D_i and on its miss probability; infinite where not needed."""

    loss: float
    miss: float


class _Update(NamedTuple):
    """The log of one step on D_i: its record and how to read its means."""

    record: Measurement
    geometry: Geometry
    reading: Reading
    rigorous: bool

    @property
    def distillation(self) -> Mean:
        return _mean(self.record, "distillation", self.geometry, self.reading)

    @property
    def drift(self) -> Mean:
        return _mean(self.record, "drift", self.geometry, self.reading)


def evaluate(
    log: LossLog,
    task: int,
    last: int,
    step: ChainStep,
    chain: Chain,
    data: Data,
    reading: Reading,
    *,
    rigorous: bool = False,
) -> Interval:
    """The bound on L_con(f_last; D_task) by one chain; ``rigorous``: moment steps with machine-proven constants.

    Raises LookupError for a record that the log does not hold.
    """
    geometry = log.geometry

    def record(t: int) -> Measurement:
        split: Split = "heldout" if data == "heldout" else "train" if t == task else "buffer"
        return log.measurement(t, task, split)

    refreshed = chain == "refreshed" and last > task
    if step == "direct":
        own = _mean(record(last), "contrastive", geometry, reading)
        return Interval(own.lower, own.upper, own.upper)
    source, prefix = record(last if refreshed else task), "teacher_" if refreshed else ""
    loss = _mean(source, f"{prefix}contrastive", geometry, reading)
    miss = _mean(source, f"{prefix}miss_probability", geometry, reading)
    first = last if refreshed else task + 1
    updates = [_Update(record(t), geometry, reading, rigorous) for t in range(first, last + 1)]
    if not updates:
        return Interval(loss.lower, loss.upper, loss.upper)
    if step == "pointwise":
        lower, upper = _pointwise(updates[-1])
        return Interval(max(lower, geometry.floor), min(upper, geometry.ceiling), upper)
    states = _climb(step, loss, miss, updates, geometry, clip=True)
    unclipped = states[-1].loss
    if step not in ("moment", "best"):  # those never leave the range
        unclipped = _climb(step, loss, miss, updates, geometry, clip=False)[-1].loss
    return Interval(_descend(step, loss, states, updates, geometry), states[-1].loss, unclipped)


def _mean(record: Measurement, name: str, geometry: Geometry, reading: Reading) -> Mean:
    """A statistic of a record with its legal range."""
    ranges = {
        "contrastive": (geometry.floor, geometry.ceiling),
        "distillation": (geometry.floor, geometry.ceiling),
        "drift": (0.0, geometry.ceiling),
        "miss_probability": (1.0 - geometry.p_max, 1.0 - geometry.p_min),
    }
    statistic = getattr(record, name)
    assert statistic is not None  # Measurement.check: after_task > task has teacher fields
    low, high = ranges[name.removeprefix("teacher_")]
    column = None if record.tuples is None else record.tuples.column(name)
    return Mean(record, name, statistic, low, high, reading, column)


def _climb(
    step: ChainStep, loss: Mean, miss: Mean, updates: Sequence[_Update], geometry: Geometry, *, clip: bool
) -> list[_State]:
    """The upper bounds before the first update and after each; pinsker's on the loss after the last only."""
    uses_miss = step in ("pinsker", "best")
    states = [_State(math.inf if step == "pinsker" else loss.upper, miss.upper if uses_miss else math.inf)]
    for update in updates:
        state, is_last = states[-1], update is updates[-1]
        upper = math.inf if step == "pinsker" and not is_last else _UPPER[step](state, update, geometry)
        upper = min(upper, geometry.ceiling) if clip else upper
        missed = math.inf
        if uses_miss and not is_last:
            missed = state.miss + math.sqrt(update.drift.upper / 2.0)
            missed = min(missed, 1.0 - geometry.p_min) if clip else missed
            if step == "best":
                missed = min(missed, -math.expm1(-upper))
        states.append(_State(upper, missed))
    return states


def _descend(
    step: ChainStep, loss: Mean, states: Sequence[_State], updates: Sequence[_Update], geometry: Geometry
) -> float:
    """The lower bound after the last update, from the upper bounds before each."""
    if step in ("linear", "saturating", "pinsker"):  # from the upper bound before the last update alone
        return max(_LOWER[step](states[-2], math.nan, updates[-1], geometry), geometry.floor)
    lower = loss.lower
    for state, update in zip(states, updates, strict=False):
        lower = max(_LOWER[step](state, lower, update, geometry), geometry.floor)
    return lower


def _linear_upper(state: _State, update: _Update, geometry: Geometry) -> float:
    return linear_step(contrastive=state.loss, distillation=update.distillation.upper, geometry=geometry).upper


def _linear_lower(state: _State, lower: float, update: _Update, geometry: Geometry) -> float:
    return linear_step(contrastive=state.loss, distillation=update.distillation.lower, geometry=geometry).lower


def _saturating_upper(state: _State, update: _Update, geometry: Geometry) -> float:
    return saturating_step(contrastive=state.loss, distillation=update.distillation.upper, geometry=geometry).upper


def _saturating_lower(state: _State, lower: float, update: _Update, geometry: Geometry) -> float:
    return saturating_step(contrastive=state.loss, distillation=update.distillation.lower, geometry=geometry).lower


def _pinsker_upper(state: _State, update: _Update, geometry: Geometry) -> float:
    distillation = update.distillation.upper
    return pinsker_step(miss_probability=state.miss, distillation=distillation, drift=0.0, geometry=geometry).upper


def _pinsker_lower(state: _State, lower: float, update: _Update, geometry: Geometry) -> float:
    distillation = update.distillation.lower
    return pinsker_step(miss_probability=state.miss, distillation=distillation, drift=0.0, geometry=geometry).lower


_solve_lower, _solve_upper = (functools.lru_cache(maxsize=4096)(solve) for solve in (solve_lower, solve_upper))


@functools.lru_cache(maxsize=4096)
def _proven(loss: float, drift: float, geometry: Geometry) -> MomentStep:
    return rigorous_moment_step(contrastive=loss, drift=drift, geometry=geometry)


def _moment_upper(state: _State, update: _Update, geometry: Geometry) -> float:
    loss, drift = geometry.clip(state.loss), update.drift.upper
    return _proven(loss, drift, geometry).upper if update.rigorous else _solve_upper(loss, drift, geometry).bound


def _moment_lower(state: _State, lower: float, update: _Update, geometry: Geometry) -> float:
    loss, drift = geometry.clip(lower), update.drift.upper
    return _proven(loss, drift, geometry).lower if update.rigorous else _solve_lower(loss, drift, geometry).bound


def _best_upper(state: _State, update: _Update, geometry: Geometry) -> float:
    rules = (_linear_upper, _saturating_upper, _pinsker_upper, _moment_upper)
    return min(rule(state, update, geometry) for rule in rules)


def _best_lower(state: _State, lower: float, update: _Update, geometry: Geometry) -> float:
    rules = (_linear_lower, _saturating_lower, _pinsker_lower, _moment_lower)
    return max(rule(state, lower, update, geometry) for rule in rules)


_UPPER: dict[str, Callable[[_State, _Update, Geometry], float]] = {
    "linear": _linear_upper,
    "saturating": _saturating_upper,
    "pinsker": _pinsker_upper,
    "moment": _moment_upper,
    "best": _best_upper,
}
_LOWER: dict[str, Callable[[_State, float, _Update, Geometry], float]] = {
    "linear": _linear_lower,
    "saturating": _saturating_lower,
    "pinsker": _pinsker_lower,
    "moment": _moment_lower,
    "best": _best_lower,
}


def _pointwise(update: _Update) -> tuple[float, float]:
    """Lower and upper bound from the values of single tuples: the means of each tuple's own bounds."""
    tuples = update.record.tuples
    if tuples is None or tuples.teacher_contrastive is None or tuples.drift is None:
        raise LookupError(
            "the log has no per-tuple values at the last step: run with per-tuple logging for the pointwise step"
        )
    geometry, reading = update.geometry, update.reading
    rounding = reading.rounding if isinstance(reading, Margin) else 0.0
    if isinstance(reading, Margin):
        reading = Margin(reading.standard_errors)  # a tuple's bound is monotone in what is rounded
    contrastive = np.asarray(tuples.teacher_contrastive)
    drift = np.clip(np.asarray(tuples.drift) * (1.0 + rounding) + rounding, 0.0, geometry.ceiling)

    def side(name: Literal["lower", "upper"], loss: np.ndarray) -> float:
        loss = np.clip(loss, geometry.floor, geometry.ceiling)
        step = pointwise_step(contrastive=loss, drift=drift, geometry=geometry)
        values = step.lower_per_tuple if name == "lower" else step.upper_per_tuple
        mean = Mean(
            update.record,
            f"pointwise {name}",
            Statistic.of(values),
            geometry.floor,
            geometry.ceiling,
            reading,
            tuple(values.tolist()),
        )
        return mean.lower if name == "lower" else mean.upper

    reach = rounding * (1.0 + contrastive)
    return side("lower", contrastive - reach), side("upper", contrastive + reach)
