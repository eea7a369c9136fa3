"""Adaptive distillation coefficients lambda_t, from the losses logged so far.

Sources: ``cila_weight`` is the rule of Wen et al., "Provable Contrastive Continual Learning" (ICML 2024) with its two
ablations; Co2L (Cha et al., ICCV 2021) is the constant 1. ``dual_price_weight`` is derived in this project
(docs/theory.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from cila_bound.geometry import Geometry, checked
from cila_bound.steps import moment_step

CilaMode = Literal["max", "pure", "min"]


def cila_weight(
    distillation_history: Sequence[float], contrastive_history: Sequence[float], kappa: float, mode: CilaMode = "max"
) -> float:
    """lambda_t from the training losses of tasks 2..t-1 (nats); 1.0 at t = 2, where both histories are empty.

    With ratio = sum(distillation_history) / sum(contrastive_history):

        "max"   max(1, kappa ratio)     the published rule
        "pure"  kappa ratio             ablation
        "min"   min(1, kappa ratio)     ablation

    Raises ValueError on histories of different length, negative or non-finite losses, a zero contrastive sum, kappa
    <= 0 or an unknown mode. Mind the scale: with a contrastive loss multiplied by a constant, the ratio is divided by
    it.
    """
    if mode not in ("max", "pure", "min"):
        raise ValueError(f"mode must be 'max', 'pure' or 'min', got {mode!r}")
    if not (math.isfinite(kappa) and kappa > 0):
        raise ValueError(f"kappa must be a finite number > 0, got {kappa!r}")
    if len(distillation_history) != len(contrastive_history):
        raise ValueError(
            "distillation_history and contrastive_history must cover the same tasks 2..t-1, "
            f"got {len(distillation_history)} and {len(contrastive_history)} values"
        )
    if not len(distillation_history):
        return 1.0
    for name, history in (("distillation_history", distillation_history), ("contrastive_history", contrastive_history)):
        for value in history:
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must hold finite losses >= 0, got {value!r}")
    total = math.fsum(contrastive_history)
    if total == 0.0:
        raise ValueError(
            "contrastive_history sums to 0: the ratio is undefined; give the losses of the tasks after the first"
        )
    adaptive = kappa * math.fsum(distillation_history) / total
    return {"max": max(1.0, adaptive), "pure": adaptive, "min": min(1.0, adaptive)}[mode]


def dual_price_weight(
    contrastive: Sequence[float], drift: Sequence[float], geometry: Geometry, *, max_weight: float = 10.0
) -> tuple[float, ...]:
    """The price at which the moment bound trades drift on each past task for contrastive loss: one lambda per task.

    For past task i with its last logged means (contrastive of the previous model, drift), lambda_i is the optimal
    beta of :func:`moment_step`, d bound / d drift: one unit of drift avoided on task i is worth beta units of current
    loss. A task whose step is vacuous has price 0 at the margin; one without drift an infinite price, cut at
    ``max_weight``. Where one number is needed, weigh them by the tasks' shares of the training data.

    Raises ValueError on unequal lengths, no task, or values out of range.
    """
    if len(contrastive) != len(drift) or not len(contrastive):
        raise ValueError(
            f"contrastive and drift need one value per past task, got {len(contrastive)} and {len(drift)} values"
        )
    max_weight = checked("max_weight", max_weight, 0.0, 1e12)
    return tuple(
        min(moment_step(contrastive=loss, drift=kl, geometry=geometry).beta, max_weight)
        for loss, kl in zip(contrastive, drift, strict=True)
    )
