"""Task streams from arrays: class-incremental, and domain-incremental by rotation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import rotate

from experiments.config import RunConfig
from experiments.datasets import Dataset, digits
from experiments.seeds import numpy_rng

SplitName = Literal["train", "heldout", "test"]


@dataclass(frozen=True)
class Task:
    """One task: its classes and, per split, images (n, channels, height, width) and labels (n,).

    ``name`` is the same for every seed; ``detail`` says what else was drawn for this one.
    """

    name: str
    classes: tuple[int, ...]
    splits: dict[SplitName, Dataset]
    detail: str = ""

    @property
    def train(self) -> Dataset:
        return self.splits["train"]


@dataclass(frozen=True)
class TaskStream:
    """Tasks in the order they arrive. ``kind`` says how accuracy is to be read."""

    kind: Literal["class-incremental", "domain-incremental"]
    tasks: tuple[Task, ...]

    def fingerprint(self) -> str:
        """SHA-256 over every image and label of every split, in order."""
        digest = hashlib.sha256()
        for task in self.tasks:
            for name, split in task.splits.items():
                digest.update(f"{task.name}/{name}/{split.images.shape}".encode())
                digest.update(split.images.astype("<f4").tobytes())
                digest.update(split.labels.astype("<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"


def split_by_class(
    labels: np.ndarray, heldout: float, test: float, rng: np.random.Generator
) -> dict[SplitName, np.ndarray]:
    """Indices of the three splits, drawn class by class with the given shares; each class has at least one sample in
    each.

    Raises ValueError if a class has fewer than three samples.
    """
    parts: dict[SplitName, list[np.ndarray]] = {"heldout": [], "test": [], "train": []}
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 3:
            raise ValueError(
                f"class {label} has {len(members)} samples, but train, held-out and test need one each: add samples"
            )
        n_heldout = min(max(round(heldout * len(members)), 1), len(members) - 2)
        n_test = min(max(round(test * len(members)), 1), len(members) - n_heldout - 1)
        cuts = np.split(members, [n_heldout, n_heldout + n_test])
        for kept, part in zip(parts.values(), cuts, strict=True):
            kept.append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def class_incremental(
    data: Dataset, n_tasks: int, splits: dict[SplitName, np.ndarray], order: Sequence[int] | None = None
) -> TaskStream:
    """The classes, in ``order`` (default: ascending), in ``n_tasks`` groups of equal size.

    Raises ValueError if the number of classes is no multiple of ``n_tasks``, or a task would have one class only (no
    negatives).
    """
    classes = np.unique(data.labels).tolist() if order is None else list(order)
    if len(classes) % n_tasks or len(classes) // n_tasks < 2:
        legal = [n for n in range(1, len(classes) // 2 + 1) if len(classes) % n == 0]
        raise ValueError(
            f"n_tasks must split {len(classes)} classes into equal groups of at least 2: one of {legal}, got {n_tasks}"
        )
    tasks = []
    for group in np.split(np.asarray(classes), n_tasks):
        chosen = {name: index[np.isin(data.labels[index], group)] for name, index in splits.items()}
        parts: dict[SplitName, Dataset] = {
            name: Dataset(data.images[index], data.labels[index]) for name, index in chosen.items()
        }
        tasks.append(Task("-".join(map(str, group.tolist())), tuple(group.tolist()), parts))
    return TaskStream("class-incremental", tuple(tasks))


def domain_incremental(data: Dataset, angles: Sequence[float], splits: dict[SplitName, np.ndarray]) -> TaskStream:
    """All classes in every task, each task with its own rotation in degrees. An image is in the same split in every
    task.
    """
    classes = tuple(np.unique(data.labels).tolist())
    tasks = []
    for number, angle in enumerate(angles, start=1):
        background = float(data.images.min())
        images = rotate(data.images, angle, axes=(2, 3), reshape=False, order=1, cval=background).astype(np.float32)
        parts: dict[SplitName, Dataset] = {
            name: Dataset(images[index], data.labels[index]) for name, index in splits.items()
        }
        tasks.append(Task(f"rotation {number}", classes, parts, f"{angle:.6g} degrees"))
    return TaskStream("domain-incremental", tuple(tasks))


def build_stream(config: RunConfig) -> TaskStream:
    """The configured stream; splits, and angles (uniform in [0, 180) degrees), depend on the seed alone.

    Raises ValueError if the stream cannot be split into ``n_tasks``, or if ``buffer_size`` would leave a past task
    without a positive pair of each class, on which the log measures it.
    """
    data = digits()
    rng = numpy_rng(config.seed, "split")
    splits = split_by_class(data.labels, config.heldout_fraction, config.test_fraction, rng)
    if config.stream == "digits":
        stream = class_incremental(data, config.n_tasks, splits)
    else:
        stream = domain_incremental(data, rng.uniform(0.0, 180.0, config.n_tasks).tolist(), splits)
    least = 2 * sum(len(task.classes) for task in stream.tasks[:-1])
    if config.buffer_size < least:
        raise ValueError(
            f"buffer_size must be at least {least}, two images of each class of past tasks, got {config.buffer_size}: "
            "every method probes and logs with it; the one that does not train on it is finetune"
        )
    return stream
