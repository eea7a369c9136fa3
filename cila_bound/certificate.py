"""From the steps of a run to a bound on the population loss of its last model, task by task.

For task i a chain starts from the contrastive loss of f_i on D_i and applies one step for every later task
(``chain="full"``), or starts from the loss of f_{T-1}, which the log of the last step holds, and applies that step
alone (``chain="refreshed"``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from cila_bound._moment import solve_lower, solve_upper
from cila_bound.geometry import Geometry
from cila_bound.losslog import LossLog
from cila_bound.records import Measurement, Split, Statistic, TupleValues
from cila_bound.steps import PointwiseStep, Step, linear_step, pinsker_step, pointwise_step, saturating_step
from cila_bound.theorem import Theorem1, theorem1

StepName = Literal["theorem1", "linear", "saturating", "pinsker", "moment", "best", "pointwise"]
Chain = Literal["full", "refreshed"]
Data = Literal["heldout", "training"]

ASSUMPTIONS: dict[str, str] = {
    "theorem1": "L_train, lambda and mixture weights of every task; every past task has data and lambda > 0",
    "linear": "L_con of each task's own model; L_dis on that task's tuples at every later step",
    "saturating": "as linear",
    "pinsker": "miss probability of each task's own model; L_dis at the last and drift at every later step",
    "moment": "L_con of each task's own model; drift on that task's tuples at every later step",
    "best": "as pinsker and moment together; the tightest of linear, saturating, pinsker and moment at every step",
    "pointwise": "per-tuple contrastive loss and drift of the last step",
}


class Interval(NamedTuple):
    """A mean known to lie in [lower, upper]; both are the logged mean unless a margin was asked for."""

    lower: float
    upper: float


class Margin(NamedTuple):
    """How far logged means are moved outwards: standard errors, and a share of 1 + mean."""

    standard_errors: float
    rounding: float

    def around(self, statistic: Statistic, n_effective: int, low: float, high: float) -> Interval:
        """The statistic's mean with the margin on both sides, moved into [low, high]."""
        reach = self.standard_errors * standard_error(statistic, n_effective) + self.rounding * (1.0 + statistic.mean)
        return Interval(min(max(statistic.mean - reach, low), high), max(min(statistic.mean + reach, high), low))


@dataclass(frozen=True)
class Certificate:
    """Bounds on L_con(f_T; D_i) for every task i seen, and what they rest on. All losses in nats.

    ``per_task`` and ``lower_per_task`` are clipped to [floor, ceiling]; ``unclipped_per_task`` is the same upper
    chain without clipping. ``total`` bounds the population loss sum_i L_con(f_T; D_i) and ``unclipped_total`` is the
    same unclipped (may be infinite); ``tightness`` is that of the clipped bound. ``kind`` is "plug_in": logged means
    stand for population means, so this is an estimate of the bound, with no statement of confidence. ``measured`` holds
    the mean of the log's test records (None where there is none).
    """

    step: StepName
    chain: Chain
    data: Data
    after_task: int
    geometry: Geometry
    tasks: tuple[str, ...]
    per_task: tuple[float, ...]
    lower_per_task: tuple[float, ...]
    unclipped_per_task: tuple[float, ...]
    total: float
    lower_total: float
    unclipped_total: float
    measured: tuple[float | None, ...]
    assumptions: tuple[str, ...]
    theorem: Theorem1 | None = None
    kind: Literal["plug_in"] = "plug_in"

    @property
    def mean(self) -> float:
        """total / number of tasks."""
        return self.total / len(self.tasks)

    @property
    def vacuous(self) -> tuple[bool, ...]:
        """Per task: at or above the ceiling, so the bound says nothing."""
        return tuple(value >= self.geometry.ceiling for value in self.unclipped_per_task)

    @property
    def vacuous_total(self) -> bool:
        """The sum says nothing, clipped as it is: every task's bound is vacuous, or Theorem 1's is."""
        if self.theorem is not None:
            return self.unclipped_total >= len(self.tasks) * self.geometry.ceiling
        return all(self.vacuous)

    @property
    def measured_total(self) -> float | None:
        """Sum of the measured test losses; None unless every task has one."""
        known = [value for value in self.measured if value is not None]
        return math.fsum(known) if len(known) == len(self.tasks) else None

    @property
    def tightness(self) -> tuple[float | None, ...]:
        """Per task: bound / measured test loss (1 is exact); None where the log holds no test record."""
        return tuple(
            None if truth is None else bound / truth for bound, truth in zip(self.per_task, self.measured, strict=True)
        )

    @property
    def tightness_total(self) -> float | None:
        return None if self.measured_total is None else self.total / self.measured_total


def certify(
    log: LossLog,
    step: StepName = "moment",
    *,
    chain: Chain = "full",
    data: Data = "heldout",
    after_task: int | None = None,
    standard_errors: float = 0.0,
    rounding: float = 0.0,
) -> Certificate:
    """Evaluates one bound on a log.

    ``data="heldout"`` uses held-out tuples throughout; ``"training"`` the training tuples of each new task and the
    buffer tuples of past ones, which the models were fitted to. "theorem1" uses the logged training losses, whatever
    ``data`` says, and its certificate says "training". ``after_task`` is T (default: the last task in the log).
    Every logged mean m is first moved outwards by ``standard_errors`` of its standard errors and ``rounding`` x
    (1 + m): all bounds are monotone in the logs, so this widens both sides.

    Raises ValueError for an unknown name or a chain that the step has not ("pointwise" exists refreshed only,
    "theorem1" full only), and LookupError for a record that the log does not hold.
    """
    for name, value, legal in (("step", step, StepName), ("chain", chain, Chain), ("data", data, Data)):
        if value not in get_args(legal):
            raise ValueError(f"{name} must be one of {', '.join(get_args(legal))}, got {value!r}")
    if step == "pointwise" and chain != "refreshed":
        raise ValueError('step "pointwise" needs chain="refreshed": per-tuple values cannot be chained over tasks')
    if step == "theorem1" and chain != "full":
        raise ValueError('step "theorem1" needs chain="full": it uses the training losses of all tasks')
    for name, share in (("standard_errors", standard_errors), ("rounding", rounding)):
        if not (math.isfinite(share) and share >= 0.0):
            raise ValueError(f"{name} must be a finite number >= 0, got {share!r}")
    last = log.last_task if after_task is None else after_task
    if not 1 <= last <= len(log.header.tasks):
        raise ValueError(f"after_task must be in 1..{len(log.header.tasks)} and logged, got {last}")

    geometry = log.geometry
    theorem = _theorem1(log, last) if step == "theorem1" else None
    if theorem is not None:
        others = (last - 1) * geometry.floor
        unclipped = [theorem.upper - others] * last
        upper = [geometry.clip(value) for value in unclipped]
        lower = [geometry.clip(theorem.lower - (last - 1) * geometry.ceiling)] * last
        totals = theorem.clipped_upper, theorem.clipped_lower, theorem.upper
    else:
        margin = Margin(standard_errors, rounding)
        chains = [_chain(log, task, last, step, chain, data, margin) for task in range(1, last + 1)]
        upper = [bound.upper for bound, _ in chains]
        lower = [bound.lower for bound, _ in chains]
        unclipped = [value for _, value in chains]
        totals = math.fsum(upper), math.fsum(lower), math.fsum(unclipped)
    return Certificate(
        step=step,
        chain=chain,
        data="training" if theorem is not None else data,
        after_task=last,
        geometry=geometry,
        tasks=log.header.tasks[:last],
        per_task=tuple(upper),
        lower_per_task=tuple(lower),
        unclipped_per_task=tuple(unclipped),
        total=totals[0],
        lower_total=totals[1],
        unclipped_total=totals[2],
        measured=tuple(_measured(log, last, task) for task in range(1, last + 1)),
        assumptions=_assumptions(step, chain, data),
        theorem=theorem,
    )


def _assumptions(step: StepName, chain: Chain, data: Data) -> tuple[str, ...]:
    source = {
        "heldout": "held-out tuples of every task, past tasks included",
        "training": "training and buffer tuples, which the models were fitted to: no unbiased sample",
    }[data]
    if step == "theorem1":
        source = "training losses, measured on data that the models were fitted to"
    restart = (
        ["the chain restarts from L_con of the previous model, measured at the last step"]
        if chain == "refreshed"
        else []
    )
    return (
        "unit-norm embeddings, one temperature and one number of negatives for teacher and student",
        ASSUMPTIONS[step],
        *restart,
        source,
        "plug-in: logged means stand for population means, no confidence level",
    )


def _theorem1(log: LossLog, last: int) -> Theorem1:
    records = [log.training(t) for t in range(1, last + 1)]
    return theorem1(
        [record.loss for record in records],
        [record.distill_weight for record in records],
        [record.mixture_weights for record in records],
        log.geometry,
        contrastive_weights=[record.contrastive_weight for record in records],
        contrastive_over="current" if all(record.contrastive_over == "current" for record in records) else "mixture",
    )


def _measured(log: LossLog, last: int, task: int) -> float | None:
    try:
        return log.test(last, task).contrastive.mean
    except LookupError:
        return None


class _State(NamedTuple):
    """What is known of f_t on D_i: an interval for its contrastive loss and an upper bound on its miss probability."""

    contrastive: Interval
    miss: float


class _Update(NamedTuple):
    """The log of one step on D_i."""

    distillation: Interval
    drift: Interval
    tuples: TupleValues | None
    n_effective: int
    margin: Margin


def _chain(
    log: LossLog, task: int, last: int, step: StepName, chain: Chain, data: Data, margin: Margin
) -> tuple[Interval, float]:
    """The clipped interval for L_con(f_T; D_i) and its unclipped upper end."""
    geometry = log.geometry

    def record(t: int) -> Measurement:
        split: Split = "heldout" if data == "heldout" else "train" if t == task else "buffer"
        return log.measurement(t, task, split)

    refreshed = chain == "refreshed" and last > task
    source = record(last if refreshed else task)
    contrastive = source.teacher_contrastive if refreshed else source.contrastive
    miss = source.teacher_miss_probability if refreshed else source.miss_probability
    assert contrastive is not None and miss is not None  # Measurement.check: task < after_task has teacher fields
    state = _State(
        margin.around(contrastive, source.n_effective, geometry.floor, geometry.ceiling),
        margin.around(miss, source.n_effective, 1.0 - geometry.p_max, 1.0 - geometry.p_min).upper,
    )
    updates = [_update(record(t), margin, geometry) for t in range(last if refreshed else task + 1, last + 1)]
    clipped = _run(state, updates, step, geometry, clip=True)
    if step in ("moment", "best"):  # never leave the range
        return clipped, clipped.upper
    return clipped, _run(state, updates, step, geometry, clip=False).upper


def _run(state: _State, updates: Sequence[_Update], step: StepName, geometry: Geometry, *, clip: bool) -> Interval:
    rule = _RULES[step]
    for update in updates:
        lower, upper = rule(state, update, geometry)
        miss = state.miss + math.sqrt(update.drift.upper / 2.0)
        if clip:
            lower, upper = max(lower, geometry.floor), min(upper, geometry.ceiling)
            miss = min(miss, 1.0 - geometry.p_min)
        if step == "best":
            miss = min(miss, -math.expm1(-upper))
        state = _State(Interval(lower, upper), miss)
    return state.contrastive


def _update(record: Measurement, margin: Margin, geometry: Geometry) -> _Update:
    assert record.distillation is not None and record.drift is not None  # Measurement.check, as above
    return _Update(
        margin.around(record.distillation, record.n_effective, geometry.floor, geometry.ceiling),
        margin.around(record.drift, record.n_effective, 0.0, geometry.ceiling),
        record.tuples,
        record.n_effective,
        margin,
    )


def standard_error(statistic: Statistic, n_effective: int) -> float:
    """sqrt(variance / n_effective), nats."""
    return math.sqrt(statistic.variance / n_effective)


def _linear(state: _State, update: _Update, geometry: Geometry) -> Interval:
    return _around_distillation(linear_step, update, contrastive=state.contrastive.upper, geometry=geometry)


def _saturating(state: _State, update: _Update, geometry: Geometry) -> Interval:
    return _around_distillation(saturating_step, update, contrastive=state.contrastive.upper, geometry=geometry)


def _pinsker(state: _State, update: _Update, geometry: Geometry) -> Interval:
    logged = {"miss_probability": state.miss, "drift": update.drift.upper, "geometry": geometry}
    return _around_distillation(pinsker_step, update, **logged)


def _around_distillation(inequality: Callable[..., Step], update: _Update, **logged: Any) -> Interval:
    """A step of the form L_dis -+ slack, each side at its own end of the interval for L_dis."""
    low, high = update.distillation
    return Interval(inequality(distillation=low, **logged).lower, inequality(distillation=high, **logged).upper)


_solve_lower, _solve_upper = (functools.lru_cache(maxsize=4096)(solve) for solve in (solve_lower, solve_upper))


def _moment(state: _State, update: _Update, geometry: Geometry) -> Interval:
    """The two sides of moment_step, each at its own end of the interval for L_con(f_{t-1})."""
    low, high = map(geometry.clip, state.contrastive)
    drift = update.drift.upper
    return Interval(_solve_lower(low, drift, geometry).bound, _solve_upper(high, drift, geometry).bound)


def _best(state: _State, update: _Update, geometry: Geometry) -> Interval:
    bounds = [rule(state, update, geometry) for rule in (_linear, _saturating, _pinsker, _moment)]
    return Interval(max(bound.lower for bound in bounds), min(bound.upper for bound in bounds))


def _pointwise(state: _State, update: _Update, geometry: Geometry) -> Interval:
    if update.tuples is None:
        raise LookupError(
            "the log has no per-tuple values at the last step: run with per-tuple logging for the pointwise step"
        )
    rounding = update.margin.rounding  # a tuple's bound is monotone in its drift and one-sided in its loss
    contrastive = np.asarray(update.tuples.teacher_contrastive)
    drift = np.clip(np.asarray(update.tuples.drift) * (1.0 + rounding) + rounding, 0.0, geometry.ceiling)

    def side(loss: np.ndarray) -> PointwiseStep:
        return pointwise_step(
            contrastive=np.clip(loss, geometry.floor, geometry.ceiling), drift=drift, geometry=geometry
        )

    lower = side(contrastive - rounding * (1.0 + contrastive)).lower_per_tuple
    upper = side(contrastive + rounding * (1.0 + contrastive)).upper_per_tuple
    errors = update.margin._replace(rounding=0.0)
    return Interval(
        errors.around(Statistic.of(lower), update.n_effective, -math.inf, math.inf).lower,
        errors.around(Statistic.of(upper), update.n_effective, -math.inf, math.inf).upper,
    )


_RULES: dict[str, Callable[[_State, _Update, Geometry], Interval]] = {
    "linear": _linear,
    "saturating": _saturating,
    "pinsker": _pinsker,
    "moment": _moment,
    "best": _best,
    "pointwise": _pointwise,
}
