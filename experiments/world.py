"""The processes that train one run together, as torchrun starts them; or this one alone.

Every rank reads the data, and draws the same order of images and the same buffer; of each batch it takes its share.
The first rank alone decides, logs and saves, and tells the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
_PATIENCE = timedelta(hours=12)  # while the first rank logs and measures; a dead rank is torchrun's business


@dataclass(frozen=True)
class World:
    """``rank`` of ``size``; without others the group is None."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch."""
        return batch[self.rank :: self.size]

    def shared(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over ranks."""
        return model if self.group is None else DistributedDataParallel(model, process_group=self.group)

    def synchronised(self, model: M, device: torch.device) -> M:
        """The model with batch statistics over all ranks. Raises ValueError on a CPU, where PyTorch has none."""
        if self.group is None:
            return model
        if device.type != "cuda":
            raise ValueError("sync_batchnorm needs GPUs: leave it out, statistics are then those of each rank's share")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, self.group)

    def said(self, decide: Callable[[], T]) -> T:
        """What the first rank's call returns; the others make none and wait. Its error is raised on all."""
        if self.group is None:
            return decide()
        told: list[object] = [None, None]
        if self.first:
            try:
                told[0] = decide()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self.group)
        if isinstance(told[1], Exception):
            raise told[1]
        return told[0]  # type: ignore[return-value]

    def gathered(self, values: Tensor) -> list[Tensor]:
        """Those of each rank; of several ranks on the CPU."""
        if self.group is None:
            return [values]
        parts: list[Tensor] = [values] * self.size
        dist.all_gather_object(parts, values.cpu(), group=self.group)
        return parts

    def adopt(self, model: nn.Module) -> None:
        """Gives every rank the first one's parameters and buffers."""
        if self.group is not None:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0, group=self.group)


ALONE = World()


def launched() -> bool:
    """Whether torchrun started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[World]:
    """This process's place among those that torchrun started; alone without it. On GPUs each rank takes its own.
    Within another ``joined`` the same again.
    """
    if not launched():
        yield ALONE
        return
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        dist.destroy_process_group()
