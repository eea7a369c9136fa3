"""One-step inequalities: on random and extreme tuples, against brute force, another solver and reference values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from cila_bound import Geometry, linear_step, moment_step, pinsker_step, pointwise_step, saturating_step
from cila_bound._moment import lower_atoms, upper_atoms
from tests.simulate import losses, tuple_logits

KINDS = ["uniform", "corners", "good", "bad", "mix"]
GEOMETRIES = [Geometry(temperature, k) for temperature in (0.05, 0.1, 0.5, 1.0) for k in (1, 5, 50)]


def all_steps(values: dict[str, np.ndarray], geometry: Geometry) -> dict[str, tuple[float, float]]:
    """(lower, upper) of every step on the empirical distribution of the tuples."""
    mean = {name: float(value.mean()) for name, value in values.items()}
    contrastive, distillation, drift = mean["teacher_contrastive"], mean["distillation"], mean["drift"]
    steps = {
        "linear": linear_step(contrastive=contrastive, distillation=distillation, geometry=geometry),
        "saturating": saturating_step(contrastive=contrastive, distillation=distillation, geometry=geometry),
        "pinsker": pinsker_step(
            miss_probability=mean["teacher_miss_probability"], distillation=distillation, drift=drift, geometry=geometry
        ),
        "moment": moment_step(contrastive=contrastive, drift=drift, geometry=geometry),
        "pointwise": pointwise_step(
            contrastive=values["teacher_contrastive"], drift=values["drift"], geometry=geometry
        ),
    }
    return {name: (step.lower, step.upper) for name, step in steps.items()}


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_every_step_holds_on_every_distribution(geometry: Geometry, student: str, teacher: str) -> None:
    """n = 1 is a point mass, n = 200 a spread; extreme kinds sit at the ends of every range."""
    rng = np.random.default_rng(0)
    for n in (1, 200):
        q, p = (tuple_logits(rng, n, geometry.n_negatives, geometry.temperature, kind) for kind in (student, teacher))
        values = losses(q, p)
        truth, rounding = values["contrastive"].mean(), 1e-9 * geometry.ceiling
        bounds = all_steps(values, geometry)
        for name, (lower, upper) in bounds.items():
            assert lower - rounding <= truth <= upper + rounding, name
        miss = pinsker_step(
            miss_probability=values["teacher_miss_probability"].mean(),
            distillation=values["distillation"].mean(),
            drift=values["drift"].mean(),
            geometry=geometry,
        ).miss_probability
        assert values["miss_probability"].mean() <= miss + 1e-12
        assert bounds["linear"][0] <= bounds["saturating"][0] <= bounds["saturating"][1] <= bounds["linear"][1]
        loose = 1e-6 * geometry.ceiling  # both round outwards
        assert bounds["moment"][0] - loose <= bounds["pointwise"][0]
        assert bounds["pointwise"][1] <= bounds["moment"][1] + loose


@pytest.mark.parametrize(
    ("temperature", "n_negatives", "contrastive", "drift", "expected"),
    [
        (0.5, 1, 0.6, 0.01, 0.9024),
        (0.5, 1, 1.0, 0.05, 1.8124),
        (1.0, 1, 0.3, 0.05, 0.5756),
        (0.5, 15, 1.0, 0.01, 1.6379),
    ],
)
def test_moment_reference_values(
    temperature: float, n_negatives: int, contrastive: float, drift: float, expected: float
) -> None:
    """Values computed elsewhere, on a 161 x 161 grid, to 5e-4."""
    step = moment_step(contrastive=contrastive, drift=drift, geometry=Geometry(temperature, n_negatives))
    assert step.upper == pytest.approx(expected, abs=5e-4)
    assert step.alpha * contrastive + step.beta * drift + step.eta == pytest.approx(step.upper, rel=1e-12)


def linear_program(contrastive: float, drift: float, geometry: Geometry, side: int, points: int = 81) -> float | None:
    """sup (side 1) or inf (side -1) of E[-log q] over laws on a grid of (p, q): attained, so inside the moment step."""
    p = 1.0 / (1.0 + np.exp(-np.linspace(*geometry.log_odds, points)))
    p, q = (axis.ravel() for axis in np.meshgrid(p, p, indexing="ij"))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    result = linprog(
        side * np.log(q),
        A_ub=[-side * np.log(p), kl],
        b_ub=[side * contrastive, drift],
        A_eq=[np.ones_like(p)],
        b_eq=[1.0],
        method="highs",
    )
    return -side * result.fun if result.status == 0 else None


@pytest.mark.parametrize("geometry", [Geometry(t, k) for t in (0.2, 0.5, 1.0) for k in (1, 15)], ids=str)
@pytest.mark.parametrize("drift", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("position", [0.02, 0.2, 0.6])
def test_moment_against_linear_program(geometry: Geometry, drift: float, position: float) -> None:
    contrastive = geometry.floor + position * (geometry.ceiling - geometry.floor)
    step = moment_step(contrastive=contrastive, drift=drift, geometry=geometry)
    upper, lower = (linear_program(contrastive, drift, geometry, side) for side in (1, -1))
    assert upper is not None
    assert lower is not None
    grid = 0.01 * geometry.ceiling  # 81 points per axis
    assert upper - 1e-9 <= step.upper <= upper + grid
    assert lower - grid <= step.lower <= lower + 1e-9


@pytest.mark.parametrize("geometry", [Geometry(t, k) for t in (0.05, 0.5, 2.0) for k in (1, 50)], ids=str)
def test_dual_constants_are_never_on_the_wrong_side(geometry: Geometry) -> None:
    """C(a, b) is a maximum and c(a, b) a minimum over a box: compare with a fine grid at random and zero prices."""
    rng = np.random.default_rng(0)
    u = np.linspace(*geometry.log_odds, 1501)
    log_p, log_miss = -np.logaddexp(0, -u), -np.logaddexp(0, u)
    kl = np.exp(log_p)[:, None] * (log_p[:, None] - log_p) + np.exp(log_miss)[:, None] * (log_miss[:, None] - log_miss)
    prices = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), *np.exp(rng.normal(0, 1.5, (40, 2)))]
    for a, b in prices:
        upper = max(atom.value for atom in upper_atoms(geometry)(a, b))
        lower = min(atom.value for atom in lower_atoms(geometry)(a, b))
        best = (-log_p + a * log_p[:, None] - b * kl).max()
        worst = (-log_p + a * log_p[:, None] + b * kl).min()
        grid = 2e-3 * (1 + a + b) * geometry.ceiling
        assert best <= upper <= best + grid
        assert worst - grid <= lower <= worst


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from(GEOMETRIES))
def test_moment_is_monotone(x: float, y: float, small: float, large: float, geometry: Geometry) -> None:
    small, large = sorted((small, large))
    low, high = (geometry.floor + z * (geometry.ceiling - geometry.floor) for z in sorted((x, y)))
    base = moment_step(contrastive=low, drift=small, geometry=geometry)
    more_loss = moment_step(contrastive=high, drift=small, geometry=geometry)
    more_drift = moment_step(contrastive=low, drift=large, geometry=geometry)
    tolerance = 1e-9 * geometry.ceiling
    assert more_loss.upper >= base.upper - tolerance
    assert more_loss.lower >= base.lower - tolerance
    assert more_drift.upper >= base.upper - tolerance
    assert more_drift.lower <= base.lower + tolerance
    assert geometry.floor <= base.lower <= low + tolerance
    assert low - tolerance <= base.upper <= geometry.ceiling


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 5), st.floats(0, 5), st.sampled_from(GEOMETRIES))
def test_other_steps_are_monotone(x: float, y: float, small: float, large: float, geometry: Geometry) -> None:
    small, large = sorted((small, large))
    low, high = (geometry.floor + z * (geometry.ceiling - geometry.floor) for z in sorted((x, y)))
    for step in (linear_step, saturating_step):
        base = step(contrastive=small, distillation=low, geometry=geometry)
        more_loss = step(contrastive=large, distillation=low, geometry=geometry)
        more_distillation = step(contrastive=small, distillation=high, geometry=geometry)
        assert more_loss.upper >= base.upper
        assert more_loss.lower <= base.lower
        assert more_distillation.upper >= base.upper
        assert more_distillation.lower >= base.lower
    options = {"distillation": low, "drift": min(small, geometry.ceiling), "geometry": geometry}
    first, second = (pinsker_step(miss_probability=miss, **options) for miss in (small, large))
    assert second.upper >= first.upper
    assert second.lower <= first.lower
    assert second.miss_probability >= first.miss_probability


@given(st.floats(0, 1), st.sampled_from(GEOMETRIES))
def test_no_drift_means_no_change(x: float, geometry: Geometry) -> None:
    """Equality: with kl = 0 both models agree on the positive, so both sides are the old loss."""
    loss = geometry.floor + x * (geometry.ceiling - geometry.floor)
    step = moment_step(contrastive=loss, drift=0.0, geometry=geometry)
    assert (step.lower, step.upper, step.alpha, step.beta, step.eta) == (loss, loss, 1.0, math.inf, 0.0)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_moment_is_attained_by_its_two_tuples(geometry: Geometry) -> None:
    """Tight: mixed so that E[-log p] = l, the dual's two tuples have the bound as E[-log q] and the drift as E[kl]."""
    loss, drift = 0.5 * (geometry.floor + min(geometry.chance, geometry.ceiling)), 0.02
    step = moment_step(contrastive=loss, drift=drift, geometry=geometry)
    if step.upper == geometry.ceiling:
        assert step.beta == 0.0
        return
    bad, good = upper_atoms(geometry)(step.alpha, step.beta)
    weight = (loss - good.surprisal) / (bad.surprisal - good.surprisal)
    assert 0.0 < weight < 1.0
    assert weight * bad.kl + (1 - weight) * good.kl == pytest.approx(drift, rel=1e-5)
    values = [atom.value + step.alpha * atom.surprisal + step.beta * atom.kl for atom in (bad, good)]  # -log q
    assert weight * values[0] + (1 - weight) * values[1] == pytest.approx(step.upper, rel=1e-7)


def test_beta_is_the_price_of_drift() -> None:
    geometry = Geometry(0.5, 1)
    middle = moment_step(contrastive=0.6, drift=0.01, geometry=geometry)
    above = moment_step(contrastive=0.6, drift=0.01 + 1e-6, geometry=geometry)
    below = moment_step(contrastive=0.6, drift=0.01 - 1e-6, geometry=geometry)
    assert (above.upper - below.upper) / 2e-6 == pytest.approx(middle.beta, rel=1e-4)


def test_pointwise_inverts_the_binary_divergence() -> None:
    geometry = Geometry(0.5, 2)
    p = np.array([0.3, 0.6])
    drift = np.array([0.02, 0.3])
    step = pointwise_step(contrastive=-np.log(p), drift=drift, geometry=geometry)
    for bound in (step.upper_per_tuple, step.lower_per_tuple):
        q = np.exp(-bound)
        kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
        assert kl == pytest.approx(drift, rel=1e-9)
    assert np.all(step.lower_per_tuple < -np.log(p))
    assert np.all(step.upper_per_tuple > -np.log(p))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: linear_step(contrastive=-1.0, distillation=0.5, geometry=g), "contrastive must lie in"),
        (lambda g: linear_step(contrastive=math.nan, distillation=0.5, geometry=g), "got nan"),
        (
            lambda g: saturating_step(contrastive=1.0, distillation=99.0, geometry=g),
            "distillation must lie in .* got 99.0",
        ),
        (lambda g: pinsker_step(miss_probability=-0.1, distillation=0.5, drift=0.1, geometry=g), "miss_probability"),
        (lambda g: moment_step(contrastive=99.0, drift=0.1, geometry=g), "contrastive must lie in .* got 99.0"),
        (lambda g: moment_step(contrastive=1.0, drift=-0.1, geometry=g), "drift must lie in .* got -0.1"),
        (lambda g: moment_step(contrastive="high", drift=0.1, geometry=g), "must be a number, got 'high'"),
        (lambda g: pointwise_step(contrastive=[0.5], drift=[0.1, 0.2], geometry=g), "got 1 and 2 values"),
        (lambda g: pointwise_step(contrastive=[], drift=[], geometry=g), "non-empty"),
        (lambda g: pointwise_step(contrastive=[0.5, math.nan], drift=[0.1, 0.2], geometry=g), "got nan"),
    ],
)
def test_refuses(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(Geometry(0.5, 1))
