"""A dataset as its source holds it: samples, a column of labels and perhaps one of tasks; and what columns say."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Counted = Literal["classes", "order", "rotations"]

LABELS = ("y", "label", "class")
_COUNTED: dict[str, Counted] = {"classes": "classes", "order": "order", "rotations": "rotations"}
_LONGEST_NAME = 200
_SMALLEST_SIDE = 8


@dataclass(frozen=True)
class Table:
    """values: images (n, channels, height, width) uint8, or features (n, 1, 1, d) float64; label and task (n,): the
    numbers or text of the source.
    """

    values: np.ndarray
    label: np.ndarray
    task: np.ndarray | None = None

    def subset(self, index: np.ndarray) -> Table:
        return Table(self.values[index], self.label[index], None if self.task is None else self.task[index])


class Source(NamedTuple):
    """What was read; ``label`` and ``task`` are the names of the columns, ``features`` those of the features if they
    have any, and ``remarks`` say what was found and what was left out.
    """

    train: Table
    test: Table | None
    label: str
    task: str | None
    remarks: list[str]
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskRule:
    """What makes the tasks: a column, of which ``values`` are wanted in this order (none: all, sorted), or ``count``
    groups of classes, parts of the rows as they arrive, or rotations.
    """

    kind: Literal["column"] | Counted
    column: str = ""
    values: tuple[str, ...] = ()
    count: int = 0


def parse_tasks(text: str) -> TaskRule:
    """``NAME``, ``NAME=VALUE,VALUE,...``, ``classes:N``, ``order:N`` or ``rotations:N``. Raises ValueError."""
    name, colon, number = text.partition(":")
    kind = _COUNTED.get(name)
    if kind is not None and colon:
        if not re.fullmatch("[0-9]{1,6}", number) or int(number) < 2:
            raise ValueError(f"tasks {text!r}: give a whole number of at least 2 tasks, as in {kind}:3")
        return TaskRule(kind, count=int(number))
    column, equals, listed = text.partition("=")
    values = tuple(value.strip() for value in listed.split(",")) if equals else ()
    if not column or "" in values or len(set(values)) < len(values) or (equals and len(values) < 2):
        raise ValueError(
            f"tasks {text!r}: give a column, a column and at least two different values in their order (site=a,b), "
            "classes:N, order:N or rotations:N"
        )
    return TaskRule("column", column, values)


class Options(NamedTuple):
    """What the user says of a source; None: it is found out."""

    label: str | None = None
    tasks: TaskRule | None = None
    images: str | None = None
    size: int | None = None

    def label_among(self, names: Collection[str]) -> str | None:
        """The column of labels: that asked for, or else the first called y, label or class."""
        return self.label or next((name for name in LABELS if name in names), None)

    def roles(self, where: object, names: Sequence[str], hint: str | None = None) -> tuple[str, str | None]:
        """The columns, among ``names``, of labels and tasks: those that were asked for, or else the first that is
        called y, label or class (or ``hint``), and task.

        Raises ValueError that lists the columns.
        """
        task = "task" if "task" in names else None
        if self.tasks is not None:
            task = self.tasks.column or None
        label = self.label_among(names) or hint
        listed = ", ".join(map(repr, names)) or "none"
        if label is None:
            raise ValueError(f"{where}: which column holds the labels? Give label, one of {listed}")
        for option, name in (("label", label), ("tasks", task)):
            if name is not None and name not in names:
                raise ValueError(f"{where} has no column {name!r}, given as {option}: choose one of {listed}")
        return label, task


def texts(where: object, values: Sequence[str | None]) -> np.ndarray:
    """A column of text; what is missing is the empty one. Raises ValueError for texts too long to be names."""
    longest = max((len(value) for value in values if value is not None), default=0)
    if longest > _LONGEST_NAME:
        raise ValueError(
            f"{where} has a value of {longest:,} characters, but labels and tasks are names of at most "
            f"{_LONGEST_NAME}: choose another column"
        )
    return np.array(["" if value is None else value.strip() for value in values], str)


def from_matrix(matrix: np.ndarray) -> np.ndarray:
    """Rows (n, d): bytes that fill squares of 8 x 8 or more are images, grey or red, green and blue plane by plane; all
    else are features.
    """
    n, d = matrix.shape
    if matrix.dtype == np.uint8:
        for channels in (1, 3):
            side = math.isqrt(d // channels)
            if side >= _SMALLEST_SIDE and channels * side * side == d:
                return matrix.reshape(n, channels, side, side)
    return matrix.astype(np.float64).reshape(n, 1, 1, d) + 0.0  # no -0, which equals 0 but for its bytes


def bytes_if_whole(values: np.ndarray) -> np.ndarray:
    """As uint8 if every value is a whole number in 0..255; otherwise as they are."""
    if values.dtype == np.uint8 or values.dtype.kind not in "iuf" or not values.size:
        return values
    whole = values.min() >= 0 and values.max() <= 255 and bool((values == np.floor(values)).all())
    return values.astype(np.uint8) if whole else values


def categories(where: str, column: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """A column as int64 or text: whole numbers are integers, whether written as such, with a decimal point or as text;
    with a ``threshold`` numbers become ">=0.5" or "<0.5".

    Raises ValueError for what is missing, NaN or infinite, for fractions without a threshold, and for text with one.
    """
    if column.dtype.kind not in "biufU":
        raise ValueError(f"{where} has dtype {column.dtype}: give numbers or text (astype(str))")
    numbers = column
    if column.dtype.kind == "U":
        missing = np.flatnonzero(np.char.strip(column) == "")
        if len(missing):
            raise ValueError(
                f"{where} is empty in {len(missing):,} rows, the first of them row {missing[0] + 1}: fill it in, or "
                "remove those rows"
            )
        try:
            numbers = column.astype(np.float64)
        except ValueError:
            if threshold is not None:
                raise ValueError(
                    f"{where} has text such as {_first_text(column)!r}, but a threshold ({threshold:g}) needs numbers: "
                    "leave it out"
                ) from None
            return column
    odd = np.flatnonzero(~np.isfinite(numbers))
    if len(odd):
        raise ValueError(
            f"{where} is {numbers[odd[0]]} in {len(odd):,} rows, the first of them row {odd[0] + 1}: fill it in, or "
            "remove those rows"
        )
    if threshold is not None:
        return np.where(numbers >= threshold, f">={threshold:g}", f"<{threshold:g}")
    fractions = np.flatnonzero(numbers != np.floor(numbers))
    if len(fractions):
        raise ValueError(
            f"{where} has fractions such as {numbers[fractions[0]]:g} in row {fractions[0] + 1}: give whole numbers or "
            "names, or for labels a threshold, which makes two classes"
        )
    if len(numbers) and not -(2.0**53) <= float(numbers.min()) <= float(numbers.max()) <= 2.0**53:
        raise ValueError(f"{where} has numbers beyond 2^53, such as {numbers.max()}: give names or smaller numbers")
    return numbers.astype(np.int64)


def _first_text(column: np.ndarray) -> str:
    """The first value that is no number."""
    for value in column.tolist():
        try:
            float(value)
        except ValueError:
            return value[:40]
    return ""
