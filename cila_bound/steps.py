"""One-step inequalities: what the logs of one model update say about the new contrastive loss.

Setting. D is any distribution of tuples (anchor, positive, K negatives). For one tuple p and q are the softmax
distributions over the K + 1 candidates under the previous model f_{t-1} (the teacher) and the current model f_t (the
student), at one temperature; index 0 is the positive. All means are over D, in nats:

    contrastive   L_con(f_{t-1}; D) = E[-log p_0]           of the *previous* model: the argument ``contrastive`` below
    distillation  L_dis(f_t; f_{t-1}, D) = E[-sum_j p_j log q_j]
    drift         KL(f_t; f_{t-1}, D) = E[sum_j p_j log(p_j / q_j)] = distillation - teacher entropy
    miss          r_t(D) = E[1 - q_0]                       probability given to anything but the positive

Every step returns ``lower <= L_con(f_t; D) <= upper``. They hold for every D, so also for the empirical distribution
of the tuples that a log was measured on, without any sampling error. Values are not clipped to [floor, ceiling].

All arguments are keywords; a value outside its legal range raises ValueError that names it.

Source: the linear form is that of Wen et al., "Provable Contrastive Continual Learning" (ICML 2024); constants and
the other steps are derived in this project (docs/theory.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from cila_bound._moment import solve_lower, solve_upper
from cila_bound.geometry import Geometry, checked, checked_array


@dataclass(frozen=True)
class Step:
    """lower <= L_con(f_t; D) <= upper, in nats."""

    upper: float
    lower: float


@dataclass(frozen=True)
class PinskerStep(Step):
    """A step that also bounds the miss probability of the new model: r_t(D) <= miss_probability."""

    miss_probability: float


@dataclass(frozen=True)
class MomentStep(Step):
    """A step with the coefficients of its upper side: upper = alpha x contrastive + beta x drift + eta.

    beta is the marginal price of drift, d upper / d drift. With drift = 0, beta is infinite (and beta x drift counts
    as 0). A vacuous upper side has alpha = beta = 0 and eta = ceiling.
    """

    alpha: float
    beta: float
    eta: float


@dataclass(frozen=True)
class PointwiseStep(Step):
    """A step from per-tuple logs; ``upper_per_tuple`` and ``lower_per_tuple`` have shape (n,)."""

    upper_per_tuple: np.ndarray
    lower_per_tuple: np.ndarray


def linear_step(*, contrastive: float, distillation: float, geometry: Geometry) -> Step:
    """L_dis - B L_con(f_{t-1}) <= L_con(f_t) <= L_dis + B L_con(f_{t-1}), B = 2 / temperature.

    Proof: -log q_0 = l_dis + sum_{j>=1} p_j (s_j - s_0), each gap is at most B, and 1 - p_0 <= -log p_0.
    Never tight unless both models are perfect. ``contrastive`` may be any upper bound on L_con(f_{t-1}) >= 0.
    """
    contrastive = checked("contrastive", contrastive, 0.0, math.inf)
    distillation = checked("distillation", distillation, geometry.floor, geometry.ceiling)
    slack = geometry.max_gap * contrastive
    return Step(upper=distillation + slack, lower=distillation - slack)


def saturating_step(*, contrastive: float, distillation: float, geometry: Geometry) -> Step:
    """|L_con(f_t) - L_dis| <= B (1 - exp(-L_con(f_{t-1}))).

    Proof: as (linear), with 1 - p_0 = 1 - exp(log p_0), concave in -log p_0 (Jensen). Strictly inside (linear) on
    both sides for contrastive > 0, and never more than B away from the distillation loss.
    """
    contrastive = checked("contrastive", contrastive, 0.0, math.inf)
    distillation = checked("distillation", distillation, geometry.floor, geometry.ceiling)
    slack = geometry.max_gap * -math.expm1(-contrastive)
    return Step(upper=distillation + slack, lower=distillation - slack)


def pinsker_step(*, miss_probability: float, distillation: float, drift: float, geometry: Geometry) -> PinskerStep:
    """|L_con(f_t) - L_dis| <= B r_{t-1},  and  r_t <= r_{t-1} + sqrt(KL / 2).

    ``miss_probability`` is r_{t-1}(D) or an upper bound on it, such as 1 - exp(-L_con(f_{t-1})) (Jensen).
    Proof: as (linear) without the last inequality; the miss probability is the probability of an event, so it moves
    by at most the total variation distance, which Pinsker's inequality bounds per tuple and Jensen's on average.
    Unrolled over tasks it grows with the sum of sqrt(KL), not exponentially.
    """
    miss_probability = checked("miss_probability", miss_probability, 0.0, math.inf)
    distillation = checked("distillation", distillation, geometry.floor, geometry.ceiling)
    drift = checked("drift", drift, 0.0, geometry.ceiling)
    slack = geometry.max_gap * miss_probability
    return PinskerStep(
        upper=distillation + slack,
        lower=distillation - slack,
        miss_probability=miss_probability + math.sqrt(drift / 2.0),
    )


def moment_step(*, contrastive: float, drift: float, geometry: Geometry) -> MomentStep:
    """The tightest two-sided step that the two means L_con(f_{t-1}; D) and KL(f_t; f_{t-1}, D) allow.

    upper = sup E[-log q_0] over all joint laws of (p_0, q_0) in [p_min, p_max]^2 with E[-log p_0] <= contrastive and
    E[kl(p_0||q_0)] <= drift, lower the infimum with E[-log p_0] >= contrastive. Some law attains each, so no formula
    in these two numbers is tighter. Non-decreasing in both arguments above, non-decreasing in contrastive and
    non-increasing in drift below.

    Rigour: solved by its Lagrange dual, whose every feasible point is a valid bound; the inner maximum is a closed
    form with a tangent remainder from concavity and a rounding pad, so it is never underestimated (derivation:
    ``cila_bound/_moment.py``).
    """
    contrastive = checked("contrastive", contrastive, geometry.floor, geometry.ceiling)
    drift = checked("drift", drift, 0.0, geometry.ceiling)
    upper = solve_upper(contrastive, drift, geometry)
    lower = solve_lower(contrastive, drift, geometry)
    return MomentStep(upper=upper.bound, lower=lower.bound, alpha=upper.a, beta=upper.b, eta=upper.c)


def pointwise_step(*, contrastive: ArrayLike, drift: ArrayLike, geometry: Geometry) -> PointwiseStep:
    """The mean over tuples of max / min { -log q : kl(p_0||q) <= drift }, from per-tuple logs of shape (n,).

    ``contrastive`` holds -log p_0 of the previous model and ``drift`` the full KL of each tuple. Tight for each tuple
    alone given the two numbers; its means are never outside (moment) at the means of the same logs, so the difference
    of the two is the slack that comes from logging means only. The inverse of the binary kl is bisected and rounded
    outwards.
    """
    surprisal = checked_array("contrastive", contrastive, geometry.floor, geometry.ceiling)
    budget = checked_array("drift", drift, 0.0, geometry.ceiling)
    if surprisal.shape != budget.shape:
        raise ValueError(
            f"contrastive and drift must have one value per tuple, got {surprisal.size} and {budget.size} values"
        )
    u = -surprisal - np.log(-np.expm1(-surprisal))
    u_min, u_max = geometry.log_odds
    upper = np.logaddexp(0.0, -_farthest(u, budget, np.full_like(u, u_min)))
    lower = np.logaddexp(0.0, -_farthest(u, budget, np.full_like(u, u_max)))
    return PointwiseStep(
        upper=float(upper.mean()), lower=float(lower.mean()), upper_per_tuple=upper, lower_per_tuple=lower
    )


def _farthest(u: np.ndarray, budget: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Log-odds v from u towards ``limit``, as far as kl(p||q) <= budget allows; the outer end of the last bracket."""
    p = expit(u)
    inner, outer = u, limit
    for _ in range(80):
        middle = 0.5 * (inner + outer)
        terms = p * (u - middle), np.logaddexp(0.0, middle), -np.logaddexp(0.0, u)
        rounding = 4e-16 * sum(np.abs(term) for term in terms)
        within = sum(terms) - rounding <= budget
        inner, outer = np.where(within, middle, inner), np.where(within, outer, middle)
    return outer
