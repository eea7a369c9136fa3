"""Streams, tuples, buffer, metrics, and whole runs: finished, interrupted and killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from cila_bound import Geometry, certify, read_log
from cila_bound.report import Report
from experiments import train
from experiments.augment import random_affine
from experiments.buffer import Buffer
from experiments.config import RunConfig
from experiments.datasets import digits
from experiments.directory import Progress
from experiments.evaluate import average_accuracy, backward_transfer, forgetting
from experiments.methods import METHODS
from experiments.models import SmallEncoder
from experiments.streams import build_stream, class_incremental, split_by_class
from experiments.sweep import sweep
from experiments.tuples import draw_tuples, tuple_losses
from tests.simulate import losses
from tests.test_kernels import triple_loop

ROOT = Path(__file__).parent.parent
TINY = RunConfig(n_tasks=5, epochs_first=2, epochs=1, buffer_size=40, tuple_rounds=2, n_negatives=2)


# --- streams, tuples, buffer


def test_splits_are_disjoint_and_complete() -> None:
    labels = digits().labels
    splits = split_by_class(labels, 0.3, 0.2, np.random.default_rng(0))
    together = np.concatenate(list(splits.values()))
    assert sorted(together) == list(range(len(labels)))
    for name, share in (("heldout", 0.3), ("test", 0.2)):
        for label in range(10):
            assert np.mean(labels[splits[name]] == label) * len(splits[name]) == pytest.approx(
                share * np.sum(labels == label), abs=1
            )


def test_class_incremental_tasks_hold_their_classes_only() -> None:
    stream = build_stream(TINY)
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    for task in stream.tasks:
        for split in task.splits.values():
            assert set(split.labels.tolist()) == set(task.classes)


def test_rotations_keep_an_image_in_its_split() -> None:
    stream = build_stream(dataclasses.replace(TINY, stream="rotated-digits", n_tasks=3))
    first, second = (task.splits for task in stream.tasks[:2])
    for name in first:
        assert np.array_equal(first[name].labels, second[name].labels)
        assert first[name].images.shape == second[name].images.shape
        assert not np.array_equal(first[name].images, second[name].images)


def test_stream_depends_on_the_seed_alone() -> None:
    same = build_stream(dataclasses.replace(TINY, method="co2l", epochs=7))
    assert build_stream(TINY).fingerprint() == same.fingerprint()
    assert build_stream(dataclasses.replace(TINY, seed=1)).fingerprint() != same.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tasks": 3}, "n_tasks must split 10 classes .* one of \\[1, 2, 5\\], got 3"),
        ({"n_tasks": 10}, "one of \\[1, 2, 5\\], got 10"),
        ({"buffer_size": 15}, "buffer_size must be at least 16, .* got 15"),
    ],
)
def test_streams_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_stream(dataclasses.replace(TINY, **change))


def test_a_class_too_small_to_split_is_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has 2 samples"):
        split_by_class(np.array([0, 0, 0, 1, 1]), 0.3, 0.3, np.random.default_rng(0))


def test_class_order_can_be_given() -> None:
    data = digits()
    splits = split_by_class(data.labels, 0.3, 0.3, np.random.default_rng(0))
    stream = class_incremental(data, 5, splits, order=list(range(9, -1, -1)))
    assert stream.tasks[0].classes == (9, 8)


@pytest.mark.parametrize("n_negatives", [1, 2, 5])
@pytest.mark.parametrize("n_classes", [2, 10])
def test_tuples_are_what_they_say(n_negatives: int, n_classes: int) -> None:
    """Another sample of the anchor's class, K of other classes; disjoint within a round, anchor classes balanced."""
    labels = np.repeat(np.arange(n_classes), 30)
    tuples = draw_tuples(labels, n_negatives, 4, np.random.default_rng(0))
    classes = labels[tuples.index]
    assert (classes[:, 0] == classes[:, 1]).all()
    assert (tuples.index[:, 0] != tuples.index[:, 1]).all()
    assert (classes[:, 2:] != classes[:, :1]).all()
    for part in np.split(tuples.index, 4):
        assert len(part) == tuples.n_effective
        assert len(np.unique(part)) == part.size
        counts = np.bincount(labels[part[:, 0]], minlength=n_classes)
        assert counts.max() - counts.min() <= 1
    assert tuples.n_effective >= 0.5 * len(labels) / (n_negatives + 2)


@pytest.mark.parametrize("labels", [[], [0, 1], [0, 0], [0, 0, 1]])
def test_too_few_samples_for_a_tuple_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="form no tuple of a positive pair and 2 negatives"):
        draw_tuples(np.array(labels, dtype=np.int64), 2, 1, np.random.default_rng(0))


def test_tuple_losses_against_their_definitions() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    tuples = draw_tuples(labels, 3, 2, rng)
    embeddings = [torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(40, 5))), dim=1) for _ in range(2)]
    result = tuple_losses(embeddings[0], embeddings[1], tuples, Geometry(0.2, 3))

    def logits(embedding: np.ndarray) -> np.ndarray:
        return np.array([[embedding[row[0]] @ embedding[j] / 0.2 for j in row[1:]] for row in tuples.index])

    expected = losses(*(logits(embedding.numpy()) for embedding in embeddings))
    for name, values in expected.items():
        assert getattr(result, name) == pytest.approx(values, rel=1e-9, abs=1e-12), name


def test_buffer_is_balanced_and_a_shrinking_sample() -> None:
    stream = build_stream(TINY)
    buffer = Buffer(40)
    for task in range(1, 6):
        before = {pair: list(kept) for pair, kept in buffer.kept.items()}
        buffer.add(stream, task, np.random.default_rng(task))
        sizes = [len(kept) for kept in buffer.kept.values()]
        assert sum(sizes) == 40
        assert max(sizes) - min(sizes) <= 1
        for pair, kept in before.items():
            assert set(buffer.kept[pair]) <= set(kept)
    for task in range(1, 6):
        assert set(buffer.of_task(stream, task).labels.tolist()) == set(stream.tasks[task - 1].classes)
    copy = Buffer(40)
    copy.load_state(buffer.state())
    assert copy == buffer


def test_augmentation_is_per_sample_and_seeded() -> None:
    images = torch.from_numpy(digits().images[:1]).repeat(6, 1, 1, 1)
    first, again, other = (random_affine(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    still = random_affine(images, torch.Generator(), degrees=0.0, scale=0.0, shift=0.0)
    assert torch.allclose(still, images, atol=1e-5)


def test_embeddings_have_unit_norm() -> None:
    model = SmallEncoder(1, 8).eval()
    images = torch.from_numpy(digits().images[:5])
    assert torch.allclose(model(images).norm(dim=1), torch.ones(5))
    assert model.represent(images).shape == (5, 128)


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
        ({"theory_temperature": 0.0}, "theory_temperature must be a number in \\[0.004, 1000\\], got 0.0"),
        ({"n_negatives": 0}, "^n_negatives must be"),
        ({"momentum": 1.0}, "momentum must be in \\[0, 1\\), got 1.0"),
        ({"momentum": -0.1}, "momentum must be in"),
        ({"weight_decay": -1e-4}, "weight_decay must be finite and >= 0, got -0.0001"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite and >= 0, got inf"),
        ({"seed": -1}, "seed must be at least 0"),
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
    assert len(metrics["class_il"]["accuracy_matrix"]) == 5
    assert not (tmp_path / "checkpoint.pt").exists()
    weights = [log.training(t).distill_weight for t in range(1, 6)]
    assert weights[0] == 0.0
    if METHODS[method].weight is None:
        assert weights == [0.0] * 5
    else:
        assert weights[1] == 1.0
    last = log.training(5)
    assert last.mixture_weights[0] == (0.0 if method == "finetune" else pytest.approx(10 / 186, rel=0.1))
    assert last.contrastive_weight == (0.0 if method == "distillation-only" else 1.0)
    assert (last.objective_distillation is None) == (METHODS[method].weight is None)


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
    config = dataclasses.replace(TINY, stream="rotated-digits", n_tasks=2, n_negatives=4, contrastive_scale=7.0)
    train.run(config, tmp_path, show_progress=False)
    log = read_log(tmp_path / "losses.jsonl")
    assert Report.of(log).violations == []
    assert log.training(2).contrastive_weight == 7.0
    assert certify(log, "theorem1").theorem.gammas[0] == 7.0


def numbers(directory: Path) -> tuple[bytes, dict[str, Any]]:
    """What must not depend on interruptions: the log, and the metrics without times."""
    metrics = json.loads((directory / "metrics.json").read_text())
    del metrics["training_seconds"]
    return (directory / "losses.jsonl").read_bytes(), metrics


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
            command += [flag, str(value)]
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


@pytest.mark.parametrize("call", range(1, 7))
def test_a_crash_at_any_checkpoint_resumes_to_the_same_numbers(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the n-th checkpoint: between epochs, between the last epoch and the records, and between tasks."""
    config = dataclasses.replace(TINY, epochs_first=2, epochs=2, n_tasks=2, buffer_size=20)
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
        train.run(dataclasses.replace(TINY, n_negatives=90), tmp_path / "run", show_progress=False)
    with pytest.raises(ValueError, match=r"raise buffer_size \(now 40\) or lower n_negatives \(now 9\): after task 4"):
        train.run(dataclasses.replace(TINY, n_negatives=9), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run/config.json").exists()


def test_two_processes_cannot_share_a_directory(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="is in use by another process"):
        train.run(TINY, tmp_path, show_progress=False)


def test_objective_against_the_equations(tmp_path: Path) -> None:
    """scale x SupCon over anchors of the current task + lambda x distillation of all rows, two views, self excluded."""
    config = dataclasses.replace(TINY, contrastive_scale=3.0)
    run = train._Run(config, tmp_path)
    run._freeze_teacher()
    run.progress.distill_weight = 2.0
    torch.nn.init.normal_(run.model.head[0].weight)  # else both models are the same
    images = torch.from_numpy(run.stream.tasks[0].train.images[:6])
    labels, current = torch.tensor([0, 1, 1, 0, 2, 2]), torch.tensor([True, True, False, True, False, False])
    views, labels, current = torch.cat([images, images.flip(3)]), labels.repeat(2), current.repeat(2)
    loss, terms = run._loss(views, labels, current)
    z, teacher = run.model(views).detach(), run.teacher(views)
    ids = torch.arange(12)
    options = {"query_label": labels, "key_label": labels, "query_id": ids, "key_id": ids}
    options |= {name: getattr(config, name) for name in ("temperature", "student_temperature", "teacher_temperature")}
    rows = triple_loop([z, z, teacher, teacher], options)
    contrastive = np.array(rows["contrastive"])[current.numpy()]
    assert terms["contrastive"].tolist() == pytest.approx(contrastive.tolist(), rel=1e-5)
    assert terms["distillation"].tolist() == pytest.approx(rows["distillation"], rel=1e-5)
    assert loss.item() == pytest.approx(3.0 * contrastive.mean() + 2.0 * np.mean(rows["distillation"]), rel=1e-5)


def test_sweep_skips_finished_runs_and_reports_failures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = dataclasses.replace(TINY, n_tasks=2, buffer_size=20, epochs_first=1, epochs=1)
    assert sweep(base, ["co2l", "finetune"], [0], 2, tmp_path) == []
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/metrics.json")}
    assert len(before) == 2
    assert sweep(base, ["co2l", "finetune"], [0], 1, tmp_path) == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/metrics.json")}
    failures = sweep(dataclasses.replace(base, buffer_size=1), ["co2l"], [0], 1, tmp_path / "other")
    assert failures[0][0] == "digits/co2l-seed0"
    assert "buffer_size must be at least 10" in failures[0][1]
    with pytest.raises(ValueError, match="at least one method"):
        sweep(base, [], [0], 1, tmp_path)
    with pytest.raises(ValueError, match="digits/co2l-seed0 is asked for twice"):
        sweep(base, ["co2l"], [0, 0], 2, tmp_path)


def test_command_line_reports_bad_input_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments", "run", "--out", str(tmp_path), "--n-tasks", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 2
    assert "experiments: n_tasks must split 10 classes" in result.stderr
    assert "Traceback" not in result.stderr
