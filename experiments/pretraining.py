"""The images of pre-training before task 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from experiments.config import RunConfig
from experiments.datasets import load
from experiments.leaks import digests
from experiments.streams import TaskStream


def pretrain_images(config: RunConfig, stream: TaskStream, data_root: Path) -> np.ndarray:
    """Set aside, or those of another dataset, resized, without those that the stream holds out; none without
    pre-training.
    """
    channels, height, width = stream.shape
    if not config.pretrain_epochs:
        return np.empty((0, *stream.shape), np.uint8)
    if stream.pretrain is not None:
        return stream.pretrain.images
    images = load(config.pretrain_dataset, data_root).train.images
    if images.shape[1] != channels:
        raise ValueError(
            f"pretrain_dataset {config.pretrain_dataset} has {images.shape[1]} channels, but the stream's images "
            f"have {channels}: choose a dataset with as many"
        )
    resized = [
        functional.interpolate(batch.float(), (height, width), mode="bilinear", antialias=True).round().byte()
        for batch in torch.from_numpy(images).split(1024)
    ]
    found = torch.cat(resized).numpy()
    kept = np.array([digest not in stream.held for digest in digests(found)], bool)
    if not kept.any():
        raise ValueError(
            f"all {len(found)} images of pretrain_dataset {config.pretrain_dataset} are held-out or test images of the "
            "stream: choose another dataset, or set images aside with pretrain_fraction"
        )
    return found[kept]
