"""The configuration of one run: one frozen dataclass, from which the command line is derived, and which is stored with
the results.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cila_bound import Geometry
from cila_bound.files import write_atomic
from experiments.methods import METHODS, MethodName

_LEAST = {
    "seed": 0,
    "n_tasks": 1,
    "buffer_size": 0,
    "epochs_first": 1,
    "epochs": 1,
    "batch_size": 2,
    "warmup_epochs": 0,
    "tuple_rounds": 1,
    "threads": 1,
}
StreamName = Literal["digits", "rotated-digits"]


@dataclass(frozen=True)
class RunConfig:
    """One method on one task stream with one seed."""

    stream: Annotated[StreamName, tyro.conf.arg(help="task stream")] = "digits"
    method: Annotated[MethodName, tyro.conf.arg(help="what is trained")] = "cila-max"
    seed: int = 0
    """Seed of everything random: split, initial weights, batches, augmentation, buffer, tuples."""

    n_tasks: int = 5
    """Number of tasks; digits has 10 classes to share between them, rotated-digits one angle for each."""
    heldout_fraction: float = 0.3
    """Share of each class kept for the bounds; never trained on."""
    test_fraction: float = 0.3
    """Share of each class kept for the truth; neither trained on nor seen by the bounds."""
    buffer_size: int = 200
    """Images of past tasks kept, for rehearsal and for the linear probe."""

    epochs_first: int = 40
    """Epochs on task 1."""
    epochs: int = 20
    """Epochs on each later task."""
    batch_size: int = 128
    """Images a step, before two views are made of each."""
    learning_rate: float = 0.01
    """Peak of SGD's cosine schedule, which restarts with each task and ends at 0.001 of it."""
    warmup_epochs: int = 2
    momentum: float = 0.9
    weight_decay: float = 1e-4

    temperature: float = 0.5
    """Of the contrastive loss in training."""
    student_temperature: float = 0.2
    """Of the current model in the distillation loss in training."""
    teacher_temperature: float = 0.1
    """Of the previous model in the distillation loss in training."""
    kappa: float = 2.0
    """Factor of CILA's adaptive distillation weight."""
    contrastive_scale: float = 1.0
    """Factor of the contrastive loss in training; Co2L's code uses temperature / 0.07."""

    theory_temperature: float = 0.5
    """Of teacher and student in the logged losses, which are the theorem's."""
    n_negatives: int = 1
    """Negatives of each logged tuple."""
    tuple_rounds: int = 10
    """Times that a task's samples are shuffled and cut into disjoint tuples."""
    log_tuples: bool = True
    """Whether per-tuple values are logged for the pointwise bound."""
    threads: int = 1
    """CPU threads of one run; runs are reproducible for equal numbers of threads."""

    def __post_init__(self) -> None:
        """Raises ValueError that names the option and its legal values."""
        try:
            Geometry(self.theory_temperature, 1)
        except ValueError as error:
            raise ValueError(f"theory_{error}") from None
        Geometry(1.0, self.n_negatives)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in (
            "learning_rate",
            "temperature",
            "student_temperature",
            "teacher_temperature",
            "kappa",
            "contrastive_scale",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise ValueError(f"weight_decay must be finite and >= 0, got {self.weight_decay}")
        heldout, test = self.heldout_fraction, self.test_fraction
        if not (heldout > 0 and test > 0 and heldout + test < 1):
            raise ValueError(f"heldout_fraction and test_fraction must be > 0 with a sum < 1, got {heldout} and {test}")

    @property
    def name(self) -> str:
        """The run's directory below the output folder."""
        return f"{self.stream}/{self.method}-seed{self.seed}"

    def check_same(self, path: Path) -> None:
        """Raises ValueError that names the difference if ``path`` holds another configuration."""
        if path.exists():
            mine, theirs = dataclasses.asdict(self), read_json(path)
            for name in mine | theirs:
                if mine.get(name) != theirs.get(name):
                    raise ValueError(
                        f"{path.parent} holds a run with {name} = {theirs.get(name)!r}, not {mine.get(name)!r}: "
                        "choose another --out or remove it"
                    )

    def save(self, path: Path) -> None:
        """Writes the configuration as JSON."""
        write_atomic(path, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())


@dataclass(frozen=True)
class SweepConfig(RunConfig):
    """What all runs of a sweep share: without --method and --seed, which ``sweep`` takes several of."""

    method: tyro.conf.Suppress[MethodName] = "cila-max"
    seed: tyro.conf.Suppress[int] = 0


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that names a damaged one."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or remove {path.parent} to train anew") from None
    return content
