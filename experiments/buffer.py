"""Rehearsal buffer: which training images of past tasks are kept, as indices into the stream."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from experiments.datasets import Dataset
from experiments.streams import TaskStream


@dataclass
class Buffer:
    """At most ``capacity`` images, spread evenly over the (task, class) pairs seen.

    ``kept`` maps a pair to indices into the task's training split, in random order: a pair is shrunk by cutting its
    list, so what stays is a uniform sample.
    """

    capacity: int
    kept: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def add(self, stream: TaskStream, task: int, rng: np.random.Generator) -> None:
        """Takes in task number ``task`` (from 1) and shrinks the rest."""
        labels = stream.tasks[task - 1].train.labels
        for label in stream.tasks[task - 1].classes:
            self.kept[task, label] = rng.permutation(np.flatnonzero(labels == label)).tolist()
        share, extra = divmod(self.capacity, len(self.kept))
        for position, pair in enumerate(self.kept):
            self.kept[pair] = self.kept[pair][: share + (position < extra)]

    def of_task(self, stream: TaskStream, task: int) -> Dataset:
        """The kept images of one task; may be empty."""
        index = np.array([i for (t, _), kept in self.kept.items() if t == task for i in kept], dtype=np.int64)
        train = stream.tasks[task - 1].train
        return Dataset(train.images[index], train.labels[index])

    def state(self) -> list[list[int]]:
        """[[task, label, index, ...], ...]: plain integers, for a checkpoint."""
        return [[task, label, *kept] for (task, label), kept in self.kept.items()]

    def load_state(self, state: list[list[int]]) -> None:
        self.kept = {(task, label): kept for task, label, *kept in state}
