"""The defaults of every stream and schedule.

"full" of the three image streams is the published protocol (Co2L, Cha et al. 2021, which CILA follows); "short" keeps
all but the numbers of epochs and images. docs/experiments.md says what was kept and what differs.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.config import RunConfig, Schedule, StreamName

_DIGITS = RunConfig()
_ROTATED_DIGITS = replace(_DIGITS, stream="rotated-digits", scenario="rotations")
_SPLIT_MNIST = replace(
    _DIGITS,
    stream="split-mnist",
    dataset="mnist",
    model="strided",
    augmentation="mnist",
    epochs_first=20,
    epochs=10,
    batch_size=256,
    learning_rate=0.05,
)
_ROTATED_MNIST = RunConfig(
    stream="rotated-mnist",
    dataset="mnist",
    scenario="rotations",
    n_tasks=20,
    model="mnist-cnn",
    augmentation="mnist",
    buffer="reservoir",
    epochs_first=100,
    epochs=20,
    batch_size=512,
    learning_rate=0.01,
    warmup_epochs=0,
    temperature=0.1,
    student_temperature=0.2,
    teacher_temperature=0.01,
    probe_learning_rate=1.0,
    der_alpha=1.0,
)
_SEQ_CIFAR10 = RunConfig(
    stream="seq-cifar10",
    dataset="cifar10",
    model="resnet18",
    augmentation="cifar10",
    epochs_first=500,
    epochs=100,
    batch_size=512,
    learning_rate=0.5,
    warmup_epochs=10,
    warmup_from=0.01,
    teacher_temperature=0.01,
    probe_learning_rate=1.0,
    der_alpha=0.1,
)
_SEQ_TINY_IMAGENET = replace(
    _SEQ_CIFAR10,
    stream="seq-tiny-imagenet",
    dataset="tiny-imagenet",
    n_tasks=10,
    augmentation="tiny-imagenet",
    epochs=50,
    learning_rate=0.1,
    student_temperature=0.1,
    teacher_temperature=0.1,
    probe_learning_rate=0.1,
)
_CUSTOM = RunConfig(
    stream="custom",
    dataset="",
    model="resnet18",
    width=16,
    augmentation="generic",
    learning_rate=0.05,
    epochs_first=100,
    epochs=50,
)

PRESETS: dict[tuple[StreamName, Schedule], RunConfig] = {
    (config.stream, config.schedule): config
    for config in (
        _DIGITS,
        replace(_DIGITS, schedule="short", epochs_first=20, epochs=10),
        _ROTATED_DIGITS,
        replace(_ROTATED_DIGITS, schedule="short", epochs_first=20, epochs=10),
        _SPLIT_MNIST,
        replace(_SPLIT_MNIST, schedule="short", train_per_class=1000, epochs_first=10, epochs=5, batch_size=128),
        _ROTATED_MNIST,
        replace(
            _ROTATED_MNIST,
            schedule="short",
            train_per_class=100,
            test_per_class=100,
            epochs_first=20,
            epochs=5,
            batch_size=128,
        ),
        _SEQ_CIFAR10,
        replace(_SEQ_CIFAR10, schedule="short", epochs_first=100, epochs=30, warmup_epochs=5),
        _SEQ_TINY_IMAGENET,
        replace(_SEQ_TINY_IMAGENET, schedule="short", epochs_first=100, epochs=20, warmup_epochs=5),
        _CUSTOM,
        replace(_CUSTOM, schedule="short", epochs_first=20, epochs=10),
    )
}


def preset(stream: StreamName, schedule: Schedule = "full") -> RunConfig:
    """The defaults of a stream. Raises ValueError that lists the names."""
    try:
        return PRESETS[stream, schedule]
    except KeyError:
        streams = ", ".join(dict.fromkeys(name for name, _ in PRESETS))
        raise ValueError(
            f"stream and schedule must be one of {streams}, each full or short, got {stream!r} and {schedule!r}"
        ) from None
