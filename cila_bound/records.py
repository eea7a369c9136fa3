"""The records of a loss log: what one line may hold, and what makes a line wrong.

One JSON object per line; ``record`` names its kind. Tasks count from 1, losses are in nats. The header checks itself
on construction, every other record in :meth:`check`, which needs the header; both raise ValueError with the offending
value and the remedy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from cila_bound.geometry import Geometry, checked, checked_array

SCHEMA_VERSION = 1
MAX_TASKS = 10_000
Split = Literal["train", "buffer", "heldout"]
_ROUNDING = 1e-6  # values outside their range by this x (1 + range) are rounding
_CONSISTENCY = 1e-4  # sums of logged means must agree to this x (1 + value): float32 training code is welcome


@dataclass(frozen=True, slots=True)
class Statistic:
    """Mean and unbiased variance (divisor n - 1; 0 for n = 1) of one loss over tuples."""

    mean: float
    variance: float

    @staticmethod
    def of(values: Sequence[float] | np.ndarray) -> Statistic:
        """The statistic of per-tuple values, shape (n,)."""
        array = np.asarray(values, dtype=np.float64)
        return Statistic(float(array.mean()), float(array.var(ddof=1)) if array.size > 1 else 0.0)

    def check(self, name: str, low: float, high: float, n: int) -> None:
        _check_range(f"{name}.mean", self.mean, low, high)
        largest = 0.25 * (high - low) ** 2 * n / max(n - 1, 1)  # half the mass at either end
        _check_range(f"{name}.variance", self.variance, 0.0, largest)


@dataclass(frozen=True)
class Header:
    """The first line: what the run was.

    ``fixed_tuples`` says that the held-out tuples of a task are the same after every task; then every bound must hold
    on them exactly, which ``cila-bound evaluate`` checks. ``config`` is the resolved configuration, ``versions`` maps
    packages (and the hardware) to text.
    """

    kind: ClassVar[str] = "header"
    temperature: float
    n_negatives: int
    tasks: tuple[str, ...]
    seed: int
    method: str
    fixed_tuples: bool
    config: dict[str, Any]
    versions: dict[str, str]
    data_fingerprint: str
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must be a non-empty list of different names, got {list(self.tasks)!r}")
        if len(self.tasks) > MAX_TASKS:
            raise ValueError(f"tasks must be at most {MAX_TASKS:,}, got {len(self.tasks):,}")
        self.geometry  # noqa: B018  (raises on an illegal temperature or n_negatives)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.temperature, self.n_negatives)


@dataclass(frozen=True)
class TupleValues:
    """Per-tuple values of one measurement, in the same order; those that are not logged are null or left out.

    The pointwise step needs ``teacher_contrastive`` and ``drift``; confidence bounds by betting need the statistic that
    they are about. If n is a multiple of n_effective, the values are rounds of n_effective independent tuples each.
    ``block``: so many consecutive tuples of a round have the task's mean on average, whatever came before, such as one
    anchor of each of two classes in turn; 1 if each tuple has; None if it is not known, and then nothing is bet on.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset(
        {"contrastive", "teacher_contrastive", "distillation", "drift", "block"}
    )
    teacher_contrastive: tuple[float, ...] | None = None
    drift: tuple[float, ...] | None = None
    contrastive: tuple[float, ...] | None = None
    distillation: tuple[float, ...] | None = None
    block: int | None = None

    def column(self, statistic: str) -> tuple[float, ...] | None:
        """The values of one statistic of the measurement, None if they are not logged; those of a miss probability
        follow from the loss.
        """
        if statistic.endswith("miss_probability"):
            losses = self.column(statistic.replace("miss_probability", "contrastive"))
            return None if losses is None else tuple(-math.expm1(-loss) for loss in losses)
        values: tuple[float, ...] | None = getattr(self, statistic, None)
        return values


@dataclass(frozen=True, slots=True)
class Measurement:
    """The losses of f_t (``after_task`` = t) on ``n`` tuples of one ``task`` i <= t, drawn from one ``split`` of its
    data.

    ``n_effective`` is the number of independent tuples that the mean is worth: n if the tuples are disjoint, and at
    most floor(samples / (K + 2)) if they share samples (Hoeffding 1963). The fields of the previous model (teacher)
    are null at t = 1.
    """

    kind: ClassVar[str] = "measurement"
    after_task: int
    task: int
    split: Split
    n: int
    n_effective: int
    contrastive: Statistic
    miss_probability: Statistic
    distillation: Statistic | None = None
    teacher_entropy: Statistic | None = None
    drift: Statistic | None = None
    teacher_contrastive: Statistic | None = None
    teacher_miss_probability: Statistic | None = None
    tuples: TupleValues | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.after_task, self.task, self.split

    def check(self, header: Header) -> None:
        _check_place(self.after_task, self.task, header)
        _check_counts(self.n, self.n_effective)
        geometry = header.geometry
        loss = geometry.floor, geometry.ceiling
        miss = 1.0 - geometry.p_max, 1.0 - geometry.p_min
        ranges = {
            "contrastive": loss,
            "miss_probability": miss,
            "distillation": loss,
            "teacher_entropy": (0.0, geometry.chance),
            "drift": (0.0, geometry.ceiling),
            "teacher_contrastive": loss,
            "teacher_miss_probability": miss,
        }
        of_teacher = list(ranges)[2:]
        present = {name for name in of_teacher if getattr(self, name) is not None}
        if present and len(present) < len(of_teacher):
            missing = [name for name in of_teacher if name not in present]
            raise ValueError(f"{missing[0]} is null while {sorted(present)[0]} is not: log all teacher fields or none")
        if self.after_task > self.task and not present:
            raise ValueError(
                "distillation is null: after a later task the losses against the previous model are needed"
            )
        if self.after_task == 1 and present:
            raise ValueError("distillation is set after task 1, where there is no previous model: log null")
        for name, (low, high) in ranges.items():
            statistic = getattr(self, name)
            if statistic is not None:
                statistic.check(name, low, high, self.n)
        if self.distillation and self.teacher_entropy and self.drift:
            _check_sum(
                "distillation.mean",
                self.distillation.mean,
                "teacher_entropy + drift",
                self.teacher_entropy.mean + self.drift.mean,
            )
        if self.tuples is not None:
            self._check_tuples(self.tuples, ranges)

    def _check_tuples(self, tuples: TupleValues, ranges: Mapping[str, tuple[float, float]]) -> None:
        if tuples.block is not None and tuples.block < 1:
            raise ValueError(f"tuples.block must be at least 1, got {tuples.block}")
        for name in ("contrastive", "teacher_contrastive", "distillation", "drift"):
            values, statistic = getattr(tuples, name), getattr(self, name)
            if values is None:
                continue
            if statistic is None:
                raise ValueError(f"tuples.{name} is set without {name}: log null")
            if len(values) != self.n:
                raise ValueError(f"tuples.{name} has {len(values)} values for n = {self.n} tuples")
            mean = float(checked_array(f"tuples.{name}", values, *ranges[name], _ROUNDING).mean())
            _check_sum(f"{name}.mean", statistic.mean, f"the mean of tuples.{name}", mean)


@dataclass(frozen=True)
class Training:
    """The training loss of task t, in the losses of the theorem.

    loss = contrastive_weight x contrastive + distill_weight x distillation, all measured with the header's tuples on
    training data: ``contrastive`` on task t alone (``contrastive_over`` = "current") or on the mixture ("mixture"),
    ``distillation`` on the mixture, in which task i has the share ``mixture_weights[i-1]``. ``distillation`` is null
    at t = 1. ``objective_contrastive`` and ``objective_distillation`` are the two terms as the optimiser saw them
    (its own temperatures and negatives; mean over the last epoch), from which adaptive weights are computed; null
    where a term was not used.
    """

    kind: ClassVar[str] = "training"
    after_task: int
    loss: float
    contrastive: float
    distillation: float | None
    contrastive_weight: float
    distill_weight: float
    mixture_weights: tuple[float, ...]
    contrastive_over: Literal["current", "mixture"]
    objective_contrastive: float | None = None
    objective_distillation: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.after_task

    def check(self, header: Header) -> None:
        _check_place(self.after_task, self.after_task, header)
        geometry = header.geometry
        _check_range("contrastive", self.contrastive, geometry.floor, geometry.ceiling)
        for name in ("contrastive_weight", "distill_weight", "objective_contrastive", "objective_distillation"):
            value = getattr(self, name)
            if value is not None:
                checked(name, value, 0.0, 1e12, 0.0)
        expected = self.contrastive_weight * self.contrastive
        if self.distillation is None:
            if self.after_task > 1:
                raise ValueError("distillation is null: only task 1 has no previous model")
            if self.distill_weight != 0.0:
                raise ValueError(f"distill_weight must be 0 for task 1, got {self.distill_weight!r}")
        else:
            _check_range("distillation", self.distillation, geometry.floor, geometry.ceiling)
            expected += self.distill_weight * self.distillation
        _check_sum("loss", self.loss, "contrastive_weight x contrastive + distill_weight x distillation", expected)
        if len(self.mixture_weights) != self.after_task:
            raise ValueError(
                f"mixture_weights must have {self.after_task} shares, one per task, got {len(self.mixture_weights)}"
            )
        checked_array("mixture_weights", self.mixture_weights, 0.0, 1.0, _ROUNDING)
        _check_sum("the sum of mixture_weights", math.fsum(self.mixture_weights), "1", 1.0)


@dataclass(frozen=True, slots=True)
class TestLoss:
    """The truth to compare with: L_con(f_t; D_i) on ``n`` test tuples that neither training nor the bound has seen."""

    __test__: ClassVar[bool] = False  # not a pytest class
    kind: ClassVar[str] = "test"
    after_task: int
    task: int
    n: int
    n_effective: int
    contrastive: Statistic

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.after_task, self.task

    def check(self, header: Header) -> None:
        _check_place(self.after_task, self.task, header)
        _check_counts(self.n, self.n_effective)
        self.contrastive.check("contrastive", header.geometry.floor, header.geometry.ceiling, self.n)


Record = Measurement | Training | TestLoss
_KINDS: dict[str, type[Any]] = {cls.kind: cls for cls in (Header, Measurement, Training, TestLoss)}


def to_json(record: Header | Record) -> dict[str, Any]:
    """The JSON object of a record."""
    return {"record": record.kind, **dataclasses.asdict(record)}


def from_json(data: object) -> Header | Record:
    """The record of a JSON object. Raises ValueError on an unknown kind or field, a missing field, or a wrong type."""
    if not isinstance(data, dict):
        raise ValueError(f"a line must be a JSON object, got {type(data).__name__}")
    kind = data.get("record")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"field 'record' must be one of {sorted(_KINDS)}, got {kind!r}")
    if kind == "header":
        _check_schema(data.get("schema"))  # before its fields, which another version may name otherwise
    return _build(_KINDS[kind], {name: value for name, value in data.items() if name != "record"}, kind)


def _build(cls: type[Any], data: Mapping[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            raise ValueError(f"unknown field {name!r} in {where}: remove it; legal fields are {', '.join(fields)}")
    for name in fields:
        if name not in data and name not in getattr(cls, "OPTIONAL", ()):
            raise ValueError(f"missing field {name!r} in {where}: write it, as null if it does not apply")
    hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
    return cls(**{name: _convert(value, hints[name], name) for name, value in data.items()})


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the annotated type, without any coercion but int -> float and list -> tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(value, arguments[0], name)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{name} must be one of {list(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_convert(item, arguments[0], f"{name}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {value!r}")
        return (
            value
            if arguments[1] is Any
            else {key: _convert(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
        )
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {value!r}")
        return _build(typing.cast(type[Any], hint), value, name)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be finite, got {str(value)[:40]}")
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name} must be of type {hint.__name__}, got {value!r}")
    return value


def _check_schema(version: object) -> None:
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"schema is version {version!r}, this program reads {SCHEMA_VERSION}: use the matching release"
        )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    try:
        checked(name, value, low, high, _ROUNDING)
    except ValueError as error:
        raise ValueError(
            f"{error}: log nats at the header's temperature and n_negatives, without extra factors"
        ) from None


def _check_place(after_task: int, task: int, header: Header) -> None:
    if not 1 <= after_task <= len(header.tasks):
        raise ValueError(
            f"after_task must be in 1..{len(header.tasks)}, the number of tasks in the header, got {after_task}"
        )
    if not 1 <= task <= after_task:
        raise ValueError(f"task must be in 1..after_task = {after_task}, got {task}")


def _check_counts(n: int, n_effective: int) -> None:
    if not 1 <= n_effective <= n:
        raise ValueError(
            f"n and n_effective must satisfy 1 <= n_effective <= n, got n = {n}, n_effective = {n_effective}"
        )


def _check_sum(name: str, value: float, expected_name: str, expected: float) -> None:
    if not abs(value - expected) <= _CONSISTENCY * (1.0 + abs(expected)):  # also true for NaN
        raise ValueError(
            f"{name} is {value!r}, but {expected_name} is {expected!r}: measure all of them on the same tuples"
        )
