"""The rigorous mode against the fast one and against samples; the one-step inequalities proven on whole boxes.

``python -m pytest tests/test_rigorous.py -s -k margins`` prints every proof with its margin.
"""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from flint import arb, ctx, fmpz_mpoly, fmpz_mpoly_ctx
from hypothesis import given
from hypothesis import strategies as st

from cila_bound import Geometry, moment_step, pointwise_step, rigorous
from cila_bound._moment import lower_atoms, solve_lower, solve_upper, upper_atoms
from cila_bound.rigorous import enclose_lower, enclose_upper, rigorous_moment_step
from tests.prover import RefutedError, Statement, UndecidedError, prove, sigmoid, softplus, square

TEMPERATURES = (0.02, 0.1, 0.5, 1.0, 10.0)
PRICES = [
    *[(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.3, 0.7), (1.0, 1.0), (1.5, 1.0), (2.0, 3.0), (40.0, 1.0001)],
    *[(1.0001, 100.0), (0.9, 1e4), (1.0 + 1e-6, 1e6), (1.0 - 1e-9, 1e9), (5.0, 1e12)],
]
CEILING = 20.0000001  # of K = 1 at temperature 0.1


# ---- Proofs. p = sigmoid(u), q = sigmoid(v); with B a side of the box, u = B x and v = B y.

ANY_TEMPERATURE = (0.2, 20.0)  # B at temperature 10 and 0.1
SCALED = "u, v in [-B, B], B in [0.2, 20]"


def lemma(side: int, *, clear: float, factor: float = 1.0) -> Statement:
    """factor B (1 - p) - side (l_con - l_dis), at a distance from the edge v = -side B, where it is zero."""

    def margin(x: arb, y: arb, b: arb) -> arb:
        miss, v = sigmoid(-b * x), b * y
        distillation = (1 - miss) * softplus(-v) + miss * softplus(v)
        return factor * b * miss - side * (softplus(-v) - distillation)

    def gradient(x: arb, y: arb, b: arb) -> Sequence[arb]:
        p, miss, height = sigmoid(b * x), sigmoid(-b * x), factor + side * y
        return -b * b * p * miss * height, side * b * miss, height * miss * (1 - b * x * p)

    y = (-clear, 1.0) if side == 1 else (-1.0, clear)
    sides = [(-1.0, 1.0), y, ANY_TEMPERATURE]
    return Statement(
        f"lemma = saturating per tuple, {_side(side)}", f"{SCALED}, |v| <= {clear} B", sides, margin, gradient
    )


def linear(side: int, *, factor: float = 1.0) -> Statement:
    """factor B (-log p) - side (l_con - l_dis)."""

    def margin(x: arb, y: arb, b: arb) -> arb:
        miss, v = sigmoid(-b * x), b * y
        distillation = (1 - miss) * softplus(-v) + miss * softplus(v)
        return factor * b * softplus(-b * x) - side * (softplus(-v) - distillation)

    def gradient(x: arb, y: arb, b: arb) -> Sequence[arb]:
        miss, height = sigmoid(-b * x), factor + side * y
        slope = height - side * y * miss
        return -b * b * miss * slope, side * b * miss, factor * _excess(b * x) + miss * (height - b * x * slope)

    return Statement(f"linear, {_side(side)}", SCALED, [(-1.0, 1.0), (-1.0, 1.0), ANY_TEMPERATURE], margin, gradient)


def surprise_exceeds_miss() -> Statement:
    def gradient(x: arb, b: arb) -> Sequence[arb]:
        return -b * square(sigmoid(-b * x)), -x * square(sigmoid(-b * x))

    sides = [(-1.0, 1.0), ANY_TEMPERATURE]
    return Statement("-log p > 1 - p", SCALED, sides, lambda x, b: _excess(b * x), gradient)


def cofactor() -> Statement:
    """What B - |v| is multiplied with in the lemma."""

    def gradient(x: arb, b: arb) -> Sequence[arb]:
        slope = -sigmoid(b * x) * sigmoid(-b * x)
        return b * slope, x * slope

    sides = [(-1.0, 1.0), ANY_TEMPERATURE]
    return Statement("lemma, margin / (B - |v|)", SCALED, sides, lambda x, b: sigmoid(-b * x), gradient)


def saturation_is_concave() -> Statement:
    """- d2/dl2 (1 - exp(-l))."""

    def margin(loss: arb) -> arb:
        return (-loss).exp()

    where = f"l in [0, {CEILING}]"
    return Statement("saturating, Jensen", where, [(0.0, CEILING)], margin, lambda loss: [-margin(loss)])


def root_is_concave() -> Statement:
    """- d2/dk2 sqrt(k / 2), with k = exp(t)."""

    def margin(t: arb) -> arb:
        return (-1.5 * t).exp() / arb(32).sqrt()

    return Statement("pinsker, Jensen", "kl in [4e-18, 22]", [(-40.0, 3.1)], margin, lambda t: [-1.5 * margin(t)])


def pinsker(side: int, *, constant: float = 2.0, near: float = 0.1) -> Statement:
    """kl(p||q) - constant (p - q)^2, in u and d = u - v, off the diagonal, where it is zero."""

    def margin(u: arb, d: arb) -> arb:
        p, miss, v = sigmoid(u), sigmoid(-u), u - d
        kl = p * (softplus(-v) - softplus(-u)) + miss * (softplus(v) - softplus(u))
        return kl - constant * (p - sigmoid(v)) ** 2

    def gradient(u: arb, d: arb) -> Sequence[arb]:
        p, miss, q = sigmoid(u), sigmoid(-u), sigmoid(u - d)
        gap = p - q
        along = p * miss * d - gap - 2 * constant * gap**2 * (miss - q)
        return along, gap * (1 - constant / 2 + 2 * constant * square(q - 0.5))

    sides = [(-20.0, 20.0), (near, 40.0) if side == 1 else (-40.0, -near)]
    return Statement(
        f"pinsker, p {'>' if side == 1 else '<'} q", f"u in [-20, 20], {near} <= |u - v| <= 40", sides, margin, gradient
    )


def moment(side: int, geometry: Geometry, contrastive: float, drift: float, *, change: float = 0.0) -> Statement:
    """C - [-log q + a log p - b kl], or [-log q + a log p + b kl] - c, with the fast step's prices and constant."""
    solution = (solve_upper if side == 1 else solve_lower)(contrastive, drift, geometry)
    assert 0.0 < solution.b < math.inf
    a, b, c = arb(solution.a), arb(solution.b), arb(solution.c) - side * change

    def margin(u: arb, v: arb) -> arb:
        p, miss = sigmoid(u), sigmoid(-u)
        kl = p * (softplus(-v) - softplus(-u)) + miss * (softplus(v) - softplus(u))
        return side * (c - softplus(-v) + a * softplus(-u)) + b * kl

    def gradient(u: arb, v: arb) -> Sequence[arb]:
        p = sigmoid(u)
        return sigmoid(-u) * (b * p * (u - v) - side * a), side * sigmoid(-v) - b * (p - sigmoid(v))

    gap = (2 / arb(geometry.temperature)).upper()
    name = f"moment, {_side(side)}, l = {contrastive}, k = {drift}"
    return Statement(name, f"u, v in [-B, B], temperature {geometry.temperature}", [(-gap, gap)] * 2, margin, gradient)


def _side(side: int) -> str:
    return "upper" if side == 1 else "lower"


def _excess(u: arb) -> arb:
    """-log p - (1 - p), which falls in u: its derivative is -(1 - p)^2."""
    low, high = (softplus(-end) - sigmoid(-end) for end in (u.upper(), u.lower()))
    return low.union(high)


STATEMENTS = [
    *(lemma(side, clear=0.999) for side in (1, -1)),
    cofactor(),
    surprise_exceeds_miss(),
    *(linear(side) for side in (1, -1)),
    saturation_is_concave(),
    *(pinsker(side) for side in (1, -1)),
    root_is_concave(),
    *(
        moment(side, Geometry(temperature, 1), contrastive, drift)
        for temperature, contrastive, drift in (
            *((0.1, 0.05, 0.002), (0.1, 0.7, 1e-4), (0.5, 0.3, 0.02), (0.5, 1.0, 0.05)),
            *((1.0, 0.3, 0.01), (1.0, 0.9, 1e-3)),
        )
        for side in (1, -1)
    ),
]


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda statement: statement.name)
def test_derivatives_of_the_margins(statement: Statement) -> None:
    """By central differences with 100 digits: a proof is worth no more than the derivatives it was given."""
    rng = random.Random(0)
    with ctx.workprec(400):
        step = arb(2) ** -100
        for _ in range(5):
            point = [arb(rng.uniform(float(low), float(high))) for low, high in statement.sides]
            for i, slope in enumerate(statement.gradient(*point)):
                ends = [[x + sign * step * (i == j) for j, x in enumerate(point)] for sign in (1, -1)]
                difference = (statement.margin(*ends[0]) - statement.margin(*ends[1])) / (2 * step)
                assert abs(difference - slope) < 1e-40 * (1 + abs(slope))


def test_margins() -> None:
    print()
    for statement in STATEMENTS:
        proof = prove(statement)
        print(f"{statement.name:44} {statement.where:60} {proof.boxes:6} {proof.margin:10.3g} {proof.seconds:6.2f} s")
        assert proof.margin > 0.0


def test_factorisations() -> None:
    """Where a margin is zero on a set it is a product with known signs; both sides as polynomials, logs as letters."""
    # K = 1: l_con - l_dis = -(1 - p) v with v = log q - log(1 - q): zero margin in the lemma only where |v| = B.
    p, q, log_q, log_miss = letters("p", "q", "log_q", "log_miss")
    assert -log_q + p * log_q + (1 - p) * log_miss == -(1 - p) * (log_q - log_miss)
    # Pinsker: along v, where q' = q (1 - q), the margin has the derivative (q - p) (1 - 2 q)^2, so it is least, and
    # zero, at q = p.
    change = q * (1 - q)
    assert -p * (1 - q) + (1 - p) * q - 4 * (q - p) * change == (q - p) * (1 - 2 * q) ** 2
    # K = 2: l_con - l_dis is the mean gap, each at most B in size, so at most B (1 - p_0) in size.
    p1, p2, s0, s1, s2, log_sum = letters("p1", "p2", "s0", "s1", "s2", "log_sum")
    distillation = (1 - p1 - p2) * (log_sum - s0) + p1 * (log_sum - s1) + p2 * (log_sum - s2)
    assert (log_sum - s0) - distillation == p1 * (s1 - s0) + p2 * (s2 - s0)
    # K = 2: merging both negatives, of shares r and 1 - r of 1 - p_0, takes (1 - p_0) kl(r||s) >= 0 off the divergence.
    p0, r, log_p0, log_q0, log_p, log_q, log_r, log_s, log_rest_r, log_rest_s = letters(
        *("p0", "r", "log_p0", "log_q0", "log_p", "log_q", "log_r", "log_s", "log_rest_r", "log_rest_s")
    )  # log_p, log_q: of 1 - p_0 and 1 - q_0; log_rest_r, log_rest_s: of 1 - r and 1 - s
    first = (1 - p0) * r * ((log_p + log_r) - (log_q + log_s))
    second = (1 - p0) * (1 - r) * ((log_p + log_rest_r) - (log_q + log_rest_s))
    merged = p0 * (log_p0 - log_q0) + (1 - p0) * (log_p - log_q)
    inner = r * (log_r - log_s) + (1 - r) * (log_rest_r - log_rest_s)
    assert p0 * (log_p0 - log_q0) + first + second == merged + (1 - p0) * inner


def letters(*names: str) -> tuple[fmpz_mpoly, ...]:
    return fmpz_mpoly_ctx.get(names, "lex").gens()


@given(st.integers(2, 50), st.floats(0.02, 10.0), st.integers(0, 2**32 - 1))
def test_merging_negatives_lowers_the_divergence(n_negatives: int, temperature: float, seed: int) -> None:
    """For any K by induction from K = 2, proven above; here with random tuples."""
    rng = np.random.default_rng(seed)
    logits = rng.uniform(-1.0, 1.0, (2, 1 + n_negatives)) / temperature
    p, q = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    merged = [np.array([row[0], np.logaddexp.reduce(row[1:])]) for row in (p, q)]
    full, binary = ((np.exp(x) * (x - y)).sum() for x, y in ((p, q), merged))
    assert binary <= full + 1e-13 * (1.0 + 2.0 / temperature)


@pytest.mark.parametrize(
    "wrong",
    [
        *(replace(lemma(side, clear=1.0, factor=0.99), name=f"lemma with 0.99 B, {_side(side)}") for side in (1, -1)),
        *(replace(linear(side, factor=0.99), name=f"linear with 0.99 B, {_side(side)}") for side in (1, -1)),
        *(replace(pinsker(side, constant=2.01), name=f"pinsker with 2.01, {side}") for side in (1, -1)),
        *(moment(side, Geometry(0.5, 1), 0.3, 0.02, change=1e-9) for side in (1, -1)),
    ],
    ids=lambda statement: statement.name,
)
def test_prover_refutes(wrong: Statement) -> None:
    """The counterexample holds: the margin is negative at its corners too, evaluated apart from the search."""
    with pytest.raises(RefutedError) as refuted:
        prove(wrong)
    for end in (0, 1):
        assert wrong.margin(*(side[end] for side in refuted.value.box)) < 0


@pytest.mark.parametrize("tight", [lemma(1, clear=1.0), pinsker(1, near=0.0)], ids=["lemma", "pinsker"])
def test_prover_does_not_accept_a_margin_of_zero(tight: Statement) -> None:
    with pytest.raises(UndecidedError, match="at least"):
        prove(tight, limit=2000)


# ---- The enclosures.


def exactly(side: int, a: float, b: float, u: arb, v: arb) -> arb:
    """side (-log q + a log p) - b kl(p||q), from the definition."""
    p, q = 1 / (1 + (-u).exp()), 1 / (1 + (-v).exp())
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return side * (-q.log() + a * p.log()) - b * kl


def ends(geometry: Geometry) -> tuple[arb, arb]:
    gap, log_k = 2 / arb(geometry.temperature), arb(geometry.n_negatives).log()
    return -log_k - gap, gap - log_k


@pytest.mark.parametrize("n_negatives", [1, 100, 10**6])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_enclosures_hold_and_are_narrow(temperature: float, n_negatives: int) -> None:
    """No sample is outside, also none with p near q, where a high b has its maximum; the width is that of rounding."""
    geometry, rng = Geometry(temperature, n_negatives), random.Random(0)
    with ctx.workprec(800):
        low, high = ends(geometry)
        spread = [low + (high - low) * arb(x) for x in (0.0, 1e-9, 1e-3, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0)]
        for a, b in PRICES:
            near = [u - arb(rng.choice([-1, 1]) * 3.0 ** -rng.randint(0, 25)) for u in spread * 2]
            points = [(u, v) for u in spread for v in spread]
            points += [(u, v) for u, v in zip(spread * 2, near, strict=True) if low <= v <= high]
            for side, (bottom, top, boxes) in ((1, enclose_upper(a, b, geometry)), (-1, enclose_lower(a, b, geometry))):
                values = [exactly(side, a, b, u, v) for u, v in points]
                outer, inner = (top, bottom) if side == 1 else (-bottom, -top)
                assert all(value.lower() <= outer for value in values)
                assert inner <= outer
                terms = (1.0 + a) * geometry.ceiling
                assert outer - inner <= 1e-15 * abs(outer) + 1e-17 * terms
                assert 9 <= boxes < 4000


@pytest.mark.parametrize("n_negatives", [1, 100, 10**6])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_fast_constants_against_enclosures(temperature: float, n_negatives: int) -> None:
    geometry = Geometry(temperature, n_negatives)
    for a, b in PRICES:
        check_fast_constants(a, b, geometry)


@given(
    st.floats(math.log(0.02), math.log(10.0)),
    st.floats(0.0, math.log(1e6)),
    st.floats(-6.0, 6.0),
    st.floats(-12.0, 27.6),
)
def test_fast_constants_against_enclosures_anywhere(
    log_temperature: float, log_negatives: float, log_a: float, log_b: float
) -> None:
    geometry = Geometry(math.exp(log_temperature), int(math.exp(log_negatives)))
    b = math.exp(log_b)
    for a in (math.exp(log_a), 1.0 + math.exp(log_a) / (1.0 + b)):
        check_fast_constants(a, b, geometry)


def check_fast_constants(a: float, b: float, geometry: Geometry) -> None:
    """The fast constant is on the safe side of the whole enclosure, and by no more than its padding."""
    upper = max(atom.value for atom in upper_atoms(geometry)(a, b))
    lower = min(atom.value for atom in lower_atoms(geometry)(a, b))
    above, below = enclose_upper(a, b, geometry), enclose_lower(a, b, geometry)
    padding = 1e-10 * (1.0 + a) * geometry.ceiling
    assert above.high <= upper <= above.low + padding
    assert below.high - padding <= lower <= below.low


def test_enclosure_derivatives() -> None:
    """By central differences: the search drops a box only where these say so."""
    rng = random.Random(0)
    geometry = Geometry(0.3, 7)
    with ctx.workprec(400):
        low, high = ends(geometry)
        step = arb(2) ** -100
        for side in (1, -1):
            problem = rigorous._Problem(side, 1.7, 2.3, geometry, arb)
            for _ in range(5):
                u, v = (low + (high - low) * rng.random() for _ in range(2))
                assert abs(problem.value(u, v)[0] - exactly(side, 1.7, 2.3, u, v)) < 1e-60
                slopes = problem.slopes(rigorous._Box(u, v, u - v, True, True))
                along_u = exactly(side, 1.7, 2.3, u + step, v) - exactly(side, 1.7, 2.3, u - step, v)
                along_v = exactly(side, 1.7, 2.3, u, v + step) - exactly(side, 1.7, 2.3, u, v - step)
                for slope, x, difference in ((slopes[0], u, along_u), (slopes[1], v, along_v)):
                    assert abs(slope / (1 + x.exp()) - difference / (2 * step)) < 1e-40


def test_ends() -> None:
    for temperature, n_negatives in ((0.1, 1), (0.02, 10**6), (0.07, 3)):
        geometry = Geometry(temperature, n_negatives)
        with ctx.workprec(400):
            for found, exact in zip(rigorous._ends(geometry, arb), ends(geometry), strict=True):
                assert found.overlaps(exact)
                assert abs(found - exact) < 1e-100


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_known_constants(temperature: float) -> None:
    """A price of zero leaves a corner: both ends of the enclosure are on its two sides."""
    geometry = Geometry(temperature, 3)
    with ctx.workprec(800):
        ceiling, floor = ((-end).exp().log1p() for end in ends(geometry))
        for a in (0.0, 0.3, 1.0, 7.0):
            low, high, _ = enclose_upper(a, 0.0, geometry)
            assert low <= ceiling - a * floor <= high
            low, high, _ = enclose_lower(a, 0.0, geometry)
            assert low <= floor - a * ceiling <= high
        low, high, _ = enclose_upper(0.0, 5.0, geometry)
        assert low <= ceiling <= high
        low, high, _ = enclose_lower(0.0, 5.0, geometry)
        assert low <= floor <= high


def test_boxes_inside_the_square() -> None:
    """The maximum is never there, so nothing else would notice a wrong bound, or a stationary point thrown away."""
    rng = random.Random(0)
    geometry = Geometry(0.3, 7)
    with ctx.workprec(300):
        low, high = ends(geometry)
        for side in (1, -1):
            for _ in range(40):
                p, d = sigmoid(low + (high - low) * rng.uniform(0.4, 0.6)), side * arb(rng.uniform(0.01, 2.0))
                u, a = (p / (1 - p)).log(), d / -(-d).expm1()  # f_u = f_v = 0 for these
                b = a / (p * abs(d))
                problem = rigorous._Problem(side, 1.0, 1.0, geometry, arb)
                problem.a, problem.b = a, b
                width, thickness = (arb(0, 10.0 ** -rng.randint(0, 9)) for _ in range(2))
                box = rigorous._Box(u + width, u + width - d - thickness, d + thickness, True, True)
                assert problem.may_hold_the_maximum(box)
                middle = box.middle()
                form = problem.mean_value_form(box, *middle, problem.value(*middle)[0])
                for _ in range(5):
                    x = u + width.rad() * rng.uniform(-1, 1)
                    y = x - d - thickness.rad() * rng.uniform(-1, 1)
                    assert form.overlaps(exactly(side, a, b, x, y))


def test_a_search_that_is_cut_short_still_encloses(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(0.1, 1)
    full = enclose_upper(1.5, 3.0, geometry)
    loose = enclose_upper(1.5, 3.0, geometry, tolerance=0.01)
    assert loose.low <= full.low <= full.high < loose.high
    assert loose.high - loose.low < 0.1 * full.high
    assert loose.boxes < full.boxes
    monkeypatch.setattr(rigorous, "_MAX_BOXES", 6)
    short = enclose_upper(1.5, 3.0, geometry)
    assert short.low <= full.low <= full.high < short.high
    assert short.boxes < full.boxes


# ---- The step.

losses = st.tuples(st.floats(math.log(0.02), math.log(10.0)), st.floats(0.0, math.log(1e6)), st.floats(0, 1))


@given(losses, st.floats(-23.0, 1.5), st.sampled_from([1, 5, 20]))
def test_step_agrees_with_the_fast_one(point: tuple[float, float, float], log_drift: float, power: int) -> None:
    geometry = Geometry(math.exp(point[0]), int(math.exp(point[1])))
    contrastive = geometry.floor + point[2] ** power * (geometry.ceiling - geometry.floor)
    drift = min(math.exp(log_drift), geometry.ceiling)
    fast = moment_step(contrastive=contrastive, drift=drift, geometry=geometry)
    proven = rigorous_moment_step(contrastive=contrastive, drift=drift, geometry=geometry)
    rounding = 4e-16 * geometry.ceiling  # of the ceiling and the floor themselves, which the fast step does not pad
    assert (
        proven.upper - rounding <= fast.upper <= proven.upper * (1 + 1e-9) + 1e-11 * (1 + fast.alpha) * geometry.ceiling
    )
    assert proven.lower * (1 - 1e-9) - 1e-11 * geometry.ceiling <= fast.lower <= proven.lower * (1 + 1e-13)
    assert (proven.alpha, proven.beta) == (fast.alpha, fast.beta)
    if proven.beta > 0.0:
        total = proven.alpha * contrastive + proven.beta * drift + proven.eta
        assert proven.upper == pytest.approx(total, rel=1e-12, abs=1e-14 * (1 + proven.alpha) * geometry.ceiling)


def test_step_is_never_inside_the_dual_value() -> None:
    """Both sides, summed anew in exact arithmetic from the enclosures at the same prices."""
    geometry = Geometry(0.5, 15)
    step = rigorous_moment_step(contrastive=1.0, drift=0.01, geometry=geometry)
    prices = solve_lower(1.0, 0.01, geometry)
    with ctx.workprec(300):
        above = step.alpha * arb(1.0) + step.beta * arb(0.01) + enclose_upper(step.alpha, step.beta, geometry).high
        below = prices.a * arb(1.0) - prices.b * arb(0.01) + enclose_lower(prices.a, prices.b, geometry).low
        assert 0 <= step.upper - above < 1e-15
        assert 0 <= below - step.lower < 1e-15
    assert step.upper == pytest.approx(1.6379, abs=5e-4)


def test_step_without_drift_and_vacuous_step() -> None:
    geometry = Geometry(0.1, 1)
    still = rigorous_moment_step(contrastive=0.7, drift=0.0, geometry=geometry)
    assert (still.lower, still.upper, still.alpha, still.beta, still.eta) == (0.7, 0.7, 1.0, math.inf, 0.0)
    beyond = geometry.ceiling * (1.0 + 1e-10)  # by rounding; moved inwards, it would be no bound
    assert rigorous_moment_step(contrastive=beyond, drift=0.0, geometry=geometry).upper == beyond
    lost = rigorous_moment_step(contrastive=0.7, drift=19.0, geometry=geometry)
    assert (lost.alpha, lost.beta, lost.upper) == (0.0, 0.0, lost.eta)
    with ctx.workprec(300):
        low, high = ends(geometry)
        ceiling, floor = (-low).exp().log1p(), (-high).exp().log1p()
        assert lost.lower <= floor
        assert lost.upper >= ceiling
    assert lost.upper == pytest.approx(geometry.ceiling, rel=1e-15)
    assert lost.lower == pytest.approx(geometry.floor, rel=1e-12)


@given(losses, st.floats(-27.0, 1.5), st.sampled_from([1, 5, 20]))
def test_pointwise_step_encloses(point: tuple[float, float, float], log_drift: float, power: int) -> None:
    """One part in 1e13 beyond its ends, kl exceeds the budget or the end of the range is reached; kl grows on the way
    there (its derivative along v is q - p), so nothing beyond is allowed.
    """
    geometry = Geometry(math.exp(point[0]), int(math.exp(point[1])))
    contrastive = geometry.floor + point[2] ** power * (geometry.ceiling - geometry.floor)
    drift = min(math.exp(log_drift), geometry.ceiling)
    step = pointwise_step(contrastive=[contrastive], drift=[drift], geometry=geometry)
    with ctx.workprec(600):
        low, high = ends(geometry)
        surprisal = arb(contrastive)
        p, log_miss = (-surprisal).exp(), (-(-surprisal).expm1()).log()
        for loss, end in ((step.upper * (1 + 1e-13), -low), (step.lower * (1 - 1e-13), -high)):
            log_q, log_rest = -arb(loss), (-(-arb(loss)).expm1()).log()
            kl = p * (-surprisal - log_q) + (1 - p) * (log_miss - log_rest)
            ceiling = end.exp().log1p()
            beyond = loss >= ceiling if loss > contrastive else loss <= ceiling
            assert beyond or kl > drift


# ---- Refusals.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: enclose_upper(-1.0, 1.0, g), "a must be a finite price >= 0, got -1.0"),
        (lambda g: enclose_lower(1.0, math.inf, g), "b must be a finite price >= 0, got inf"),
        (lambda g: enclose_lower(math.nan, 1.0, g), "a must be a finite price >= 0, got nan"),
        (lambda g: enclose_upper(1.0, 1.0, g, tolerance=0.0), r"tolerance must lie in \(0, 1\), got 0.0"),
        (
            lambda g: rigorous_moment_step(contrastive=99.0, drift=0.1, geometry=g),
            "contrastive must lie in .* got 99.0",
        ),
        (lambda g: rigorous_moment_step(contrastive=1.0, drift=-0.1, geometry=g), "drift must lie in .* got -0.1"),
    ],
)
def test_refuses(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(Geometry(0.5, 1))


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flint", None)
    for call in (
        lambda: enclose_upper(1.0, 1.0, Geometry(0.5, 1)),
        lambda: rigorous_moment_step(contrastive=1.0, drift=0.1, geometry=Geometry(0.5, 1)),
    ):
        with pytest.raises(ImportError, match=r"pip install 'cila-bound\[rigorous\]'"):
            call()
