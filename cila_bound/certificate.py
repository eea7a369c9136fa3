"""From the steps of a run to a bound on the population loss of its last model, task by task: as an estimate, or as a
certificate at a stated confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from cila_bound.chain import Chain, ChainStep, Data, Interval, evaluate
from cila_bound.geometry import Geometry
from cila_bound.losslog import LossLog
from cila_bound.means import Confidence, ConfidenceStatement, Inequality, Inventory, Margin, Reading
from cila_bound.theorem import Theorem1, theorem1

StepName = Literal["theorem1", ChainStep]

ASSUMPTIONS: dict[str, str] = {
    "theorem1": "L_train, lambda and mixture weights of every task; every past task has data and lambda > 0",
    "linear": "L_con of each task's own model; L_dis on that task's tuples at every later step",
    "saturating": "as linear",
    "pinsker": "miss probability of each task's own model; L_dis at the last and drift at every later step",
    "moment": "L_con of each task's own model; drift on that task's tuples at every later step",
    "best": "as pinsker and moment together; the tightest of linear, saturating, pinsker and moment at every step",
    "pointwise": "per-tuple contrastive loss and drift of the last step",
    "direct": "L_con of the last model on every task's tuples: no inequality, what measuring itself would give",
}


@dataclass(frozen=True)
class Certificate:
    """Bounds on L_con(f_T; D_i) for every task i seen, and what they rest on. All losses in nats.

    ``per_task`` and ``lower_per_task`` are clipped to [floor, ceiling]; ``unclipped_per_task`` is the same upper
    chain without clipping. ``total`` bounds the population loss sum_i L_con(f_T; D_i) and ``unclipped_total`` is the
    same unclipped (may be infinite); ``tightness`` is that of the clipped bound. ``measured`` holds the mean of the
    log's test records (None where there is none).

    ``kind`` is "plug_in": logged means stand for population means, so this is an estimate of the bound, with no
    statement of confidence. Or it is "certificate": with probability ``confidence`` or more over the draw of the
    held-out tuples, all bounds of all tasks, upper and lower, hold at once. It rests on ``statements``, one-sided
    confidence bounds on means, each of which fails with probability ``delta`` at most (union bound).
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
    kind: Literal["plug_in", "certificate"] = "plug_in"
    confidence: float | None = None
    selections: int = 1
    delta: float | None = None
    statements: tuple[ConfidenceStatement, ...] = ()

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
    confidence: float | None = None,
    inequality: Inequality = "auto",
    selections: int = 1,
    standard_errors: float = 0.0,
    rounding: float = 0.0,
    rigorous: bool = False,
) -> Certificate:
    """Evaluates one bound on a log.

    ``data="heldout"`` uses held-out tuples throughout; ``"training"`` the training tuples of each new task and the
    buffer tuples of past ones, which the models were fitted to. "theorem1" uses the logged training losses, whatever
    ``data`` says, and its result says "training". ``after_task`` is T (default: the last task in the log).

    Without ``confidence`` the result is a plug-in estimate. Every logged mean m is first moved outwards by
    ``standard_errors`` of its standard errors (as Student's t requires for few tuples) and ``rounding`` x (1 + m): all
    bounds are monotone in the logs, so this widens both sides.

    With ``confidence`` in (0, 1), such as 0.95, it is a certificate: every end of a mean that the bound uses is
    replaced by a one-sided confidence bound at level delta = (1 - confidence) / (ends used x ``selections``).
    ``inequality`` is that of :mod:`cila_bound.concentration`; "auto" takes betting where the log holds the values of
    single tuples and their ``block``, and else Chernoff's bound. ``selections``: how many models these held-out tuples
    chose this one from (variants compared on them, updates they let pass or refused): the bound then holds for any of
    them.

    ``rigorous``: moment steps with machine-proven constants (:mod:`cila_bound.rigorous`, which needs python-flint).

    Raises ValueError for an unknown name, a chain that the step has not ("pointwise" and "direct" exist refreshed only,
    "theorem1" full only), a confidence outside (0, 1), and for a certificate on training data, which are no sample that
    the model is independent of; and LookupError for a record that the log does not hold.
    """
    for name, value, legal in (
        ("step", step, StepName),
        ("chain", chain, Chain),
        ("data", data, Data),
        ("inequality", inequality, Inequality),
    ):
        if value not in get_args(legal):
            raise ValueError(f"{name} must be one of {', '.join(get_args(legal))}, got {value!r}")
    if step in ("pointwise", "direct") and chain != "refreshed":
        raise ValueError(
            f'step "{step}" needs chain="refreshed": what it is computed from cannot be chained over tasks'
        )
    if step == "theorem1" and chain != "full":
        raise ValueError('step "theorem1" needs chain="full": it uses the training losses of all tasks')
    for name, share in (("standard_errors", standard_errors), ("rounding", rounding)):
        if not (math.isfinite(share) and share >= 0.0):
            raise ValueError(f"{name} must be a finite number >= 0, got {share!r}")
    last = log.last_task if after_task is None else after_task
    if not 1 <= last <= len(log.header.tasks):
        raise ValueError(f"after_task must be in 1..{len(log.header.tasks)} and logged, got {last}")
    if confidence is not None:
        _check_confidence(confidence, selections, step, data, standard_errors, rounding)
    elif selections != 1 or inequality != "auto":
        given = f"selections = {selections}" if selections != 1 else f'inequality = "{inequality}"'
        raise ValueError(f"{given} needs a confidence, such as 0.95: a plug-in estimate has no level")

    if step == "theorem1":
        return _of_theorem1(log, last, chain)

    def bounds(reading: Reading) -> list[Interval]:
        return [evaluate(log, task, last, step, chain, data, reading, rigorous=rigorous) for task in range(1, last + 1)]

    reading: Margin | Confidence = Margin(standard_errors, rounding)
    delta = None
    if confidence is not None:
        inventory = Inventory()
        for task in range(1, last + 1):
            evaluate(log, task, last, step, chain, data, inventory)
        delta = (1.0 - confidence) / (len(inventory.asked) * selections)
        reading = Confidence(delta, inequality)
    found = bounds(reading)
    statements = tuple(reading.statements.values()) if isinstance(reading, Confidence) else ()
    return Certificate(
        step=step,
        chain=chain,
        data=data,
        after_task=last,
        geometry=log.geometry,
        tasks=log.header.tasks[:last],
        per_task=tuple(bound.upper for bound in found),
        lower_per_task=tuple(bound.lower for bound in found),
        unclipped_per_task=tuple(bound.unclipped for bound in found),
        total=math.fsum(bound.upper for bound in found),
        lower_total=math.fsum(bound.lower for bound in found),
        unclipped_total=math.fsum(bound.unclipped for bound in found),
        measured=_measured(log, last),
        assumptions=_assumptions(step, chain, data, statements, selections),
        kind="plug_in" if confidence is None else "certificate",
        confidence=confidence,
        selections=selections,
        delta=delta,
        statements=statements,
    )


def _check_confidence(
    confidence: float, selections: int, step: StepName, data: Data, standard_errors: float, rounding: float
) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), such as 0.95, got {confidence!r}")
    if selections < 1:
        raise ValueError(f"selections must be at least 1, the model itself, got {selections!r}")
    if step == "theorem1" or data == "training":
        source = "theorem1 takes training losses" if step == "theorem1" else 'data="training"'
        raise ValueError(
            f"no certificate at confidence {confidence:g}: {source}, measured on the samples that the models were "
            "fitted to, which say nothing of new ones at any confidence; leave confidence out for the plug-in "
            "estimate, or use a step on held-out tuples"
        )
    if standard_errors or rounding:
        raise ValueError("standard_errors and rounding are margins of estimates: leave them out with a confidence")


def _assumptions(
    step: StepName, chain: Chain, data: Data, statements: tuple[ConfidenceStatement, ...] = (), selections: int = 1
) -> tuple[str, ...]:
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
    worth = ["plug-in: logged means stand for population means, no confidence level"]
    if statements:
        used = sorted({statement.inequality for statement in statements})
        worth = [
            "the held-out tuples of a task are independent draws of its law, given their classes, worth n_effective "
            "each time they share samples, and the models do not depend on them",
            f"they chose the model among {selections}" if selections > 1 else "they chose no model or setting",
            f"{len(statements)} one-sided confidence bounds on means, by {' and '.join(used)}, together (union bound)",
        ]
    return (
        "unit-norm embeddings, one temperature and one number of negatives for teacher and student",
        ASSUMPTIONS[step],
        *restart,
        source,
        *worth,
    )


def _of_theorem1(log: LossLog, last: int, chain: Chain) -> Certificate:
    geometry = log.geometry
    records = [log.training(t) for t in range(1, last + 1)]
    theorem = theorem1(
        [record.loss for record in records],
        [record.distill_weight for record in records],
        [record.mixture_weights for record in records],
        geometry,
        contrastive_weights=[record.contrastive_weight for record in records],
        contrastive_over="current" if all(record.contrastive_over == "current" for record in records) else "mixture",
    )
    alone = theorem.upper - (last - 1) * geometry.floor
    return Certificate(
        step="theorem1",
        chain=chain,
        data="training",
        after_task=last,
        geometry=geometry,
        tasks=log.header.tasks[:last],
        per_task=(geometry.clip(alone),) * last,
        lower_per_task=(geometry.clip(theorem.lower - (last - 1) * geometry.ceiling),) * last,
        unclipped_per_task=(alone,) * last,
        total=theorem.clipped_upper,
        lower_total=theorem.clipped_lower,
        unclipped_total=theorem.upper,
        measured=_measured(log, last),
        assumptions=_assumptions("theorem1", chain, "training"),
        theorem=theorem,
    )


def _measured(log: LossLog, last: int) -> tuple[float | None, ...]:
    losses: list[float | None] = []
    for task in range(1, last + 1):
        try:
            losses.append(log.test(last, task).contrastive.mean)
        except LookupError:
            losses.append(None)
    return tuple(losses)
