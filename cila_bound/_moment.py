"""The moment bound: the tightest step that the means of a contrastive loss and of a drift allow.

For one tuple let p and q be the probabilities that the previous and the current model give to the positive, both in
[p_min, p_max]. Over all joint laws of (p, q), with kl the binary Kullback-Leibler divergence,

    upper  G(l, k) = sup E[-log q]  s.t.  E[-log p] <= l,  E[kl(p||q)] <= k  =  min_{a,b>=0}  a l + b k + C(a, b)
    lower  g(l, k) = inf E[-log q]  s.t.  E[-log p] >= l,  E[kl(p||q)] <= k  =  max_{a,b>=0}  a l - b k + c(a, b)

    C(a, b) = max_{p,q} [-log q + a log p - b kl(p||q)]          c(a, b) = min_{p,q} [-log q + a log p + b kl(p||q)]

*Every* (a, b) gives a valid bound, so a rough optimum costs tightness, never validity; only C and c have to be
rigorous.

**Closed forms.** Eliminate q for fixed p, and write F(p) for what is left.

Upper. q* = clip((b p - 1)/(b - 1)) if b p > 1, else p_min. Where q* = p_min, i.e. p <= p_1 = (1 + (b-1) p_min)/b, F
is concave and its maximum solves a/p = b log-odds(p)/odds(p_min): a Wright omega value. Beyond p_1, F'(p) = b (a z +
log(1 - z)) with z = 1/(b p): F falls, then rises, so its maximum is at p_1 or p_max. Hence C is the larger of two
numbers: the "bad" tuple (p-hat, p_min) and the "good" tuple (p_max, q*(p_max)).

Lower. q* = clip((1 + b p)/(1 + b)). Where q* = p_max, i.e. p >= p_2 = ((1+b) p_max - 1)/b, F is concave, then convex,
and its only interior minimum solves a/p = b (log-odds(p_max) - log-odds(p)): the principal Lambert W value. Below
p_2, F'(p) = b (a z - log(1 + z)): F rises, then falls, and F' is continuous at p_2, so the minimum is not there.
Hence c is the smallest of three numbers, at p_min, p-hat and p_max.

**Rigour.** p-hat is known to rounding only. On the concave (convex) piece the tangent at p-hat bounds F, so the
remainder |F'(p-hat)| x (length of the piece) is added (subtracted), and so is a rounding pad of a few ulps of every
term summed. No grid is involved. Probabilities are kept as log-odds u, with kl(p||q) = p d - log1p(q expm1(d)), d = u
- v, which loses nothing when p and q are close (large b) or near 0 or 1 (small temperature).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from scipy.optimize import brentq
from scipy.special import lambertw, wrightomega

from cila_bound.geometry import Geometry, expit, softplus

_ULPS = 64 * 2.0**-52
_LOG_MAX_PRICE = math.log(1e12)  # a higher b changes the bound by less than rounding does


class Atom(NamedTuple):
    """One (p, q) tuple: its value in C or c (rounded outwards), -log p and kl(p||q)."""

    value: float
    surprisal: float
    kl: float


Atoms = Callable[[float, float], tuple[Atom, Atom]]


class Solution(NamedTuple):
    """``bound`` = a l + b k + c (upper) or a l - b k + c (lower), with the coefficients that give it."""

    bound: float
    a: float
    b: float
    c: float


def solve_upper(contrastive: float, drift: float, geometry: Geometry) -> Solution:
    """G(l, k) for l = ``contrastive`` in [floor, ceiling], k = ``drift`` >= 0; never below the true supremum."""
    ceiling = geometry.ceiling
    if drift <= 0.0:
        return Solution(contrastive, 1.0, math.inf, 0.0)
    vacuous = Solution(ceiling, 0.0, 0.0, ceiling)
    u_min, _ = geometry.log_odds
    if drift >= _kl(_logit(contrastive), u_min):
        return vacuous  # the drift suffices to move every tuple to the ceiling
    atoms = upper_atoms(geometry)
    a, b = _best_prices(contrastive, drift, atoms, 1.0, -softplus(u_min) - math.log(geometry.p_max - geometry.p_min))
    c = max(atom.value for atom in atoms(a, b))
    bound = (a * contrastive + b * drift + c) * (1.0 + _ULPS)
    return Solution(bound, a, b, c) if bound < ceiling else vacuous


def solve_lower(contrastive: float, drift: float, geometry: Geometry) -> Solution:
    """g(l, k) for l = ``contrastive`` in [floor, ceiling], k = ``drift`` >= 0; never above the true infimum."""
    floor = geometry.floor
    if drift <= 0.0:
        return Solution(contrastive, 1.0, math.inf, 0.0)
    vacuous = Solution(floor, 0.0, 0.0, floor)
    if contrastive <= floor:
        return vacuous
    _, u_max = geometry.log_odds
    atoms = lower_atoms(geometry)
    a, b = _best_prices(contrastive, drift, atoms, 0.0, -softplus(u_max) - math.log(geometry.p_max - geometry.p_min))
    c = min(atom.value for atom in atoms(a, b))
    bound = a * contrastive - b * drift + c
    bound -= _ULPS * (a * contrastive + b * drift + abs(c))
    return Solution(bound, a, b, c) if bound > floor else vacuous


def _best_prices(
    contrastive: float, drift: float, atoms: Atoms, a_start: float, log_free_price: float
) -> tuple[float, float]:
    """The optimal (a, b), by two nested searches.

    For fixed b the best a >= ``a_start`` makes both tuples worth the same: the difference is convex and decreasing in
    a, so Newton's method converges from anywhere, and the last a is a good start. A mixture of the two with mean
    -log p = l then has mean kl = the slope of the optimal value in b, which is monotone: the best b is where that mean
    is k. Below the free price the bound is vacuous.
    """
    a, bad, good = a_start, *atoms(a_start, 1.0)

    def balance(b: float) -> None:
        nonlocal a, bad, good
        for _ in range(100):
            bad, good = atoms(a, b)
            spread = bad.surprisal - good.surprisal
            step = (bad.value - good.value) / spread if spread > 0.0 else -math.inf
            if abs(step) <= 1e-13 * max(a, 1.0) or (a == a_start and step <= 0.0):
                return
            a = max(a + step, a_start)

    def unspent(log_price: float) -> float:
        balance(price(log_price))
        spread = bad.surprisal - good.surprisal
        weight = min(max((contrastive - good.surprisal) / spread, 0.0), 1.0) if spread > 0.0 else 1.0
        return drift - weight * bad.kl - (1.0 - weight) * good.kl

    def price(log_price: float) -> float:
        return math.exp(log_free_price) + math.exp(log_price)

    low, high = log_free_price - 34.0, _LOG_MAX_PRICE
    ends = {low: unspent(low), high: unspent(high)}  # their signs must not change with the last a, by rounding
    if ends[low] >= 0.0:
        best = low
    elif ends[high] <= 0.0:
        best = high
    else:
        best = float(brentq(lambda x: ends[x] if x in ends else unspent(x), low, high, xtol=1e-7, rtol=1e-9))
    balance(price(best))
    return a, price(best)


def upper_atoms(geometry: Geometry) -> Atoms:
    """(a, b) -> the bad and the good tuple of C(a, b); C is the larger of their values."""
    (u_min, u_max), ceiling, p_max, p_min = geometry.log_odds, geometry.ceiling, geometry.p_max, geometry.p_min

    def atoms(a: float, b: float) -> tuple[Atom, Atom]:
        # Good: p = p_max, q* = (b p - 1)/(b - 1), whose log-odds are log(b p - 1) - log(b (1 - p)).
        v = math.log(b * p_max - 1.0) - math.log(b) + softplus(u_max) if b * p_max > 1.0 else u_min
        good = _atom(a, b, u_max, max(v, u_min))
        # Bad: q = p_min and a/p = b (u - u_min): with r = a/b, w = u - u_min - r solves w + log w = log r - u_min - r.
        end = u_max - u_min
        if b > 1.0:
            end = min(end, softplus(ceiling - math.log(b - 1.0)))  # log-odds of p_1
        gap = 0.0
        if a > 0.0:
            gap = a / b + float(wrightomega(math.log(a / b) - u_min - a / b)) if b > 0.0 else end
        slope = a / expit(u_min + gap) - b * gap if gap < end else 0.0
        gap = min(gap, end)
        bad = _atom(a, b, u_min + gap, u_min, gap, remainder=abs(slope) * (expit(u_min + end) - p_min))
        return bad, good

    return atoms


def lower_atoms(geometry: Geometry) -> Atoms:
    """(a, b) -> the bad tuple (p = p_min) and the best other candidate of c(a, b); c is the smaller of their values."""
    (u_min, u_max), ceiling, floor = geometry.log_odds, geometry.ceiling, geometry.floor

    def at(a: float, b: float, u: float, surprisal: float) -> Atom:
        """F at p with q* = (1 + b p)/(1 + b), whose log-odds exceed those of p by log(1 + 1/(b p))."""
        step = min(softplus(surprisal - math.log(b)) if b > 0.0 else math.inf, u_max - u)
        return _atom(a, b, u, u + step, -step, sign=-1.0)

    def atoms(a: float, b: float) -> tuple[Atom, Atom]:
        bad, good = at(a, b, u_min, ceiling), at(a, b, u_max, floor)
        # p-hat: a/p = b (u_max - u): with r = a/b, y = u_max - r - u <= 1 solves y exp(-y) = r exp(r - u_max).
        r = a / b if b > 0.0 else math.inf
        if 0.0 < r < math.inf and math.log(r) + r - u_max <= -1.0:
            gap = r - float(lambertw(-math.exp(math.log(r) + r - u_max)).real)
            if 0.0 < gap < u_max - u_min:
                slope = a / expit(u_max - gap) - b * gap
                good = min(good, _atom(a, b, u_max - gap, u_max, -gap, remainder=abs(slope), sign=-1.0))
        return bad, good

    return atoms


def _atom(
    a: float, b: float, u: float, v: float, gap: float | None = None, *, remainder: float = 0.0, sign: float = 1.0
) -> Atom:
    """-log q + a log p - sign b kl(p||q) at log-odds u of p and v of q, moved by ``remainder`` and rounding in
    direction ``sign``.

    ``gap`` is u - v, where the caller knows it better than by subtraction.
    """
    gap = u - v if gap is None else gap
    kl = _kl(u, v, gap)
    surprisal, loss = softplus(-u), softplus(-v)
    pad = _ULPS * (loss + a * surprisal + b * (kl + expit(u) * abs(gap)))
    return Atom(loss - a * surprisal + sign * (remainder + pad - b * kl), surprisal, kl)


def _kl(u: float, v: float, gap: float | None = None) -> float:
    """kl(p||q) of two Bernoulli laws given by their log-odds."""
    gap = u - v if gap is None else gap
    if abs(gap) > 1.0:
        return max(expit(u) * gap - softplus(u) + softplus(v), 0.0)
    return max(expit(u) * gap - math.log1p(expit(v) * math.expm1(gap)), 0.0)


def _logit(surprisal: float) -> float:
    """log-odds of p from -log p > 0."""
    return -surprisal - math.log(-math.expm1(-surprisal))
