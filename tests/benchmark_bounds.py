"""Times of the bounds, with pytest-benchmark: ``pytest tests/benchmark_bounds.py``. Asserts nothing about time."""

from pytest_benchmark.fixture import BenchmarkFixture

from cila_bound import Geometry, moment_step
from cila_bound.report import Report
from tests.simulate import simulate


def test_moment_step(benchmark: BenchmarkFixture) -> None:
    """Both sides of one step."""
    step = benchmark(moment_step, contrastive=0.6, drift=0.01, geometry=Geometry(0.5, 1))
    assert step.lower < step.upper


def test_every_bound_of_twenty_tasks(benchmark: BenchmarkFixture) -> None:
    """All bounds, both chains, both sides, and the check for violations: what ``cila-bound evaluate`` does."""
    log = simulate(20, 5, 0.5, n=100, drift=0.05)
    report = benchmark(Report.of, log)
    assert not report.violations


def test_moment_certificate_of_twenty_tasks(benchmark: BenchmarkFixture) -> None:
    from cila_bound import certify

    log = simulate(20, 5, 0.5, n=100, drift=0.05)
    assert len(benchmark(certify, log, "moment").per_task) == 20
