"""Training on one task, epoch by epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.augment import Augmentation
from experiments.config import RunConfig
from experiments.methods import METHODS
from experiments.moco import KeyQueue
from experiments.models import Logits, Model, layout
from experiments.objective import Loss, contrastive_loss, replay_loss
from experiments.seeds import derive, torch_generator
from experiments.world import ALONE, World


class DivergedError(ValueError):
    """Of several ranks perhaps of this one alone."""


class Rows(NamedTuple):
    """What a task is trained on, on the training device: its own images first, then those of the buffer.

    ``images`` (n, channels, height, width) uint8, ``labels`` and ``tasks`` (n,), of which ``n_current`` are the task's
    own; ``positives`` (n,): images of one number are each other's positives; ``logits`` (n - n_current, classes) as
    buffered, or None.
    """

    images: Tensor
    labels: Tensor
    tasks: Tensor
    positives: Tensor
    n_current: int
    logits: Tensor | None = None


class TaskTrainer:
    """One task's training of ``model``; task 0 is pre-training. ``embed`` is the model, compiled or not; ``teacher``:
    the frozen previous model, or None; ``weights``: lambda for the rows of each of the tasks 1..task, empty without
    distillation.
    """

    def __init__(
        self,
        config: RunConfig,
        task: int,
        model: Model,
        embed: nn.Module,
        rows: Rows,
        augment: Augmentation,
        teacher: Model | None,
        weights: Sequence[float],
        world: World = ALONE,
    ) -> None:
        self.config = config if task else dataclasses.replace(config, positives="view")
        self.task, self.model, self.rows, self.augment, self.world = task, model, rows, augment, world
        self.method, self.weights = METHODS[config.method], weights
        self.predict = world.shared(Logits(model) if self.method.classifier else embed)
        self.teacher = teacher if weights else None
        self.epochs = epochs_of(config, task)
        self.optimizer = torch.optim.SGD(
            model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.queue = KeyQueue(model, config.queue_size, config.queue_momentum, world) if config.queue_size else None
        self.device = rows.images.device
        self._layout = layout(config.model, self.device)
        half = config.precision == "bfloat16" or (config.precision == "auto" and self.device.type == "cuda")
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def state(self) -> dict[str, Any]:
        """Of optimiser and queue, for a checkpoint between epochs; all ranks call it together."""
        return {"optimizer": self.optimizer.state_dict(), "queue": self.queue.state() if self.queue else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.queue:
            self.queue.load_state(state["queue"])

    def epoch(self, number: int) -> dict[str, float]:
        """One pass (``number`` from 0); returns the terms of the objective, each averaged over its rows.

        Raises ValueError with the remedy if the run diverges.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, number, self.epochs)
        n = self.rows.n_current if self.method.classifier else len(self.rows.labels)
        order = torch.randperm(n, generator=torch_generator(config.seed, "batches", self.task, number))
        torch.manual_seed(derive(config.seed, "epoch", self.task, number) + self.world.rank)
        step = self._replay_step if self.method.classifier else self._contrastive_step
        terms: dict[str, list[Tensor]] = {}
        self.model.train()
        for batch in _batches(order.to(self.device), config.batch_size, max(2, self.world.size)):
            for name, values in step(batch, number).items():
                terms.setdefault(name, []).append(values)
        self.model.eval()
        with torch.no_grad():
            embedding = self.model(self.augment.plain(self.rows.images[: config.batch_size]))
        self._check_finite(number, _log_norm(embedding), *self.model.state_dict().values())
        return {name: torch.cat(self.world.gathered(torch.cat(values))).mean().item() for name, values in terms.items()}

    def _contrastive_step(self, batch: Tensor, number: int) -> dict[str, Tensor]:
        batch = self.world.share(batch)
        views, label = self._two_views(self.rows.images[batch]), self.rows.positives[batch].repeat(2)
        teacher = None
        with self._autocast:
            embedding = self.predict(views)
            if self.teacher is not None:
                with torch.no_grad():
                    teacher = self.teacher(views)
        self._check_finite(number, *(_log_norm(z.detach()) for z in (embedding, teacher) if z is not None))
        result = contrastive_loss(
            self.config,
            self.method,
            embedding,
            label,
            self.rows.tasks[batch].repeat(2),
            teacher,
            current_task=self.task,
            weights=self.weights,
            queue=self.queue,
            world=self.world,
        )
        self._step(result, number)
        if self.queue:
            with self._autocast:
                self.queue.advance(self.model, views, teacher, label)
        return result.terms

    def _replay_step(self, batch: Tensor, number: int) -> dict[str, Tensor]:
        """One view of each current image, and of as many buffered ones (twice as many for DER++), drawn with
        replacement.
        """
        rows, buffered = self.rows, len(self.rows.labels) - self.rows.n_current
        whole, batch = len(batch), self.world.share(batch)
        drawn = batch[:0]
        if buffered:
            count = len(batch) * (2 if self.method.logits else 1)
            drawn = torch.randint(buffered, (count,), device=self.device)
        index = torch.cat([batch, drawn + rows.n_current])
        views = self.augment(rows.images[index]).contiguous(memory_format=self._layout)
        with self._autocast:
            logits = self.predict(views)
        replay: list[Tensor | None] = []
        if buffered:
            target = None if rows.logits is None else rows.logits[drawn]
            replay = [logits[len(batch) :].float(), rows.labels[index[len(batch) :]], target]
        result = replay_loss(self.config, self.method, logits[: len(batch)].float(), rows.labels[batch], *replay)
        weight = len(batch) * self.world.size / whole  # ranks are averaged, their shares may differ by an image
        self._step(result._replace(loss=weight * result.loss), number)
        return result.terms

    def _two_views(self, images: Tensor) -> Tensor:
        return torch.cat([self.augment(images), self.augment(images)]).contiguous(memory_format=self._layout)

    def _step(self, result: Loss, number: int) -> None:
        self._check_finite(number, result.loss.detach())
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(result.loss)
        self.optimizer.step()

    def _check_finite(self, number: int, *values: Tensor) -> None:
        """Raises DivergedError with the remedy: before a checkpoint of it is saved."""
        if not all(value.isfinite().all() for value in values):
            raise DivergedError(
                f"the run diverged (NaN, infinity or overflow) in task {self.task}, epoch {number + 1}: lower "
                f"learning_rate (now {self.config.learning_rate:g})"
            )


def epochs_of(config: RunConfig, task: int) -> int:
    """Of task number ``task``; 0 stands for pre-training."""
    return (config.pretrain_epochs, config.epochs_first, config.epochs)[min(task, 2)]


def learning_rate(config: RunConfig, epoch: int, epochs: int) -> float:
    """Linear warm-up, then a cosine that would be 0.001 of the peak after the last epoch."""
    start, peak, last = config.warmup_from, config.learning_rate, 1e-3 * config.learning_rate
    warmup = min(config.warmup_epochs, epochs - 1)
    if epoch < warmup:
        return start + (peak - start) * (epoch + 1) / (warmup + 1)
    return last + 0.5 * (peak - last) * (1.0 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))


def _log_norm(embedding: Tensor) -> Tensor:
    """Of each row: about 0, -inf where the encoder overflowed before it normalised, NaN where it gave NaN."""
    return embedding.norm(dim=1).log()


def _batches(order: Tensor, size: int, least: int) -> Iterator[Tensor]:
    """Consecutive slices; fewer than ``least`` images left over join the last one: SupCon needs company, and each rank
    an image.
    """
    end = len(order) - (len(order) % size if len(order) % size < least else 0)
    for start in range(0, end, size):
        stop = min(start + size, end)
        yield order[start : len(order) if stop == end else stop]
