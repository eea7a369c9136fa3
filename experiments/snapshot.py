"""A model as it was after a task, and what it makes of the stream's images."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from experiments.models import Model, Outputs
from experiments.streams import SplitName, TaskStream

_BATCH = 1024


class Snapshot:
    """A frozen copy of ``model`` in eval mode. Its outputs are float32 on the CPU, without augmentation."""

    def __init__(
        self, model: Model, stream: TaskStream, normalise: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._stream, self._normalise, self._device = stream, normalise, device
        self._known: dict[tuple[int, SplitName], Outputs] = {}

    def split(self, task: int, name: SplitName) -> Outputs:
        """Of all images of a split of task number ``task`` (from 1); computed once."""
        if (task, name) not in self._known:
            self._known[task, name] = self.of(self._stream.tasks[task - 1].splits[name].images)
        return self._known[task, name]

    @torch.no_grad()
    def of(self, images: np.ndarray) -> Outputs:
        """Of images (n, channels, height, width) uint8, n >= 0."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self._of(images)

    def _of(self, images: np.ndarray) -> Outputs:
        batches = torch.from_numpy(np.ascontiguousarray(images)).split(_BATCH)
        parts = [self.model.outputs(self._normalise(batch.to(self._device))) for batch in batches]
        logits = [part.logits.float().cpu() for part in parts if part.logits is not None]
        return Outputs(
            torch.cat([part.representation.float().cpu() for part in parts]),
            torch.cat([part.embedding.cpu() for part in parts]),
            torch.cat(logits) if logits else None,
        )
