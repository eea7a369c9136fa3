"""One run on several processes, as torchrun starts them: the same numbers, one writer, and no hang when a rank dies."""

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

from cila_bound import read_log
from experiments import audit, train
from experiments.config import RunConfig
from experiments.streams import build_stream
from experiments.trainer import _batches
from experiments.world import World

ROOT = Path(__file__).parent.parent
RANKS = (1, 2, 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "cila-max": {"method": "cila-max"},
    "finetune-view": {"method": "finetune", "positives": "view"},
    "co2l-queue": {"method": "co2l", "queue_size": 1000},  # never full: which keys are oldest depends on the ranks
    "dual-price": {"method": "dual-price-per-task"},
    "er": {"method": "er", "buffer_size": 0},  # replayed images are drawn by each rank for itself
}


def torchrun(ranks: int, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Path]]:
    """Runs whose numbers depend on the ranks by rounding only: no batch statistics, no random views."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 4
    images = rng.integers(0, 60, (160, 16, 16))
    for label in range(4):
        images[labels == label, 4 * label : 4 * label + 4] += 150
    np.savez(root / "data.npz", x=images.astype(np.uint8), y=labels)
    base = RunConfig(
        stream="custom", dataset=str(root / "data.npz"), n_tasks=2, model="mnist-cnn", width=16, augmentation="none",
        epochs_first=3, epochs=3, batch_size=23, learning_rate=0.1, warmup_epochs=0, buffer_size=12, tuple_rounds=2,
        probe_epochs=2,
    )  # fmt: skip
    runs: dict[str, dict[int, Path]] = {name: {} for name in VARIANTS}
    for ranks in RANKS:
        spec = []
        for name, change in VARIANTS.items():
            config = dataclasses.replace(base, **change)
            runs[name][ranks] = root / f"{name}-{ranks}"
            spec.append([str(runs[name][ranks]), config.as_json()])
        path = root / f"spec-{ranks}.json"
        path.write_text(json.dumps(spec))
        process = torchrun(ranks, str(ROOT / "tests/train_ranks.py"), str(path))
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, out + err
    return runs


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_train_what_one_process_trains(exact: dict[str, dict[int, Path]], name: str, ranks: int) -> None:
    one, several = (json.loads((exact[name][n] / "metrics.json").read_text()) for n in (1, ranks))
    assert len(one["objective"]) == len(several["objective"]) == 6
    for a, b in zip(one["objective"], several["objective"], strict=True):
        assert a.keys() == b.keys()
        for term in a:
            assert a[term] == pytest.approx(b[term], rel=2e-4), (term, a, b)
    logs = [read_log(exact[name][n] / "losses.jsonl") for n in (1, ranks)]
    assert [record.key for record in logs[0].records] == [record.key for record in logs[1].records]
    for a, b in zip(*(log.records for log in logs), strict=True):
        if a.kind == "test":
            assert a.contrastive.mean == pytest.approx(b.contrastive.mean, rel=5e-3)
    assert [entry.task for entry in audit.verify(exact[name][ranks])] == [1, 2]


def test_training_moved_the_losses(exact: dict[str, dict[int, Path]]) -> None:
    """Equal numbers would say nothing if no rank learned."""
    objective = json.loads((exact["cila-max"][2] / "metrics.json").read_text())["objective"]
    assert objective[2]["contrastive"] < 0.97 * objective[0]["contrastive"]


def options(out: Path, **changes: Any) -> list[str]:
    values = {"epochs-first": 3, "epochs": 2, "buffer-size": 40, "probe-epochs": 2, "tuple-rounds": 2} | changes
    return ["-m", "experiments", "run", "--out", str(out), *(f"--{k}={v}" for k, v in values.items())]


def test_a_killed_rank_ends_the_run_which_goes_on_with_other_ranks(tmp_path: Path) -> None:
    process = torchrun(2, *options(tmp_path, epochs=25), start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(reached(path) >= (2, 1) for path in tmp_path.rglob("checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    victim = next(pid for pid in children(process.pid) if environment_of(pid).get("RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "exitcode  : -9" in err
    assert "average accuracy" not in out
    (directory,) = tmp_path.glob("digits/*")
    log = read_log(directory / "losses.jsonl")
    assert log.last_task == 1
    task, epoch = reached(directory / "checkpoint.pt")
    assert task == 2 and epoch >= 1
    config = RunConfig(epochs_first=3, epochs=25, buffer_size=40, probe_epochs=2, tuple_rounds=2)
    metrics = train.run(config, directory, show_progress=False)
    assert [len(row) for row in metrics["accuracy"]["class_il"]["accuracy_matrix"]] == [1, 2, 3, 4, 5]
    assert len(metrics["objective"]) == 3 + 4 * 25
    assert [entry.task for entry in audit.verify(directory)] == [1, 2, 3, 4, 5]


def reached(checkpoint: Path) -> tuple[int, int]:
    """Task and finished epochs."""
    state = torch.load(checkpoint, weights_only=True)
    return state["task"], state["epoch"]


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            own = int(path.parent.name)
            found += [own, *children(own)]
    return found


def environment_of(pid: int) -> dict[str, str]:
    content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(pair.split("=", 1) for pair in content.split("\0") if "=" in pair)


@pytest.mark.parametrize(("change", "fewest"), [({"batch_size": 3}, 3), ({"train_per_class": 8}, 8)])
def test_more_ranks_than_images_of_a_batch_are_refused(change: dict[str, int], fewest: int) -> None:
    config = RunConfig(**change)  # type: ignore[arg-type]
    stream = build_stream(config, ROOT)
    assert fewest == min(config.batch_size, *(len(task.train.labels) for task in stream.tasks))
    train._check_ranks(config, stream, fewest)
    with pytest.raises(ValueError, match=f"{fewest + 1} ranks need a training image each.*: start fewer ranks"):
        train._check_ranks(config, stream, fewest + 1)


def test_an_error_of_one_rank_is_said_once(tmp_path: Path) -> None:
    process = torchrun(2, *options(tmp_path, **{"epochs-first": 0}))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("experiments: epochs_first must be at least 1, got 0") == 1
    assert not list(tmp_path.rglob("*.jsonl"))


def test_sweeps_are_for_one_process(tmp_path: Path) -> None:
    process = torchrun(2, "-m", "experiments", "sweep", str(ROOT / "experiments/specs/demo.toml"))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "invalid choice" in err or "unrecognized" in err.lower()


def test_every_rank_gets_a_share_of_every_batch() -> None:
    order = torch.arange(103)
    for size in (1, 2, 3, 5):
        worlds = [World(rank, size) for rank in range(size)]
        seen = []
        for batch in _batches(order, 25, max(2, size)):
            shares = [world.share(batch) for world in worlds]
            assert min(map(len, shares)) >= 1
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            seen += [i for share in shares for i in share.tolist()]
        assert sorted(seen) == list(range(103))
    assert [len(batch) for batch in _batches(order, 25, 5)] == [25, 25, 25, 28]
    assert [len(batch) for batch in _batches(order, 25, 2)] == [25, 25, 25, 25, 3]


def test_synchronised_statistics_need_gpus() -> None:
    model = torch.nn.BatchNorm1d(3)
    assert World().synchronised(model, torch.device("cpu")) is model
    with pytest.raises(ValueError, match="sync_batchnorm needs GPUs"):
        World(0, 2, object()).synchronised(model, torch.device("cpu"))  # type: ignore[arg-type]
