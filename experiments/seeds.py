"""Every random number comes from (seed, purpose, task, epoch), so a resumed run repeats an uninterrupted one."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

# the position of each is part of its seeds: new ones go to the end
Purpose = Literal[
    "split",
    "classes",
    "pretraining",
    "weights",
    "batches",
    "epoch",
    "buffer",
    "tuples",
    "probe",
    "angles",
    "imbalance",
    "label-noise",
]


def derive(seed: int, purpose: Purpose, task: int = 0, epoch: int = 0) -> int:
    """A 62-bit seed; different for every combination of arguments, up to chance."""
    words = np.random.SeedSequence([seed, get_args(Purpose).index(purpose), task, epoch]).generate_state(2, np.uint32)
    return (int(words[0]) << 30) ^ int(words[1])


def numpy_rng(seed: int, purpose: Purpose, task: int = 0, epoch: int = 0) -> np.random.Generator:
    return np.random.default_rng(derive(seed, purpose, task, epoch))


def torch_generator(seed: int, purpose: Purpose, task: int = 0, epoch: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, purpose, task, epoch))
