"""The methods: which losses they train on, whether they rehearse, and how they weigh distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from cila_bound import LossLog, Measurement, cila_weight, dual_price_weight

if TYPE_CHECKING:
    from experiments.config import RunConfig

MethodName = Literal[
    "cila-max",
    "cila-pure",
    "cila-min",
    "co2l",
    "dual-price",
    "dual-price-per-task",
    "contrastive-only",
    "distillation-only",
    "finetune",
    "er",
    "der++",
]
Weights = Callable[[LossLog, int, "RunConfig"], tuple[float, ...]]


@dataclass(frozen=True)
class Method:
    """What happens from task 2 on; task 1 is always the contrastive loss, or the classifier's cross entropy, alone.

    ``weights(log, t, config)`` is lambda for the rows of each of the tasks 1..t, from what the run has logged before
    task t; None means no distillation. ``classifier``: cross entropy on current and buffered images instead of both
    losses, with buffered logits as targets too if ``logits``.
    """

    summary: str
    weights: Weights | None = None
    contrastive: bool = True
    rehearsal: bool = True
    classifier: bool = False
    logits: bool = False


def _constant(log: LossLog, task: int, config: RunConfig) -> tuple[float, ...]:
    return (config.distill_weight,) * task


def _adaptive(log: LossLog, task: int, config: RunConfig, mode: Literal["max", "pure", "min"]) -> tuple[float, ...]:
    """CILA's rule on the two terms of the objective of tasks 2..t-1, as the optimiser saw them."""
    records = [log.training(j) for j in range(2, task)]
    distillation, contrastive = (
        [loss for record in records if (loss := getattr(record, name)) is not None]
        for name in ("objective_distillation", "objective_contrastive")
    )
    return (cila_weight(distillation, contrastive, config.kappa, mode),) * task


def _dual_prices(log: LossLog, task: int, config: RunConfig) -> tuple[float, ...]:
    """The price of drift on each past task, from its last losses on training data; on the current task, their mean.

    The newest past task has not drifted yet, nor has one been measured whose buffered images form no tuple: they are
    taken to be as the others are on average. At t = 2 nothing has drifted: lambda = 1.
    """
    last = task - 1
    measured: dict[int, Measurement] = {}
    for i in range(1, last):
        try:
            measured[i] = log.measurement(last, i, "buffer")
        except LookupError:
            continue
    if not measured:
        return (1.0,) * task
    losses = {i: record.contrastive.mean for i, record in measured.items()}
    drifts = {i: record.drift.mean for i, record in measured.items() if record.drift is not None}
    losses[last] = log.measurement(last, last, "train").contrastive.mean
    drifts[last] = sum(drifts.values()) / len(drifts)
    prices = dict(
        zip(losses, dual_price_weight(list(losses.values()), list(drifts.values()), log.geometry), strict=True)
    )
    mean = sum(prices.values()) / len(prices)
    return tuple(prices.get(i, mean) for i in range(1, task + 1))


def _mean_dual_price(log: LossLog, task: int, config: RunConfig) -> tuple[float, ...]:
    return _dual_prices(log, task, config)[-1:] * task


METHODS: dict[str, Method] = {
    "cila-max": Method(
        "SupCon + distillation, lambda = max(1, kappa ratio) (Wen et al. 2024)", partial(_adaptive, mode="max")
    ),
    "cila-pure": Method("SupCon + distillation, lambda = kappa ratio", partial(_adaptive, mode="pure")),
    "cila-min": Method("SupCon + distillation, lambda = min(1, kappa ratio)", partial(_adaptive, mode="min")),
    "co2l": Method("SupCon + distillation, lambda = distill_weight (1: Cha et al. 2021)", _constant),
    "dual-price": Method("SupCon + distillation, lambda = the moment bound's mean price of drift", _mean_dual_price),
    "dual-price-per-task": Method("the same with the price of each past task for its own images", _dual_prices),
    "contrastive-only": Method("SupCon with rehearsal, no distillation"),
    "distillation-only": Method(
        "distillation with rehearsal, no new contrastive learning", _constant, contrastive=False
    ),
    "finetune": Method("SupCon on the current task alone", rehearsal=False),
    "er": Method("cross entropy on current and buffered images (experience replay)", classifier=True),
    "der++": Method(
        "cross entropy, and squared distance to buffered logits (Buzzega et al. 2020)", classifier=True, logits=True
    ),
}
