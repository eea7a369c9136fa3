"""Confidence bounds: coverage by simulation, against independent formulas, and what makes each of them wrong."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from cila_bound import betting, chernoff, effective_size, empirical_bernstein, hoeffding
from cila_bound.concentration import ConfidenceBounds

LOW, HIGH = 0.2, 4.2
REPETITIONS = 4000

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
LAWS: dict[str, tuple[Draw, float]] = {  # shares of the range, and their expectation
    "uniform": (lambda rng, shape: rng.random(shape), 0.5),
    "fair coin": (lambda rng, shape: (rng.random(shape) < 0.5).astype(float), 0.5),
    "two points near 0": (lambda rng, shape: 0.02 * (rng.random(shape) < 0.3), 0.006),
    "rare ceiling": (lambda rng, shape: (rng.random(shape) < 0.02).astype(float), 0.02),
    "heavy mass at the ceiling": (lambda rng, shape: 1.0 - 0.9 * (rng.random(shape) < 0.1), 0.91),
    "small losses": (lambda rng, shape: rng.beta(0.3, 6.0, shape), 0.3 / 6.3),
}


def of(name: str, values: np.ndarray, delta: float, low: float = LOW, high: float = HIGH) -> ConfidenceBounds:
    """One inequality on samples (..., n)."""
    n, mean, variance = values.shape[-1], values.mean(-1), values.var(-1, ddof=1)
    level = {"delta": delta, "low": low, "high": high}
    if name == "betting":
        return betting(values[..., None, :], **level)
    if name == "empirical_bernstein":
        return empirical_bernstein(mean, variance, n, **level)
    return {"hoeffding": hoeffding, "chernoff": chernoff}[name](mean, n, **level)


NAMES = ["hoeffding", "chernoff", "empirical_bernstein", "betting"]


def misses(bounds: ConfidenceBounds, truth: float) -> tuple[int, int]:
    """How often the truth lies below ``lower`` and above ``upper``."""
    return int(np.sum(truth < bounds.lower - 1e-12)), int(np.sum(truth > bounds.upper + 1e-12))


def not_above(count: int, delta: float, n: int = REPETITIONS) -> bool:
    """A miss rate of ``delta`` or less is not refuted; at a level that allows for all the tests in this file."""
    return stats.binomtest(count, n, delta, alternative="greater").pvalue > 1e-5


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "delta"), [(5, 0.2), (30, 0.05), (200, 0.01)])
def test_coverage(law: str, name: str, n: int, delta: float) -> None:
    draw, mean = LAWS[law]
    values = LOW + (HIGH - LOW) * draw(np.random.default_rng(0), (REPETITIONS, n))
    bounds = of(name, values, delta)
    for count in misses(bounds, LOW + (HIGH - LOW) * mean):
        assert not_above(count, delta)
    assert ((bounds.lower >= LOW) & (bounds.upper <= HIGH) & (bounds.lower <= bounds.upper)).all()


def test_coverage_can_be_seen_to_fail() -> None:
    """The normal approximation misses rare losses at the ceiling far too often; the test above would say so."""
    values = LAWS["rare ceiling"][0](np.random.default_rng(0), (REPETITIONS, 30))
    upper = values.mean(-1) + stats.norm.isf(0.05) * values.std(-1, ddof=1) / math.sqrt(30)
    assert not not_above(int(np.sum(upper < 0.02)), 0.05)


def test_bounds_are_as_sharp_as_they_can_be() -> None:
    """Betting and Chernoff miss a fair coin's mean about as often as delta allows their kind to: no hidden slack."""
    values = LAWS["fair coin"][0](np.random.default_rng(1), (REPETITIONS, 200))
    for name in ("chernoff", "betting"):
        rate = sum(misses(of(name, values, 0.2, 0.0, 1.0), 0.5)) / (2 * REPETITIONS)
        assert 0.02 < rate <= 0.2


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("n", "delta"), [(10, 0.05), (35, 0.003), (100, 0.05), (1000, 0.003)])
def test_betting_is_no_wider_than_hoeffding_on_average(law: str, n: int, delta: float) -> None:
    values = LAWS[law][0](np.random.default_rng(0), (400, n))
    widths = {name: float(np.mean(np.subtract(*of(name, values, delta, 0.0, 1.0)[::-1]))) for name in NAMES}
    assert widths["betting"] <= widths["hoeffding"] + 1e-9
    assert widths["chernoff"] <= widths["hoeffding"] + 1e-9
    if law in ("two points near 0", "small losses") and n >= 100:
        assert widths["betting"] < 0.5 * widths["hoeffding"]


def test_rounds_of_shared_samples_are_covered() -> None:
    """Forty ways to cut 60 samples into 20 disjoint tuples: the mean over all tuples is worth 20, not 800."""
    rng, n_logs = np.random.default_rng(0), 2000
    samples = rng.random((n_logs, 60)) < 0.3
    rounds = []
    for _ in range(40):
        part = rng.permuted(samples, axis=1).reshape(n_logs, 20, 3)
        rounds.append((part.sum(-1) >= 2).astype(float))
    values = np.stack(rounds, axis=1)
    truth = 3 * 0.3**2 * 0.7 + 0.3**3
    n = effective_size(60, 1)
    assert n == 20
    level = {"delta": 0.05, "low": 0.0, "high": 1.0}
    mean = values.mean((1, 2))
    for bounds in (hoeffding(mean, n, **level), chernoff(mean, n, **level), betting(values, **level)):
        for count in misses(bounds, truth):
            assert not_above(count, 0.05, n_logs)
    narrow = chernoff(mean, 800, **level)
    assert not not_above(max(misses(narrow, truth)), 0.05, n_logs)  # counting every tuple as independent is wrong


def test_strata_of_different_means_are_covered_in_blocks() -> None:
    """Anchor classes in turn, one with losses near the ceiling: a bet that changes within a block may be beaten."""
    rng = np.random.default_rng(0)
    values = np.empty((REPETITIONS, 1, 40))
    values[..., 0::2] = 0.1 * rng.random((REPETITIONS, 1, 20))
    values[..., 1::2] = rng.random((REPETITIONS, 1, 20)) < 0.9
    bounds = betting(values, delta=0.1, low=0.0, high=1.0, block=2)
    for count in misses(bounds, 0.475):
        assert not_above(count, 0.1)


def test_an_incomplete_block_is_left_out() -> None:
    values = np.array([0.1, 0.9] * 10 + [1.0])
    level = {"delta": 0.05, "low": 0.0, "high": 1.0, "block": 2}
    assert betting(values, **level) == betting(values[:-1], **level)
    assert betting(values, **(level | {"block": 1})) != betting(values[:-1], **(level | {"block": 1}))


def test_hoeffding_and_bernstein_are_their_formulas() -> None:
    level = {"delta": 0.01, "low": 0.0, "high": 4.0}
    reach = 4.0 * math.sqrt(math.log(100) / 200)
    assert hoeffding(1.5, 100, **level) == pytest.approx((1.5 - reach, 1.5 + reach), rel=1e-12)
    reach = math.sqrt(2 * 0.3 * math.log(200) / 400) + 7 * 4.0 * math.log(200) / (3 * 399)
    assert empirical_bernstein(1.5, 0.3, 400, **level) == pytest.approx((1.5 - reach, 1.5 + reach), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.003, 0.4, 0.97, 1.0])
@pytest.mark.parametrize("n", [1, 34, 10_000])
def test_chernoff_against_a_root_finder(share: float, n: int) -> None:
    def excess(y: float) -> float:
        return n * float(stats.entropy([share, 1 - share], [y, 1 - y])) - math.log(1 / 0.02)

    lower, upper = chernoff(share, n, delta=0.02, low=0.0, high=1.0)
    start = min(max(share, 1e-12), 1 - 1e-12)
    top, bottom = 1 - 1e-15, 1e-300  # beyond, no float is refuted
    expected = brentq(excess, start, top, xtol=1e-15) if excess(top) > 0.0 else 1.0
    assert upper == pytest.approx(expected, rel=1e-9, abs=1e-12)
    expected = brentq(excess, bottom, start, xtol=1e-300) if excess(bottom) > 0.0 else 0.0
    assert lower == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert lower <= share <= upper
    if share == 0.0:
        assert upper == pytest.approx(1 - 0.02 ** (1 / n), rel=1e-8)


def test_betting_against_a_grid() -> None:
    """The capital, term by term in a loop, at means a hair to either side of the bound."""
    rng = np.random.default_rng(3)
    values = rng.beta(0.5, 4.0, (3, 50))
    delta, (lower, upper) = 0.03, betting(values, delta=0.03, low=0.0, high=1.0)

    def capital(m: float, x: np.ndarray) -> float:
        total, seen = 0.0, 1
        products = []
        for row in x:
            product, means, squares = 1.0, 0.5, 0.25
            history: list[float] = []
            for value in row:
                bet = math.sqrt(2 * math.log(1 / delta) / (len(row) * squares))
                product *= 1 + min(bet, 0.75 / (1 - m)) * (m - value)
                history.append(value)
                seen = len(history)
                means = (0.5 + sum(history)) / (seen + 1)
                squares = (0.25 + sum((h - means) ** 2 for h in history)) / (seen + 1)
            products.append(product)
            total += product
        return total / len(products)

    assert capital(upper - 1e-6, values) < 1 / delta < capital(upper + 1e-6, values)
    assert capital(1 - lower - 1e-6, 1 - values) < 1 / delta < capital(1 - lower + 1e-6, 1 - values)


def test_bounds_move_with_range_confidence_and_size() -> None:
    x = np.random.default_rng(0).beta(1, 9, 200)
    for name in NAMES:
        narrow, wide = of(name, x, 0.1, 0.0, 1.0), of(name, x, 0.001, 0.0, 1.0)
        assert wide.lower <= narrow.lower <= x.mean() <= narrow.upper <= wide.upper
        shifted = of(name, 2.0 + 3.0 * x, 0.1, 2.0, 5.0)
        assert shifted == pytest.approx((2.0 + 3.0 * narrow.lower, 2.0 + 3.0 * narrow.upper), rel=1e-9)
        mirrored = of(name, 1.0 - x, 0.1, 0.0, 1.0)
        assert mirrored == pytest.approx((1.0 - narrow.upper, 1.0 - narrow.lower), rel=1e-9)
        assert of(name, np.tile(x, 4), 0.1, 0.0, 1.0).upper < narrow.upper


def test_arrays_are_answered_at_once() -> None:
    means, sizes = np.array([[0.1], [0.4]]), np.array([10, 100, 1000])
    bounds = chernoff(means, sizes, delta=0.05, low=0.0, high=1.0)
    assert bounds.upper.shape == (2, 3)
    assert bounds.upper[1, 2] == chernoff(0.4, 1000, delta=0.05, low=0.0, high=1.0).upper
    values = np.random.default_rng(0).random((4, 2, 30))
    many = betting(values, delta=0.05, low=0.0, high=1.0)
    assert many.lower.shape == (4,)
    assert many.upper[2] == pytest.approx(betting(values[2], delta=0.05, low=0.0, high=1.0).upper, rel=1e-12)


def test_a_hundred_thousand_values_are_narrowed_down() -> None:
    x = np.random.default_rng(0).random(100_000)
    bounds = betting(x, delta=0.01, low=0.0, high=1.0)
    assert x.mean() - 0.005 < bounds.lower < x.mean() < bounds.upper < x.mean() + 0.005


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hoeffding(0.5, 10, delta=0.0, low=0.0, high=1.0), r"delta must be in \(0, 1\), got 0.0"),
        (lambda: hoeffding(0.5, 10, delta=0.1, low=1.0, high=1.0), "low < high, got 1.0 and 1.0"),
        (lambda: chernoff(0.5, 0, delta=0.1, low=0.0, high=1.0), "n must be at least 1, got 0"),
        (lambda: chernoff(1.5, 9, delta=0.1, low=0.0, high=1.0), r"mean must lie in \[0, 1\]"),
        (lambda: chernoff(math.nan, 9, delta=0.1, low=0.0, high=1.0), r"mean must lie in \[0, 1\]"),
        (lambda: empirical_bernstein(0.5, 0.1, 1, delta=0.1, low=0.0, high=1.0), "n must be at least 2, got 1"),
        (lambda: empirical_bernstein(0.5, -0.1, 9, delta=0.1, low=0.0, high=1.0), "variance must be >= 0, got -0.1"),
        (lambda: betting([], delta=0.1, low=0.0, high=1.0), "got none"),
        (lambda: betting([0.1, math.nan], delta=0.1, low=0.0, high=1.0), "got from nan"),
        (lambda: betting([0.1, 1.2], delta=0.1, low=0.0, high=1.0), r"numbers in \[0, 1\], got from 0.1 to 1.2"),
        (lambda: betting([0.1], delta=0.1, low=0.0, high=1.0, block=2), "block must be in 1..1"),
        (lambda: effective_size(2, 1), "2 samples form no tuple .* give at least 3"),
    ],
)
def test_what_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
