"""What a run logs after each task: the theorem's losses on tuples of every task seen, and the training loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cila_bound import Geometry, Measurement, TestLoss, Training
from cila_bound.records import Record, Split
from experiments.buffer import Buffer
from experiments.config import LogTuples, RunConfig
from experiments.methods import METHODS
from experiments.seeds import numpy_rng
from experiments.snapshot import Snapshot
from experiments.streams import SplitName, TaskStream
from experiments.tuples import TupleLosses, Tuples, draw_tuples, tuple_losses

_SPLITS: tuple[Split | SplitName, ...] = ("train", "heldout", "test", "buffer")


FixedTuples = dict[tuple[int, SplitName], Tuples]


def draw_fixed(config: RunConfig, stream: TaskStream, n_negatives: int) -> FixedTuples:
    """The tuples of every (task, split), the same after every task.

    Raises ValueError if a split of a task cannot form a single tuple.
    """
    return {
        (task, name): _draw(config, stream, n_negatives, task, name, split.labels)
        for task in range(1, len(stream.tasks) + 1)
        for name, split in stream.tasks[task - 1].splits.items()
    }


class Recorder:
    """Measures models on tuples, with one number of negatives and one temperature."""

    def __init__(
        self, config: RunConfig, stream: TaskStream, geometry: Geometry, fixed: FixedTuples, *, log_tuples: LogTuples
    ) -> None:
        self.config, self.stream, self.geometry, self.log_tuples = config, stream, geometry, log_tuples
        self.fixed = fixed

    def unmeasurable(self) -> list[tuple[int, int]]:
        """(after_task, task) for which what the buffer will keep of a past task forms no tuple.

        The log then lacks that buffer record, and the task's share in ``mixture_weights`` is 0: the Theorem 1 form
        becomes infinite. No other bound needs it.
        """
        buffer = Buffer(self.config.buffer_size, self.config.buffer)
        found = []
        for task in range(2, len(self.stream.tasks) + 1):
            buffer.add(self.stream, task - 1, numpy_rng(self.config.seed, "buffer", task - 1))
            found += [(task, i) for i in range(1, task) if self._draw_buffer(buffer, i, task) is None]
        return found

    def records(
        self,
        task: int,
        student: Snapshot,
        teacher: Snapshot | None,
        buffer: Buffer,
        weights: tuple[float, ...],
        objective: dict[str, Any],
    ) -> list[Record]:
        """All records after ``task``: of each task seen its training or buffer, held-out and test tuples."""
        fitted: dict[int, TupleLosses] = {}
        found: list[Record] = []
        for i in range(1, task + 1):
            if i == task:
                own = self._on_split(student, teacher, i, "train")
                found.append(self._measurement(task, i, "train", own, self.fixed[i, "train"]))
                fitted[i] = own
            elif (tuples := self._draw_buffer(buffer, i, task)) is not None:
                images = buffer.of_task(self.stream, i).images
                embedded = None if teacher is None else teacher.of(images).embedding
                kept = tuple_losses(student.of(images).embedding, embedded, tuples, self.geometry)
                found.append(self._measurement(task, i, "buffer", kept, tuples))
                fitted[i] = kept
            heldout = self._on_split(student, teacher, i, "heldout")
            found.append(self._measurement(task, i, "heldout", heldout, self.fixed[i, "heldout"]))
            test = self.fixed[i, "test"]
            contrastive = self._on_split(student, None, i, "test").statistics()["contrastive"]
            found.append(TestLoss(task, i, len(test.index), test.n_effective, contrastive))
        sizes = {i: len(buffer.kept.get(i, ())) for i in range(1, task)}
        sizes[task] = len(self.stream.tasks[task - 1].train.labels)
        return [*found, self._training(task, fitted, sizes, weights, objective)]

    def _training(
        self,
        task: int,
        fitted: dict[int, TupleLosses],
        sizes: dict[int, int],
        weights: tuple[float, ...],
        objective: dict[str, Any],
    ) -> Training:
        """L_train of the task on training and buffer tuples, weighted by the numbers of images trained on.

        With one lambda per task, ``distill_weight`` is their mean over the images, and a task's share is multiplied by
        its lambda / that mean: shares and weight are those of the loss that was trained.
        """
        method = METHODS[self.config.method]
        trained = {i: sizes[i] if i in fitted and (i == task or method.rehearsal) else 0 for i in sizes}
        shares = [size / sum(trained.values()) for size in trained.values()]
        distill_weight = math.fsum(share * weight for share, weight in zip(shares, weights, strict=False))
        if distill_weight and len(set(weights)) > 1:
            shares = [share * weight / distill_weight for share, weight in zip(shares, weights, strict=True)]
        elif weights:
            distill_weight = weights[0]
        contrastive = float(fitted[task].contrastive.mean())
        distillation = None
        if task > 1:
            means = {i: _mean(losses.distillation) for i, losses in fitted.items()}
            distillation = math.fsum(share * means[i] for i, share in zip(sizes, shares, strict=True) if share)
        contrastive_weight = self.config.contrastive_scale if task == 1 or method.contrastive else 0.0
        if method.classifier:
            contrastive_weight = 0.0
        return Training(
            after_task=task,
            loss=contrastive_weight * contrastive + distill_weight * (distillation or 0.0),
            contrastive=contrastive,
            distillation=distillation,
            contrastive_weight=contrastive_weight,
            distill_weight=distill_weight,
            mixture_weights=tuple(shares),
            contrastive_over="current",
            objective_contrastive=objective.get("contrastive"),
            objective_distillation=objective.get("distillation"),
        )

    def _measurement(self, task: int, i: int, split: Split, losses: TupleLosses, tuples: Tuples) -> Measurement:
        last = task == len(self.stream.tasks)
        per_tuple = None
        if split == "heldout" and self.log_tuples == "all":
            per_tuple = losses.per_tuple(tuples.block, "contrastive", "teacher_contrastive", "distillation", "drift")
        elif split == "heldout" and self.log_tuples == "last" and last and task > i:
            per_tuple = losses.per_tuple(tuples.block, "teacher_contrastive", "drift")
        return Measurement(
            task, i, split, len(tuples.index), tuples.n_effective, **losses.statistics(), tuples=per_tuple
        )

    def _on_split(self, student: Snapshot, teacher: Snapshot | None, task: int, name: SplitName) -> TupleLosses:
        embedded = None if teacher is None else teacher.split(task, name).embedding
        return tuple_losses(student.split(task, name).embedding, embedded, self.fixed[task, name], self.geometry)

    def _draw_buffer(self, buffer: Buffer, task: int, after_task: int) -> Tuples | None:
        labels = buffer.of_task(self.stream, task).labels
        try:
            return _draw(self.config, self.stream, self.geometry.n_negatives, task, "buffer", labels, after_task)
        except ValueError:
            return None


def _draw(
    config: RunConfig,
    stream: TaskStream,
    n_negatives: int,
    task: int,
    split: Split | SplitName,
    labels: np.ndarray,
    after_task: int = 0,
) -> Tuples:
    rng = numpy_rng(config.seed, "tuples", task, len(_SPLITS) * after_task + _SPLITS.index(split))
    try:
        return draw_tuples(labels, n_negatives, config.tuple_rounds, rng, limit=config.max_tuples)
    except ValueError as error:
        name = stream.tasks[task - 1].name
        raise ValueError(f"the {split} data of task {task} ({name}) are too few: {error}") from None


def _mean(values: np.ndarray | None) -> float:
    assert values is not None  # every task after the first has a teacher
    return float(values.mean())
