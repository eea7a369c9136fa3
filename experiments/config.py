"""The configuration of one run: one frozen dataclass, from which the command line is derived, and which is stored with
the results. Its defaults are those of the stream "digits"; ``experiments.presets`` holds those of the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from cila_bound import Geometry
from cila_bound.files import write_atomic
from experiments.augment import AugmentationName
from experiments.evaluate import Costs
from experiments.methods import METHODS, MethodName
from experiments.models import ModelName

StreamName = Literal[
    "digits", "rotated-digits", "split-mnist", "rotated-mnist", "seq-cifar10", "seq-tiny-imagenet", "custom"
]
Schedule = Literal["full", "short"]
Scenario = Literal["class-incremental", "rotations", "task-column"]
LogTuples = Literal["none", "last", "all"]

_LEAST = {
    "seed": 0,
    "n_tasks": 1,
    "train_per_class": 0,
    "test_per_class": 0,
    "width": 0,
    "buffer_size": 0,
    "queue_size": 0,
    "epochs_first": 1,
    "epochs": 1,
    "batch_size": 2,
    "warmup_epochs": 0,
    "pretrain_epochs": 0,
    "probe_epochs": 1,
    "tuple_rounds": 1,
    "max_tuples": 1,
    "threads": 1,
}
_POSITIVE = (
    "learning_rate",
    "temperature",
    "student_temperature",
    "teacher_temperature",
    "kappa",
    "contrastive_scale",
    "probe_learning_rate",
)
_NOT_NEGATIVE = (
    "weight_decay",
    "warmup_from",
    "distill_weight",
    "der_alpha",
    "der_beta",
    "miss_cost",
    "alarm_cost",
)
_SHARES = ("momentum", "queue_momentum", "pretrain_fraction")


@dataclass(frozen=True)
class RunConfig:
    """One method on one task stream with one seed."""

    stream: Annotated[StreamName, tyro.conf.arg(help="task stream; sets the defaults of all other options")] = "digits"
    schedule: Schedule = "full"
    """"full": the published schedule, or for digits this project's; "short": fewer epochs and images."""
    method: Annotated[MethodName, tyro.conf.arg(help="what is trained")] = "cila-max"
    seed: int = 0
    """Seed of everything random: split, initial weights, batches, augmentation, buffer, tuples."""

    dataset: str = "digits"
    """digits, mnist, cifar10, tiny-imagenet, or the path of an .npz file or image folder (with --stream custom)."""
    scenario: Scenario = "class-incremental"
    """Classes in groups; all classes in every task, each task rotated; or tasks given by the dataset."""
    n_tasks: int = 5
    """Number of tasks: groups of classes, or rotations; with "task-column" the dataset decides."""
    class_order: Literal["ascending", "random"] = "ascending"
    """Order in which classes arrive; "random" depends on the seed."""
    train_per_class: int = 0
    """Training images of each class (and task of a task column) used, drawn at random; 0: all."""
    test_per_class: int = 0
    """The same of the official test images."""
    heldout_fraction: float = 0.3
    """Share of each class kept for the bounds; never trained on. Where the dataset has a test split, training images
    are left alone, and that split is divided in the proportion of the two fractions."""
    test_fraction: float = 0.3
    """Share of each class kept for the truth; neither trained on nor seen by the bounds."""

    label_noise: float = 0.0
    """Share of each task's training labels replaced by another class of the task; held-out and test labels stay."""
    imbalance: float = 1.0
    """In each task and split, class sizes fall geometrically in class order: the first is this many times the last."""

    model: ModelName = "small"
    width: int = 0
    """Width of the model; 0: its own default."""
    augmentation: AugmentationName = "small-affine"
    buffer_size: int = 200
    """Images of past tasks kept, for rehearsal and for the linear probe."""
    buffer: Literal["balanced", "reservoir"] = "balanced"
    """Spread evenly over the classes of each task, or a uniform sample of all images seen."""

    epochs_first: int = 40
    """Epochs on task 1."""
    epochs: int = 20
    """Epochs on each later task."""
    batch_size: int = 128
    """Images a step, before two views are made of each."""
    learning_rate: float = 0.01
    """Peak of SGD's cosine schedule, which restarts with each task and falls towards 0.001 of it."""
    warmup_epochs: int = 2
    warmup_from: float = 0.0
    """Learning rate from which the warm-up rises linearly to the peak."""
    momentum: float = 0.9
    weight_decay: float = 1e-4

    temperature: float = 0.5
    """Of the contrastive loss in training."""
    student_temperature: float = 0.2
    """Of the current model in the distillation loss in training."""
    teacher_temperature: float = 0.1
    """Of the previous model in the distillation loss in training."""
    positives: Literal["class", "view"] = "class"
    """SupCon, or SimCLR's InfoNCE, which sees no labels: positives are images of the class, or the other view."""
    queue_size: int = 0
    """Further keys of each batch: embeddings of a momentum encoder on earlier batches of the task (MoCo); 0: none."""
    queue_momentum: float = 0.99
    kappa: float = 2.0
    """Factor of CILA's adaptive distillation weight."""
    distill_weight: float = 1.0
    """Lambda of the methods with a constant one."""
    contrastive_scale: float = 1.0
    """Factor of the contrastive loss in training; Co2L's code uses temperature / 0.07."""
    der_alpha: float = 0.5
    """DER++: weight of the squared distance of buffered images' logits."""
    der_beta: float = 0.5
    """DER++: weight of buffered images' cross entropy."""

    pretrain_epochs: int = 0
    """Epochs of SimCLR's InfoNCE before task 1; 0: none."""
    pretrain_fraction: float = 0.0
    """Share of each class's training images set aside for it, and used for nothing else, with or without epochs."""
    pretrain_dataset: str = ""
    """Dataset to pre-train on instead, resized to the stream's images."""

    probe_epochs: int = 100
    """Epochs of the linear probe; its learning rate falls to a fifth after 60, 75 and 90% of them."""
    probe_learning_rate: float = 0.1
    defect_class: int | None = None
    """A class whose errors cost something: errors are then counted of the decisions with the least expected cost, and
    not of the likeliest class, as accuracies always are."""
    miss_cost: float = 1.0
    """What an item of that class costs that is not found."""
    alarm_cost: float = 1.0
    """What another item costs that is taken for one."""

    theory_temperatures: tuple[float, ...] = (0.5,)
    """Of teacher and student in the logged losses, which are the theorem's; the first is that of losses.jsonl."""
    n_negatives: tuple[int, ...] = (1,)
    """Negatives of each logged tuple; every combination with a temperature gets a log of its own."""
    tuple_rounds: int = 10
    """Times that a task's samples are shuffled and cut into disjoint tuples."""
    max_tuples: int = 1000
    """Disjoint tuples of a round, at most."""
    log_tuples: LogTuples = "last"
    """Values of single held-out tuples in losses.jsonl: of the last model, for the pointwise bound; of every model, for
    certificates by betting; or none."""

    confidence: float = 0.95
    """Of the certificates in the audit file, and of the gate."""
    max_bound_increase: float | None = None
    """Largest rise of the certified bound on the mean loss of the tasks before, in nats, with which an update is
    accepted; beyond it the old model is kept. None: every update is accepted."""
    gate: Literal["direct", "moment"] = "direct"
    """The bound of that gate: what measuring the update on held-out tuples certifies, or the moment step from the
    previous model, which rises with any drift, whether or not it does harm."""
    keep_checkpoints: bool = True
    """Whether the model after each task is kept, for a rollback."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the training passes; "auto": bfloat16 (autocast) on a GPU. Logs and accuracies are always float32."""
    compile: bool = False
    """Whether the encoder that is trained by a contrastive method is compiled by torch.compile."""
    sync_batchnorm: bool = False
    """Whether batch statistics are those of all ranks (under torchrun, on GPUs), and not of each rank's share."""
    threads: int = 1
    """CPU threads of one run; runs are reproducible for equal numbers of threads."""

    def __post_init__(self) -> None:
        """Raises ValueError that names the option and its legal values."""
        if not (self.theory_temperatures and self.n_negatives):
            raise ValueError("theory_temperatures and n_negatives need one value at least")
        for name in ("theory_temperatures", "n_negatives"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} holds a value twice: {getattr(self, name)}")
        try:
            self.geometries  # noqa: B018  (raises on an illegal temperature or n_negatives)
        except ValueError as error:
            raise ValueError(f"theory_temperatures and n_negatives: {error}") from None
        for name, legal in _CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} must be one of {', '.join(legal)}, got {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in _POSITIVE:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        for name in _SHARES:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(f"confidence must be in (0, 1), such as 0.95, got {self.confidence}")
        limit = self.max_bound_increase
        if limit is not None and not (math.isfinite(limit) and limit >= 0.0):
            raise ValueError(f"max_bound_increase must be finite and >= 0, or None, got {limit}")
        heldout, test = self.heldout_fraction, self.test_fraction
        if not (heldout > 0 and test > 0 and heldout + test < 1):
            raise ValueError(f"heldout_fraction and test_fraction must be > 0 with a sum < 1, got {heldout} and {test}")
        if not 0.0 <= self.label_noise <= 0.5:
            raise ValueError(f"label_noise must be in [0, 0.5], got {self.label_noise}")
        if not 1.0 <= self.imbalance < math.inf:
            raise ValueError(f"imbalance must be finite and at least 1, got {self.imbalance}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.pretrain_epochs and not (self.pretrain_fraction or self.pretrain_dataset):
            raise ValueError(
                f"pretrain_epochs is {self.pretrain_epochs}, but there is nothing to pre-train on: "
                "give pretrain_fraction or pretrain_dataset"
            )
        if self.pretrain_fraction and self.pretrain_dataset:
            raise ValueError("pretrain_fraction and pretrain_dataset are two sources of images: give one")
        if self.pretrain_dataset and Path(self.pretrain_dataset).resolve() == Path(self.dataset).resolve():
            raise ValueError(
                f"pretrain_dataset {self.pretrain_dataset} is the stream's own dataset, whose held-out and test images "
                "it may hold: give pretrain_fraction instead"
            )
        if METHODS[self.method].classifier and (self.queue_size or self.positives == "view" or self.pretrain_epochs):
            raise ValueError(
                f"{self.method} trains a classifier: queue_size, positives and pretrain_epochs are for contrastive "
                "methods"
            )

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        """One per log: every temperature with every number of negatives."""
        return tuple(Geometry(tau, k) for tau in self.theory_temperatures for k in self.n_negatives)

    @property
    def costs(self) -> Costs | None:
        """Of errors on the class of defects, if there is one."""
        return None if self.defect_class is None else Costs(self.defect_class, self.miss_cost, self.alarm_cost)

    @property
    def study(self) -> str:
        """Stream and schedule (and dataset, if it is the user's): what runs have in common that are compared.

        Raises ValueError for a custom stream without a dataset.
        """
        if self.stream == "custom" and not self.dataset:
            raise ValueError("stream custom needs --dataset: the path of an .npz file or of an image folder")
        own = f"-{Path(self.dataset).stem}" if self.stream == "custom" else ""
        return f"{self.stream}{own}{'-short' if self.schedule == 'short' else ''}"

    @property
    def variant(self) -> str:
        """The method, with every option of training that differs from the preset of stream and schedule."""
        from experiments.presets import preset

        default = preset(self.stream, self.schedule)
        unnamed = _NOT_NAMED | ({"dataset"} if self.stream == "custom" else set())  # which is in the study's name
        changed = [
            f"{field.name}={_short(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.name not in unnamed and getattr(self, field.name) != getattr(default, field.name)
        ]
        return " ".join([self.method, *changed])

    @property
    def name(self) -> str:
        """The run's directory below the output folder: different for different configurations of one study."""
        folder = self.variant.replace(" ", "-").replace("/", "_")
        if len(folder) > 150:
            folder = f"{folder[:140]}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"
        return f"{self.study}/{folder}-seed{self.seed}"

    def check_same(self, path: Path) -> None:
        """Raises ValueError that names the difference if ``path`` holds another configuration."""
        if path.exists():
            mine, theirs = self.as_json(), RunConfig().as_json() | read_json(path)  # made before there was an option
            for name in mine | theirs:
                if mine.get(name) != theirs.get(name):
                    raise ValueError(
                        f"{path.parent} holds a run with {name} = {theirs.get(name)!r}, not {mine.get(name)!r}: "
                        "choose another --out or remove it"
                    )

    def as_json(self) -> dict[str, Any]:
        """Options to plain values, as JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_json(options: dict[str, Any]) -> RunConfig:
        """Of what ``as_json`` gave. Raises TypeError for an option that there is not, ValueError for an illegal one."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        return RunConfig(**values)

    def save(self, path: Path) -> None:
        """Writes the configuration as JSON."""
        write_atomic(path, (json.dumps(self.as_json(), indent=2) + "\n").encode())


_CHOICES: dict[str, tuple[str, ...]] = {
    "stream": get_args(StreamName),
    "schedule": get_args(Schedule),
    "method": tuple(METHODS),
    "scenario": get_args(Scenario),
    "class_order": ("ascending", "random"),
    "model": get_args(ModelName),
    "augmentation": get_args(AugmentationName),
    "buffer": ("balanced", "reservoir"),
    "positives": ("class", "view"),
    "log_tuples": get_args(LogTuples),
    "gate": ("direct", "moment"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "float32", "bfloat16"),
}
_MEASURING = {"theory_temperatures", "n_negatives", "log_tuples", "defect_class", "miss_cost", "alarm_cost"}
_NOT_NAMED = _MEASURING | {
    "stream",
    "schedule",
    "method",
    "seed",
    "device",
    "precision",
    "compile",
    "threads",
    "keep_checkpoints",
}


def _short(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that names a damaged one."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or remove {path.parent} to train anew") from None
    return content
