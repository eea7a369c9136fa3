"""Times of the bounds, with pytest-benchmark: ``pytest tests/benchmark_bounds.py``. Asserts nothing about time."""

from collections.abc import Callable

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from cila_bound import (
    ConfidenceBounds,
    Geometry,
    betting,
    certify,
    chernoff,
    empirical_bernstein,
    hoeffding,
    moment_step,
    rigorous,
)
from cila_bound.report import Report
from tests.simulate import simulate

VALUES = np.random.default_rng(0).beta(0.5, 5.0, 100_000)
LEVEL = {"delta": 0.01, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize("step", [moment_step, rigorous.rigorous_moment_step])
def test_moment_step(benchmark: BenchmarkFixture, step: Callable[..., moment_step]) -> None:
    """Both sides of one step."""
    found = benchmark(step, contrastive=0.6, drift=0.01, geometry=Geometry(0.5, 1))
    assert found.lower < found.upper


@pytest.mark.parametrize("options", [{}, {"confidence": 0.95}], ids=["plug-in", "certified"])
def test_every_bound_of_twenty_tasks(benchmark: BenchmarkFixture, options: dict[str, float]) -> None:
    """All bounds, both chains, both sides, and the check for violations: what ``cila-bound evaluate`` does."""
    log = simulate(20, 5, 0.5, n=100, drift=0.05)
    report = benchmark.pedantic(Report.of, (log,), options, rounds=3)
    assert not report.violations


@pytest.mark.parametrize("options", [{}, {"confidence": 0.95}], ids=["plug-in", "certified"])
def test_moment_certificate_of_twenty_tasks(benchmark: BenchmarkFixture, options: dict[str, float]) -> None:
    log = simulate(20, 5, 0.5, n=100, drift=0.05)
    assert len(benchmark.pedantic(certify, (log, "moment"), options, rounds=3).per_task) == 20


@pytest.mark.parametrize(
    "bound",
    [
        lambda: hoeffding(VALUES.mean(), VALUES.size, **LEVEL),
        lambda: chernoff(VALUES.mean(), VALUES.size, **LEVEL),
        lambda: empirical_bernstein(VALUES.mean(), VALUES.var(ddof=1), VALUES.size, **LEVEL),
        lambda: betting(VALUES, **LEVEL),
        lambda: chernoff(VALUES, 1000, **LEVEL),
    ],
    ids=["hoeffding", "chernoff", "empirical_bernstein", "betting", "chernoff of as many means"],
)
def test_confidence_bounds_from_a_hundred_thousand_values(
    benchmark: BenchmarkFixture, bound: Callable[[], ConfidenceBounds]
) -> None:
    found = benchmark(bound)
    assert np.all(found.lower < found.upper)
