"""The Theorem 1 form: a bound from nothing but training losses, distillation weights and mixture weights.

Source: Theorem 1 of Wen et al., "Provable Contrastive Continual Learning" (ICML 2024) for the form

    sum_i L_con(f_T; D_i)  <=  alpha^(T-1) L_train(f_1) + sum_{t=2..T} alpha^(T-t) / gamma_t L_train(f_t) + eta,

with a lower bound of the same kind. The paper's text gives alpha, gamma and eta for its own assumptions; the defaults
here are derived in this project (docs/theory.md) and all of them are arguments, so that other constants can be put
in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cila_bound.geometry import Geometry


@dataclass(frozen=True)
class Theorem1:
    """lower <= sum_{i=1..T} L_con(f_T; D_i) <= upper, in nats and unclipped, with every constant used.

    ``terms`` holds what each task's training loss adds to ``upper``; ``clipped_upper`` and ``clipped_lower`` are
    moved into [T floor, T ceiling]. ``vacuous``: upper >= T ceiling, so the bound says nothing.
    """

    upper: float
    lower: float
    alpha: float
    eta: float
    gammas: tuple[float, ...]
    terms: tuple[float, ...]
    geometry: Geometry

    @property
    def clipped_upper(self) -> float:
        return min(self.upper, len(self.terms) * self.geometry.ceiling)

    @property
    def clipped_lower(self) -> float:
        return max(self.lower, len(self.terms) * self.geometry.floor)

    @property
    def vacuous(self) -> bool:
        return self.upper >= len(self.terms) * self.geometry.ceiling


def theorem1(
    train_losses: Sequence[float],
    distill_weights: Sequence[float],
    mixture_weights: Sequence[Sequence[float]],
    geometry: Geometry,
    alpha: float | None = None,
    eta: float = 0.0,
    *,
    gammas: Sequence[float] | None = None,
    contrastive_weights: Sequence[float] | None = None,
    contrastive_over: Literal["mixture", "current"] = "mixture",
) -> Theorem1:
    """Evaluates the Theorem 1 form for T = len(train_losses) tasks.

    Assumptions: L_train(f_t) = w_t L_con(f_t; .) + lambda_t L_dis(f_t; f_{t-1}, mixture), lambda_1 = 0, both models
    with unit-norm embeddings and one temperature; task i has share k_{t,i} = ``mixture_weights[t-1][i-1]`` of the
    data of task t, and w_t = ``contrastive_weights[t-1]`` (default 1). L_con is taken over the current task alone
    ("current"), or over the mixture or either ("mixture", the default: both sides hold in both cases).

    Defaults: alpha = max(B, 1) with B = 2 / temperature, eta = 0, gamma_1 = w_1 and, for t >= 2,
    gamma_t = min(w_t k_{t,t}, lambda_t min_{i<t} k_{t,i}), with k_{t,t} replaced by 1 for "current". A gamma of 0 (no
    distillation, or a task without data) makes the bound infinite: then training losses alone say nothing.

    Proof of the upper side. Let S_t = sum_{i<=t} L_con(f_t; D_i). By the linear step,
    S_t <= L_con(f_t; D_t) + sum_{i<t} [B L_con(f_{t-1}; D_i) + L_dis(f_t; f_{t-1}, D_i)]
        <= alpha S_{t-1} + L_train(f_t) / gamma_t.

    Proof of the lower side. The linear step also says L_dis(D_i) <= L_con(f_T; D_i) + B L_con(f_{T-1}; D_i). With
    k = max_{i<T} k_{T,i}, put into L_train(f_T), this gives
    L_train(f_T) <= m S_T + lambda_T k alpha S_{T-1} + lambda_T k_{T,T} ceiling,
    where m = max(w, (w + lambda) k) is at least the total weight of any one L_con(f_T; D_i); max(w, lambda k) for
    "current". Solve for S_T, with S_{T-1} at its upper bound. Both sides are equalities at T = 1.

    Raises ValueError on unequal lengths, negative or non-finite losses or weights, shares that do not sum to 1,
    lambda_1 != 0, alpha <= 0 or an unknown ``contrastive_over``.
    """
    n_tasks = len(train_losses)
    if n_tasks == 0:
        raise ValueError("train_losses is empty: give one training loss per task")
    weights = [1.0] * n_tasks if contrastive_weights is None else list(contrastive_weights)
    for name, values in (
        ("distill_weights", distill_weights),
        ("mixture_weights", mixture_weights),
        ("contrastive_weights", weights),
    ):
        if len(values) != n_tasks:
            raise ValueError(f"{name} must have one entry per task ({n_tasks}), got {len(values)}")
    for name, numbers in (
        ("train_losses", train_losses),
        ("distill_weights", distill_weights),
        ("contrastive_weights", weights),
    ):
        for value in numbers:
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must hold finite numbers >= 0, got {value!r}")
    if distill_weights[0] != 0.0:
        raise ValueError(f"distill_weights[0] must be 0 (task 1 has no previous model), got {distill_weights[0]!r}")
    if contrastive_over not in ("mixture", "current"):
        raise ValueError(f"contrastive_over must be 'mixture' or 'current', got {contrastive_over!r}")
    for t, shares in enumerate(mixture_weights, start=1):
        if (
            len(shares) != t
            or not all(math.isfinite(k) and k >= 0.0 for k in shares)
            or abs(math.fsum(shares) - 1.0) > 1e-6
        ):
            raise ValueError(f"mixture_weights[{t - 1}] must be {t} shares >= 0 with sum 1, got {list(shares)!r}")
    if alpha is None:
        alpha = max(geometry.max_gap, 1.0)
    if not (math.isfinite(alpha) and alpha > 0.0 and math.isfinite(eta)):
        raise ValueError(f"alpha must be finite and > 0 and eta finite, got alpha = {alpha!r}, eta = {eta!r}")

    if gammas is None:
        gammas = [
            _gamma(w, weight, shares, contrastive_over)
            for w, weight, shares in zip(distill_weights, weights, mixture_weights, strict=True)
        ]
    if len(gammas) != n_tasks or not all(g >= 0.0 for g in gammas):
        raise ValueError(f"gammas must be {n_tasks} numbers >= 0, got {list(gammas)!r}")

    terms = tuple(
        _product(_power(alpha, n_tasks - t), loss, g)
        for t, (loss, g) in enumerate(zip(train_losses, gammas, strict=True), 1)
    )
    upper = math.fsum(terms) + eta if all(map(math.isfinite, terms)) else math.inf

    previous_upper = 0.0
    if n_tasks > 1:
        earlier = math.fsum(terms[:-1]) / alpha if all(map(math.isfinite, terms[:-1])) else math.inf
        previous_upper = min(earlier + eta, (n_tasks - 1) * geometry.ceiling)
    *past, current = mixture_weights[-1]
    past_share, distill, weight = max(past, default=0.0), distill_weights[-1], weights[-1]
    multiplicity = max(weight, (weight * (contrastive_over == "mixture") + distill) * past_share)
    surplus = train_losses[-1] - distill * (current * geometry.ceiling + past_share * alpha * previous_upper)
    lower = surplus / multiplicity if multiplicity > 0.0 else -math.inf
    return Theorem1(upper, lower, alpha, eta, tuple(gammas), terms, geometry)


def _gamma(distill_weight: float, contrastive_weight: float, shares: Sequence[float], contrastive_over: str) -> float:
    own = contrastive_weight * (shares[-1] if contrastive_over == "mixture" else 1.0)
    return min(own, distill_weight * min(shares[:-1])) if len(shares) > 1 else own


def _power(alpha: float, exponent: int) -> float:
    try:
        return alpha**exponent
    except OverflowError:
        return math.inf


def _product(power: float, loss: float, gamma: float) -> float:
    if gamma == 0.0:
        return math.inf  # even of a loss of 0, which is that of a term which was not trained on
    return power * loss / gamma if loss else 0.0
