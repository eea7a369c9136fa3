"""Chains of steps: against hand-rolled loops, on simulated runs with known truth, and violations to be found."""

import dataclasses
import math

import pytest
from scipy import stats

from cila_bound import (
    LossLog,
    Statistic,
    TestLoss,
    certify,
    linear_step,
    moment_step,
    pinsker_step,
    pointwise_step,
    saturating_step,
    theorem1,
)
from cila_bound.certificate import StepName
from cila_bound.report import Report
from cila_bound.violations import find_violations
from tests.simulate import simulate

FULL: list[StepName] = ["theorem1", "linear", "saturating", "pinsker", "moment", "best"]
REFRESHED: list[StepName] = ["linear", "saturating", "pinsker", "moment", "best", "pointwise"]
BOTH = [(step, "full") for step in FULL] + [(step, "refreshed") for step in REFRESHED]


@pytest.mark.parametrize(
    ("step", "chain", "data"),
    [
        (*both, data)
        for both in BOTH
        for data in ("heldout", "training")
        if (both[0], data) != ("pointwise", "training")
    ],
)
def test_holds_exactly_on_the_tuples_it_was_computed_from(step: StepName, chain: str, data: str) -> None:
    for seed, temperature, n_negatives, drift in ((0, 0.5, 1, 0.05), (1, 0.1, 7, 0.3), (2, 1.0, 50, 0.6)):
        log = simulate(5, n_negatives, temperature, drift=drift, seed=seed)
        result = certify(log, step, chain=chain, data=data)
        for lower, truth, upper in zip(result.lower_per_task, result.measured, result.per_task, strict=True):
            assert lower - 1e-9 <= truth <= upper + 1e-9
        assert result.lower_total - 1e-9 <= result.measured_total <= result.total + 1e-9
        assert find_violations(log, result) == ()


def test_linear_chain_against_unrolled_loop() -> None:
    log = simulate(4, 3, 0.5)
    for task in range(1, 5):
        value = log.measurement(task, task, "heldout").contrastive.mean
        for t in range(task + 1, 5):
            value = log.measurement(t, task, "heldout").distillation.mean + 4.0 * value
        assert certify(log, "linear").unclipped_per_task[task - 1] == pytest.approx(value, rel=1e-12)


def test_moment_and_pinsker_chains_against_loops() -> None:
    log = simulate(4, 3, 0.5, drift=0.1)
    moment, pinsker = certify(log, "moment"), certify(log, "pinsker")
    for task in range(1, 4):
        start = log.measurement(task, task, "heldout")
        upper = lower = start.contrastive.mean
        miss = start.miss_probability.mean
        for t in range(task + 1, 5):
            update = log.measurement(t, task, "heldout")
            upper = moment_step(contrastive=upper, drift=update.drift.mean, geometry=log.geometry).upper
            lower = moment_step(contrastive=lower, drift=update.drift.mean, geometry=log.geometry).lower
            loss = update.distillation.mean + 4.0 * miss
            miss += math.sqrt(update.drift.mean / 2)
        assert moment.per_task[task - 1] == pytest.approx(upper, rel=1e-12)
        assert moment.lower_per_task[task - 1] == pytest.approx(lower, rel=1e-12)
        assert pinsker.unclipped_per_task[task - 1] == pytest.approx(loss, rel=1e-12)


def test_best_chain_against_loop() -> None:
    """Every step keeps the tightest interval, and the tightest of two bounds on the miss probability."""
    log = simulate(5, 3, 0.5, drift=0.2, seed=3)
    geometry, best = log.geometry, certify(log, "best")
    used = set()
    for task in range(1, 5):
        start = log.measurement(task, task, "heldout")
        lower = upper = start.contrastive.mean
        miss = start.miss_probability.mean
        for t in range(task + 1, 6):
            update = log.measurement(t, task, "heldout")
            logged = {"distillation": update.distillation.mean, "geometry": geometry}
            steps = {
                "linear": linear_step(contrastive=upper, **logged),
                "saturating": saturating_step(contrastive=upper, **logged),
                "pinsker": pinsker_step(miss_probability=miss, drift=update.drift.mean, **logged),
            }
            uppers = {name: step.upper for name, step in steps.items()}
            drift = update.drift.mean
            uppers["moment"] = moment_step(contrastive=upper, drift=drift, geometry=geometry).upper
            lowers = [step.lower for step in steps.values()]
            lowers.append(moment_step(contrastive=lower, drift=drift, geometry=geometry).lower)
            used.add(min(uppers, key=uppers.get))
            upper, lower = min(*uppers.values(), geometry.ceiling), max(*lowers, geometry.floor)
            miss = min(miss + math.sqrt(drift / 2), 1 - math.exp(-upper), 1 - geometry.p_min)
        assert best.per_task[task - 1] == pytest.approx(upper, rel=1e-12)
        assert best.lower_per_task[task - 1] == pytest.approx(lower, rel=1e-12)
    assert len(used) > 1  # no single step is always the tightest


def test_theorem1_per_task_leaves_the_others_at_their_ends() -> None:
    log = simulate(3, 1, 2.0, drift=0.05)  # B = 1
    geometry, result = log.geometry, certify(log, "theorem1", data="heldout")
    theorem = theorem1(
        [log.training(t).loss for t in (1, 2, 3)],
        [0.0, 1.0, 1.0],
        [[1.0], [0.5, 0.5], [1 / 3] * 3],
        geometry,
        contrastive_over="current",
    )
    assert result.data == "training"
    assert result.theorem == theorem
    assert result.unclipped_per_task == pytest.approx([theorem.upper - 2 * geometry.floor] * 3)
    assert result.lower_per_task == pytest.approx([geometry.clip(theorem.lower - 2 * geometry.ceiling)] * 3)
    assert (result.total, result.lower_total) == (theorem.clipped_upper, theorem.clipped_lower)


def test_orderings() -> None:
    """best is inside the others, saturating in linear, pointwise in refreshed moment, refreshed moment in full."""
    for seed in range(4):
        log = simulate(5, 2, 0.5, drift=0.15, seed=seed)
        full = {step: certify(log, step) for step in FULL}
        for step in ("linear", "saturating", "pinsker", "moment"):
            for i in range(5):
                assert full["best"].per_task[i] <= full[step].per_task[i] + 1e-12
                assert full["best"].lower_per_task[i] >= full[step].lower_per_task[i] - 1e-12
        refreshed, pointwise = (certify(log, step, chain="refreshed") for step in ("moment", "pointwise"))
        for i in range(5):
            assert full["saturating"].per_task[i] <= full["linear"].per_task[i] + 1e-12
            assert pointwise.per_task[i] <= refreshed.per_task[i] + 1e-6
            assert refreshed.per_task[i] <= full["moment"].per_task[i] + 1e-9


def test_summary_figures() -> None:
    log = simulate(4, 1, 0.5)
    result = certify(log, "linear")
    geometry = log.geometry
    assert result.total == pytest.approx(sum(result.per_task))
    assert result.mean == pytest.approx(result.total / 4)
    assert result.kind == "plug_in"
    assert result.per_task[-1] == pytest.approx(log.measurement(4, 4, "heldout").contrastive.mean)
    assert result.tightness == pytest.approx([b / m for b, m in zip(result.per_task, result.measured, strict=True)])
    assert result.vacuous == tuple(value >= geometry.ceiling for value in result.unclipped_per_task)
    assert result.vacuous[0]
    assert not result.vacuous[-1]
    assert all(geometry.floor <= value <= geometry.ceiling for value in result.per_task + result.lower_per_task)


def test_a_margin_widens_both_sides() -> None:
    log = simulate(4, 2, 0.5, drift=0.1)
    for step, chain in BOTH:
        for margin in ("standard_errors", "rounding"):
            narrow, wide = certify(log, step, chain=chain), certify(log, step, chain=chain, **{margin: 0.5})
            if step == "theorem1":
                continue  # training losses are logged without a variance
            for i in range(4):
                assert wide.lower_per_task[i] <= narrow.lower_per_task[i] + 1e-12
                assert narrow.per_task[i] <= wide.per_task[i] + 1e-12
            assert wide.total > narrow.total


def test_a_margin_moves_every_mean_by_its_own_standard_error() -> None:
    """Chains against loops whose means are moved by hand; n_effective, not n, counts, by Student's t."""
    log = simulate(3, 2, 0.5, drift=0.05, n=400, n_effective=50)
    wide = {step: certify(log, step, standard_errors=2.0) for step in ("linear", "pinsker", "moment")}
    factor = stats.t.isf(stats.norm.sf(2.0), 49)
    assert 2.0 < factor < 2.1

    def moved(statistic: Statistic, sign: int = 1) -> float:
        return statistic.mean + sign * factor * math.sqrt(statistic.variance / 50)

    start, update = log.measurement(2, 2, "heldout"), log.measurement(3, 2, "heldout")
    assert wide["linear"].unclipped_per_task[1] == pytest.approx(
        moved(update.distillation) + 4.0 * moved(start.contrastive)
    )
    assert wide["pinsker"].unclipped_per_task[1] == pytest.approx(
        moved(update.distillation) + 4.0 * moved(start.miss_probability)
    )
    drift = moved(update.drift)
    upper = moment_step(contrastive=moved(start.contrastive), drift=drift, geometry=log.geometry).upper
    lower = moment_step(contrastive=moved(start.contrastive, -1), drift=drift, geometry=log.geometry).lower
    assert wide["moment"].per_task[1] == pytest.approx(upper, rel=1e-12)
    assert wide["moment"].lower_per_task[1] == pytest.approx(lower, rel=1e-12)
    pointwise = certify(log, "pointwise", chain="refreshed", standard_errors=2.0)
    values = pointwise_step(
        contrastive=update.tuples.teacher_contrastive, drift=update.tuples.drift, geometry=log.geometry
    )
    assert pointwise.unclipped_per_task[1] == pytest.approx(moved(Statistic.of(values.upper_per_tuple)))


def test_earlier_models_can_be_certified() -> None:
    log = simulate(4, 2, 0.5)
    assert len(certify(log, "moment", after_task=2).per_task) == 2
    assert certify(log, "moment", after_task=1).per_task == (log.measurement(1, 1, "heldout").contrastive.mean,)


def test_a_log_without_test_records_has_no_tightness() -> None:
    full = simulate(3, 2, 0.5)
    log = LossLog(full.header)
    for record in full.records:
        if not isinstance(record, TestLoss):
            log.add(record)
    result = certify(log, "moment")
    assert result.measured == (None, None, None)
    assert result.tightness == (None, None, None)
    assert result.tightness_total is None
    assert "nothing to compare" in Report.of(log).as_text("log")


def with_test_loss(log: LossLog, task: int, mean: float) -> LossLog:
    """The same log with another measured test loss of the last model on ``task``."""
    changed = LossLog(log.header)
    for record in log.records:
        if isinstance(record, TestLoss) and (record.after_task, record.task) == (log.last_task, task):
            record = dataclasses.replace(record, contrastive=Statistic(mean, record.contrastive.variance))
        changed.add(record)
    return changed


@pytest.mark.parametrize("side", ["upper", "lower"])
def test_a_test_loss_is_a_violation_just_beyond_its_sampling_error(side: str) -> None:
    """The limit: the bound from means moved by 3 standard errors, plus 3 standard errors of the test loss."""
    log = simulate(4, 1, 0.5, drift=0.02, n=4000, n_effective=400)
    room = stats.t.isf(stats.norm.sf(3.0), 399) * math.sqrt(log.test(4, 2).contrastive.variance / 400)
    wide = certify(log, "moment", standard_errors=3.0)
    limit = wide.per_task[1] + room if side == "upper" else wide.lower_per_task[1] - room
    for distance, expected in ((1e-6, [("task 2", side, "test")]), (-1e-6, [])):
        changed = with_test_loss(log, 2, limit + (distance if side == "upper" else -distance))
        found = find_violations(changed, certify(changed, "moment"))
        assert [(v.task, v.side, v.measured_on) for v in found if v.task != "total"] == expected


def test_a_total_can_be_violated_alone() -> None:
    """Theorem 1 bounds the sum: at temperature 2 it is not vacuous, and no single task exceeds it."""
    log = simulate(2, 1, 2.0, drift=0.02, n=4000, distill_weight=2.0)
    bound = certify(log, "theorem1")
    each = 0.55 * bound.total
    assert each < log.geometry.ceiling
    false = with_test_loss(with_test_loss(log, 1, each), 2, each)
    found = find_violations(false, certify(false, "theorem1"))
    assert [(v.task, v.side) for v in found] == [("total", "upper")]
    assert (found[0].measured, found[0].bound) == pytest.approx((2 * each, bound.total))


def test_float32_logs_are_no_violations_on_their_own_tuples() -> None:
    """The moment bound moves like the root of a small drift, so an error of 1e-7 in the log shows."""
    for seed in range(20):
        log = simulate(2, 1, 0.1, drift=1e-4, seed=seed)
        rounded = LossLog(log.header)
        for record in log.records:
            if record.kind == "measurement" and record.drift is not None and record.task < record.after_task:
                lost = min(1e-7, record.drift.mean)
                drift = dataclasses.replace(record.drift, mean=record.drift.mean - lost)
                record = dataclasses.replace(record, drift=drift, tuples=None)
            rounded.add(record)
        for step in ("moment", "best"):
            assert find_violations(rounded, certify(rounded, step)) == ()


def test_a_false_drift_is_found_on_the_bounds_own_tuples() -> None:
    """Drift logged as 0 while the loss moved: no sampling error can explain it, however small."""
    log = simulate(2, 1, 0.5, drift=0.3)
    false = LossLog(log.header)
    for record in log.records:
        if record.kind == "measurement" and record.drift is not None and record.task < record.after_task:
            zero = Statistic(0.0, 0.0)
            record = dataclasses.replace(record, drift=zero, teacher_entropy=record.distillation, tuples=None)
        if not isinstance(record, TestLoss):
            false.add(record)
    found = find_violations(false, certify(false, "moment"))
    assert [v.measured_on for v in found] == ["bound"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": "magic"}, ValueError, "step must be one of .* got 'magic'"),
        ({"chain": "half"}, ValueError, "chain must be one of"),
        ({"data": "test"}, ValueError, "data must be one of"),
        ({"step": "pointwise"}, ValueError, 'needs chain="refreshed"'),
        ({"step": "theorem1", "chain": "refreshed"}, ValueError, 'needs chain="full"'),
        ({"after_task": 9}, ValueError, "after_task must be in 1..3 and logged, got 9"),
        ({"standard_errors": -1.0}, ValueError, "standard_errors"),
        ({"step": "pointwise", "chain": "refreshed", "data": "training"}, LookupError, "no per-tuple values"),
    ],
)
def test_refuses(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        certify(simulate(3, 2, 0.5), **options)


def test_a_missing_record_is_named() -> None:
    full = simulate(3, 2, 0.5)
    log = LossLog(full.header)
    for record in full.records:
        if record.key != ("measurement", 3, 2, "heldout"):
            log.add(record)
    with pytest.raises(LookupError, match=r"no record measurement \(after task 3, on task 2, split heldout\)"):
        certify(log, "moment")
