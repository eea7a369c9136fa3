"""A run's directory: ``losses.jsonl``, the log that the bounds read, and one for every further temperature or number of
negatives; ``config.json``, from the first finished epoch on; ``checkpoint.pt``, replaced after every epoch while
unfinished; ``checkpoints/task-N.pt``, the same as it was after task N; ``audit.jsonl``, what became of each task's
model; and ``metrics.json``, written last.

What a crash leaves can be resumed. What it cannot leave, a damaged or missing file, is refused by name.
"""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cila_bound import read_log
from cila_bound.files import write_atomic
from experiments import audit
from experiments.config import RunConfig, read_json
from experiments.versions import made_with


@dataclass
class Progress:
    """Everything that a resumed run needs beside its configuration; plain numbers and tensors only.

    ``task`` counts from 1, and is 0 during pre-training; ``records`` counts those of each log; ``logits`` are those of
    the buffered images, in its order.
    """

    task: int = 1
    epoch: int = 0
    records: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    seconds: float = 0.0
    buffer: list[list[int]] = field(default_factory=list)
    logits: torch.Tensor | None = None
    over_seen: list[list[float]] = field(default_factory=list)
    over_own: list[list[float]] = field(default_factory=list)
    confusion: list[list[list[int]]] = field(default_factory=list)
    confusion_own: list[list[list[int]]] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    objective: list[dict[str, Any]] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        content = io.BytesIO()
        torch.save({name.name: getattr(self, name.name) for name in dataclasses.fields(self)}, content)
        write_atomic(path, content.getvalue())

    @staticmethod
    def load(path: Path) -> Progress:
        """Raises ValueError that names the file if it is no checkpoint."""
        content = io.BytesIO(path.read_bytes())
        try:
            return Progress(**torch.load(content, weights_only=True, map_location="cpu"))
        except Exception as error:  # damaged bytes fail in torch in many ways
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{path} is damaged ({reason}): {_remedy(path)}") from None


def log_names(config: RunConfig) -> list[str]:
    """One log per geometry of the theory; the first is ``losses.jsonl``."""
    further = [f"losses-temperature{g.temperature:g}-negatives{g.n_negatives}.jsonl" for g in config.geometries[1:]]
    return ["losses.jsonl", *further]


def put_on_file(
    config: RunConfig, directory: Path, progress: Progress, event: str, task: int, facts: dict[str, Any]
) -> None:
    """The task's checkpoint, the audit entry that vouches for it and for the logs, then the running checkpoint: in this
    order, so that whatever a crash leaves is made again as it was.
    """
    kept = None
    if config.keep_checkpoints:
        name = f"checkpoints/task-{task}.pt"
        progress.save(directory / name)
        kept = {"file": name, "sha256": audit.file_sha256(directory / name)}
    logs = [
        {"file": name, "lines": 1 + count, "sha256": audit.prefix_sha256(directory / name, 1 + count)}
        for name, count in zip(log_names(config), progress.records, strict=True)
    ]
    audit.append(directory, event, task, {"checkpoint": kept, "logs": logs, **facts})
    progress.save(directory / "checkpoint.pt")


def finished(config: RunConfig, directory: Path) -> dict[str, Any] | None:
    """What ``metrics.json`` holds, or None if the run is not finished.

    Raises ValueError if the directory holds another run, or a file of a finished one is damaged or missing.
    """
    config.check_same(directory / "config.json")
    metrics = directory / "metrics.json"
    if not metrics.exists():
        return None
    for name in log_names(config):
        if not ((directory / name).exists() or (directory / f"{name}.gz").exists()):
            raise ValueError(f"{directory / name} of a finished run is missing: {_remedy(directory / name)}")
    return read_json(metrics)


def finished_notice(directory: Path, metrics: dict[str, Any]) -> str:
    """What to tell whoever asked for a run that is there already."""
    return (
        f"{directory} is finished already, made with {made_with(metrics.get('versions', {}))}: nothing was trained; "
        "remove it to train anew"
    )


def begin_or_resume(config: RunConfig, directory: Path) -> Progress:
    """The checkpoint of an unfinished run; without one a fresh start, and no log.

    After which task a run stands, its audit file says: if the running checkpoint is of another task, as a crash during
    a rollback leaves it, or lost, that task's own checkpoint is taken.

    Raises ValueError if the checkpoint, the audit file or a log is damaged or missing.
    """
    checkpoint = directory / "checkpoint.pt"
    progress = Progress.load(checkpoint) if checkpoint.exists() else None
    entries = audit.standing(audit.read(directory))
    if entries and entries[-1].content["checkpoint"]:
        last = entries[-1]
        if progress is None or progress.task != last.task + 1:
            audit.check_file(directory, last, last.content["checkpoint"])
            progress = Progress.load(directory / last.content["checkpoint"]["file"])
    if progress is not None:
        for name in log_names(config):
            if not (directory / name).exists():
                raise ValueError(f"{directory / name} of an unfinished run is missing: {_remedy(directory / name)}")
        return progress
    for log in sorted(directory.glob("losses*.jsonl")):
        if read_log(log).records:
            raise ValueError(f"{log} has records, but {checkpoint.name} or metrics.json is missing: {_remedy(log)}")
        log.unlink()
    return Progress(task=0 if config.pretrain_epochs else 1)


def _remedy(path: Path) -> str:
    return f"restore it, or remove {path.parent} to train anew"
