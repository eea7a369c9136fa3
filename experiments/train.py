"""One run: train on each task in turn, log the theorem's losses, measure accuracy, and be able to stop anywhere."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from cila_bound import Geometry, Header, LossLog, LossLogWriter
from cila_bound.files import remove_stale, write_atomic
from cila_bound.records import Record
from experiments import audit
from experiments.augment import Augmentation
from experiments.buffer import Buffer
from experiments.config import RunConfig
from experiments.datasets import load
from experiments.directory import begin_or_resume, finished, log_names, task_checkpoint
from experiments.evaluate import average_accuracy, backward_transfer, forgetting
from experiments.gate import Decision, certificates, notice, weigh
from experiments.methods import METHODS
from experiments.models import Model, build_model, layout
from experiments.record import Recorder, draw_fixed
from experiments.scores import measure
from experiments.seeds import derive, numpy_rng
from experiments.snapshot import Snapshot
from experiments.streams import build_stream
from experiments.trainer import Rows, TaskTrainer, epochs_of
from experiments.versions import changes, made_with, versions


def run(
    config: RunConfig, directory: Path, *, data_root: Path = Path("data"), show_progress: bool = True
) -> dict[str, Any]:
    """Trains, or resumes, or finds finished; returns what ``metrics.json`` holds. Datasets are looked for below
    ``data_root``.

    Raises ValueError for a configuration that cannot work, a directory with another run or a damaged file, or a run
    that diverges.
    """
    result = finished(config, directory)
    if result is None:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(directory / ".lock", timeout=0):
                remove_stale(directory)
                torch.set_num_threads(config.threads)
                result = _Run(config, directory, data_root).train(show_progress)
                write_atomic(directory / "metrics.json", (json.dumps(result, indent=2) + "\n").encode())
                (directory / "checkpoint.pt").unlink(missing_ok=True)
        except Timeout:
            raise ValueError(
                f"{directory} is in use by another process: wait for it, or choose another --out"
            ) from None
    return result


class _Run:
    def __init__(self, config: RunConfig, directory: Path, data_root: Path) -> None:
        self.config, self.directory, self.method = config, directory, METHODS[config.method]
        self.device, self.versions = _device(config.device), versions()
        self.stream = build_stream(config, data_root)
        self.n_tasks = len(self.stream.tasks)
        self.pretrain_images = self._pretrain_images(data_root)
        fixed = {k: draw_fixed(config, self.stream, k) for k in config.n_negatives}
        self.recorders = [
            Recorder(
                config,
                self.stream,
                geometry,
                fixed[geometry.n_negatives],
                log_tuples="none" if position else config.log_tuples,
            )
            for position, geometry in enumerate(config.geometries)
        ]
        self.augment = Augmentation(config.augmentation, self.stream.shape[1], self.stream.mean, self.stream.std)
        self.augment.to(self.device)
        torch.manual_seed(derive(config.seed, "weights"))
        n_classes = self.stream.n_classes if self.method.classifier else None
        self.model = build_model(config.model, self.stream.shape, width=config.width or None, n_classes=n_classes)
        self.model.to(self.device).to(memory_format=layout(config.model, self.device)).eval()  # type: ignore[call-overload]
        self.embed: Callable[[Tensor], Tensor] = torch.compile(self.model) if config.compile else self.model
        self.buffer = Buffer(config.buffer_size, config.buffer)
        self.teacher: Snapshot | None = None
        self.progress = begin_or_resume(config, directory)
        self.buffer.load_state(self.progress.buffer)
        if self.progress.teacher:
            teacher = copy.deepcopy(self.model)
            teacher.load_state_dict(self.progress.teacher)
            self.teacher = self._snapshot(teacher)
        if self.progress.model:
            self.model.load_state_dict(self.progress.model)

    def train(self, show_progress: bool) -> dict[str, Any]:
        config, progress = self.config, self.progress
        with ExitStack() as stack:
            fingerprint, kept = self.stream.fingerprint(), progress.records or [0] * len(self.recorders)
            writers = [
                stack.enter_context(
                    LossLogWriter(self.directory / name, self._header(geometry, fingerprint), resume=True, keep=keep)
                )
                for name, geometry, keep in zip(log_names(config), config.geometries, kept, strict=True)
            ]
            total = sum(epochs_of(config, task) for task in range(self.n_tasks + 1))
            bar = stack.enter_context(tqdm(total=total, desc=config.name, unit="epoch", disable=not show_progress))
            self._warn(writers[0])
            bar.update(len(progress.objective))
            for task in range(progress.task, self.n_tasks + 1):
                self._train_task(task, writers[0], bar)
                if task:
                    self._finish_task(task, writers)
                else:
                    progress.task, progress.epoch, progress.trainer = 1, 0, {}
                    self._save()
        return self._result()

    def _train_task(self, task: int, writer: LossLogWriter, bar: tqdm) -> None:
        config, progress = self.config, self.progress
        if progress.epoch == 0 and task > 1 and self.method.weights:
            progress.weights = list(self.method.weights(writer.log, task, config))
        teacher = self.teacher.model if self.teacher else None
        trainer = TaskTrainer(
            config, task, self.model, self.embed, self._rows(task), self.augment, teacher, progress.weights
        )
        if progress.trainer:
            trainer.load_state(progress.trainer)
        for epoch in range(progress.epoch, trainer.epochs):
            start = time.perf_counter()
            terms = trainer.epoch(epoch)
            progress.objective.append({"task": task, "epoch": epoch, **terms})
            progress.epoch, progress.trainer = epoch + 1, trainer.state()
            progress.seconds += time.perf_counter() - start
            self._save()
            bar.set_postfix(task=task, **{name: f"{value:.3f}" for name, value in terms.items()}, refresh=False)
            bar.update()

    def _rows(self, task: int) -> Rows:
        """What ``task`` is trained on: its training split and, with rehearsal, the buffer.

        Where tasks share classes, images of a class are positives within a task only, as in Co2L's code.
        """
        if task == 0:
            parts = [(self.pretrain_images, np.zeros(len(self.pretrain_images), np.int64), 0)]
        else:
            own = self.stream.tasks[task - 1].train
            parts = [(own.images, own.labels, task)]
            if self.method.rehearsal:
                parts += [(*self.buffer.of_task(self.stream, past), past) for past in range(1, task)]
        labels = torch.from_numpy(np.concatenate([labels for _, labels, _ in parts])).to(self.device)
        tasks = torch.cat([torch.full((len(labels),), number) for _, labels, number in parts]).to(self.device)
        domains = self.stream.kind == "domain-incremental"
        return Rows(
            images=torch.from_numpy(np.concatenate([images for images, _, _ in parts])).to(self.device),
            labels=labels,
            tasks=tasks,
            positives=labels + self.stream.n_classes * tasks if domains else labels,
            n_current=len(parts[0][1]),
            logits=None if self.progress.logits is None else self.progress.logits.to(self.device),
        )

    def _finish_task(self, task: int, writers: list[LossLogWriter]) -> None:
        """Weighs the update, logs, measures accuracy, fills the buffer, makes the model the next task's teacher, and
        puts all of it on file.
        """
        progress, snapshot = self.progress, self._snapshot(self.model)
        decision = weigh(self.config, writers[0].log, self._records(self.recorders[0], task, snapshot), task)
        if decision is not None and (text := notice(decision, task, self.stream.tasks[task - 1].name)):
            tqdm.write(text, file=sys.stderr)
        if decision is not None and not decision.accepted:
            assert self.teacher is not None  # the first task is always accepted
            snapshot = self.teacher
            self.model.load_state_dict(snapshot.model.state_dict())
            progress.refused.append(task)
        for recorder, writer in zip(self.recorders, writers, strict=True):
            for record in self._records(recorder, task, snapshot):
                writer.append(record)
        scores = measure(self.config, self.stream, self.buffer, task, snapshot, self.device)
        progress.over_seen.append(scores.over_seen)
        progress.over_own.append(scores.over_own)
        progress.confusion_own += scores.confusion[-1:]
        progress.confusion = scores.confusion
        before = dict(zip(self.buffer.pairs(), () if progress.logits is None else progress.logits, strict=False))
        self.buffer.add(self.stream, task, numpy_rng(self.config.seed, "buffer", task))
        progress.buffer = self.buffer.state()
        if self.method.logits:
            new = snapshot.of(self.buffer.of_task(self.stream, task).images).logits
            kept = [before[pair] for pair in self.buffer.pairs() if pair[0] < task]
            progress.logits = torch.cat([*(row[None] for row in kept), *([] if new is None else [new])])
        self.teacher = snapshot
        progress.teacher = progress.model = snapshot.model.state_dict()
        progress.task, progress.epoch, progress.trainer = task + 1, 0, {}
        progress.records = [len(writer.log.records) for writer in writers]
        self._put_on_file(task, writers[0].log, decision)

    def _records(self, recorder: Recorder, task: int, snapshot: Snapshot) -> list[Record]:
        progress = self.progress
        return recorder.records(
            task, snapshot, self.teacher, self.buffer, tuple(progress.weights), progress.objective[-1]
        )

    def _put_on_file(self, task: int, log: LossLog, decision: Decision | None) -> None:
        """The task's checkpoint, the audit entry that vouches for it and for the logs, then the running checkpoint: in
        this order, so that whatever a crash leaves is made again as it was.
        """
        kept = None
        if self.config.keep_checkpoints:
            name = task_checkpoint(task)
            self.progress.save(self.directory / name)
            kept = {"file": name, "sha256": audit.file_sha256(self.directory / name)}
        facts = {
            "name": self.stream.tasks[task - 1].name,
            "checkpoint": kept,
            "logs": [
                {"file": name, "lines": 1 + count, "sha256": audit.prefix_sha256(self.directory / name, 1 + count)}
                for name, count in zip(log_names(self.config), self.progress.records, strict=True)
            ],
            "certificates": certificates(self.config, log, task),
            "gate": None if decision is None else decision.as_json(),
            "made_with": made_with(self.versions),
        }
        accepted = decision is None or decision.accepted
        audit.append(self.directory, "task" if accepted else "refused", task, facts)
        self.progress.save(self.directory / "checkpoint.pt")

    def _pretrain_images(self, data_root: Path) -> np.ndarray:
        """Set aside, or those of another dataset, resized; none without pre-training."""
        config, (channels, height, width) = self.config, self.stream.shape
        if not config.pretrain_epochs:
            return np.empty((0, *self.stream.shape), np.uint8)
        if self.stream.pretrain is not None:
            return self.stream.pretrain.images
        images = load(config.pretrain_dataset, data_root).train.images
        if images.shape[1] != channels:
            raise ValueError(
                f"pretrain_dataset {config.pretrain_dataset} has {images.shape[1]} channels, but the stream's images "
                f"have {channels}: choose a dataset with as many"
            )
        resized = [
            functional.interpolate(batch.float(), (height, width), mode="bilinear", antialias=True).round().byte()
            for batch in torch.from_numpy(images).split(1024)
        ]
        return torch.cat(resized).numpy()

    def _snapshot(self, model: Model) -> Snapshot:
        return Snapshot(model, self.stream, self.augment.plain, self.device)

    def _warn(self, writer: LossLogWriter) -> None:
        """Of other versions than the run was begun with, and of what the log will lack."""
        messages = []
        changed = changes(writer.log.header.versions, self.versions)
        if changed:
            messages.append(
                f"{self.directory} is resumed with other versions than it was begun with ({changed}): its numbers may "
                "differ from those of a run of one version"
            )
        for recorder in {recorder.geometry.n_negatives: recorder for recorder in self.recorders}.values():
            missing = recorder.unmeasurable()
            if missing:
                after, task = missing[0]
                negatives = recorder.geometry.n_negatives
                messages.append(
                    f"with buffer_size {self.config.buffer_size} the buffer's images of a past task will form no tuple "
                    f"of {negatives} negative{'s' if negatives > 1 else ''} {len(missing)} times, first after task "
                    f"{after} those of task {task}: the Theorem 1 form will be infinite"
                )
        for text in messages:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def _save(self) -> None:
        config_path = self.directory / "config.json"
        if not config_path.exists():
            self.config.save(config_path)
        self.progress.model = self.model.state_dict()
        self.progress.save(self.directory / "checkpoint.pt")

    def _header(self, geometry: Geometry, fingerprint: str) -> Header:
        config = self.config
        return Header(
            temperature=geometry.temperature,
            n_negatives=geometry.n_negatives,
            tasks=tuple(task.name for task in self.stream.tasks),
            seed=config.seed,
            method=config.method,
            fixed_tuples=True,
            config=config.as_json() | {"task_details": [task.detail for task in self.stream.tasks]},
            versions=self.versions,
            data_fingerprint=fingerprint,
        )

    def _result(self) -> dict[str, Any]:
        config, progress = self.config, self.progress
        matrices = {"class_il": progress.over_seen, "task_il": progress.over_own}
        if self.stream.kind == "domain-incremental":
            matrices = {"domain_il": progress.over_seen}
        return {
            "study": config.study,
            "variant": config.variant,
            "config": config.as_json(),
            "tasks": [task.name for task in self.stream.tasks],
            "accuracy": {
                name: {
                    "accuracy_matrix": matrix,
                    "average_accuracy": average_accuracy(matrix),
                    "forgetting": forgetting(matrix),
                    "backward_transfer": backward_transfer(matrix),
                }
                for name, matrix in matrices.items()
            },
            "confusion": {"own": progress.confusion_own, "last": progress.confusion},
            "refused": progress.refused,
            "objective": progress.objective,
            "training_seconds": progress.seconds,
            "versions": self.versions,
        }


def _device(name: str) -> torch.device:
    """Raises ValueError if a GPU is asked for that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU: choose cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
