"""The methods: which losses they train on, whether they rehearse, and how they weigh distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from cila_bound import LossLog, cila_weight, dual_price_weight

MethodName = Literal[
    "cila-max", "cila-pure", "cila-min", "co2l", "dual-price", "contrastive-only", "distillation-only", "finetune"
]
Weight = Callable[[LossLog, int, float], float]


@dataclass(frozen=True)
class Method:
    """What happens from task 2 on; task 1 is always the contrastive loss alone.

    ``weight(log, t, kappa)`` is lambda_t, from what the run has logged before task t; None means no distillation.
    """

    summary: str
    weight: Weight | None
    contrastive: bool = True
    rehearsal: bool = True


def _constant(log: LossLog, task: int, kappa: float) -> float:
    return 1.0


def _adaptive(log: LossLog, task: int, kappa: float, mode: Literal["max", "pure", "min"]) -> float:
    """CILA's rule on the two terms of the objective of tasks 2..t-1, as the optimiser saw them."""
    records = [log.training(j) for j in range(2, task)]
    distillation, contrastive = (
        [loss for record in records if (loss := getattr(record, name)) is not None]
        for name in ("objective_distillation", "objective_contrastive")
    )
    return cila_weight(distillation, contrastive, kappa, mode)


def _dual_price(log: LossLog, task: int, kappa: float) -> float:
    """The mean price of drift on the past tasks, each from its last losses on training data; kappa is not used.

    The newest past task has not drifted yet: it is taken to drift as the others did on average. At t = 2 nothing has:
    lambda = 1.
    """
    last = task - 1
    older = [log.measurement(last, i, "buffer") for i in range(1, last)]
    drift = [record.drift.mean for record in older if record.drift is not None]
    if not drift:
        return 1.0
    contrastive = [record.contrastive.mean for record in (*older, log.measurement(last, last, "train"))]
    prices = dual_price_weight(contrastive, [*drift, sum(drift) / len(drift)], log.geometry)
    return sum(prices) / len(prices)


METHODS: dict[str, Method] = {
    "cila-max": Method(
        "SupCon + distillation, lambda = max(1, kappa ratio) (Wen et al. 2024)", partial(_adaptive, mode="max")
    ),
    "cila-pure": Method("SupCon + distillation, lambda = kappa ratio", partial(_adaptive, mode="pure")),
    "cila-min": Method("SupCon + distillation, lambda = min(1, kappa ratio)", partial(_adaptive, mode="min")),
    "co2l": Method("SupCon + distillation, lambda = 1 (Cha et al. 2021)", _constant),
    "dual-price": Method("SupCon + distillation, lambda = the moment bound's price of drift", _dual_price),
    "contrastive-only": Method("SupCon with rehearsal, no distillation", None),
    "distillation-only": Method(
        "distillation with rehearsal, no new contrastive learning", _constant, contrastive=False
    ),
    "finetune": Method("SupCon on the current task alone", None, rehearsal=False),
}
