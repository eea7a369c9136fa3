"""Linear probe and the metrics of continual learning."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

_BATCH = 256


class Costs(NamedTuple):
    """Of a missed item of the class ``defect``, and of an item of any other class that is taken for one."""

    defect: int
    miss: float
    alarm: float


class Accuracy(NamedTuple):
    """On one task's images: argmax over all classes seen, and over the task's own."""

    over_seen: float
    over_own: float


def linear_probe(
    representation: Tensor,
    label: Tensor,
    group: Tensor,
    n_classes: int,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> nn.Linear:
    """A linear classifier on frozen representations (n, width), by the protocol of Co2L (Cha et al. 2021): SGD with
    momentum 0.9, batches of 256 drawn with replacement so that each ``group`` (n,) is drawn as often, learning rate x
    0.2 after 60, 75 and 90% of the epochs. An epoch has ceil(n / 256) steps.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = nn.Linear(representation.shape[1], n_classes)
    nn.init.normal_(probe.weight, std=0.01, generator=generator)
    nn.init.zeros_(probe.bias)
    probe.to(representation.device)
    optimizer = torch.optim.SGD(probe.parameters(), learning_rate, momentum=0.9)
    milestones = [round(share * epochs) for share in (0.6, 0.75, 0.9)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    weight = draw_weights(group)
    steps = math.ceil(len(label) / _BATCH)
    for _ in range(epochs):
        drawn = torch.multinomial(weight, steps * _BATCH, replacement=True, generator=generator)
        for batch in drawn.to(representation.device).split(_BATCH):
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(functional.cross_entropy(probe(representation[batch]), label[batch]))
            optimizer.step()
        scheduler.step()
    return probe.requires_grad_(False)


def draw_weights(group: Tensor) -> Tensor:
    """Weights (n,) by which each group is drawn as often as the others."""
    return 1.0 / torch.bincount(group)[group]


def accuracy(logits: Tensor, labels: np.ndarray, known: Collection[int], own: Collection[int]) -> Accuracy:
    """Shares of correct argmaxes of ``logits`` (n, classes): over the ``known`` classes, and over those of them that
    are the task's ``own``.

    A class that is not known is never predicted.
    """

    def correct(classes: Collection[int]) -> float:
        return float(np.mean(likeliest(logits, classes) == labels)) if classes else 0.0

    return Accuracy(correct(known), correct(set(known) & set(own)))


def confusion(decision: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """(n_classes, n_classes) counts of true class (row) and decision (column)."""
    counts = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(counts, (labels, decision), 1)
    return counts


def likeliest(logits: Tensor, classes: Collection[int]) -> np.ndarray:
    """Of ``classes``, for each row (n,)."""
    among = sorted(classes)
    return np.asarray(among)[logits[:, among].argmax(1).numpy()]


def cheapest(logits: Tensor, classes: Collection[int], costs: Costs) -> np.ndarray:
    """The decision of least expected cost among ``classes``, for each row (n,), if the softmax of ``logits`` is right:
    the defect if miss x its probability exceeds alarm x that of all others (Elkan 2001), or else the likeliest other.
    """
    others = sorted(set(classes) - {costs.defect})
    if costs.defect not in classes or not others:
        return likeliest(logits, classes)
    miss, alarm = torch.tensor([costs.miss, costs.alarm], dtype=torch.float64).log()
    rejected = logits[:, costs.defect].double() + miss > logits[:, others].double().logsumexp(1) + alarm
    return np.where(rejected.numpy(), costs.defect, likeliest(logits, others))


def average_accuracy(matrix: Sequence[Sequence[float]]) -> float:
    """Mean accuracy after the last task. ``matrix[t][i]`` is the accuracy on task i after task t, i <= t."""
    return float(np.mean(matrix[-1]))


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over tasks i < T of the best earlier accuracy on i minus the last (Chaudhry et al. 2018); 0 for one task."""
    last = len(matrix) - 1
    return (
        float(np.mean([max(matrix[t][i] for t in range(i, last)) - matrix[last][i] for i in range(last)]))
        if last
        else 0.0
    )


def backward_transfer(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over tasks i < T of the last accuracy on i minus the one right after i (Lopez-Paz & Ranzato 2017); or 0."""
    last = len(matrix) - 1
    return float(np.mean([matrix[last][i] - matrix[i][i] for i in range(last)])) if last else 0.0
