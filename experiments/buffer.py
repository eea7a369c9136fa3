"""Rehearsal buffer: which training images of past tasks are kept, as indices into the stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from experiments.datasets import Dataset
from experiments.streams import TaskStream


@dataclass
class Buffer:
    """At most ``capacity`` images of past tasks, taken in when a task ends.

    "balanced": spread evenly over the (task, class) pairs seen; a pair is shrunk by cutting its list, which is in
    random order, so what stays is a uniform sample. "reservoir": a uniform sample of all images seen (Vitter 1985,
    algorithm R), whatever their class. ``kept`` maps a task to indices into its training split.
    """

    capacity: int
    policy: Literal["balanced", "reservoir"] = "balanced"
    kept: dict[int, list[int]] = field(default_factory=dict)

    def add(self, stream: TaskStream, task: int, rng: np.random.Generator) -> None:
        """Takes in task number ``task`` (from 1) and shrinks the rest."""
        if self.policy == "balanced":
            self._balance(stream, task, rng)
        else:
            self._sample(stream, task, rng)

    def _balance(self, stream: TaskStream, task: int, rng: np.random.Generator) -> None:
        self.kept[task] = rng.permutation(len(stream.tasks[task - 1].train.labels)).tolist()
        pairs: dict[tuple[int, int], list[int]] = {}
        for past, indices in self.kept.items():
            part = stream.tasks[past - 1]
            labels = part.train.labels[indices]
            for label in part.classes:
                pairs[past, label] = [i for i, own in zip(indices, labels, strict=True) if own == label]
        share, extra = divmod(self.capacity, len(pairs))
        self.kept = {past: [] for past in self.kept}
        for position, ((past, _), indices) in enumerate(pairs.items()):
            self.kept[past] += indices[: share + (position < extra)]

    def _sample(self, stream: TaskStream, task: int, rng: np.random.Generator) -> None:
        slots = [(past, i) for past, indices in self.kept.items() for i in indices]
        seen = sum(len(stream.tasks[past - 1].train.labels) for past in range(1, task))
        for i in rng.permutation(len(stream.tasks[task - 1].train.labels)).tolist():
            seen += 1
            if len(slots) < self.capacity:
                slots.append((task, i))
            elif (place := int(rng.integers(seen))) < self.capacity:
                slots[place] = task, i
        self.kept = {past: [i for owner, i in slots if owner == past] for past in range(1, task + 1)}

    def of_task(self, stream: TaskStream, task: int) -> Dataset:
        """The kept images of one task; may be empty."""
        index = np.array(self.kept.get(task, []), dtype=np.int64)
        train = stream.tasks[task - 1].train
        return Dataset(train.images[index], train.labels[index])

    def pairs(self) -> list[tuple[int, int]]:
        """(task, index into its training split) of every kept image, in order of the tasks."""
        return [(task, i) for task, indices in self.kept.items() for i in indices]

    def state(self) -> list[list[int]]:
        """[[task, index, ...], ...]: plain integers, for a checkpoint."""
        return [[task, *indices] for task, indices in self.kept.items()]

    def load_state(self, state: list[list[int]]) -> None:
        self.kept = {task: indices for task, *indices in state}
