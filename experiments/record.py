"""What a run logs after each task: the theorem's losses on tuples of every task seen, and the training loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cila_bound import Geometry, LossLogWriter, Measurement, TestLoss, Training
from cila_bound.records import Split
from experiments.buffer import Buffer
from experiments.config import RunConfig
from experiments.datasets import Dataset
from experiments.methods import METHODS
from experiments.models import SmallEncoder
from experiments.seeds import numpy_rng
from experiments.streams import TaskStream
from experiments.tuples import TupleLosses, Tuples, draw_tuples, tuple_losses

_SPLITS: tuple[Split | str, ...] = ("train", "heldout", "test", "buffer")


class Recorder:
    """Draws the tuples of every task once, and measures models on them.

    Raises ValueError before any training if a split of a task, or what the buffer will keep of it, cannot form a single
    tuple.
    """

    def __init__(self, config: RunConfig, stream: TaskStream) -> None:
        self.config, self.stream = config, stream
        self.geometry = Geometry(config.theory_temperature, config.n_negatives)
        self.fixed = {
            (task, name): self._draw(task, name, split.labels)
            for task in range(1, len(stream.tasks) + 1)
            for name, split in stream.tasks[task - 1].splits.items()
        }
        self._check_buffer()

    def record(
        self,
        writer: LossLogWriter,
        task: int,
        model: SmallEncoder,
        teacher: SmallEncoder | None,
        buffer: Buffer,
        distill_weight: float,
        objective: dict[str, Any],
    ) -> None:
        """Appends all records after ``task``: of each task seen its training or buffer, held-out and test tuples."""
        fitted: dict[int, tuple[TupleLosses, int]] = {}
        for i in range(1, task + 1):
            splits = self.stream.tasks[i - 1].splits
            kept = splits["train"] if i == task else buffer.of_task(self.stream, i)
            tuples = self.fixed[i, "train"] if i == task else self._draw_buffer(i, kept, task)
            own: Split = "train" if i == task else "buffer"
            measured: list[tuple[Split, Dataset, Tuples]] = [
                (own, kept, tuples),
                ("heldout", splits["heldout"], self.fixed[i, "heldout"]),
            ]
            for split, data, chosen in measured:
                losses = self._losses(model, teacher, data, chosen)
                per_tuple = losses.per_tuple() if self.config.log_tuples and split == "heldout" and task > i else None
                counts = len(chosen.index), chosen.n_effective
                writer.append(Measurement(task, i, split, *counts, **losses.statistics(), tuples=per_tuple))
                if split == own:
                    fitted[i] = losses, len(data.labels)
            test = self.fixed[i, "test"]
            contrastive = self._losses(model, None, splits["test"], test).statistics()["contrastive"]
            writer.append(TestLoss(task, i, len(test.index), test.n_effective, contrastive))
        writer.append(self._training(task, fitted, distill_weight, objective))

    def _training(
        self, task: int, fitted: dict[int, tuple[TupleLosses, int]], distill_weight: float, objective: dict[str, Any]
    ) -> Training:
        """L_train of the task on training and buffer tuples, weighted by the numbers of images trained on."""
        method = METHODS[self.config.method]
        sizes = [size if i == task or method.rehearsal else 0 for i, (_, size) in fitted.items()]
        shares = tuple(size / sum(sizes) for size in sizes)
        contrastive = float(fitted[task][0].contrastive.mean())
        distillation = None
        if task > 1:
            means = [_mean(losses.distillation) for losses, _ in fitted.values()]
            distillation = math.fsum(share * mean for share, mean in zip(shares, means, strict=True))
        contrastive_weight = self.config.contrastive_scale if task == 1 or method.contrastive else 0.0
        return Training(
            after_task=task,
            loss=contrastive_weight * contrastive + distill_weight * (distillation or 0.0),
            contrastive=contrastive,
            distillation=distillation,
            contrastive_weight=contrastive_weight,
            distill_weight=distill_weight,
            mixture_weights=shares,
            contrastive_over="current",
            objective_contrastive=objective["contrastive"],
            objective_distillation=objective["distillation"],
        )

    def _losses(self, model: SmallEncoder, teacher: SmallEncoder | None, data: Dataset, tuples: Tuples) -> TupleLosses:
        embedded = None if teacher is None else _embed(teacher, data)
        return tuple_losses(_embed(model, data), embedded, tuples, self.geometry)

    def _check_buffer(self) -> None:
        """Fills a buffer as the run will, and draws from it after every task."""
        buffer = Buffer(self.config.buffer_size)
        for task in range(2, len(self.stream.tasks) + 1):
            buffer.add(self.stream, task - 1, numpy_rng(self.config.seed, "buffer", task - 1))
            for i in range(1, task):
                self._draw_buffer(i, buffer.of_task(self.stream, i), task)

    def _draw_buffer(self, task: int, kept: Dataset, after_task: int) -> Tuples:
        try:
            return self._draw(task, "buffer", kept.labels, after_task)
        except ValueError as error:
            raise ValueError(
                f"raise buffer_size (now {self.config.buffer_size}) or lower n_negatives (now "
                f"{self.config.n_negatives}): after task {after_task} {error}"
            ) from None

    def _draw(self, task: int, split: str, labels: np.ndarray, after_task: int = 0) -> Tuples:
        rng = numpy_rng(self.config.seed, "tuples", task, len(_SPLITS) * after_task + _SPLITS.index(split))
        try:
            return draw_tuples(labels, self.config.n_negatives, self.config.tuple_rounds, rng)
        except ValueError as error:
            name = self.stream.tasks[task - 1].name
            raise ValueError(f"the {split} data of task {task} ({name}) are too few: {error}") from None


@torch.no_grad()
def _embed(model: SmallEncoder, data: Dataset) -> Tensor:
    embedding: Tensor = model(torch.from_numpy(data.images))
    return embedding


def _mean(values: np.ndarray | None) -> float:
    assert values is not None  # every task after the first has a teacher
    return float(values.mean())
