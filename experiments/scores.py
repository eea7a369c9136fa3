"""Accuracy after a task, on the images that no model is trained on: held-out and test split of every task seen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from experiments.buffer import Buffer
from experiments.config import RunConfig
from experiments.evaluate import accuracy, cheapest, confusion, draw_weights, likeliest, linear_probe
from experiments.methods import METHODS
from experiments.seeds import derive
from experiments.snapshot import Snapshot
from experiments.streams import TaskStream

MOST_CLASSES = 50  # of which confusions are kept without being asked for by costs


class Scores(NamedTuple):
    """Per task seen: accuracy over all classes seen and over the task's own, and counts[true class][decision] over
    all classes of the stream, among those seen: of least expected cost, or without costs the likeliest (and none for
    more than MOST_CLASSES classes).
    """

    over_seen: list[float]
    over_own: list[float]
    confusion: list[list[list[int]]]


def measure(
    config: RunConfig, stream: TaskStream, buffer: Buffer, task: int, snapshot: Snapshot, device: torch.device
) -> Scores:
    """Of the model after ``task``: by its own classifier, or by a linear probe on its representations."""
    seen = stream.tasks[:task]
    known = {label for part in seen for label in part.classes}
    probe, shift = None, torch.zeros(stream.n_classes)
    if not METHODS[config.method].classifier:
        probe, known, shift = _probe(config, stream, buffer, task, snapshot, device)
    scores = Scores([], [], [])
    for number, part in enumerate(seen, start=1):
        heldout, test = snapshot.split(number, "heldout"), snapshot.split(number, "test")
        if probe is not None:
            logits = probe(torch.cat([heldout.representation, test.representation]))
        else:
            assert heldout.logits is not None and test.logits is not None  # those of the classifier
            logits = torch.cat([heldout.logits, test.logits])
        truth = np.concatenate([part.splits["heldout"].labels, part.splits["test"].labels])
        over_seen, over_own = accuracy(logits, truth, known, part.classes)
        scores.over_seen.append(over_seen)
        scores.over_own.append(over_own)
        if config.costs is not None:
            decision = cheapest(logits + shift, known, config.costs)
        elif stream.n_classes <= MOST_CLASSES:
            decision = likeliest(logits, known)
        else:
            continue
        scores.confusion.append(confusion(decision, truth, stream.n_classes).tolist())
    return scores


def _probe(
    config: RunConfig, stream: TaskStream, buffer: Buffer, task: int, snapshot: Snapshot, device: torch.device
) -> tuple[nn.Linear, set[int], torch.Tensor]:
    """A linear probe trained on the task's training split and the buffer, balanced over their classes or, where
    tasks share classes, over the tasks (as Co2L's code); the classes that it knows; and what takes its logits from
    the shares of classes that it was trained on to those of the tasks' training images, each task counted equally.
    """
    past = {i: part for i in range(1, task) if len((part := buffer.of_task(stream, i)).labels)}
    outputs = [snapshot.split(task, "train"), *(snapshot.of(part.images) for part in past.values())]
    parts = {task: stream.tasks[task - 1].train, **past}
    label = torch.from_numpy(np.concatenate([part.labels for part in parts.values()]))
    number = torch.cat([torch.full((len(part.labels),), i) for i, part in parts.items()])
    group = number if stream.kind == "domain-incremental" else label
    probe = linear_probe(
        torch.cat([out.representation for out in outputs]).to(device),
        label.to(device),
        group,
        stream.n_classes,
        epochs=config.probe_epochs,
        learning_rate=config.probe_learning_rate,
        seed=derive(config.seed, "probe", task),
    )
    drawn = torch.bincount(label, draw_weights(group).double(), stream.n_classes)
    counts = [np.bincount(part.train.labels, minlength=stream.n_classes) for part in stream.tasks[:task]]
    present = torch.from_numpy(np.mean([count / count.sum() for count in counts], axis=0))
    shift = torch.where(drawn > 0, (present / drawn).log(), 0.0)  # up to a constant, which changes no decision
    return probe.cpu(), set(label.tolist()), shift
