"""The Theorem 1 form: against a hand computation, and on simulated runs where the truth is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cila_bound import Geometry, LossLog, theorem1
from tests.simulate import simulate

GEOMETRY = Geometry(0.5, 1)  # B = 4
LOSSES, WEIGHTS = [0.5, 0.8, 0.9], [0.0, 1.0, 2.0]
SHARES = [[1.0], [0.25, 0.75], [0.3, 0.1, 0.6]]


def test_against_hand_computation() -> None:
    """gamma = 1, min(.75, 1 x .25), min(.6, 2 x .1); terms 16 x .5, 4 x .8 / .25, .9 / .2."""
    result = theorem1(LOSSES, WEIGHTS, SHARES, GEOMETRY)
    assert result.alpha == 4.0
    assert result.gammas == pytest.approx((1.0, 0.25, 0.2))
    assert result.terms == pytest.approx((8.0, 12.8, 4.5))
    assert result.upper == pytest.approx(25.3)
    assert result.clipped_upper == pytest.approx(3 * GEOMETRY.ceiling)
    assert result.vacuous


def test_current_task_alone_has_larger_gammas() -> None:
    """gamma = 1, min(1, 8 x .25), min(1, 2 x .1)."""
    result = theorem1(LOSSES, [0.0, 8.0, 2.0], SHARES, GEOMETRY, contrastive_over="current")
    assert result.gammas == pytest.approx((1.0, 1.0, 0.2))
    assert result.upper == pytest.approx(8.0 + 4 * 0.8 + 4.5)


def test_constants_are_arguments() -> None:
    result = theorem1(LOSSES, WEIGHTS, SHARES, GEOMETRY, alpha=2.0, eta=0.25, gammas=[1.0, 0.5, 0.5])
    assert result.upper == pytest.approx(4 * 0.5 + 2 * 0.8 / 0.5 + 0.9 / 0.5 + 0.25)


def test_alpha_is_at_least_one() -> None:
    assert theorem1(LOSSES, WEIGHTS, SHARES, Geometry(5.0, 1)).alpha == 1.0


def test_lower_against_hand_computation() -> None:
    """S_1 <= .5: (L_2 - lambda (.75 ceiling + .25 x 4 x .5)) / m, m = max(1, (1 + lambda) .25), max(1, lambda .25)."""
    for weight, mixture, current in ((1.0, 1.0, 1.0), (6.0, 1.75, 1.5)):
        for over, m in (("mixture", mixture), ("current", current)):
            result = theorem1(LOSSES[:2], [0.0, weight], SHARES[:2], GEOMETRY, contrastive_over=over)
            assert result.lower == pytest.approx((0.8 - weight * (0.75 * GEOMETRY.ceiling + 0.5)) / m)
            assert result.clipped_lower == pytest.approx(2 * GEOMETRY.floor)


def test_lower_with_eta_and_a_third_task() -> None:
    """S_2 <= 4 x .5 + .8 / .25 + eta = 5.7, less than 2 ceilings; k = .3, m = max(1, 1.5 x .3)."""
    weights = [0.0, 1.0, 0.5]
    result = theorem1(LOSSES, weights, SHARES, GEOMETRY, eta=0.5)
    assert result.lower == pytest.approx(0.9 - 0.5 * (0.6 * GEOMETRY.ceiling + 0.3 * 4 * 5.7))


def test_default_holds_when_the_contrastive_loss_is_over_the_current_task() -> None:
    """One tuple a task, K = 1: gap 4 -> 4 on task 1, 0 -> -2 on task 2; little distillation: the lower side bites."""

    def loss(gap: float) -> float:
        return math.log1p(math.exp(-gap))

    def cross_entropy(teacher: float, student: float) -> float:
        p = 1 / (1 + math.exp(-teacher))
        return p * loss(student) + (1 - p) * loss(-student)

    distillation = 0.5 * (cross_entropy(4, 4) + cross_entropy(0, -2))
    losses, weights, shares = [loss(4), loss(-2) + 0.1 * distillation], [0.0, 0.1], [[1.0], [0.5, 0.5]]
    truth = loss(4) + loss(-2)
    for over in ("mixture", "current"):
        result = theorem1(losses, weights, shares, GEOMETRY, contrastive_over=over)
        assert 1.9 < result.lower <= truth <= result.upper


def test_one_task_is_exact() -> None:
    result = theorem1([0.7], [0.0], [[1.0]], GEOMETRY)
    assert (result.lower, result.upper) == (0.7, 0.7)


def test_no_distillation_says_nothing() -> None:
    nothing = theorem1([0.0, 0.0, 0.0], [0.0] * 3, SHARES, GEOMETRY, contrastive_weights=[0.0] * 3)
    assert (nothing.upper, nothing.lower) == (math.inf, -math.inf)  # a loss of 0 because nothing was trained on
    assert theorem1(LOSSES, [0.0, 0.0, 1.0], SHARES, GEOMETRY).upper == math.inf
    assert theorem1(LOSSES, WEIGHTS, [[1.0], [0.0, 1.0], SHARES[2]], GEOMETRY).upper == math.inf


def test_many_tasks_do_not_overflow() -> None:
    n = 400
    shares = [[1.0 / t] * t for t in range(1, n + 1)]
    assert theorem1([0.5] * n, [0.0] + [1.0] * (n - 1), shares, Geometry(0.01, 1)).upper == math.inf


def of_log(log: LossLog, over: str) -> tuple[float, float, float]:
    """(lower, truth, upper) for a simulated log; with "mixture", L_train is rebuilt from the measurements."""
    n = log.last_task
    records = [log.training(t) for t in range(1, n + 1)]
    train_losses = [record.loss for record in records]
    if over == "mixture":
        for t, record in enumerate(records[1:], start=2):
            mean = sum(log.measurement(t, i, "heldout").contrastive.mean for i in range(1, t + 1)) / t
            train_losses[t - 1] = mean + record.distill_weight * record.distillation
    result = theorem1(
        train_losses,
        [record.distill_weight for record in records],
        [record.mixture_weights for record in records],
        log.geometry,
        contrastive_over=over,
    )
    truth = sum(log.test(n, i).contrastive.mean for i in range(1, n + 1))
    return result.lower, truth, result.upper


@pytest.mark.parametrize("over", ["mixture", "current"])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("distill_weight", [0.1, 1.0, 4.0])
def test_holds_on_simulated_runs(over: str, temperature: float, distill_weight: float) -> None:
    """Training, past and test tuples are one sample, so the theorem holds exactly. Temperature 5: B < 1, alpha = 1."""
    for seed in range(3):
        for n_tasks in (1, 2, 5):
            log = simulate(n_tasks, 2, temperature, seed=seed, drift=0.4, distill_weight=distill_weight)
            lower, truth, upper = of_log(log, over)
            assert lower - 1e-9 <= truth <= upper + 1e-9


@given(st.integers(0, 2), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_monotone(index: int, more_loss: float, more_weight: float) -> None:
    """Up in every training loss and in alpha and eta, down in every distillation weight."""
    base = theorem1(LOSSES, WEIGHTS, SHARES, GEOMETRY).upper
    losses = [loss + more_loss * (i == index) for i, loss in enumerate(LOSSES)]
    assert theorem1(losses, WEIGHTS, SHARES, GEOMETRY).upper >= base
    weights = [w + more_weight * (i == index and i > 0) for i, w in enumerate(WEIGHTS)]
    assert theorem1(LOSSES, weights, SHARES, GEOMETRY).upper <= base
    assert theorem1(LOSSES, WEIGHTS, SHARES, GEOMETRY, alpha=4.0 + more_loss).upper >= base
    assert theorem1(LOSSES, WEIGHTS, SHARES, GEOMETRY, eta=more_loss).upper >= base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_losses": []}, "train_losses is empty"),
        ({"train_losses": [0.5, math.nan, 0.9]}, "train_losses must hold finite numbers >= 0, got nan"),
        ({"distill_weights": [0.0, 1.0]}, "distill_weights must have one entry per task \\(3\\), got 2"),
        ({"distill_weights": [1.0, 1.0, 1.0]}, "distill_weights\\[0\\] must be 0"),
        ({"mixture_weights": [[1.0], [0.5, 0.6], SHARES[2]]}, "mixture_weights\\[1\\] must be 2 shares"),
        ({"alpha": 0.0}, "alpha must be finite and > 0"),
        ({"gammas": [1.0, -1.0, 1.0]}, "gammas must be 3 numbers >= 0"),
        ({"contrastive_over": "both"}, "got 'both'"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {"train_losses": LOSSES, "distill_weights": WEIGHTS, "mixture_weights": SHARES, "geometry": GEOMETRY}
    with pytest.raises(ValueError, match=message):
        theorem1(**(arguments | change))
