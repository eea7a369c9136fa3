"""Linear probe and the metrics of continual learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from experiments.datasets import Dataset
from experiments.models import SmallEncoder


class Probe(NamedTuple):
    """Accuracy on one task's test split: argmax over all classes seen, and over the task's own."""

    class_il: float
    task_il: float


def linear_probe(model: SmallEncoder, train: Dataset, tests: Sequence[tuple[Dataset, tuple[int, ...]]]) -> list[Probe]:
    """Class-balanced logistic regression on frozen representations of ``train`` (last task and buffer), tested on
    (split, classes) pairs.

    A class that ``train`` lacks is never predicted.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    probe.fit(_represent(model, train), train.labels)
    known = probe.classes_
    results = []
    for test, classes in tests:
        scores = probe.decision_function(_represent(model, test))
        if len(known) == 2:  # scikit-learn gives one column for two classes
            scores = np.stack([-scores, scores], axis=1)
        own = np.isin(known, classes)
        task_il = np.mean(known[own][scores[:, own].argmax(1)] == test.labels) if own.any() else 0.0
        results.append(Probe(float(np.mean(known[scores.argmax(1)] == test.labels)), float(task_il)))
    return results


def _represent(model: SmallEncoder, data: Dataset) -> np.ndarray:
    return model.represent(torch.from_numpy(data.images)).numpy()


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
