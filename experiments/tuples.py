"""Tuples (anchor, positive, K negatives) of one task, and the theorem's losses on them.

D_i, the distribution of task i: the anchor's class is uniform over the task's classes, the positive is another image
of that class, the negatives are images of the task's other classes. No augmentation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cila_bound import Geometry, Statistic, TupleValues


@dataclass(frozen=True)
class Tuples:
    """``index`` (n, 2 + K) into a split: anchor, positive, negatives; ``n_effective``: disjoint tuples in one round;
    ``block``: so many consecutive ones, a turn of anchor classes, have the task's mean on average whatever came before;
    None for more than two classes, where the negatives' classes depend on those drawn before, or less than a turn.
    """

    index: np.ndarray
    n_effective: int
    block: int | None


def draw_tuples(
    labels: np.ndarray, n_negatives: int, rounds: int, rng: np.random.Generator, *, limit: int = 1_000_000
) -> Tuples:
    """``rounds`` times: shuffle the samples and cut them into disjoint tuples, ``limit`` at most, anchor classes in
    turn, each as often as the others (unless samples or limit do not suffice for one of each). A class with a single
    sample has negatives only.

    Given the classes drawn, the tuples of a round are independent, and the mean over rounds is no worse than the mean
    of one (Hoeffding 1963, section 5), so the mean is worth the tuples of one round: ``n_effective``.

    Raises ValueError if not even one tuple can be formed.
    """
    drawn = [_one_round(labels, n_negatives, rng, limit) for _ in range(rounds)]
    size = min(map(len, drawn))
    if size == 0:
        raise ValueError(
            f"{len(labels)} samples of {len(np.unique(labels))} classes form no tuple of a positive pair and "
            f"{n_negatives} negatives of other classes: give more samples or lower n_negatives"
        )
    counts = np.unique(labels, return_counts=True)[1]
    turn = int(np.sum(counts > 1))
    size -= size % turn if size > turn else 0
    index = np.array([row for part in drawn for row in part[:size]], dtype=np.int64)
    return Tuples(index, size, turn if len(counts) == 2 and size >= turn else None)


def _one_round(labels: np.ndarray, n_negatives: int, rng: np.random.Generator, limit: int) -> list[list[int]]:
    pools = {int(label): rng.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)}
    tuples: list[list[int]] = []
    anchors = [label for label, members in pools.items() if len(members) > 1]
    for own in itertools.islice(itertools.cycle(rng.permutation(anchors).tolist()), limit):
        others = [label for label in pools if label != own]
        if len(pools[own]) < 2 or sum(len(pools[label]) for label in others) < n_negatives:
            break
        row = [pools[own].pop(), pools[own].pop()]
        for _ in range(n_negatives):
            weight = np.array([len(pools[label]) for label in others], dtype=np.float64)
            row.append(pools[others[rng.choice(len(others), p=weight / weight.sum())]].pop())
        tuples.append(row)
    return tuples


class TupleLosses(NamedTuple):
    """Per-tuple losses in nats, float64 (n,). The last five are None without a teacher."""

    contrastive: np.ndarray
    miss_probability: np.ndarray
    distillation: np.ndarray | None = None
    teacher_entropy: np.ndarray | None = None
    drift: np.ndarray | None = None
    teacher_contrastive: np.ndarray | None = None
    teacher_miss_probability: np.ndarray | None = None

    def statistics(self) -> dict[str, Any]:
        """The fields of a Measurement: a Statistic each, to ten digits, or None."""
        return {
            name: None if value is None else _rounded(Statistic.of(value)) for name, value in self._asdict().items()
        }

    def per_tuple(self, block: int | None, *columns: str) -> TupleValues:
        """Of the named losses, as far as they are there, to eight digits."""
        found = {name: values for name in columns if (values := getattr(self, name)) is not None}
        short = {name: tuple(float(f"{value:.8g}") for value in values) for name, values in found.items()}
        return TupleValues(**short, block=block)


def _rounded(statistic: Statistic) -> Statistic:
    return Statistic(float(f"{statistic.mean:.10g}"), float(f"{statistic.variance:.6g}"))


def tuple_losses(embedding: Tensor, teacher: Tensor | None, tuples: Tuples, geometry: Geometry) -> TupleLosses:
    """The losses of docs/theory.md, for unit-norm embeddings (samples, D) of student and teacher,
    in float64.
    """
    log_q = _log_softmax(embedding, tuples, geometry)
    student = (-log_q[:, 0]).numpy(), (-torch.expm1(log_q[:, 0])).numpy()
    if teacher is None:
        return TupleLosses(*student)
    log_p = _log_softmax(teacher, tuples, geometry)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    drift = (p * ((log_p - log_q) + torch.expm1(log_q - log_p))).sum(
        1
    )  # adds sum(q - p) = 0: terms >= 0, no cancellation
    return TupleLosses(
        *student,
        distillation=(entropy + drift).numpy(),
        teacher_entropy=entropy.numpy(),
        drift=drift.numpy(),
        teacher_contrastive=(-log_p[:, 0]).numpy(),
        teacher_miss_probability=(-torch.expm1(log_p[:, 0])).numpy(),
    )


def _log_softmax(embedding: Tensor, tuples: Tuples, geometry: Geometry) -> Tensor:
    """(n, 1 + K), the positive first."""
    unit = torch.nn.functional.normalize(embedding.double(), dim=1)
    index = torch.from_numpy(tuples.index)
    similarity = torch.einsum("nd,nkd->nk", unit[index[:, 0]], unit[index[:, 1:]])
    return torch.log_softmax(similarity.clamp(-1.0, 1.0) / geometry.temperature, dim=1)
