"""The streams of published datasets, from small generated files in the official layouts to bounds that hold."""

import dataclasses
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cila_bound import read_log
from cila_bound.report import Report
from experiments import published_files, train
from experiments.config import RunConfig
from experiments.presets import preset

RNG = np.random.default_rng(0)
QUICK: dict[str, Any] = {
    "epochs_first": 1,
    "epochs": 1,
    "batch_size": 16,
    "tuple_rounds": 2,
    "probe_epochs": 2,
    "buffer_size": 16,
}


def write_mnist(root: Path) -> None:
    (root / "MNIST/raw").mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 40)):
        images, labels = RNG.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for name, values in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            (root / f"MNIST/raw/{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        records = RNG.integers(0, 256, (40, 3073), np.uint8)
        records[:, 0] = np.arange(40) % 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())


def write_tiny_imagenet(root: Path) -> None:
    """20 classes instead of 200, of 4 training and 4 validation images of 64 x 64."""
    folder = root / "tiny-imagenet-200"
    names = [f"n{number:02}" for number in range(20)]
    (folder / "val/images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(names))
    rows = []
    for name in names:
        (folder / "train" / name / "images").mkdir(parents=True)
        for k in range(4):
            for file in (folder / "train" / name / f"images/{name}_{k}.JPEG", folder / f"val/images/{name}_{k}.JPEG"):
                Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
            rows.append(f"{name}_{k}.JPEG\t{name}\t0\t0\t1\t1\n")
    (folder / "val/val_annotations.txt").write_text("".join(rows))


@pytest.mark.parametrize(
    ("stream", "write", "change", "first_task", "kind"),
    [
        ("split-mnist", write_mnist, {}, "0-1", {"class_il", "task_il"}),
        ("rotated-mnist", write_mnist, {"n_tasks": 2}, "rotation 1", {"domain_il"}),
        ("seq-cifar10", write_cifar10, {"width": 4}, "airplane-automobile", {"class_il", "task_il"}),
        ("seq-tiny-imagenet", write_tiny_imagenet, {"width": 4}, "n00-n01", {"class_il", "task_il"}),
    ],
)
def test_published_streams_run_from_their_official_files(
    stream: Any,
    write: Any,
    change: dict[str, Any],
    first_task: str,
    kind: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(published_files, "CIFAR_RECORDS", 40)
    write(tmp_path / "data")
    config: RunConfig = dataclasses.replace(preset(stream), method="co2l", **QUICK, **change)
    metrics = train.run(config, tmp_path / "run", data_root=tmp_path / "data", show_progress=False)
    log = read_log(tmp_path / "run/losses.jsonl")
    assert log.header.tasks[0] == first_task
    assert len(log.header.tasks) == config.n_tasks == preset(stream).n_tasks if "n_tasks" not in change else 2
    assert Report.of(log).violations == []
    assert set(metrics["accuracy"]) == kind
