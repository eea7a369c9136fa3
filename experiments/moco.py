"""Keys beyond the batch: a queue of a momentum encoder's embeddings (MoCo, He et al. 2020)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from experiments.models import Model
from experiments.world import ALONE, World


class KeyQueue:
    """The last ``size`` embeddings that a momentum encoder and the teacher have made of the task's training views.

    ``key`` (n, D), ``teacher_key`` (n, D') or None, and ``label`` (n,), n <= size; empty when a task begins. The keys
    of the batch itself come from the encoder in training, with gradient; those of the queue carry none. Of several
    ranks each holds its part of the queue.
    """

    def __init__(self, model: Model, size: int, momentum: float, world: World = ALONE) -> None:
        self.encoder = copy.deepcopy(model).requires_grad_(False).train()
        self.size, self.momentum, self.world = -(-size // world.size), momentum, world
        self.key: Tensor | None = None
        self.teacher_key: Tensor | None = None
        self.label: Tensor | None = None

    @torch.no_grad()
    def advance(self, model: Model, views: Tensor, teacher: Tensor | None, label: Tensor) -> None:
        """After a step: moves the momentum encoder towards ``model``, and takes in its embeddings of ``views``."""
        for own, new in zip(self.encoder.parameters(), model.parameters(), strict=True):
            own.lerp_(new, 1.0 - self.momentum)
        self.key = self._appended(self.key, self.encoder(views))
        self.label = self._appended(self.label, label)
        if teacher is not None:
            self.teacher_key = self._appended(self.teacher_key, teacher)

    def _appended(self, old: Tensor | None, new: Tensor) -> Tensor:
        return (new if old is None else torch.cat([old, new]))[-self.size :]

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors only, a list of each rank's."""
        kept = {"key": self.key, "teacher_key": self.teacher_key, "label": self.label}
        return {"encoder": self.encoder.state_dict()} | {
            name: self.world.gathered(value) for name, value in kept.items() if value is not None
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Each rank takes its own part back; other ranks than those before share the whole queue."""
        self.encoder.load_state_dict(state["encoder"])
        device = next(self.encoder.parameters()).device
        rank, ranks = self.world.rank, self.world.size
        kept = {
            name: (parts[rank] if len(parts) == ranks else self.world.share(torch.cat(parts))).to(device)
            for name, parts in state.items()
            if name != "encoder"
        }
        self.key, self.teacher_key, self.label = kept.get("key"), kept.get("teacher_key"), kept.get("label")
