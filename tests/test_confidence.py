"""Certificates at a confidence: what they rest on, that they hold as often as they say, and what they refuse."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cila_bound import LossLog, Measurement, Statistic, TestLoss, betting, certify, chernoff, tuples_needed
from cila_bound.certificate import StepName
from cila_bound.cli import main
from cila_bound.violations import find_violations
from experiments.tuples import draw_tuples
from tests.simulate import Population, simulate

FULL: list[StepName] = ["linear", "saturating", "pinsker", "moment", "best"]
BOTH = [(step, chain) for step in FULL for chain in ("full", "refreshed")] + [
    ("pointwise", "refreshed"),
    ("direct", "refreshed"),
]


def not_above(count: int, rate: float, n: int) -> bool:
    return stats.binomtest(count, n, rate, alternative="greater").pvalue > 1e-4


@pytest.mark.parametrize(("inequality", "tuples", "n_logs"), [("chernoff", False, 2000), ("betting", True, 250)])
def test_certificates_hold_as_often_as_they_say(inequality: Any, tuples: bool, n_logs: int) -> None:
    """A population with known means, many logs drawn from it: bounds of all tasks, and every statement below them."""
    population = Population(2, 1, 0.5)
    truth = [population.truth[2, i]["contrastive"] for i in (1, 2)]
    rng = np.random.default_rng(0)
    wrong = dict.fromkeys((("moment", "full"), ("pinsker", "full"), ("direct", "refreshed")), 0)
    wrong_statements = dict.fromkeys(wrong, 0)
    for _ in range(n_logs):
        log = population.log(rng, 40, tuples=tuples)
        for step, chain in wrong:
            certificate = certify(log, step, chain=chain, confidence=0.7, inequality=inequality)
            holds = all(
                low <= loss <= high
                for low, loss, high in zip(certificate.lower_per_task, truth, certificate.per_task, strict=True)
            )
            wrong[step, chain] += not holds
            wrong_statements[step, chain] += any(
                (mean > s.bound) if s.side == "upper" else (mean < s.bound)
                for s in certificate.statements
                for mean in [population.truth[s.after_task, s.task][s.statistic]]
            )
    for key in wrong:
        assert not_above(wrong_statements[key], 0.3, n_logs)
        assert wrong[key] <= wrong_statements[key]  # the inequalities themselves never fail
    assert sum(wrong_statements.values()) > 0  # the levels are used


def test_a_single_task_is_certified_without_slack() -> None:
    """One task, no step: the certificate is two confidence bounds; losses at two points, which Chernoff is made for."""
    log = simulate(1, 1, 0.5)
    geometry, record = log.geometry, log.measurement(1, 1, "heldout")
    rng, n_logs, n, wrong = np.random.default_rng(1), 3000, 50, 0
    truth = geometry.floor + 0.1 * (geometry.ceiling - geometry.floor)
    for count in rng.binomial(n, 0.1, n_logs):
        share = count / n
        spread = (geometry.ceiling - geometry.floor) ** 2 * share * (1 - share) * n / (n - 1)
        mean = geometry.floor + share * (geometry.ceiling - geometry.floor)
        drawn = LossLog(log.header)
        drawn.add(dataclasses.replace(record, n=n, n_effective=n, contrastive=Statistic(mean, spread)))
        certificate = certify(drawn, "moment", confidence=0.6)
        assert len(certificate.statements) == 2
        wrong += not certificate.lower_per_task[0] <= truth <= certificate.per_task[0]
    assert not_above(wrong, 0.4, n_logs)
    assert wrong > 0.05 * n_logs


@pytest.mark.parametrize("among", [10, 1])
def test_the_confidence_is_shared_among_the_means(among: int) -> None:
    """Losses at two points, above so often that a sample without one just misses: at the level of one among ten means,
    where certificates fail nearly as often as they may, and of a single one, at which they would fail far too often.
    """
    log = simulate(5, 1, 0.5)
    geometry, n, n_logs, delta = log.geometry, 4, 1000, 0.4
    span = geometry.ceiling - geometry.floor
    share = 1.0 - (delta / among) ** (1 / n) + 1e-9
    rng, wrong = np.random.default_rng(2), 0
    for counts in rng.binomial(n, share, (n_logs, 5)):
        drawn = LossLog(log.header)
        for task, high in enumerate(counts / n, 1):
            loss = Statistic(geometry.floor + high * span, span**2 * high * (1 - high) * n / (n - 1))
            record = log.measurement(5, task, "heldout")
            drawn._records[record.key] = dataclasses.replace(record, n=n, n_effective=n, contrastive=loss, tuples=None)
        certificate = certify(drawn, "direct", chain="refreshed", confidence=1 - delta, inequality="chernoff")
        assert len(certificate.statements) == 10
        wrong += any(upper < geometry.floor + share * span for upper in certificate.per_task)
    assert not_above(wrong, delta / 2, n_logs)
    assert among == 1 or wrong > 0.35 * delta * n_logs


@pytest.mark.parametrize("excess", [-1e-6, 1e-7, 4.5e-6])  # nearly the most that a log may have
def test_a_mean_rounded_out_of_its_range_is_certified_as_the_end(excess: float) -> None:
    log = simulate(1, 1, 0.5)
    geometry, record = log.geometry, log.measurement(1, 1, "heldout")
    end = geometry.floor if excess < 0 else geometry.ceiling
    drawn = LossLog(log.header)
    drawn.add(dataclasses.replace(record, contrastive=Statistic(end + excess, 0.0), tuples=None))
    certificate = certify(drawn, "direct", chain="refreshed", confidence=0.95)
    assert geometry.floor <= certificate.lower_per_task[0] <= end <= certificate.per_task[0] <= geometry.ceiling


def moved(log: LossLog, at: tuple[Any, ...], statistic: str, by: float) -> LossLog:
    """The same log with one mean moved (and its values and variance left alone)."""
    changed = LossLog(log.header)
    for record in log.records:
        if record.key == at:
            old = getattr(record, statistic)
            record = dataclasses.replace(record, **{statistic: Statistic(old.mean + by, old.variance)})
        changed._records[record.key] = record  # unchecked: the sums of a record need not agree here
    return changed


@pytest.mark.parametrize(("step", "chain"), [both for both in BOTH if both[0] != "pointwise"])
def test_the_statements_are_exactly_the_means_used(step: StepName, chain: Any) -> None:
    """Moving a mean moves the certificate if and only if it is listed; and no statement is listed twice."""
    log = LossLog(simulate(4, 2, 2.0).header)
    for record in simulate(4, 2, 2.0, drift=0.02, n=50).records:
        if isinstance(record, Measurement):  # so many tuples that nothing reaches an end of its range
            log.add(dataclasses.replace(record, n=10**9, n_effective=10**9, tuples=None))
    certificate = certify(log, step, chain=chain, confidence=0.95, inequality="chernoff")
    listed = {("measurement", s.after_task, s.task, s.split, s.statistic) for s in certificate.statements}
    assert certificate.delta == pytest.approx(0.05 / len(certificate.statements))
    sides = [(s.after_task, s.task, s.statistic, s.side) for s in certificate.statements]
    assert len(set(sides)) == len(sides)
    names = [f.name for f in dataclasses.fields(Measurement) if f.type == "Statistic | None" or f.type == "Statistic"]
    assert len(names) == 7
    for record, name in itertools.product(log.records, names):
        if not isinstance(record, Measurement) or getattr(record, name) is None:
            continue
        # down and up: "best" takes the tightest of several, so a mean may count in one direction only
        others = [
            certify(moved(log, record.key, name, by), step, chain=chain, confidence=0.95, inequality="chernoff")
            for by in (-1e-5, 1e-5)
        ]
        bounds = certificate.unclipped_per_task, certificate.lower_per_task
        used = any((other.unclipped_per_task, other.lower_per_task) != bounds for other in others)
        if step == "best":
            assert not used or (*record.key, name) in listed
        else:
            assert used == ((*record.key, name) in listed), (record.key, name)


def test_how_many_means_each_bound_uses() -> None:
    """Four tasks: i has 4 - i steps; upper and lower side together."""
    log = simulate(4, 2, 0.5, n=50)
    starts, steps = 4, 3 + 2 + 1
    counts = {
        ("moment", "full"): 2 * starts + steps,  # both sides of each start, the upper side of each drift
        ("linear", "full"): (starts + 1) + steps + 3,  # upper starts (and the last task's lower), L_dis, lower L_dis
        ("pinsker", "full"): (starts + 1) + (steps - 3) + 2 * 3,
        ("moment", "refreshed"): 2 * starts + 3,
        ("pointwise", "refreshed"): 2 * starts,
        ("direct", "refreshed"): 2 * starts,
    }
    for (step, chain), count in counts.items():
        assert len(certify(log, step, chain=chain, confidence=0.9).statements) == count, (step, chain)


def test_a_certificate_is_the_plug_in_bound_of_its_confidence_bounds() -> None:
    """By hand: two tasks, Chernoff bounds at the union level, put through the moment step."""
    from cila_bound import moment_step

    log = simulate(2, 1, 0.5, drift=0.05, n=400)
    geometry, start, update = log.geometry, log.measurement(1, 1, "heldout"), log.measurement(2, 1, "heldout")
    certificate = certify(log, "moment", confidence=0.9, inequality="chernoff")
    delta = 0.1 / 5
    level = {"delta": delta, "high": geometry.ceiling}
    loss = chernoff(start.contrastive.mean, 400, low=geometry.floor, **level)
    drift = chernoff(update.drift.mean, 400, low=0.0, **level)
    expected = moment_step(contrastive=loss.upper, drift=drift.upper, geometry=geometry)
    assert certificate.per_task[0] == pytest.approx(expected.upper, rel=1e-12)
    expected = moment_step(contrastive=loss.lower, drift=drift.upper, geometry=geometry)
    assert certificate.lower_per_task[0] == pytest.approx(expected.lower, rel=1e-12)
    assert certificate.kind == "certificate"
    assert certificate.confidence == 0.9
    assert any("5 one-sided confidence bounds" in text for text in certificate.assumptions)


@pytest.mark.parametrize(("step", "chain"), BOTH)
def test_confidence_and_selections_widen(step: StepName, chain: Any) -> None:
    log = simulate(3, 1, 0.5, drift=0.05, n=2000)
    estimate = certify(log, step, chain=chain)
    assert (estimate.kind, estimate.statements, estimate.delta) == ("plug_in", (), None)
    previous = estimate
    for options in ({"confidence": 0.5}, {"confidence": 0.95}, {"confidence": 0.95, "selections": 37}):
        certificate = certify(log, step, chain=chain, **options)
        for i in range(3):
            assert certificate.lower_per_task[i] <= previous.lower_per_task[i] + 1e-9
            assert certificate.per_task[i] >= previous.per_task[i] - 1e-9
        assert certificate.total > previous.total
        previous = certificate
    assert certificate.delta == pytest.approx(0.05 / (37 * len(certificate.statements)))
    assert any("among 37" in text for text in certificate.assumptions)


def test_auto_bets_where_values_of_tuples_are_logged() -> None:
    population = Population(2, 1, 0.5)
    for tuples, expected in ((True, {"betting"}), (False, {"chernoff"})):
        log = population.log(np.random.default_rng(0), 60, tuples=tuples)
        assert {s.inequality for s in certify(log, "pinsker", confidence=0.9).statements} == expected


def test_rounds_that_share_samples_are_not_independent_tuples() -> None:
    log = simulate(2, 1, 0.5, n=60, n_effective=20)
    with pytest.raises(ValueError, match=r"60 tuples of task 1 are worth 20: log one round .* or use betting"):
        certify(log, "moment", confidence=0.9, inequality="empirical-bernstein")
    independent = simulate(2, 1, 0.5, n=60)
    narrow = certify(independent, "moment", confidence=0.9, inequality="empirical-bernstein")
    assert {s.inequality for s in narrow.statements} == {"empirical-bernstein"}
    with pytest.raises(LookupError, match="betting needs the contrastive of every tuple after task 1 on task 1"):
        certify(log, "moment", confidence=0.9, inequality="betting")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "theorem1"}, "no certificate at confidence 0.95: theorem1 takes training losses.*leave confidence"),
        ({"data": "training"}, 'no certificate at confidence 0.95: data="training".*plug-in estimate'),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), such as 0.95, got 1.0"),
        ({"confidence": math.nan}, r"confidence must be in \(0, 1\)"),
        ({"selections": 0}, "selections must be at least 1"),
        ({"inequality": "normal"}, "inequality must be one of auto, hoeffding, .* got 'normal'"),
        ({"standard_errors": 1.0}, "margins of estimates"),
        ({"step": "direct", "chain": "full"}, 'step "direct" needs chain="refreshed"'),
    ],
)
def test_what_cannot_be_certified(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify(simulate(2), **({"confidence": 0.95} | options))


def test_a_certificate_that_the_truth_refutes_is_a_violation() -> None:
    log = simulate(3, 1, 0.5, drift=0.01, n=4000)
    assert find_violations(log, certify(log, "moment", confidence=0.95)) == ()
    false = LossLog(log.header)
    for record in log.records:
        if isinstance(record, TestLoss) and (record.after_task, record.task) == (3, 1):
            record = dataclasses.replace(record, contrastive=Statistic(3.5, 0.1))
        false.add(record)
    found = find_violations(false, certify(false, "moment", confidence=0.95))
    assert {(v.task, v.side, v.measured_on) for v in found} >= {("task 1", "upper", "test")}


@pytest.mark.parametrize("below", [None, 0.9])
def test_tuples_needed_against_certificates_of_that_many(below: float | None) -> None:
    """With the planned number of tuples and the same means a Chernoff certificate is below; with 3% fewer it is not."""
    log = simulate(3, 1, 0.5, drift=0.01, n=200, seed=1)
    n = tuples_needed(log, "moment", below=below)
    assert n is not None
    limit = below or log.geometry.ceiling

    def highest(size: int) -> float:
        other = LossLog(log.header)
        for record in log.records:
            if isinstance(record, Measurement):
                other.add(dataclasses.replace(record, n=size, n_effective=size, tuples=None))
        return max(certify(other, "moment", confidence=0.95, inequality="chernoff").per_task)

    assert highest(n) < limit
    assert highest(math.floor(0.97 * n)) >= limit


def test_no_number_of_tuples_makes_a_vacuous_bound_useful() -> None:
    log = simulate(4, 1, 0.1, drift=0.6)
    assert certify(log, "linear").vacuous[0]
    assert tuples_needed(log, "linear") is None


@pytest.mark.parametrize("options", [{}, {"confidence": 0.9}])
@pytest.mark.parametrize(("step", "chain"), [("moment", "full"), ("moment", "refreshed"), ("best", "full")])
def test_machine_proven_steps_give_the_same_certificate(step: StepName, chain: Any, options: dict[str, Any]) -> None:
    """To the pads of the fast constants; and they are asked for, not only accepted."""
    pytest.importorskip("flint")
    log = simulate(3, 1, 0.5, drift=0.1, n=400)
    fast = certify(log, step, chain=chain, **options)
    proven = certify(log, step, chain=chain, rigorous=True, **options)
    assert proven.per_task == pytest.approx(fast.per_task, rel=1e-9)
    assert proven.lower_per_task == pytest.approx(fast.lower_per_task, rel=1e-9)
    if step == "moment":
        assert proven.per_task[0] != fast.per_task[0]
        assert all(a <= b for a, b in zip(proven.per_task, fast.per_task, strict=True))


def test_two_tuples_refute_nothing() -> None:
    """Standard errors of two tuples may be tiny by chance; Student's t knows."""
    log = simulate(2, 1, 0.5, n=4, n_effective=2)
    false = LossLog(log.header)
    for record in log.records:
        if isinstance(record, TestLoss) and record.task == 1 and record.after_task == 2:
            record = dataclasses.replace(record, contrastive=Statistic(record.contrastive.mean + 0.3, 1e-4))
        false.add(record)
    assert not [v for v in find_violations(false, certify(false, "moment")) if v.measured_on == "test"]
    single = simulate(2, 1, 0.5, n=4, n_effective=1)
    assert certify(single, "moment", standard_errors=3.0).vacuous == (True, True)


def test_the_command_certifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "losses.jsonl"
    simulate(3, 1, 0.5, drift=0.02, n=3000).write(path)
    assert main(["evaluate", str(path), "--confidence", "0.95"]) == 0
    out = capsys.readouterr().out
    assert "certified: each column holds with probability >= 0.95" in out
    assert "not evaluated: theorem1 (full): it takes training losses" in out
    assert "direct, refreshed" in out
    assert "moment, full           9, each wrong with probability <= 0.0056, by betting and chernoff (needs" in out
    assert main(["evaluate", str(path), "--confidence", "0.95", "--step", "moment", "--json", "--selections", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    first = report["certificates"][0]
    assert (first["kind"], first["confidence"], first["selections"]) == ("certificate", 0.95, 4)
    assert len(first["statements"]) == 9
    assert {"after_task", "task", "statistic", "side", "mean", "bound", "n_effective", "inequality"} <= set(
        first["statements"][0]
    )
    assert main(["evaluate", str(path), "--confidence", "0.95", "--step", "theorem1"]) == 2
    assert "training losses" in capsys.readouterr().err
    assert main(["evaluate", str(path), "--confidence", "2"]) == 2
    pytest.importorskip("flint")
    assert main(["evaluate", str(path), "--step", "moment", "--rigorous"]) == 0


def test_betting_needs_to_know_which_tuples_share_a_mean() -> None:
    log = Population(2, 1, 0.5).log(np.random.default_rng(0), 40, tuples=True)
    unknown = LossLog(log.header)
    for record in log.records:
        if isinstance(record, Measurement) and record.tuples is not None:
            record = dataclasses.replace(record, tuples=dataclasses.replace(record.tuples, block=None))
        unknown.add(record)
    assert {s.inequality for s in certify(log, "moment", confidence=0.95).statements} == {"betting"}
    assert {s.inequality for s in certify(unknown, "moment", confidence=0.95).statements} == {"chernoff"}
    with pytest.raises(ValueError, match=r"tuples.block of task 1 after task 1 is not given: use chernoff"):
        certify(unknown, "moment", confidence=0.95, inequality="betting")


@pytest.mark.parametrize("counts", [(15, 15), (9, 21), (10, 10, 10), (6, 9, 15)])
@pytest.mark.parametrize("rounds", [1, 24])
def test_bounds_cover_the_mean_of_the_tuples_that_are_drawn(counts: tuple[int, ...], rounds: int) -> None:
    """Images are independent given their class, a tuple's loss is a property of its negative; the mean sought is known.
    Taking all tuples of all rounds for independent would miss far too often.
    """
    rng, delta, n_draws = np.random.default_rng(0), 0.05, 600
    labels = np.repeat(np.arange(len(counts)), counts)
    chance = np.linspace(0.5, 0.8, len(counts))
    wrong = {"chernoff": 0, "betting": 0, "all independent": 0}
    for _ in range(n_draws):
        tuples = draw_tuples(labels, 1, rounds, rng)
        negative = tuples.index[:, 2]
        mean = float(chance[labels[negative]].mean())
        loss = (rng.random(len(labels)) < chance[labels])[negative].astype(float)
        level: dict[str, Any] = {"delta": delta, "low": 0.0, "high": 1.0}
        bounds = {
            "chernoff": chernoff(loss.mean(), tuples.n_effective, **level),
            "all independent": chernoff(loss.mean(), len(loss), **level),
        }
        if tuples.block is not None:
            bounds["betting"] = betting(loss.reshape(rounds, -1), block=tuples.block, **level)
        for name, found in bounds.items():
            wrong[name] += not found.lower <= mean <= found.upper
    assert not_above(wrong["chernoff"], 2 * delta, n_draws)
    assert not_above(wrong["betting"], 2 * delta, n_draws)
    assert rounds == 1 or not not_above(wrong["all independent"], 2 * delta, n_draws)
