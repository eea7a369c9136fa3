"""The moment bound with a machine-checked proof: ball arithmetic in place of closed forms and rounding pads.

The moment step (docs/theory.md) is valid for every pair of prices (a, b), as long as its constant is not on the wrong
side. With p and q the probabilities of the positive under the previous and the current model, both in [p_min, p_max],

    C(a, b) = max_{p,q} [-log q + a log p - b kl(p||q)]          c(a, b) = min_{p,q} [-log q + a log p + b kl(p||q)]

Here both are enclosed by branch and bound over the square, from these definitions and their derivatives alone; nothing
is shared with the closed forms of ``cila_bound/_moment.py``, which this checks. Every operation is done on balls
(python-flint, ``pip install 'cila-bound[rigorous]'``), so an enclosure is a theorem whatever the rounding, and so are
the ends p_min and p_max, computed from the temperature (a float, taken as exact) and K. The working precision is global
in python-flint: not for several threads at once.

**Method.** Let u, v be the log-odds of p and q, d = u - v, and s = 1 for C, -1 for c. To be maximised is

    f = s (-log q + a log p) - b kl,    f_u = (1 - p) (s a - b p d),    f_v = (1 - q) (b p (1 - exp(-d)) - s)

The maximum lies in a corner, inside an edge or inside the square, and there every derivative along a free coordinate
vanishes. A box is dropped when one of them cannot, and inside the square also when d cannot satisfy both together, (a -
1) (1 - exp(-d)) = d - 1 + exp(-d): without this a large b leaves a long ridge, d ~ 1/(b p), undecided. A box is done
when its mean value form is at most ``tolerance`` above the best value found, and halved otherwise, d in relative terms.

Source: derived in this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from cila_bound._moment import solve_lower, solve_upper
from cila_bound.geometry import Geometry, checked
from cila_bound.steps import MomentStep

if TYPE_CHECKING:
    from flint import arb

_MAX_BOXES = 4096  # at once; beyond, the enclosure is returned as wide as it is


class Enclosure(NamedTuple):
    """low <= constant <= high, in nats, proven; ``boxes`` is how many boxes the proof took."""

    low: float
    high: float
    boxes: int


def enclose_upper(a: float, b: float, geometry: Geometry, *, tolerance: float = 1e-18) -> Enclosure:
    """C(a, b) = max over p, q of -log q + a log p - b kl(p||q), for finite prices a, b >= 0.

    ``tolerance`` is relative to the sum of the three terms' sizes at the maximum; the ends are then rounded outwards
    to floats. Raises ValueError for other prices or a tolerance outside (0, 1), ImportError without python-flint.
    """
    return _enclose(1, a, b, geometry, tolerance)


def enclose_lower(a: float, b: float, geometry: Geometry, *, tolerance: float = 1e-18) -> Enclosure:
    """c(a, b) = min over p, q of -log q + a log p + b kl(p||q); otherwise as :func:`enclose_upper`."""
    low, high, boxes = _enclose(-1, a, b, geometry, tolerance)
    return Enclosure(-high, -low, boxes)


def rigorous_moment_step(*, contrastive: float, drift: float, geometry: Geometry) -> MomentStep:
    """:func:`cila_bound.moment_step` with both sides proven by machine; arguments, result and errors are the same.

    The prices (a, b) are those of the fast step, taken as a hint; their constants are enclosed anew, summed in ball
    arithmetic and rounded outwards. So E[-log p_0] <= ``contrastive`` and E[kl] <= ``drift`` imply E[-log q_0] <=
    ``upper``, and E[-log p_0] >= ``contrastive`` and E[kl] <= ``drift`` imply E[-log q_0] >= ``lower``, both numbers
    read as exact. ``upper`` may exceed alpha x contrastive + beta x drift + eta by rounding.

    Raises ValueError as the fast step does, ImportError without python-flint.
    """
    flint = _flint()
    loss = checked("contrastive", contrastive, geometry.floor, geometry.ceiling)
    checked("drift", drift, 0.0, geometry.ceiling)
    contrastive, drift = float(contrastive), max(float(drift), 0.0)  # not moved inwards: that would not be proven
    if drift == 0.0:  # then p = q almost surely
        return MomentStep(upper=contrastive, lower=contrastive, alpha=1.0, beta=math.inf, eta=0.0)
    upper, lower = solve_upper(loss, drift, geometry), solve_lower(loss, drift, geometry)
    above = enclose_upper(upper.a, upper.b, geometry)
    below = enclose_lower(lower.a, lower.b, geometry)
    with flint.ctx.workprec(_bits(geometry, 1.0)):
        l, k = flint.arb(contrastive), flint.arb(drift)  # noqa: E741
        highest = _float_above(upper.a * l + upper.b * k + above.high)
        lowest = _float_below(lower.a * l - lower.b * k + below.low)
    return MomentStep(upper=highest, lower=lowest, alpha=upper.a, beta=upper.b, eta=above.high)


def _enclose(sign: int, a: float, b: float, geometry: Geometry, tolerance: float) -> Enclosure:
    """The maximum of f (module docstring) over the square, by branch and bound, breadth first."""
    for name, price in (("a", a), ("b", b)):
        if not 0.0 <= price < math.inf:
            raise ValueError(f"{name} must be a finite price >= 0, got {price!r}")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must lie in (0, 1), got {tolerance!r}")
    flint = _flint()
    with flint.ctx.workprec(_bits(geometry, a + b)):
        problem = _Problem(sign, a, b, geometry, flint.arb)
        best = proven = flint.arb("-inf")
        enough, boxes, todo = best, 0, problem.faces()
        while todo:
            boxes += len(todo)
            kept = []
            for box in filter(problem.may_hold_the_maximum, todo):
                u, v = box.middle()
                value, size = problem.value(u, v)
                if problem.holds(box, u, v) and value.lower() > best:
                    best = value.lower()
                    enough = (best + tolerance * size).upper()
                kept.append((problem.mean_value_form(box, u, v, value).upper(), box))
            if len(kept) > _MAX_BOXES:
                enough = flint.arb("inf")
            proven = max([proven, *(bound for bound, _ in kept if bound <= enough)])
            todo = [half for bound, box in kept if bound > enough for half in box.halves()]
        return Enclosure(_float_below(best), _float_above(proven), boxes)


class _Box(NamedTuple):
    """Log-odds u and v, and d = u - v, of a part of the square, of an edge or a corner: what is not free is an end."""

    u: arb
    v: arb
    d: arb
    free_u: bool
    free_v: bool

    def middle(self) -> tuple[arb, arb]:
        """(u, v) of one point; an end stays a ball."""
        if not self.free_v:
            return self.v + self.d.mid() if self.free_u else self.u, self.v
        u = self.u.mid() if self.free_u else self.u
        return u, u - self.d.mid()

    def halves(self) -> list[_Box]:
        """Both halves along d, or along u where that is wider than d, in relative terms, and d is far from 0."""
        far = 2 * self.d.rad() < abs(self.d.mid())
        if self.free_u and self.free_v and far and self.u.rad() * abs(self.d.mid()) > self.d.rad():
            return [self._replace(u=half, v=half - self.d) for half in _halves(self.u)]
        if self.free_v:
            return [self._replace(d=half, v=self.u - half) for half in _halves(self.d)]
        return [self._replace(d=half, u=self.v + half) for half in _halves(self.d)]


class _Problem:
    """f of the module docstring and its derivatives, on boxes of the square."""

    def __init__(self, sign: int, a: float, b: float, geometry: Geometry, ball: type[arb]) -> None:
        self.sign, self.a, self.b = sign, ball(float(a)), ball(float(b))
        self.low, self.high = _ends(geometry, ball)

    def faces(self) -> list[_Box]:
        """The corners, the edges and the square itself."""
        ends, span = (self.low, self.high), self.low.lower().union(self.high.upper())
        corners = [_Box(u, v, u - v, False, False) for u in ends for v in ends]
        edges = [_Box(u, span, u - span, False, True) for u in ends]
        edges += [_Box(span, v, span - v, True, False) for v in ends]
        return [*corners, *edges, _Box(span, span, span - span, True, True)]

    def value(self, u: arb, v: arb) -> tuple[arb, arb]:
        """f and the sum of the sizes of its terms."""
        loss, surprisal = _softplus(-v), _softplus(-u)
        kl = loss - surprisal - _sigmoid(-u) * (u - v)  # = p log(p/q) + (1-p) log((1-p)/(1-q))
        return self.sign * (loss - self.a * surprisal) - self.b * kl, loss + self.a * surprisal + self.b * kl

    def slopes(self, box: _Box) -> tuple[arb, arb]:
        """f_u / (1 - p) and f_v / (1 - q)."""
        price = self.b * _sigmoid(box.u)
        return self.sign * self.a - price * box.d, price * _saturation(box.d) - self.sign

    def may_hold_the_maximum(self, box: _Box) -> bool:
        """False where no point of the domain has vanishing derivatives along the free coordinates."""
        slope_u, slope_v = self.slopes(box)
        for free, x, slope in ((box.free_u, box.u, slope_u), (box.free_v, box.v, slope_v)):
            if free and (x < self.low or x > self.high or not slope.contains(0)):
                return False
        if box.free_u and box.free_v:
            return bool(_excess(box.d).overlaps((self.a - 1) * _saturation(box.d)))
        return True

    def holds(self, box: _Box, u: arb, v: arb) -> bool:
        """Whether a point of the box is surely in the domain."""
        return all(self.low <= x <= self.high for free, x in ((box.free_u, u), (box.free_v, v)) if free)

    def mean_value_form(self, box: _Box, u: arb, v: arb, value: arb) -> arb:
        """All values on the box, from that at (u, v) and the derivatives along d (and u, inside the square)."""
        slope_u, slope_v = self.slopes(box)
        slope_u, slope_v = slope_u * _sigmoid(-box.u), slope_v * _sigmoid(-box.v)
        if box.free_v:
            value -= slope_v * (box.d - box.d.mid())
            return value + (slope_u + slope_v) * (box.u - u) if box.free_u else value
        return value + slope_u * (box.d - box.d.mid()) if box.free_u else value


def _flint() -> ModuleType:
    try:
        import flint
    except ImportError:
        raise ImportError("the rigorous mode needs python-flint: pip install 'cila-bound[rigorous]'") from None
    return flint


def _bits(geometry: Geometry, price: float) -> int:
    """A working precision that leaves digits after every cancellation: of p near 1, and of p near q at a high price."""
    return 192 + 2 * math.ceil(geometry.ceiling) + 2 * max(math.frexp(price)[1], 0)


def _ends(geometry: Geometry, ball: type[arb]) -> tuple[arb, arb]:
    """log-odds of p_min and p_max."""
    gap, log_k = 2 / ball(float(geometry.temperature)), ball(int(geometry.n_negatives)).log()
    return -log_k - gap, -log_k + gap


def _halves(x: arb) -> list[arb]:
    quarter = x.rad() / 2
    unit = (x - x.mid()) / 2  # a ball around zero
    return [x.mid() - quarter + unit, x.mid() + quarter + unit]


def _softplus(x: arb) -> arb:
    return x.exp().log1p()


def _monotone(function: Callable[[arb], arb], x: arb) -> arb:
    return function(x.lower()).union(function(x.upper()))


def _sigmoid(x: arb) -> arb:
    return _monotone(lambda end: 1 / (1 + (-end).exp()), x)


def _saturation(d: arb) -> arb:
    """1 - exp(-d)."""
    return _monotone(lambda end: -(-end).expm1(), d)


def _excess(d: arb) -> arb:
    """d - 1 + exp(-d), convex with minimum 0 at 0."""
    ends = _monotone(lambda end: end + (-end).expm1(), d)
    return ends.union(0) if d.contains(0) else ends


def _float_below(x: arb) -> float:
    number = float(x.lower())
    while not number <= x:
        number = math.nextafter(number, -math.inf)
    return number


def _float_above(x: arb) -> float:
    return -_float_below(-x)
