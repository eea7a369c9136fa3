"""From what a source holds to what a stream needs: classes and tasks numbered, copies left out, and enough samples of
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.datasets import statistics
from experiments.image_files import Labelled
from experiments.leaks import digests
from experiments.tables import Source, Table, TaskRule, categories

_LEAST = 6  # of a class in a task: of 40, 30 and 30% of them, two are in each split
_LEAST_TRAIN, _LEAST_TEST = 2, 4  # the same where there is a test split, which is halved
_SMALLEST_SIDE = 4
_DEFAULT_TASKS = 5

Assembled = tuple[Labelled, Labelled | None, tuple[str, ...], tuple[str, ...], TaskRule]


def assemble(path: Path, source: Source, rule: TaskRule | None, threshold: float | None) -> Assembled:
    """Training and test samples, the names of classes and tasks, and the rule that made the tasks (``rule``, if it is
    given). Adds to the source's remarks.

    Raises ValueError as ``sources.prepare`` says.
    """
    remarks = source.remarks
    train, test = source.train, source.test
    _check_values(path, train, test)
    remarks.insert(0, _found(source))
    if rule is not None and rule.kind == "order" and test is not None:
        remarks.append(
            f"the {len(test.label):,} samples of the test split, which have no place in the order, are left out"
        )
        test = None
    if threshold is not None:
        remarks.append(f"{source.label!r} is cut in two at {threshold:g}")
    train = _categorised(path, source, train, threshold)
    test = None if test is None else _categorised(path, source, test, threshold)
    if test is not None and test.label.dtype.kind != train.label.dtype.kind:
        train, test = (replace(part, label=part.label.astype(str)) for part in (train, test))
    if rule is None and source.task is not None:
        rule = TaskRule("column", source.task)
    task_names: tuple[str, ...] = ()
    if rule is not None and rule.kind == "column":
        train, test, task_names = _of_tasks(path, train, test, rule, remarks)
    train, test = _without_constants(path, train, test, source.features, remarks)
    train, test = _without_copies(path, train, test, remarks)
    class_names = _names(train.label)
    if len(class_names) < 2:
        raise ValueError(
            f"{path}: column {source.label!r} has {len(class_names)} classes ({', '.join(class_names)[:80]}), but two "
            "or more are needed: give other labels, or another threshold"
        )
    labels = _numbered(path, "class", train.label, class_names)
    test_labels = None if test is None else _numbered(path, "class", test.label, class_names)
    if rule is None:
        rule = _default(path, class_names)
    if rule.kind == "rotations" and train.values.shape[2] == 1:
        raise ValueError(f"{path} holds features, which cannot be rotated (rotations:{rule.count}): choose other tasks")
    if rule.kind == "classes":
        groups, task_names = _groups(path, class_names, rule.count)
        tasks, test_tasks = groups[labels], None if test_labels is None else groups[test_labels]
    elif rule.kind == "order":
        tasks, test_tasks = np.arange(len(labels)) * rule.count // max(len(labels), 1), None
        task_names = tuple(f"part {number}" for number in range(1, rule.count + 1))
    elif rule.kind == "column":
        tasks, test_tasks = train.task, None if test is None else test.task
    else:
        tasks = test_tasks = None
    own = Labelled(train.values, labels, tasks)
    official = None if test is None or test_labels is None else Labelled(test.values, test_labels, test_tasks)
    _check_counts(path, own, official, class_names, task_names)
    return own, official, class_names, task_names, rule


def counts(part: Labelled, n_tasks: int, n_classes: int) -> np.ndarray:
    """Samples (n_tasks, n_classes); without a task each is in all."""
    if part.tasks is None:
        return np.tile(np.bincount(part.labels, minlength=n_classes), (n_tasks, 1))
    return np.bincount(part.tasks * n_classes + part.labels, minlength=n_tasks * n_classes).reshape(n_tasks, n_classes)


def _found(source: Source) -> str:
    n, channels, height, width = source.train.values.shape
    what = f"rows of {width} features"
    if source.train.values.dtype == np.uint8:
        what = f"images of {width} x {height} pixels, {'grey' if channels == 1 else 'colour'}"
    more = f", and {len(source.test.label):,} more as test split" if source.test else ""
    task = f", tasks in {source.task!r}" if source.task else ""
    return f"{n:,} {what}{more}; labels in {source.label!r}{task}"


def _check_values(path: Path, train: Table, test: Table | None) -> None:
    if not len(train.label) or (test is not None and not len(test.label)):
        raise ValueError(f"{path} has {len(train.label)} samples (a test split not counted): give some of each")
    shape = train.values.shape[1:]
    if test is not None and test.values.shape[1:] != shape:
        raise ValueError(
            f"{path}: samples of the test split have the shape {test.values.shape[1:]}, the others {shape}: give all "
            "one size, and grey or colour"
        )
    _, height, width = shape
    if train.values.dtype == np.uint8 and (height != width or width < _SMALLEST_SIDE):
        raise ValueError(
            f"{path} has images of {width} x {height} pixels, but they must be square and {_SMALLEST_SIDE} or more a "
            "side: give an image_size"
        )


def _categorised(path: Path, source: Source, table: Table, threshold: float | None) -> Table:
    where = f"{path}: column"
    return Table(
        table.values,
        categories(f"{where} {source.label!r}", table.label, threshold),
        None if table.task is None else categories(f"{where} {source.task!r}", table.task),
    )


def _names(values: np.ndarray) -> tuple[str, ...]:
    return tuple(map(str, np.unique(values).tolist()))


def _numbered(path: Path, what: str, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    unique, inverse = np.unique(values, return_inverse=True)
    place = {name: number for number, name in enumerate(names)}
    unknown = next((name for name in map(str, unique.tolist()) if name not in place), None)
    if unknown is not None:
        raise ValueError(
            f"{path}: {what} {unknown!r} of the test split is none of {', '.join(names)[:200]}: add training samples "
            "of it, or remove its test samples"
        )
    return np.array([place[str(value)] for value in unique.tolist()], np.int64)[inverse]


def _of_tasks(
    path: Path, train: Table, test: Table | None, rule: TaskRule, remarks: list[str]
) -> tuple[Table, Table | None, tuple[str, ...]]:
    """The samples whose task is wanted, their tasks numbered in the wanted order; and the names of the tasks."""
    assert train.task is not None  # a source that was asked for a column of tasks has one
    there = _names(train.task)
    names = rule.values or there
    unknown = next((name for name in names if name not in there), None)
    if unknown is not None or len(names) < 2:
        raise ValueError(
            f"{path}: column {rule.column!r} has the values {', '.join(there)[:200]}"
            + (", one task; at least two are needed" if unknown is None else f", not {unknown!r}")
            + ": choose other tasks"
        )
    parts: list[Table] = []
    for part in (train, test):
        if part is not None:
            assert part.task is not None  # as above, in both splits
            wanted = np.isin(part.task.astype(str), names)
            parts.append(replace(part.subset(wanted), task=_numbered(path, "task", part.task[wanted], names)))
            if not wanted.all():
                remarks.append(f"{np.sum(~wanted):,} samples of other values of {rule.column!r} are left out")
    return parts[0], parts[1] if test else None, names


def _without_copies(path: Path, train: Table, test: Table | None, remarks: list[str]) -> tuple[Table, Table | None]:
    """The first of equal samples, training samples first; none of equal ones with different labels.

    Raises ValueError if nothing is left.
    """
    own = digests(train.values)
    everything = own + ([] if test is None else digests(test.values))
    labels = train.label.tolist() + ([] if test is None else test.label.tolist())
    first: dict[bytes, int] = {}
    contradicted = set()
    for number, (digest, label) in enumerate(zip(everything, labels, strict=True)):
        if labels[first.setdefault(digest, number)] != label:
            contradicted.add(digest)
    kept = np.array([first[digest] == number for number, digest in enumerate(everything)], bool)
    clear = np.array([digest not in contradicted for digest in everything], bool)
    if not clear.all():
        remarks.append(
            f"{np.sum(~clear):,} samples are left out, as they equal others with another label ({len(contradicted):,} "
            "different samples)"
        )
    if not kept[clear].all():
        remarks.append(f"{np.sum(~kept & clear):,} exact copies are left out, the first of each is kept")
    index = kept & clear
    if not index[: len(own)].any():
        raise ValueError(f"{path}: {remarks[-1]}, so that none is left: correct the labels")
    return train.subset(index[: len(own)]), None if test is None else test.subset(index[len(own) :])


def _without_constants(
    path: Path, train: Table, test: Table | None, features: Sequence[str], remarks: list[str]
) -> tuple[Table, Table | None]:
    """Raises ValueError for images with a constant channel, and for features that are all constant."""
    if train.values.dtype == np.uint8:
        statistics(train.values, str(path))
        return train, test
    constant = (train.values == train.values[:1]).all(axis=(0, 1, 2))
    if constant.all():
        raise ValueError(f"{path}: all {len(constant)} features are constant: give features that differ")
    if constant.any():
        names = [features[n] if features else str(n) for n in np.flatnonzero(constant).tolist()]
        remarks.append(f"{len(names):,} constant features are left out: {', '.join(names[:20])}")
        train = replace(train, values=train.values[..., ~constant])
        test = None if test is None else replace(test, values=test.values[..., ~constant])
    return train, test


def _default(path: Path, class_names: Sequence[str]) -> TaskRule:
    count = min(_DEFAULT_TASKS, len(class_names) // 2)
    if count < 2:
        raise ValueError(
            f"{path} has {len(class_names)} classes, too few for tasks of their own: give tasks, a column of them, "
            "order:N or rotations:N"
        )
    return TaskRule("classes", count=count)


def _groups(path: Path, class_names: Sequence[str], count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The task of each class, and the names of the tasks."""
    if len(class_names) < 2 * count:
        most = len(class_names) // 2
        raise ValueError(
            f"{path} has {len(class_names)} classes, but classes:{count} needs two for each task: give "
            f"{f'at most classes:{most}, or ' if most > 1 else ''}other tasks, such as order:2"
        )
    titles, tasks = [], np.empty(len(class_names), np.int64)
    for number, group in enumerate(np.array_split(np.arange(len(class_names)), count)):
        tasks[group] = number
        own = [class_names[label] for label in group.tolist()]
        titles.append("-".join(own) if len(own) <= 3 else f"{number + 1}: {own[0]} ... {own[-1]}")
    return tasks, tuple(titles)


def _check_counts(
    path: Path, train: Labelled, test: Labelled | None, class_names: Sequence[str], task_names: Sequence[str]
) -> None:
    """Raises ValueError unless every task has two classes and enough samples of each for a tuple in every split."""
    n_tasks = max(len(task_names), 1)
    own = counts(train, n_tasks, len(class_names))
    official = None if test is None else counts(test, n_tasks, len(class_names))
    for number in range(n_tasks):
        title = f"task {task_names[number]!r}" if task_names else "the dataset"
        classes = np.flatnonzero(own[number])
        if len(classes) < 2:
            names = ", ".join(class_names[label] for label in classes.tolist())
            raise ValueError(f"{path}: {title} has {len(classes)} classes ({names}), but needs two: choose other tasks")
        for label in np.flatnonzero(own[number] + (0 if official is None else official[number])).tolist():
            checks = [("", own, _LEAST if official is None else _LEAST_TRAIN)]
            checks += [] if official is None else [("test ", official, _LEAST_TEST)]
            for split, table, least in checks:
                if table[number, label] < least:
                    raise ValueError(
                        f"{path}: {title} has {table[number, label]} {split}samples of class {class_names[label]!r}, "
                        f"but needs {least}: add some, leave the class out, or choose other tasks"
                    )
