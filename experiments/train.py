"""One run: train on each task in turn, log the theorem's losses, measure accuracy, and be able to stop anywhere."""

from __future__ import annotations

import copy
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from cila_bound import Geometry, Header, LossLogWriter
from cila_bound.files import remove_stale, write_atomic
from cila_bound.records import Record
from experiments.augment import Augmentation
from experiments.buffer import Buffer
from experiments.config import RunConfig
from experiments.directory import begin_or_resume, finished, log_names, put_on_file
from experiments.evaluate import average_accuracy, backward_transfer, forgetting
from experiments.gate import certificates, notice, weigh
from experiments.methods import METHODS
from experiments.models import Model, build_model, layout
from experiments.pretraining import pretrain_images
from experiments.record import Recorder, draw_fixed
from experiments.scores import measure
from experiments.seeds import derive, numpy_rng
from experiments.snapshot import Snapshot
from experiments.streams import TaskStream, build_stream
from experiments.trainer import Rows, TaskTrainer, epochs_of
from experiments.versions import changes, made_with, versions
from experiments.world import ALONE, World, joined


def run(
    config: RunConfig, directory: Path, *, data_root: Path = Path("data"), show_progress: bool = True
) -> dict[str, Any]:
    """Trains, or resumes, or finds finished; returns what ``metrics.json`` holds. Datasets are looked for below
    ``data_root``. Processes that torchrun started train it together; the first one writes.

    Raises ValueError for a configuration that cannot work, a directory with another run or a damaged file, or a run
    that diverges.
    """
    with joined() as world, ExitStack() as stack:
        result = world.said(lambda: finished(config, directory))
        if result is None:
            world.said(lambda: _lock(directory, stack))
            result = world.said(lambda: finished(config, directory))  # by another process, meanwhile
        if result is None:
            torch.set_num_threads(config.threads)
            result = _Run(config, directory, data_root, world).train(show_progress)
            if world.first:
                write_atomic(directory / "metrics.json", (json.dumps(result, indent=2) + "\n").encode())
                (directory / "checkpoint.pt").unlink(missing_ok=True)
    return result


def _lock(directory: Path, stack: ExitStack) -> None:
    """Keeps other processes out until ``stack`` closes."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(FileLock(directory / ".lock", timeout=0))
    except Timeout:
        raise ValueError(f"{directory} is in use by another process: wait for it, or choose another --out") from None
    remove_stale(directory)


class _Run:
    def __init__(self, config: RunConfig, directory: Path, data_root: Path, world: World = ALONE) -> None:
        self.config, self.directory, self.method, self.world = config, directory, METHODS[config.method], world
        self.device, self.versions = _device(config.device), versions()
        self.stream = build_stream(config, data_root)
        self.n_tasks = len(self.stream.tasks)
        _check_ranks(config, self.stream, world.size)
        if config.defect_class is not None and not 0 <= config.defect_class < self.stream.n_classes:
            raise ValueError(f"defect_class must be in 0..{self.stream.n_classes - 1}, got {config.defect_class}")
        self.pretrain_images = pretrain_images(config, self.stream, data_root)
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
        if config.sync_batchnorm:
            self.model = world.synchronised(self.model, self.device)
        self.model.to(self.device).to(memory_format=layout(config.model, self.device)).eval()  # type: ignore[call-overload]
        self.embed: nn.Module = cast(nn.Module, torch.compile(self.model)) if config.compile else self.model
        self.buffer = Buffer(config.buffer_size, config.buffer)
        self.teacher: Snapshot | None = None
        self.progress = world.said(lambda: begin_or_resume(config, directory))
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
            writers = self._writers(stack) if self.world.first else []
            total = sum(epochs_of(config, task) for task in range(self.n_tasks + 1))
            silent = not (show_progress and self.world.first)
            bar = stack.enter_context(tqdm(total=total, desc=config.name, unit="epoch", disable=silent))
            bar.update(len(progress.objective))
            for task in range(progress.task, self.n_tasks + 1):
                self._train_task(task, writers, bar)
                if task:
                    self._finish_task(task, writers)
                else:
                    progress.task, progress.epoch, progress.trainer = 1, 0, {}
                    self._save()
        return self.world.said(self._result)

    def _writers(self, stack: ExitStack) -> list[LossLogWriter]:
        """Of all logs; they close with ``stack``."""
        fingerprint, kept = self.stream.fingerprint(), self.progress.records or [0] * len(self.recorders)
        writers = [
            stack.enter_context(
                LossLogWriter(self.directory / name, self._header(geometry, fingerprint), resume=True, keep=keep)
            )
            for name, geometry, keep in zip(log_names(self.config), self.config.geometries, kept, strict=True)
        ]
        self._warn(writers[0])
        return writers

    def _train_task(self, task: int, writers: list[LossLogWriter], bar: tqdm) -> None:
        config, progress, rule = self.config, self.progress, self.method.weights
        if progress.epoch == 0 and task > 1 and rule is not None:
            progress.weights = self.world.said(lambda: list(rule(writers[0].log, task, config)))
        teacher = self.teacher.model if self.teacher else None
        trainer = TaskTrainer(
            config, task, self.model, self.embed, self._rows(task), self.augment, teacher, progress.weights, self.world
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
        """The first rank closes the task; the others take over what they need for the next one."""
        buffer, logits = self.world.said(lambda: self._close(task, writers))
        self.world.adopt(self.model)
        if not self.world.first:
            self.buffer.load_state(buffer)
            self.progress.logits, self.progress.epoch, self.progress.trainer = logits, 0, {}
            self.teacher = self._snapshot(self.model)

    def _close(self, task: int, writers: list[LossLogWriter]) -> tuple[list[list[int]], Tensor | None]:
        """Weighs the update, logs, measures accuracy, fills the buffer, makes the model the next task's teacher, and
        puts all of it on file; returns the state of the buffer and its logits.
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
        accepted = decision is None or decision.accepted
        facts = {
            "name": self.stream.tasks[task - 1].name,
            "certificates": certificates(self.config, writers[0].log, task),
            "gate": None if decision is None else decision.as_json(),
            "made_with": made_with(self.versions),
        }
        put_on_file(self.config, self.directory, progress, "task" if accepted else "refused", task, facts)
        return progress.buffer, progress.logits

    def _records(self, recorder: Recorder, task: int, snapshot: Snapshot) -> list[Record]:
        progress = self.progress
        return recorder.records(
            task, snapshot, self.teacher, self.buffer, tuple(progress.weights), progress.objective[-1]
        )

    def _snapshot(self, model: Model) -> Snapshot:
        return Snapshot(model, self.stream, self.augment.plain, self.device)

    def _warn(self, writer: LossLogWriter) -> None:
        """Of other versions than the run was begun with, and of what the log will lack."""
        messages = []
        if self.stream.leaked:
            messages.append(
                f"{self.stream.leaked} held-out or test images are copies of training images, or of each other, and "
                "were left out: the bounds hold for images that are not"
            )
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
        if not self.world.first:
            return
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
            "leaked": self.stream.leaked,
            "objective": progress.objective,
            "training_seconds": progress.seconds,
            "versions": self.versions,
        }


def _device(name: str) -> torch.device:
    """Raises ValueError if a GPU is asked for that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU: choose cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _check_ranks(config: RunConfig, stream: TaskStream, ranks: int) -> None:
    smallest = min(len(task.train.labels) for task in stream.tasks)
    if ranks > min(config.batch_size, smallest):
        raise ValueError(
            f"{ranks} ranks need a training image each, but batch_size is {config.batch_size} and the smallest task "
            f"has {smallest}: start fewer ranks"
        )
