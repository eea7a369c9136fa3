"""One run: train on each task in turn, log the theorem's losses, probe, and be able to stop anywhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from cila_bound import Header, LossLogWriter
from cila_bound.files import write_atomic
from cila_kernels import info_nce_distill, info_nce_distill_loss
from experiments.augment import random_affine
from experiments.buffer import Buffer
from experiments.config import RunConfig
from experiments.datasets import Dataset
from experiments.directory import begin_or_resume, finished
from experiments.evaluate import average_accuracy, backward_transfer, forgetting, linear_probe
from experiments.methods import METHODS
from experiments.models import SmallEncoder
from experiments.record import Recorder
from experiments.seeds import derive, numpy_rng, torch_generator
from experiments.streams import build_stream
from experiments.versions import changes, versions


def run(config: RunConfig, directory: Path, *, show_progress: bool = True) -> dict[str, Any]:
    """Trains, or resumes, or finds finished; returns what ``metrics.json`` holds.

    Raises ValueError for a configuration that cannot work, a directory with another run or a damaged file, or a run
    that diverges.
    """
    result = finished(config, directory)
    if result is None:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(directory / ".lock", timeout=0):
                torch.set_num_threads(config.threads)
                result = _Run(config, directory).train(show_progress)
                write_atomic(directory / "metrics.json", (json.dumps(result, indent=2) + "\n").encode())
                (directory / "checkpoint.pt").unlink(missing_ok=True)
        except Timeout:
            raise ValueError(
                f"{directory} is in use by another process: wait for it, or choose another --out"
            ) from None
    return result


class _Run:
    def __init__(self, config: RunConfig, directory: Path) -> None:
        self.config, self.directory, self.method = config, directory, METHODS[config.method]
        self.stream = build_stream(config)
        self.recorder = Recorder(config, self.stream)
        torch.manual_seed(derive(config.seed, "weights"))
        _, channels, side, _ = self.stream.tasks[0].train.images.shape
        self.model = SmallEncoder(channels, side).eval()
        self.teacher: SmallEncoder | None = None
        self.buffer = Buffer(config.buffer_size)
        self.progress = begin_or_resume(directory)
        if self.progress.model:
            self.model.load_state_dict(self.progress.model)
            self.buffer.load_state(self.progress.buffer)
        if self.progress.teacher:
            self._freeze_teacher()
            self.teacher.load_state_dict(self.progress.teacher)  # type: ignore[attr-defined]

    def train(self, show_progress: bool) -> dict[str, Any]:
        config, progress, log = self.config, self.progress, self.directory / "losses.jsonl"
        total = config.epochs_first + config.epochs * (config.n_tasks - 1)
        with (
            LossLogWriter(log, self._header(), resume=True, keep=progress.records) as writer,
            tqdm(total=total, desc=config.name, unit="epoch", disable=not show_progress) as bar,
        ):
            self._warn_of_changes(writer.log.header.versions)
            bar.update(len(progress.objective))
            for task in range(progress.task, config.n_tasks + 1):
                self._train_task(task, writer, bar)
                self.recorder.record(
                    writer,
                    task,
                    self.model,
                    self.teacher,
                    self.buffer,
                    progress.distill_weight,
                    progress.objective[-1],
                )
                self._probe(task)
                self.buffer.add(self.stream, task, numpy_rng(config.seed, "buffer", task))
                progress.buffer = self.buffer.state()
                progress.teacher = self._freeze_teacher()
                progress.task, progress.epoch, progress.optimizer = task + 1, 0, {}
                progress.records = len(writer.log.records)
                self._save()
        return self._result()

    def _train_task(self, task: int, writer: LossLogWriter, bar: tqdm) -> None:
        config, progress = self.config, self.progress
        epochs = config.epochs_first if task == 1 else config.epochs
        optimizer = torch.optim.SGD(
            self.model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        if progress.optimizer:
            optimizer.load_state_dict(progress.optimizer)
        if progress.epoch == 0:
            weigh = self.method.weight if task > 1 else None
            progress.distill_weight = weigh(writer.log, task, config.kappa) if weigh else 0.0
        images, labels, current = self._training_data(task)
        for epoch in range(progress.epoch, epochs):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(config, epoch, epochs)
            terms = self._epoch(task, epoch, images, labels, current, optimizer)
            with torch.no_grad():
                embedding = self.model(images[: config.batch_size])
            self._check_finite(_log_norm(embedding), *self.model.state_dict().values())
            progress.objective.append({"task": task, "epoch": epoch, **terms})
            progress.epoch, progress.optimizer = epoch + 1, optimizer.state_dict()
            progress.seconds += time.perf_counter() - start
            self._save()
            shown = {name: f"{value:.3f}" for name, value in terms.items() if value is not None}
            bar.set_postfix(task=task, **shown, refresh=False)
            bar.update()

    def _training_data(self, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """The task's training split and, with rehearsal, the buffer: images, labels, whether of the current task."""
        own = self.stream.tasks[task - 1].train
        data = self._with_buffer(task) if self.method.rehearsal else own
        current = torch.arange(len(data.labels)) < len(own.labels)
        return torch.from_numpy(data.images), torch.from_numpy(data.labels), current

    def _with_buffer(self, task: int) -> Dataset:
        """The task's training split, then the buffered images of each past task."""
        parts = [
            self.stream.tasks[task - 1].train,
            *(self.buffer.of_task(self.stream, past) for past in range(1, task)),
        ]
        return Dataset(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _epoch(
        self,
        task: int,
        epoch: int,
        images: Tensor,
        labels: Tensor,
        current: Tensor,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, float | None]:
        """One pass; returns the two terms of the objective, each averaged over its rows (None if not used)."""
        config = self.config
        augmentation = torch_generator(config.seed, "augmentation", task, epoch)
        order = torch.randperm(len(labels), generator=torch_generator(config.seed, "batches", task, epoch))
        rows: dict[str, list[Tensor]] = {"contrastive": [], "distillation": []}
        self.model.train()
        for batch in _batches(order, config.batch_size):
            views = torch.cat([random_affine(images[batch], augmentation) for _ in range(2)])
            loss, terms = self._loss(views, labels[batch].repeat(2), current[batch].repeat(2))
            self._check_finite(loss.detach())
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            for name, values in terms.items():
                rows[name].append(values)
        self.model.eval()
        return {name: torch.cat(values).mean().item() if values else None for name, values in rows.items()}

    def _loss(self, views: Tensor, labels: Tensor, current: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of a batch of two views, and its per-row terms, detached.

        SupCon over all rows, with those of the current task as anchors (asymmetric, as Co2L); distillation of all rows.
        """
        config, weight, scale = self.config, self.progress.distill_weight, self.config.contrastive_scale
        z = self.model(views)
        self._check_finite(_log_norm(z.detach()))
        ids = torch.arange(len(labels))
        teacher = None
        if self.teacher is not None and self.method.weight is not None:
            with torch.no_grad():
                teacher = self.teacher(views)
                self._check_finite(_log_norm(teacher))
        options: dict[str, Any] = {
            "query_label": labels,
            "key_label": labels,
            "query_id": ids,
            "key_id": ids,
            "temperature": config.temperature,
            "student_temperature": config.student_temperature,
            "teacher_temperature": config.teacher_temperature,
            "on_missing_positive": "ignore",  # a batch of buffered images only has no anchor
        }
        if teacher is not None and not self.method.contrastive:
            distillation = info_nce_distill(z, z, teacher, teacher, **options).distillation
            assert distillation is not None
            return weight * distillation.mean(), {"distillation": distillation.detach()}
        result = info_nce_distill_loss(
            z, z, teacher, teacher, distill_weight=weight / scale, anchor_mask=current, **options
        )
        terms = {"contrastive": result.contrastive[current]}
        if result.distillation is not None:
            terms["distillation"] = result.distillation
        return scale * result.loss, terms

    def _check_finite(self, *values: Tensor) -> None:
        """Raises ValueError with the remedy if the run has diverged: before a checkpoint of it is saved."""
        if not all(value.isfinite().all() for value in values):
            task, epoch = self.progress.task, self.progress.epoch + 1
            raise ValueError(
                f"the run diverged (NaN, infinity or overflow) in task {task}, epoch {epoch}: lower learning_rate "
                f"(now {self.config.learning_rate:g})"
            )

    def _warn_of_changes(self, begun_with: dict[str, str]) -> None:
        changed = changes(begun_with, versions())
        if changed:
            tqdm.write(
                f"warning: {self.directory} is resumed with other versions than it was begun with ({changed}): "
                "its numbers may differ from those of a run of one version",
                file=sys.stderr,
            )

    def _probe(self, task: int) -> None:
        tests = [(seen.splits["test"], seen.classes) for seen in self.stream.tasks[:task]]
        probes = linear_probe(self.model, self._with_buffer(task), tests)
        self.progress.class_il.append([probe.class_il for probe in probes])
        self.progress.task_il.append([probe.task_il for probe in probes])

    def _freeze_teacher(self) -> dict[str, Any]:
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()
        return self.teacher.state_dict()

    def _save(self) -> None:
        config_path = self.directory / "config.json"
        if not config_path.exists():
            self.config.save(config_path)
        self.progress.model = self.model.state_dict()
        self.progress.save(self.directory / "checkpoint.pt")

    def _header(self) -> Header:
        config = self.config
        return Header(
            temperature=config.theory_temperature,
            n_negatives=config.n_negatives,
            tasks=tuple(task.name for task in self.stream.tasks),
            seed=config.seed,
            method=config.method,
            fixed_tuples=True,
            config=dataclasses.asdict(config) | {"task_details": [task.detail for task in self.stream.tasks]},
            versions=versions(),
            data_fingerprint=self.stream.fingerprint(),
        )

    def _result(self) -> dict[str, Any]:
        progress = self.progress
        result: dict[str, Any] = {
            "config": dataclasses.asdict(self.config),
            "tasks": [task.name for task in self.stream.tasks],
        }
        for name, matrix in (("class_il", progress.class_il), ("task_il", progress.task_il)):
            result[name] = {
                "accuracy_matrix": matrix,
                "average_accuracy": average_accuracy(matrix),
                "forgetting": forgetting(matrix),
                "backward_transfer": backward_transfer(matrix),
            }
        return result | {
            "objective": progress.objective,
            "training_seconds": progress.seconds,
            "versions": versions(),
        }


def _log_norm(embedding: Tensor) -> Tensor:
    """Of each row: about 0, -inf where the encoder overflowed before it normalised, NaN where it gave NaN."""
    return embedding.norm(dim=1).log()


def _batches(order: Tensor, size: int) -> Iterator[Tensor]:
    """Consecutive slices; a single image left over joins the last one, as SupCon needs company."""
    end = len(order) - (len(order) % size == 1)
    for start in range(0, end, size):
        stop = min(start + size, end)
        yield order[start : len(order) if stop == end else stop]


def _learning_rate(config: RunConfig, epoch: int, epochs: int) -> float:
    """Linear warm-up, then a cosine to 0.001 of the peak."""
    peak, last = config.learning_rate, 1e-3 * config.learning_rate
    warmup = min(config.warmup_epochs, epochs - 1)
    if epoch < warmup:
        return peak * (epoch + 1) / (warmup + 1)
    return last + 0.5 * (peak - last) * (1.0 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))
