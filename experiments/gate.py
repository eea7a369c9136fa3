"""Whether an update is accepted: by how much the certified loss on the tasks before may rise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cila_bound import Certificate, LossLog, certify
from cila_bound.records import Record
from experiments.config import RunConfig

_AUDITED = (("moment", "full"), ("moment", "refreshed"), ("direct", "refreshed"))


@dataclass(frozen=True)
class Decision:
    """Certified upper bounds on the mean loss over the past tasks, in nats, of the old model and of the update; and
    whether ``after`` - ``before`` is within ``limit``. ``vacuous``: the old model's bound says nothing for some task,
    so that nothing could have worsened it.
    """

    before: float
    after: float
    limit: float
    vacuous: bool

    @property
    def accepted(self) -> bool:
        return self.after - self.before <= self.limit + 1e-12  # rounding of equal bounds

    def as_json(self) -> dict[str, Any]:
        return {
            "accepted": self.accepted,
            "before": self.before,
            "after": self.after,
            "limit": self.limit,
            "vacuous": self.vacuous,
        }


def weigh(config: RunConfig, log: LossLog, update: Sequence[Record], task: int) -> Decision | None:
    """Of the model trained on ``task``, whose records are ``update``; None without a limit, or for the first task."""
    if config.max_bound_increase is None or task == 1:
        return None
    trial = LossLog(log.header)
    for record in (*log.records, *update):
        trial.add(record)
    updated = _certify(config, trial, task, config.gate, "refreshed")
    # The current model too at its level, though it rests on fewer means, so that their difference is the update's.
    options: dict[str, Any] = {"chain": "refreshed", "after_task": task - 1, "selections": updated.selections}
    means = len(certify(trial, config.gate, confidence=config.confidence, **options).statements)
    share = means / len(updated.statements)
    current = certify(trial, config.gate, confidence=1.0 - (1.0 - config.confidence) * share, **options)
    before, after = (math.fsum(found.per_task[: task - 1]) / (task - 1) for found in (current, updated))
    vacuous = any(bound >= log.geometry.ceiling for bound in current.per_task[: task - 1])
    return Decision(before, after, config.max_bound_increase, vacuous)


def notice(decision: Decision, task: int, name: str) -> str:
    """What to tell of a refusal, or of an acceptance that says nothing; empty otherwise."""
    rise = f"from {decision.before:.4g} to {decision.after:.4g} nats a task"
    if not decision.accepted:
        return (
            f"task {task} ({name}): update refused: the certified bound on the mean loss of the tasks before would "
            f"rise {rise}, by more than the limit of {decision.limit:g}; the model of task {task - 1} is kept"
        )
    if decision.vacuous:
        return (
            f"task {task} ({name}): update accepted, but the bound on an old task was vacuous before it already "
            f"({rise}): more held-out images would let the limit mean something"
        )
    return ""


def certificates(config: RunConfig, log: LossLog, task: int) -> list[dict[str, Any]]:
    """What can be certified of the model after ``task``, for the audit file."""
    found = []
    for step, chain in _AUDITED:
        certificate = _certify(config, log, task, step, chain)
        found.append(
            {
                "step": step,
                "chain": chain,
                "confidence": certificate.confidence,
                "selections": certificate.selections,
                "statements": len(certificate.statements),
                "per_task": certificate.per_task,
                "total": certificate.total,
            }
        )
    return found


def _certify(config: RunConfig, log: LossLog, task: int, step: Any, chain: Any) -> Certificate:
    """Each decision so far chose between two models on the same tuples, which the certificate has to pay for."""
    selections = 1 if config.max_bound_increase is None else 2 ** (task - 1)
    return certify(log, step, chain=chain, after_task=task, confidence=config.confidence, selections=selections)
