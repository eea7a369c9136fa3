"""Task streams from datasets: class-incremental, domain-incremental by rotation, or by the dataset's task column."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.ndimage import rotate

from experiments.config import RunConfig
from experiments.datasets import Dataset, ImageData, load, quantised, statistics
from experiments.leaks import digests, seen_before
from experiments.seeds import numpy_rng
from experiments.stress import imbalanced, noisy_labels

SplitName = Literal["train", "heldout", "test"]
Splits = dict[SplitName, np.ndarray]


@dataclass(frozen=True)
class Task:
    """One task: its classes and, per split, images (n, channels, height, width) uint8 and labels (n,).

    ``name`` is the same for every seed; ``detail`` says what else was drawn for this one.
    """

    name: str
    classes: tuple[int, ...]
    splits: dict[SplitName, Dataset]
    detail: str = ""

    @property
    def train(self) -> Dataset:
        return self.splits["train"]


_HELD: tuple[SplitName, ...] = ("heldout", "test")


@dataclass(frozen=True)
class TaskStream:
    """Tasks in the order they arrive. ``kind`` says how accuracy is to be read; ``mean`` and ``std`` are those of the
    channels of pixels / 255; ``pretrain`` are images set aside for pre-training. ``leaked`` images were taken out of
    held-out or test split because they are training images too, or out of the test split because they are held out.
    ``held``: digests of held-out and test images before any rotation, if another dataset is pre-trained on.
    """

    kind: Literal["class-incremental", "domain-incremental"]
    tasks: tuple[Task, ...]
    n_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pretrain: Dataset | None = None
    leaked: int = 0
    held: frozenset[bytes] = frozenset()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.tasks[0].train.images.shape[1:]
        return channels, height, width

    def fingerprint(self) -> str:
        """SHA-256 over every image and label of every split, in order."""
        digest = hashlib.sha256()
        for task in self.tasks:
            for name, split in task.splits.items():
                digest.update(f"{task.name}/{name}/{split.images.shape}".encode())
                digest.update(np.ascontiguousarray(split.images).data)
                digest.update(split.labels.astype("<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"


def split_by_class(
    labels: np.ndarray,
    heldout: float,
    test: float,
    rng: np.random.Generator,
    name: Callable[[int], str] = str,
) -> Splits:
    """Indices of the three splits, drawn class by class with the given shares; each class has one sample or more in
    each. ``name`` is what an error calls a label.

    Raises ValueError if a class has fewer than three samples.
    """
    parts: dict[SplitName, list[np.ndarray]] = {"heldout": [], "test": [], "train": []}
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 3:
            raise ValueError(
                f"class {name(label)} has {len(members)} samples, but train, held-out and test need one each: "
                "add samples"
            )
        n_heldout = min(max(round(heldout * len(members)), 1), len(members) - 2)
        n_test = min(max(round(test * len(members)), 1), len(members) - n_heldout - 1)
        cuts = np.split(members, [n_heldout, n_heldout + n_test])
        for kept, part in zip(parts.values(), cuts, strict=True):
            kept.append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def class_incremental(
    splits: dict[SplitName, Dataset], order: Sequence[int], n_tasks: int, names: Sequence[str]
) -> tuple[Task, ...]:
    """The classes, in ``order``, in ``n_tasks`` groups of equal size.

    Raises ValueError if the number of classes is no multiple of ``n_tasks``, or a task would have one class only (no
    negatives).
    """
    if len(order) % n_tasks or len(order) // n_tasks < 2:
        legal = [n for n in range(1, len(order) // 2 + 1) if len(order) % n == 0]
        raise ValueError(
            f"n_tasks must split {len(order)} classes into equal groups of at least 2: one of {legal}, got {n_tasks}"
        )
    tasks = []
    for position, group in enumerate(np.split(np.asarray(order), n_tasks), start=1):
        parts = {name: _subset(split, np.isin(split.labels, group)) for name, split in splits.items()}
        classes = [names[label] for label in group]
        title = "-".join(classes) if len(classes) <= 3 else f"{position}: {classes[0]} ... {classes[-1]}"
        tasks.append(Task(title, tuple(group.tolist()), parts))
    return tuple(tasks)


def domain_incremental(splits: dict[SplitName, Dataset], angles: Sequence[float]) -> tuple[Task, ...]:
    """All classes in every task, each task with its own rotation in degrees. An image is in the same split in every
    task.
    """
    classes = tuple(np.unique(splits["train"].labels).tolist())
    background = int(splits["train"].images.min())
    tasks = []
    for number, angle in enumerate(angles, start=1):
        parts = {
            name: split._replace(
                images=rotate(split.images, angle, axes=(2, 3), reshape=False, order=1, cval=background)
            )
            for name, split in splits.items()
        }
        tasks.append(Task(f"rotation {number}", classes, parts, f"{angle:.6g} degrees"))
    return tuple(tasks)


def by_task_column(
    splits: dict[SplitName, Dataset], columns: dict[SplitName, np.ndarray], names: Sequence[str]
) -> tuple[Task, ...]:
    """One task per value of the dataset's task column. Raises ValueError if one has a single class (no negatives)."""
    tasks = []
    for number, title in enumerate(names):
        parts = {name: _subset(split, columns[name] == number) for name, split in splits.items()}
        classes = np.unique(parts["train"].labels)
        for name, part in parts.items():
            if len(classes) < 2 or not np.array_equal(np.unique(part.labels), classes):
                raise ValueError(
                    f"task {title!r} has training images of the classes {classes.tolist()} and {name} images of "
                    f"{np.unique(part.labels).tolist()}: each task needs at least two classes, the same in every split"
                )
        tasks.append(Task(title, tuple(classes.tolist()), parts))
    return tuple(tasks)


def build_stream(config: RunConfig, data_root: Path) -> TaskStream:
    """The configured stream; splits, class order and angles (uniform in [0, 180) degrees) depend on the seed alone.

    Raises ValueError if the dataset is missing or damaged, or cannot be split into ``n_tasks``.
    """
    data = load(config.dataset, data_root)
    height, width = data.train.images.shape[2:]
    if height not in (1, width):
        raise ValueError(f"the images of {data.name} are {height} x {width}: cut or pad them to a square")
    splits, columns = _split(config, data, numpy_rng(config.seed, "split"))
    splits, columns, leaked = _without_leaks(splits, columns)
    if splits["train"].images.dtype != np.uint8:
        train = splits["train"].images
        splits = {name: part._replace(images=quantised(train, part.images)) for name, part in splits.items()}
    mean, std = data.mean, data.std
    if mean is None or std is None:
        mean, std = statistics(splits["train"].images, data.name)
    splits, columns, aside = _set_aside(config, splits, columns, numpy_rng(config.seed, "pretraining"))
    held: frozenset[bytes] = frozenset()
    if config.pretrain_dataset:
        held = frozenset(digest for name in _HELD for digest in digests(splits[name].images))
    kind: Literal["class-incremental", "domain-incremental"] = "class-incremental"
    if config.scenario == "class-incremental":
        order: list[int] = np.unique(splits["train"].labels).tolist()
        if config.class_order == "random":
            order = numpy_rng(config.seed, "classes").permutation(order).tolist()
        tasks = class_incremental(splits, order, config.n_tasks, data.class_names)
    elif config.scenario == "rotations":
        if height == 1:
            raise ValueError(f"{data.name} has rows of features, which cannot be rotated: choose another scenario")
        kind = "domain-incremental"
        angles = numpy_rng(config.seed, "angles").uniform(0.0, 180.0, config.n_tasks)
        tasks = domain_incremental(splits, angles.tolist())
    else:
        tasks = by_task_column(splits, columns, data.task_names)
        if len({task.classes for task in tasks}) == 1:
            kind = "domain-incremental"
    tasks = tuple(_stressed(config, task, number) for number, task in enumerate(tasks, start=1))
    return TaskStream(kind, tasks, len(data.class_names), mean, std, aside, leaked, held)


def _split(
    config: RunConfig, data: ImageData, rng: np.random.Generator
) -> tuple[dict[SplitName, Dataset], dict[SplitName, np.ndarray]]:
    """The three splits, and the task number of each of their images.

    Without an official test split all are drawn from the training images; with one it is shared by the other two.
    """
    if config.scenario == "task-column" and data.train_task is None:
        raise ValueError(f"scenario task-column needs a task for each image, but {data.name} has none")
    train_task = np.zeros(len(data.train.labels), np.int64) if data.train_task is None else data.train_task
    train_groups = train_task * len(data.class_names) + data.train.labels
    kept = _at_most(train_groups, config.train_per_class, rng)
    train, train_task, train_groups = _subset(data.train, kept), train_task[kept], train_groups[kept]
    if data.test is None:

        def title(group: int) -> str:
            task, label = divmod(group, len(data.class_names))
            return data.class_names[label] + (f" of task {data.task_names[task]}" if data.task_names else "")

        index = split_by_class(train_groups, config.heldout_fraction, config.test_fraction, rng, title)
        return (
            {name: _subset(train, chosen) for name, chosen in index.items()},
            {name: train_task[chosen] for name, chosen in index.items()},
        )
    test_task = np.zeros(len(data.test.labels), np.int64) if data.test_task is None else data.test_task
    test_groups = test_task * len(data.class_names) + data.test.labels
    kept = _at_most(test_groups, config.test_per_class, rng)
    test, test_task, test_groups = _subset(data.test, kept), test_task[kept], test_groups[kept]
    share = config.heldout_fraction / (config.heldout_fraction + config.test_fraction)
    halves: dict[SplitName, list[np.ndarray]] = {"heldout": [], "test": []}
    for group in np.unique(test_groups):
        members = rng.permutation(np.flatnonzero(test_groups == group))
        for half, part in zip(halves.values(), np.split(members, [round(share * len(members))]), strict=True):
            half.append(part)
    splits: dict[SplitName, Dataset] = {"train": train}
    columns: dict[SplitName, np.ndarray] = {"train": train_task}
    for name, parts in halves.items():
        chosen = np.sort(np.concatenate(parts))
        splits[name], columns[name] = _subset(test, chosen), test_task[chosen]
    return splits, columns


def _without_leaks(
    splits: dict[SplitName, Dataset], columns: dict[SplitName, np.ndarray]
) -> tuple[dict[SplitName, Dataset], dict[SplitName, np.ndarray], int]:
    """Every image in the first only of train, held-out and test split that has it; and how many that removes.

    A copy within one split stays.
    """
    order: tuple[SplitName, ...] = ("train", "heldout", "test")
    masks = dict(zip(order, seen_before([splits[name].images for name in order]), strict=True))
    leaked = sum(int(mask.sum()) for mask in masks.values())
    if leaked:
        splits = {name: _subset(split, ~masks[name]) for name, split in splits.items()}
        columns = {name: column[~masks[name]] for name, column in columns.items()}
    return splits, columns, leaked


def _set_aside(
    config: RunConfig,
    splits: dict[SplitName, Dataset],
    columns: dict[SplitName, np.ndarray],
    rng: np.random.Generator,
) -> tuple[dict[SplitName, Dataset], dict[SplitName, np.ndarray], Dataset | None]:
    """Takes the images for pre-training out of the training split."""
    if not config.pretrain_fraction:
        return splits, columns, None
    train = splits["train"]
    aside = np.zeros(len(train.labels), bool)
    groups = columns["train"] * (train.labels.max() + 1) + train.labels
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        count = round(config.pretrain_fraction * len(members))
        if count > len(members) - 2:
            raise ValueError(
                f"pretrain_fraction {config.pretrain_fraction} leaves {len(members) - count} of a class's "
                f"{len(members)} training images: lower it, so that at least 2 are left"
            )
        aside[members[:count]] = True
    rest: dict[SplitName, Dataset] = {**splits, "train": _subset(train, ~aside)}
    return rest, {**columns, "train": columns["train"][~aside]}, _subset(train, aside)


def _stressed(config: RunConfig, task: Task, number: int) -> Task:
    """With classes of unequal size in every split, and wrong training labels, as configured."""
    if config.imbalance > 1:
        rng = numpy_rng(config.seed, "imbalance", number)
        splits: dict[SplitName, Dataset] = {}
        for name, split in task.splits.items():
            try:
                splits[name] = _subset(split, imbalanced(split.labels, task.classes, config.imbalance, rng))
            except ValueError as error:
                raise ValueError(f"the {name} data of task {number} ({task.name}): {error}") from None
        task = replace(task, splits=splits)
    if config.label_noise:
        rng = numpy_rng(config.seed, "label-noise", number)
        labels = noisy_labels(task.train.labels, task.classes, config.label_noise, rng)
        task = replace(task, splits={**task.splits, "train": task.train._replace(labels=labels)})
    return task


def _at_most(groups: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of at most ``count`` random members of each group, in order; of all if ``count`` is 0."""
    if not count:
        return np.arange(len(groups))
    chosen = [rng.permutation(np.flatnonzero(groups == group))[:count] for group in np.unique(groups)]
    return np.sort(np.concatenate(chosen))


def _subset(data: Dataset, index: np.ndarray) -> Dataset:
    return Dataset(data.images[index], data.labels[index])
