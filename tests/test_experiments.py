"""Configurations, metrics, and whole runs: every method, interrupted and killed."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from cila_bound import certify, read_log
from cila_bound.report import Report
from experiments import methods, scores, train
from experiments.config import RunConfig
from experiments.directory import Progress, log_names
from experiments.evaluate import (
    Costs,
    accuracy,
    average_accuracy,
    backward_transfer,
    cheapest,
    forgetting,
    likeliest,
    linear_probe,
)
from experiments.methods import METHODS
from experiments.presets import PRESETS, preset
from experiments.streams import build_stream
from experiments.trainer import TaskTrainer

ROOT = Path(__file__).parent.parent
TINY = RunConfig(
    n_tasks=5,
    epochs_first=2,
    epochs=1,
    buffer_size=40,
    tuple_rounds=2,
    max_tuples=20,
    n_negatives=(2,),
    probe_epochs=2,
)
ROTATED = dataclasses.replace(TINY, stream="rotated-digits", scenario="rotations")


def test_metrics_against_hand_computation() -> None:
    matrix = [[0.7], [0.9, 0.8], [0.8, 0.5, 1.0]]  # task 1 is best after task 2
    assert average_accuracy(matrix) == pytest.approx((0.8 + 0.5 + 1.0) / 3)
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.8) + (0.8 - 0.5)) / 2)
    assert backward_transfer(matrix) == pytest.approx(((0.8 - 0.7) + (0.5 - 0.8)) / 2)
    assert forgetting([[0.9]]) == backward_transfer([[0.9]]) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "method must be one of .* got 'magic'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and > 0"),
        ({"kappa": float("nan")}, "kappa must be finite and > 0, got nan"),
        ({"heldout_fraction": 0.6, "test_fraction": 0.5}, "with a sum < 1, got 0.6 and 0.5"),
        ({"theory_temperatures": (0.5, 0.0)}, "theory_temperatures .* must be a number in \\[0.004, 1000\\], got 0.0"),
        ({"theory_temperatures": ()}, "need one value at least"),
        ({"n_negatives": (1, 1)}, "n_negatives holds a value twice"),
        ({"model": "big"}, "model must be one of small, .* got 'big'"),
        ({"pretrain_fraction": 1.0}, "pretrain_fraction must be in \\[0, 1\\), got 1.0"),
        ({"pretrain_dataset": "./digits"}, "pretrain_dataset ./digits is the stream's own dataset"),
        ({"pretrain_dataset": "mnist", "pretrain_fraction": 0.5}, "are two sources of images: give one"),
        ({"pretrain_epochs": 3}, "pretrain_epochs is 3, but there is nothing to pre-train on"),
        ({"method": "er", "queue_size": 8}, "er trains a classifier: queue_size, positives and pretrain_epochs"),
        ({"distill_weight": -1.0}, "distill_weight must be finite and >= 0, got -1.0"),
        ({"n_negatives": (0,)}, "n_negatives must be"),
        ({"momentum": 1.0}, "momentum must be in \\[0, 1\\), got 1.0"),
        ({"momentum": -0.1}, "momentum must be in"),
        ({"weight_decay": -1e-4}, "weight_decay must be finite and >= 0, got -0.0001"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite and >= 0, got inf"),
        ({"miss_cost": -1.0}, "miss_cost must be finite and >= 0, got -1.0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"label_noise": 0.51}, "label_noise must be in \\[0, 0.5\\], got 0.51"),
        ({"label_noise": -0.1}, "label_noise must be in"),
        ({"label_noise": float("nan")}, "label_noise must be in"),
        ({"imbalance": 0.9}, "imbalance must be finite and at least 1, got 0.9"),
        ({"imbalance": float("inf")}, "imbalance must be finite"),
    ],
)
def test_configuration_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


# --- whole runs


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_its_bounds_hold(method: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, method=method)
    metrics = train.run(config, tmp_path, show_progress=False)
    log = read_log(tmp_path / "losses.jsonl")
    assert log.last_task == 5
    assert Report.of(log).violations == []
    for kind in ("class_il", "task_il"):
        assert [len(row) for row in metrics["accuracy"][kind]["accuracy_matrix"]] == [1, 2, 3, 4, 5]
    assert metrics["study"] == "digits"
    assert metrics["variant"].startswith(method)
    assert not (tmp_path / "checkpoint.pt").exists()
    weights = [log.training(t).distill_weight for t in range(1, 6)]
    assert weights[0] == 0.0
    if METHODS[method].weights is None:
        assert weights == [0.0] * 5
    else:
        assert weights[1] == 1.0
    last = log.training(5)
    assert last.mixture_weights[0] == (0.0 if method == "finetune" else pytest.approx(10 / 186, rel=0.5))
    replay = METHODS[method].classifier
    assert last.contrastive_weight == (0.0 if method == "distillation-only" or replay else 1.0)
    assert log.training(1).contrastive_weight == (0.0 if replay else 1.0)
    assert (last.objective_distillation is None) == (METHODS[method].weights is None)


def test_the_log_says_what_the_models_do(tmp_path: Path) -> None:
    """Fixed tuples: the previous model's loss at step t is the current model's at t - 1. One seed, one result."""
    train.run(TINY, tmp_path / "a", show_progress=False)
    log = read_log(tmp_path / "a/losses.jsonl")
    for t in range(2, 6):
        for i in range(1, t):
            now, before = (log.measurement(s, i, "heldout") for s in (t, t - 1))
            assert now.teacher_contrastive.mean == pytest.approx(before.contrastive.mean, rel=1e-9)
            assert now.drift.mean > 0.0
    train.run(TINY, tmp_path / "b", show_progress=False)
    assert (tmp_path / "b/losses.jsonl").read_bytes() == (tmp_path / "a/losses.jsonl").read_bytes()


def test_rotated_digits_run(tmp_path: Path) -> None:
    config = dataclasses.replace(ROTATED, n_tasks=2, n_negatives=(4,), contrastive_scale=7.0)
    train.run(config, tmp_path, show_progress=False)
    log = read_log(tmp_path / "losses.jsonl")
    assert Report.of(log).violations == []
    assert log.training(2).contrastive_weight == 7.0
    assert certify(log, "theorem1").theorem.gammas[0] == 7.0


def test_every_combination_of_temperature_and_negatives_has_its_log(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, theory_temperatures=(0.5, 0.1), n_negatives=(1, 3))
    train.run(config, tmp_path, show_progress=False)
    names = log_names(config)
    assert names[:2] == ["losses.jsonl", "losses-temperature0.5-negatives3.jsonl"]
    assert sorted(names) == sorted(path.name for path in tmp_path.glob("losses*.jsonl"))
    for name, geometry in zip(names, config.geometries, strict=True):
        log = read_log(tmp_path / name)
        assert (log.header.temperature, log.header.n_negatives) == (geometry.temperature, geometry.n_negatives)
        assert log.last_task == 5
        assert Report.of(log).violations == []
        assert (log.measurement(5, 1, "heldout").tuples is not None) == (name == "losses.jsonl")
    (tmp_path / names[3]).unlink()
    with pytest.raises(ValueError, match=f"{names[3]} of a finished run is missing"):
        train.run(config, tmp_path, show_progress=False)


_NAMED = ("positives", "queue_size", "buffer_size", "label_noise", "imbalance")


@pytest.mark.parametrize(
    "change",
    [
        {"method": "co2l", "positives": "view"},
        {"method": "co2l", "queue_size": 64},
        {"method": "cila-max", "precision": "bfloat16", "epochs_first": 5},
        {"method": "finetune", "buffer_size": 0},
        {"method": "er", "buffer_size": 0},
        {"method": "co2l", "model": "resnet18", "width": 4, "augmentation": "generic", "train_per_class": 10},
        {"method": "co2l", "pretrain_epochs": 1, "pretrain_dataset": "OTHER"},
        {"method": "cila-max", "label_noise": 0.3, "imbalance": 3.0, "model": "strided"},
        {"method": "der++", "scenario": "rotations", "stream": "rotated-digits", "buffer": "reservoir"},
    ],
)
def test_every_option_runs_and_its_bounds_hold(change: dict[str, Any], tmp_path: Path) -> None:
    if "pretrain_dataset" in change:
        other = tmp_path / "other.npz"
        np.savez(other, x=np.random.default_rng(0).integers(0, 256, (40, 12, 12), np.uint8), y=np.arange(40) % 4)
        change = change | {"pretrain_dataset": str(other)}
    config = dataclasses.replace(TINY, n_tasks=2, **change)
    metrics = train.run(config, tmp_path, show_progress=False)
    log = read_log(tmp_path / "losses.jsonl")
    assert Report.of(log).violations == []
    assert all(name in metrics["variant"] for name in change if name in _NAMED)
    assert "precision" not in metrics["variant"]
    assert set(metrics["accuracy"]) == ({"domain_il"} if "scenario" in change else {"class_il", "task_il"})


def test_a_compiled_encoder_trains_as_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured as a graph once; without the code generator, which takes a minute on a CPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    config = dataclasses.replace(TINY, n_tasks=2, method="co2l")
    plain, compiled = (
        train.run(dataclasses.replace(config, compile=value), tmp_path / str(value), show_progress=False)
        for value in (False, True)
    )
    for before, after in zip(plain["objective"], compiled["objective"], strict=True):
        assert after == pytest.approx(before, rel=1e-3)


def test_a_buffer_without_a_tuple_is_announced_and_makes_theorem_1_infinite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(TINY, buffer_size=7, n_negatives=(1,))
    train.run(config, tmp_path, show_progress=False)
    error = capsys.readouterr().err
    assert "will form no tuple of 1 negative 6 times, first after task 4 those of task 2: the Theorem" in error
    log = read_log(tmp_path / "losses.jsonl")
    assert log.training(5).mixture_weights[1] == 0.0
    with pytest.raises(LookupError):
        log.measurement(5, 2, "buffer")
    assert certify(log, "theorem1").unclipped_total == float("inf")
    assert certify(log, "moment").unclipped_total < float("inf")


def test_prices_per_task_are_logged_as_shares_of_the_distillation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """distill_weight x mixture_weights = what each task's distillation loss was multiplied by."""
    monkeypatch.setattr(methods, "dual_price_weight", lambda losses, *_: tuple(1.0 + i for i in range(len(losses))))
    config = dataclasses.replace(TINY, method="dual-price-per-task", n_negatives=(1,))
    train.run(config, tmp_path, show_progress=False)
    last = read_log(tmp_path / "losses.jsonl").training(5)
    current = len(build_stream(config, tmp_path).tasks[4].train.labels)
    sizes = np.array([10, 10, 10, 10, current])
    prices = np.array([1.0, 2.0, 3.0, 4.0, 2.5])
    products = last.distill_weight * np.array(last.mixture_weights)
    assert products == pytest.approx(sizes / sizes.sum() * prices, rel=1e-9)


@pytest.mark.parametrize("costs", [Costs(0, 1.0, 1.0), Costs(1, 50.0, 5.0), Costs(2, 0.0, 1.0), Costs(0, 1.0, 0.0)])
def test_decisions_have_the_least_expected_cost(costs: Costs) -> None:
    """Of all decisions, given the softmax of the known classes; errors among other classes cost nothing."""
    logits = 2 * torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    for known in ({0, 1, 2, 3}, {costs.defect, 3}):
        expected = []
        for row in logits.double().numpy():
            chance = {c: np.exp(row[c]) for c in known}
            others = sum(p for c, p in chance.items() if c != costs.defect)
            price = dict.fromkeys(known, costs.miss * chance[costs.defect])  # of every decision
            price[costs.defect] = costs.alarm * others
            expected.append(min(price, key=lambda c: (price[c], -chance[c])))
        assert cheapest(logits, known, costs).tolist() == expected
    assert cheapest(logits, {costs.defect}, costs).tolist() == [costs.defect] * 300
    unknown = {0, 1, 2, 3} - {costs.defect}
    assert (cheapest(logits, unknown, costs) == likeliest(logits, unknown)).all()


def test_costs_of_errors_change_decisions_and_no_accuracy(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, n_tasks=2)
    plain, priced = (
        train.run(dataclasses.replace(config, **change), tmp_path / str(len(change)), show_progress=False)
        for change in ({}, {"defect_class": 1, "miss_cost": 1000.0})
    )
    assert (plain["accuracy"], plain["variant"]) == (priced["accuracy"], priced["variant"])
    table, other = (np.array(metrics["confusion"]["last"][0]) for metrics in (plain, priced))
    assert table.sum(1).tolist() == other.sum(1).tolist()
    assert other[:, 1].sum() > table[:, 1].sum()
    with pytest.raises(ValueError, match=r"defect_class must be in 0\.\.9, got 10"):
        train.run(dataclasses.replace(config, defect_class=10), tmp_path / "no", show_progress=False)


@pytest.mark.parametrize("kind", ["class-incremental", "domain-incremental"])
def test_decisions_know_how_frequent_classes_are(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A representation that says nothing: the corrected softmax is the share of each class in the tasks' training
    images, though the probe was trained on balanced classes or tasks, and on a buffer with other shares.
    """
    base = TINY if kind == "class-incremental" else ROTATED
    config = dataclasses.replace(base, n_tasks=2, imbalance=9.0, probe_epochs=100)
    run = train._Run(config, tmp_path, tmp_path)
    run.buffer.add(run.stream, 1, np.random.default_rng(0))
    snapshot = run._snapshot(run.model)
    blind = snapshot.of(run.stream.tasks[0].train.images).representation

    def of(_: Any, images: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(representation=blind[:1].expand(len(images), -1))

    monkeypatch.setattr(type(snapshot), "of", of)
    monkeypatch.setattr(type(snapshot), "split", lambda _, task, name: of(_, run.stream.tasks[task - 1].train.images))
    probe, known, shift = scores._probe(config, run.stream, run.buffer, 2, snapshot, torch.device("cpu"))
    share = np.mean([np.bincount(t.train.labels, minlength=10) / len(t.train.labels) for t in run.stream.tasks], 0)
    found = (probe(blind[:1]) + shift).softmax(1)[0].numpy()
    assert known == set(np.flatnonzero(share))
    assert found == pytest.approx(share, abs=0.04)
    assert probe(blind[:1]).softmax(1)[0].numpy() != pytest.approx(share, abs=0.04)


def test_linear_probe_separates_what_is_separable_and_balances_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([0] * 300 + [1] * 10 + [3] * 10)
    centre = 4 * torch.eye(8)[[0, 1, 2, 2]]
    representation = centre[label] + torch.randn(320, 8, generator=generator)
    probe = linear_probe(representation, label, label, 4, epochs=100, learning_rate=0.1, seed=0)
    new = torch.tensor([0, 1, 3]).repeat_interleave(200)
    logits = probe(centre[new] + torch.randn(600, 8, generator=generator))
    for kind in (0, 1, 3):
        assert (logits[new == kind].argmax(1) == kind).float().mean() > 0.95
    again = linear_probe(representation, label, label, 4, epochs=100, learning_rate=0.1, seed=0)
    assert torch.equal(probe.weight, again.weight)


def test_linear_probe_draws_every_group_as_often() -> None:
    """The same images labelled 0 in a large group and 1 in a small one: an even draw is undecided."""
    representation = torch.ones(1000, 1)
    label = torch.tensor([0] * 990 + [1] * 10)
    even, uneven = (
        linear_probe(representation, label, group, 2, epochs=60, learning_rate=0.1, seed=0)(torch.ones(1, 1)).softmax(1)
        for group in (label, torch.zeros_like(label))
    )
    assert even[0, 1] == pytest.approx(0.5, abs=0.1)
    assert uneven[0, 1] < 0.05


def test_where_tasks_share_classes_positives_stay_within_a_task(tmp_path: Path) -> None:
    for config, expected in ((ROTATED, False), (TINY, True)):
        run = train._Run(dataclasses.replace(config, n_tasks=2), tmp_path, tmp_path)
        run.buffer.add(run.stream, 1, np.random.default_rng(0))
        rows = run._rows(2)
        assert set(rows.tasks.tolist()) == {1, 2}
        pairs = list(zip(rows.labels.tolist(), rows.tasks.tolist(), rows.positives.tolist(), strict=True))
        assert len({positive for _, _, positive in pairs}) == len({(label, task) for label, task, _ in pairs})
        assert torch.equal(rows.positives, rows.labels) == expected


@pytest.mark.parametrize(("config", "balanced_over"), [(TINY, "classes"), (ROTATED, "tasks")])
def test_the_probe_is_balanced_over_classes_or_tasks(
    config: RunConfig, balanced_over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def probe(representation: torch.Tensor, label: torch.Tensor, group: torch.Tensor, *arguments: Any, **options: Any):
        seen.append((label, group))
        return linear_probe(representation, label, group, *arguments, **options)

    monkeypatch.setattr(scores, "linear_probe", probe)
    train.run(dataclasses.replace(config, n_tasks=2), tmp_path, show_progress=False)
    label, group = seen[-1]
    if balanced_over == "classes":
        assert torch.equal(label, group)
    else:
        assert group.unique().tolist() == [1, 2]
        assert group[0] == 2 and len(label.unique()) == 10


@pytest.mark.parametrize("policy", ["balanced", "reservoir"])
def test_buffered_logits_stay_with_their_images(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: dict[tuple[int, int], torch.Tensor] = {}
    finish = train._Run._finish_task

    def check(self: train._Run, task: int, writers: Any) -> None:
        finish(self, task, writers)
        pairs = self.buffer.pairs()
        assert self.progress.logits.shape == (len(pairs), 10)
        fresh = self.teacher.of(self.buffer.of_task(self.stream, task).images).logits
        own = [row for pair, row in zip(pairs, self.progress.logits, strict=True) if pair[0] == task]
        assert torch.equal(torch.stack(own), fresh)
        for pair, row in zip(pairs, self.progress.logits, strict=True):
            assert torch.equal(first.setdefault(pair, row.clone()), row)

    monkeypatch.setattr(train._Run, "_finish_task", check)
    config = dataclasses.replace(TINY, method="der++", buffer=policy, n_negatives=(1,))
    train.run(config, tmp_path, show_progress=False)
    assert {task for task, _ in first} == {1, 2, 3, 4, 5}


def test_pretraining_sees_no_labels(tmp_path: Path) -> None:
    run = train._Run(dataclasses.replace(TINY, pretrain_epochs=1, pretrain_fraction=0.5), tmp_path, tmp_path)
    for task, positives in ((0, "view"), (1, "class")):
        rows = run._rows(task)
        trainer = TaskTrainer(run.config, task, run.model, run.embed, rows, run.augment, None, ())
        assert trainer.config.positives == positives
        assert trainer.epochs == (1, 2)[task]
        assert rows.labels.any() == bool(task)


def test_a_finished_run_may_have_its_logs_compressed(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, n_tasks=1)
    metrics = train.run(config, tmp_path, show_progress=False)
    log = tmp_path / "losses.jsonl"
    (tmp_path / "losses.jsonl.gz").write_bytes(gzip.compress(log.read_bytes()))
    log.unlink()
    assert train.run(config, tmp_path, show_progress=False) == metrics


def test_accuracy_over_seen_and_own_classes() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 9.0], [1.0, 2.0, 3.0, 9.0], [3.0, 2.0, 1.0, 9.0]])
    labels = np.array([1, 2, 0])
    assert accuracy(logits, labels, {0, 1, 2}, (1, 2)) == pytest.approx((2 / 3, 2 / 3))  # class 3 is not known
    assert accuracy(logits, labels, {0, 1, 2}, (0, 1, 2)) == pytest.approx((2 / 3, 2 / 3))
    assert accuracy(logits, labels, {3}, (0, 1)) == (0.0, 0.0)


def test_presets_are_the_published_protocol() -> None:
    """Cha et al. 2021, supplementary tables; the two short schedules change epochs and numbers of images only."""
    published = {
        "rotated-mnist": (20, 0.01, 0.1, 0.2, 0.01, 100, 20, 1.0),
        "seq-cifar10": (5, 0.5, 0.5, 0.2, 0.01, 500, 100, 1.0),
        "seq-tiny-imagenet": (10, 0.1, 0.5, 0.1, 0.1, 500, 50, 0.1),
    }
    names = "n_tasks learning_rate temperature student_temperature teacher_temperature epochs_first epochs "
    for stream, values in published.items():
        full, short = preset(stream), preset(stream, "short")
        assert tuple(getattr(full, name) for name in [*names.split(), "probe_learning_rate"]) == values
        assert (full.batch_size, full.momentum, full.weight_decay, full.buffer_size) == (512, 0.9, 1e-4, 200)
        changed = {
            field.name for field in dataclasses.fields(full) if getattr(full, field.name) != getattr(short, field.name)
        }
        assert changed <= {
            "schedule",
            "epochs_first",
            "epochs",
            "warmup_epochs",
            "batch_size",
            "train_per_class",
            "test_per_class",
        }
    for (stream, schedule), config in PRESETS.items():
        assert (config.stream, config.schedule) == (stream, schedule)
        assert config.variant == config.method
    with pytest.raises(ValueError, match=r"must be one of digits, rotated-digits, .* got 'cifar'"):
        preset("cifar")


def test_names_tell_configurations_apart() -> None:
    assert dataclasses.replace(TINY, dataset="mnist").variant.startswith("cila-max dataset=mnist")
    with pytest.raises(ValueError, match="stream custom needs --dataset"):
        preset("custom").name  # noqa: B018
    assert preset("digits").name == "digits/cila-max-seed0"
    short = dataclasses.replace(preset("rotated-mnist", "short"), kappa=0.5, seed=3, theory_temperatures=(0.1,))
    assert short.name == "rotated-mnist-short/cila-max-kappa=0.5-seed3"
    long = [dataclasses.replace(TINY, learning_rate=0.1 + rate, dataset="a/b.npz", **LONG) for rate in (1e-9, 2e-9)]
    assert long[0].name != long[1].name and all(len(config.name) < 200 for config in long)
    assert long[0].name.count("/") == 1


LONG: dict[str, Any] = {"temperature": 0.123456789, "student_temperature": 0.2345678, "momentum": 0.12345678}


def numbers(directory: Path) -> tuple[list[bytes], dict[str, Any]]:
    """What must not depend on interruptions: the logs, and the metrics without times."""
    metrics = json.loads((directory / "metrics.json").read_text())
    del metrics["training_seconds"]
    return [path.read_bytes() for path in sorted(directory.glob("losses*.jsonl"))], metrics


@pytest.mark.parametrize("epochs_before_the_kill", [1, 3])
def test_a_killed_run_resumes_to_the_same_numbers(epochs_before_the_kill: int, tmp_path: Path) -> None:
    """SIGKILL while training task 1 (first epoch done) and task 2 (after the first records)."""
    config = dataclasses.replace(TINY, epochs_first=2, epochs=2, n_tasks=2, buffer_size=20)
    train.run(config, tmp_path / "whole" / config.name, show_progress=False)
    command = [sys.executable, "-m", "experiments", "run", "--out", str(tmp_path / "killed")]
    for name, value in dataclasses.asdict(config).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command.append(flag if value else f"--no-{flag[2:]}")
        else:
            command += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    directory = tmp_path / "killed" / config.name
    checkpoint = directory / "checkpoint.pt"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if checkpoint.exists() and len(Progress.load(checkpoint).objective) >= epochs_before_the_kill:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    error = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, error
    assert not (directory / "metrics.json").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 0, again.stderr
    assert numbers(directory) == numbers(tmp_path / "whole" / config.name)


class StopError(Exception):
    """Raised in place of a crash."""


@pytest.mark.parametrize(
    ("call", "change"),
    [
        *((call, {}) for call in range(1, 7)),
        *((call, {"pretrain_epochs": 1, "pretrain_fraction": 0.5, "positives": "view"}) for call in (1, 2)),
        *((call, {"queue_size": 300}) for call in (1, 4)),
        *((call, {"method": "der++", "buffer": "reservoir"}) for call in (4, 6)),
        (5, {"theory_temperatures": (0.5, 0.1)}),
        (7, {"n_tasks": 5, "n_negatives": (1, 4), "buffer_size": 8, "epochs": 1}),  # logs of different lengths
        (7, {"n_tasks": 5, "n_negatives": (4, 1), "buffer_size": 8, "epochs": 1}),
        (5, {"method": "dual-price-per-task", "buffer_size": 0}),
    ],
)
def test_a_crash_at_any_checkpoint_resumes_to_the_same_numbers(
    call: int, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the n-th checkpoint: between epochs, between the last epoch and the records, and between tasks."""
    config = dataclasses.replace(TINY, **{"epochs_first": 2, "epochs": 2, "n_tasks": 2, "buffer_size": 20} | change)
    train.run(config, tmp_path / "whole", show_progress=False)
    save, count = Progress.save, 0

    def crash(self: Progress, path: Path) -> None:
        nonlocal count
        save(self, path)
        count += 1
        if count == call:
            raise StopError

    monkeypatch.setattr(Progress, "save", crash)
    with pytest.raises(StopError):
        train.run(config, tmp_path / "crashed", show_progress=False)
    monkeypatch.undo()
    train.run(config, tmp_path / "crashed", show_progress=False)
    assert numbers(tmp_path / "crashed") == numbers(tmp_path / "whole")


def test_a_directory_with_another_run_is_refused(tmp_path: Path) -> None:
    TINY.save(tmp_path / "config.json")
    with pytest.raises(ValueError, match="holds a run with epochs = 1, not 3: choose another --out or remove it"):
        train.run(dataclasses.replace(TINY, epochs=3), tmp_path, show_progress=False)


def test_a_refused_configuration_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_tasks must split"):
        train.run(dataclasses.replace(TINY, n_tasks=3), tmp_path / "run", show_progress=False)
    with pytest.raises(ValueError, match=r"data of task 1 .* are too few"):
        train.run(dataclasses.replace(TINY, n_negatives=(120,)), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run/config.json").exists()


def test_two_processes_cannot_share_a_directory(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="is in use by another process"):
        train.run(TINY, tmp_path, show_progress=False)


def test_command_line_reports_bad_input_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments", "run", "--out", str(tmp_path), "--n-tasks", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 2
    assert "experiments: n_tasks must split 10 classes" in result.stderr
    assert "Traceback" not in result.stderr
