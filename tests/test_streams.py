"""Task streams, the tuples drawn from them, and the rehearsal buffer."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from cila_bound import Geometry
from experiments import streams
from experiments.buffer import Buffer
from experiments.config import RunConfig
from experiments.datasets import Dataset, ImageData, load
from experiments.presets import preset
from experiments.pretraining import pretrain_images
from experiments.seeds import Purpose, derive, numpy_rng
from experiments.streams import SplitName, TaskStream, build_stream, split_by_class
from experiments.stress import imbalanced, noisy_labels
from experiments.tuples import draw_tuples, tuple_losses
from tests.simulate import losses

ROOT = Path(__file__).parent.parent
DATA = ROOT / "no-data"  # digits need none
DIGITS = load("digits", DATA).train
TINY = RunConfig(n_tasks=5, buffer_size=40)
ROTATED = dataclasses.replace(TINY, stream="rotated-digits", scenario="rotations")


def test_splits_are_disjoint_and_complete() -> None:
    labels = DIGITS.labels
    splits = split_by_class(labels, 0.3, 0.2, np.random.default_rng(0))
    together = np.concatenate(list(splits.values()))
    assert sorted(together) == list(range(len(labels)))
    for name, share in (("heldout", 0.3), ("test", 0.2)):
        for label in range(10):
            assert np.mean(labels[splits[name]] == label) * len(splits[name]) == pytest.approx(
                share * np.sum(labels == label), abs=1
            )


def test_class_incremental_tasks_hold_their_classes_only() -> None:
    stream = build_stream(TINY, DATA)
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    for task in stream.tasks:
        for split in task.splits.values():
            assert set(split.labels.tolist()) == set(task.classes)


def test_rotations_keep_an_image_in_its_split() -> None:
    stream = build_stream(dataclasses.replace(ROTATED, n_tasks=3), DATA)
    first, second = (task.splits for task in stream.tasks[:2])
    for name in first:
        assert np.array_equal(first[name].labels, second[name].labels)
        assert first[name].images.shape == second[name].images.shape
        assert not np.array_equal(first[name].images, second[name].images)


def test_angles_depend_on_the_seed_alone() -> None:
    def angles(**change: Any) -> list[str]:
        return [task.detail for task in build_stream(dataclasses.replace(ROTATED, n_tasks=3, **change), DATA).tasks]

    assert angles() == angles(train_per_class=50)
    assert angles() != angles(seed=1)


def test_a_class_of_a_task_that_is_too_small_is_named(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (22, 8, 8), np.uint8)
    y, task = ["cat"] * 10 + ["dog"] * 10 + ["cat"] * 2, ["a"] * 20 + ["b"] * 2
    np.savez(tmp_path / "pets.npz", x=x, y=y, task=task)
    config = dataclasses.replace(preset("custom"), dataset=str(tmp_path / "pets.npz"), scenario="task-column")
    with pytest.raises(ValueError, match="class cat of task b has 2 samples"):
        build_stream(config, DATA)


def test_stream_depends_on_the_seed_alone() -> None:
    same = build_stream(dataclasses.replace(TINY, method="co2l", epochs=7), DATA)
    assert build_stream(TINY, DATA).fingerprint() == same.fingerprint()
    assert build_stream(dataclasses.replace(TINY, seed=1), DATA).fingerprint() != same.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tasks": 3}, "n_tasks must split 10 classes .* one of \\[1, 2, 5\\], got 3"),
        ({"n_tasks": 10}, "one of \\[1, 2, 5\\], got 10"),
        ({"pretrain_fraction": 0.995}, r"pretrain_fraction 0.995 leaves 0 of a class's \d+ training images"),
        ({"scenario": "task-column"}, "needs a task for each image, but digits has none"),
    ],
)
def test_streams_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_stream(dataclasses.replace(TINY, **change), DATA)


def test_a_class_too_small_to_split_is_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has 2 samples"):
        split_by_class(np.array([0, 0, 0, 1, 1]), 0.3, 0.3, np.random.default_rng(0))


def test_random_class_order_is_a_permutation_that_the_seed_decides() -> None:
    orders = [
        [
            label
            for task in build_stream(dataclasses.replace(TINY, class_order="random", seed=seed), DATA).tasks
            for label in task.classes
        ]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(10))
    assert orders[0] != list(range(10))


@pytest.mark.parametrize("n_negatives", [1, 2, 5])
@pytest.mark.parametrize("n_classes", [2, 10])
def test_tuples_are_what_they_say(n_negatives: int, n_classes: int) -> None:
    """Another sample of the anchor's class, K of other classes; disjoint within a round, anchor classes balanced."""
    labels = np.repeat(np.arange(n_classes), 30)
    tuples = draw_tuples(labels, n_negatives, 4, np.random.default_rng(0))
    classes = labels[tuples.index]
    assert (classes[:, 0] == classes[:, 1]).all()
    assert (tuples.index[:, 0] != tuples.index[:, 1]).all()
    assert (classes[:, 2:] != classes[:, :1]).all()
    for part in np.split(tuples.index, 4):
        assert len(part) == tuples.n_effective
        assert len(np.unique(part)) == part.size
        if len(part) >= n_classes:  # whole cycles: every block has one anchor of each class
            assert tuples.block == (2 if n_classes == 2 else None)
            assert (np.sort(labels[part[:, 0]].reshape(-1, n_classes)) == np.arange(n_classes)).all()
        else:
            assert tuples.block is None
    assert tuples.n_effective >= 0.5 * len(labels) / (n_negatives + 2) - n_classes


@pytest.mark.parametrize("labels", [[], [0, 1], [0, 0], [0, 0, 1]])
def test_too_few_samples_for_a_tuple_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="form no tuple of a positive pair and 2 negatives"):
        draw_tuples(np.array(labels, dtype=np.int64), 2, 1, np.random.default_rng(0))


def test_tuples_are_limited_and_single_samples_serve_as_negatives() -> None:
    labels = np.array([0] * 40 + [1] * 40 + [2])
    tuples = draw_tuples(labels, 1, 3, np.random.default_rng(0), limit=5)
    assert (tuples.n_effective, len(tuples.index), tuples.block) == (4, 12, None)
    assert set(labels[tuples.index[:, 0]].tolist()) == {0, 1}
    few = draw_tuples(np.array([0, 0, 1]), 1, 20, np.random.default_rng(0))
    assert few.n_effective == 1
    assert set(few.index[:, 2].tolist()) == {2}


def test_tuple_losses_against_their_definitions() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    tuples = draw_tuples(labels, 3, 2, rng)
    embeddings = [torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(40, 5))), dim=1) for _ in range(2)]
    result = tuple_losses(embeddings[0], embeddings[1], tuples, Geometry(0.2, 3))

    def logits(embedding: np.ndarray) -> np.ndarray:
        return np.array([[embedding[row[0]] @ embedding[j] / 0.2 for j in row[1:]] for row in tuples.index])

    expected = losses(*(logits(embedding.numpy()) for embedding in embeddings))
    for name, values in expected.items():
        assert getattr(result, name) == pytest.approx(values, rel=1e-9, abs=1e-12), name


def test_balanced_buffer_is_even_over_classes_and_a_shrinking_sample() -> None:
    stream = build_stream(TINY, DATA)
    buffer = Buffer(40)
    for task in range(1, 6):
        before = {past: list(kept) for past, kept in buffer.kept.items()}
        buffer.add(stream, task, np.random.default_rng(task))
        counts = np.concatenate([np.bincount(buffer.of_task(stream, past).labels) for past in range(1, task + 1)])
        counts = counts[counts > 0]
        assert len(counts) == 2 * task
        assert counts.sum() == 40 and counts.max() - counts.min() <= 1
        for past, kept in before.items():
            assert set(buffer.kept[past]) <= set(kept)
    copy = Buffer(40)
    copy.load_state(buffer.state())
    assert copy == buffer
    assert len(buffer.pairs()) == 40


def test_reservoir_keeps_every_image_seen_with_equal_probability() -> None:
    stream = build_stream(dataclasses.replace(ROTATED, n_tasks=3, train_per_class=12), DATA)
    size = len(stream.tasks[0].train.labels)
    counts = np.zeros((3, size))
    for seed in range(400):
        buffer = Buffer(20, "reservoir")
        for task in range(1, 4):
            buffer.add(stream, task, np.random.default_rng([seed, task]))
            assert len(buffer.pairs()) == len(set(buffer.pairs())) == 20
        for task, index in buffer.pairs():
            counts[task - 1, index] += 1
    expected = 400 * 20 / (3 * size)
    assert np.abs(counts.sum(1) / size - expected).max() < 4 * np.sqrt(expected / size)
    statistic = ((counts - expected) ** 2 / expected).sum() / (1 - 20 / (3 * size))  # chi-square, without replacement
    assert 0.5 * counts.size < statistic < 1.5 * counts.size


def test_an_empty_buffer_keeps_nothing() -> None:
    stream = build_stream(TINY, DATA)
    for policy in ("balanced", "reservoir"):
        buffer = Buffer(0, policy)
        for task in (1, 2):
            buffer.add(stream, task, np.random.default_rng(task))
        assert buffer.pairs() == []
        assert buffer.of_task(stream, 1).images.shape == (0, 1, 8, 8)


def official(monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """The digits as if the last third were an official test split."""
    data = load("digits", DATA)
    data = dataclasses.replace(
        data,
        train=Dataset(data.train.images[:1200], data.train.labels[:1200]),
        test=Dataset(data.train.images[1200:], data.train.labels[1200:]),
    )
    monkeypatch.setattr(streams, "load", lambda *_: data)
    return data


def test_fractions_divide_an_official_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training images are all trained on; held-out and test share the test images, class by class."""
    data = official(monkeypatch)
    assert data.test is not None
    stream = build_stream(dataclasses.replace(TINY, heldout_fraction=0.1, test_fraction=0.3), DATA)
    for task in stream.tasks:
        own = np.isin(data.train.labels, task.classes)
        assert np.array_equal(task.train.images, data.train.images[own])
        heldout, test = task.splits["heldout"], task.splits["test"]
        both = np.isin(data.test.labels, task.classes).sum()
        assert len(heldout.labels) + len(test.labels) == both
        assert len(heldout.labels) == pytest.approx(both / 4, abs=1)
        assert not {image.tobytes() for image in heldout.images} & {image.tobytes() for image in test.images}
    capped = build_stream(dataclasses.replace(TINY, train_per_class=30, test_per_class=20), DATA)
    for task in capped.tasks:
        assert np.bincount(task.train.labels)[list(task.classes)].tolist() == [30, 30]
        assert len(task.splits["heldout"].labels) + len(task.splits["test"].labels) == 40


def cells(path: Path, labels: list[str]) -> str:
    """An .npz of two tasks of 60 images with the given labels, repeated."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (120, 8, 8), dtype=np.uint8)
    np.savez(path, x=x, y=np.resize(labels, 120), task=np.repeat(["poly", "mono"], 60))
    return str(path)


def test_tasks_of_a_task_column(tmp_path: Path) -> None:
    path = cells(tmp_path / "cells.npz", ["ok", "crack"])
    config = dataclasses.replace(preset("custom"), dataset=path, scenario="task-column")
    assert config.study == "custom-cells"
    stream = build_stream(config, DATA)
    assert stream.kind == "domain-incremental"
    assert sorted(part.name for part in stream.tasks) == ["mono", "poly"]
    with np.load(path) as data:
        for part in stream.tasks:
            images = sorted(image.tobytes() for split in part.splits.values() for image in split.images)
            assert images == sorted(image.tobytes() for image in data["x"][data["task"] == part.name])


def test_a_task_of_one_class_is_refused(tmp_path: Path) -> None:
    path = cells(tmp_path / "cells.npz", ["ok"] * 60 + ["ok", "crack"] * 30)
    with pytest.raises(ValueError, match=r"'poly' has training images of the classes .* needs at least two classes"):
        build_stream(dataclasses.replace(preset("custom"), dataset=path, scenario="task-column"), DATA)


def test_images_that_are_not_square_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", x=np.arange(960, dtype=np.uint8).reshape(20, 6, 8), y=np.arange(20) % 2)
    with pytest.raises(ValueError, match=r"the images of .* are 6 x 8: cut or pad them"):
        build_stream(dataclasses.replace(preset("custom"), dataset=str(tmp_path / "wide.npz"), n_tasks=1), DATA)


def custom(path: Path, change: dict[str, Any] | None = None, **arrays: Any) -> TaskStream:
    """The stream of an .npz file of these arrays."""
    np.savez(path, **arrays)
    default = dataclasses.replace(preset("custom"), dataset=str(path), n_tasks=1)
    return build_stream(dataclasses.replace(default, **change or {}), DATA)


def test_statistics_of_a_custom_dataset_are_those_of_its_training_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    stream = custom(tmp_path / "a.npz", {"n_tasks": 2}, x=x, y=np.arange(60) % 4)
    train = np.concatenate([task.train.images for task in stream.tasks]) / 255
    assert len(train) == 28
    np.testing.assert_allclose(stream.mean, train.mean((0, 2, 3)))
    np.testing.assert_allclose(stream.std, train.std((0, 2, 3)))
    official = custom(tmp_path / "b.npz", x=x[:40], y=np.arange(40) % 2, x_test=x[40:], y_test=np.arange(20) % 2)
    np.testing.assert_allclose(official.mean, (x[:40] / 255).mean((0, 2, 3)))
    with pytest.raises(ValueError, match=r"a: channel 0 of the training images is 9 everywhere"):
        custom(tmp_path / "a.npz", x=np.full((60, 8, 8), 9, np.uint8), y=np.arange(60) % 2)


def test_features_are_quantised_by_the_training_split_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 5)), np.arange(90) % 2
    stream = custom(tmp_path / "a.npz", x=x, y=y)
    splits = stream.tasks[0].splits
    assert stream.shape == (1, 1, 5) and all(split.images.dtype == np.uint8 for split in splits.values())
    assert stream.mean[0] == pytest.approx(0.5, abs=0.01) and stream.std[0] == pytest.approx(12**-0.5, abs=0.01)
    order = np.sort(splits["train"].images[:, 0, 0], axis=0)
    assert (np.abs(order - np.linspace(3, 252, 34)[:, None]) <= 2).all()  # the training rows are spread evenly
    index = split_by_class(y, 0.3, 0.3, numpy_rng(0, "split"))
    x[np.concatenate([index["heldout"], index["test"]])] *= 1e6
    moved = custom(tmp_path / "a.npz", x=x, y=y)
    assert (moved.tasks[0].train.images == splits["train"].images).all() and moved.mean == stream.mean
    assert not (moved.tasks[0].splits["test"].images == splits["test"].images).all()
    with pytest.raises(ValueError, match="a has rows of features, which cannot be rotated"):
        custom(tmp_path / "a.npz", {"scenario": "rotations"}, x=x, y=y)


def images_of(stream: TaskStream, name: SplitName) -> list[bytes]:
    return [image.tobytes() for task in stream.tasks for image in task.splits[name].images]


@pytest.mark.parametrize("official_test", [False, True])
@pytest.mark.parametrize("kind", ["images", "features"])
def test_copies_of_training_images_are_in_no_other_split(official_test: bool, kind: str, tmp_path: Path) -> None:
    """Of every second image there are two copies, in another class and task where there are any."""
    rng = np.random.default_rng(0)
    x: np.ndarray = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8) if kind == "images" else rng.normal(size=(60, 7))
    arrays = {"x": np.concatenate([x, x[::2], x[::2]]), "y": np.arange(120) % 4}
    if official_test:
        arrays = {"x": x, "y": np.arange(60) % 4, "x_test": arrays["x"][45:], "y_test": arrays["y"][45:]}
    stream = custom(tmp_path / "a.npz", {"n_tasks": 2}, **arrays)
    train, heldout, test = (images_of(stream, name) for name in ("train", "heldout", "test"))
    assert not set(heldout) & set(train) and not set(test) & set(train) and not set(test) & set(heldout)
    total = len(arrays["x"]) + len(arrays.get("x_test", ()))
    assert stream.leaked == total - len(train) - len(heldout) - len(test) > 10
    assert len(set(train + heldout + test)) == 60
    again = custom(tmp_path / "a.npz", {"n_tasks": 2}, **arrays)
    assert again.fingerprint() == stream.fingerprint()


def test_leaks_are_found_before_images_are_rotated_and_digits_have_none(tmp_path: Path) -> None:
    assert build_stream(TINY, DATA).leaked == build_stream(ROTATED, DATA).leaked == 0
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    copies = {"x": np.concatenate([x, x]), "y": np.tile(np.arange(30) % 2, 2)}
    stream = custom(tmp_path / "a.npz", {"n_tasks": 3, "scenario": "rotations"}, **copies)
    assert stream.leaked > 5
    for task in stream.tasks:
        assert sum(len(split.labels) for split in task.splits.values()) == 60 - stream.leaked


def test_pretraining_images_count_as_training_images(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    copies = {"x": np.concatenate([x, x]), "y": np.tile(np.arange(40) % 2, 2)}
    stream = custom(tmp_path / "a.npz", {"pretrain_fraction": 0.6}, **copies)
    assert stream.pretrain is not None
    aside = {image.tobytes() for image in stream.pretrain.images}
    assert not aside & {*images_of(stream, "heldout"), *images_of(stream, "test")}


def test_another_datasets_copies_of_held_out_images_are_not_pretrained_on(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    y = np.arange(40) % 2
    np.savez(tmp_path / "same.npz", x=x, y=y)
    change = {"pretrain_dataset": str(tmp_path / "same.npz"), "pretrain_epochs": 1}
    stream = custom(tmp_path / "a.npz", change, x=x, y=y)
    config = dataclasses.replace(TINY, **change)
    held = {*images_of(stream, "heldout"), *images_of(stream, "test")}
    pretrained = [image.tobytes() for image in pretrain_images(config, stream, DATA)]
    assert sorted(pretrained) == sorted(image.tobytes() for image in x[:, None] if image.tobytes() not in held)
    assert pretrained


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_label_noise_is_within_the_task_and_in_training_labels_only(share: float) -> None:
    config = dataclasses.replace(TINY, n_tasks=2)
    clean = build_stream(config, DATA)
    noisy = build_stream(dataclasses.replace(config, label_noise=share), DATA)
    for task, before in zip(noisy.tasks, clean.tasks, strict=True):
        assert all((task.splits[name].labels == before.splits[name].labels).all() for name in ("heldout", "test"))
        assert all((task.splits[name].images == part.images).all() for name, part in before.splits.items())
        wrong = task.train.labels != before.train.labels
        assert wrong.sum() == round(share * len(wrong)) and set(task.train.labels.tolist()) == set(task.classes)
        old, new = before.train.labels[wrong], task.train.labels[wrong]
        pairs = np.array([np.sum((old == a) & (new == b)) for a in task.classes for b in task.classes if a != b])
        if share == 0.5:  # enough for each pair
            assert pairs.min() > 0 and pairs.std() < 2 * np.sqrt(pairs.mean())
    again, other, clean_other = (
        build_stream(dataclasses.replace(config, label_noise=noise, seed=seed), DATA)
        for noise, seed in ((share, 0), (share, 1), (0.0, 1))
    )
    assert again.fingerprint() == noisy.fingerprint()
    pairs_of_seeds = zip(other.tasks[0].train.labels, clean_other.tasks[0].train.labels, strict=True)
    wrong_in_other = np.array([a != b for a, b in pairs_of_seeds])
    assert (wrong_in_other != (noisy.tasks[0].train.labels != clean.tasks[0].train.labels)).any()
    first, second = (
        part.train.labels != before.train.labels for part, before in zip(noisy.tasks, clean.tasks, strict=True)
    )
    assert (first[:100] != second[:100]).any()


def test_label_noise_makes_labels_wrong_in_tasks_of_two_classes() -> None:
    labels = noisy_labels(np.array([4, 9] * 50), (9, 4), 0.5, np.random.default_rng(0))
    assert np.sum(labels != np.array([4, 9] * 50)) == 50 and set(labels.tolist()) == {4, 9}


def test_imbalance_makes_class_sizes_fall_geometrically_in_every_split() -> None:
    config = dataclasses.replace(TINY, n_tasks=2, class_order="random", imbalance=16.0)
    stream, whole = build_stream(config, DATA), build_stream(dataclasses.replace(config, imbalance=1.0), DATA)
    for task, before in zip(stream.tasks, whole.tasks, strict=True):
        for name, split in task.splits.items():
            sizes = np.array([np.sum(split.labels == label) for label in task.classes])
            full = np.array([np.sum(before.splits[name].labels == label) for label in task.classes])
            assert np.abs(sizes - sizes[0] / np.array([1, 2, 4, 8, 16])).max() < 1 and (sizes <= full).all()
            assert sizes[0] == full[0]
            original = {image.tobytes(): label for image, label in zip(*before.splits[name], strict=True)}
            assert all(original[image.tobytes()] == label for image, label in zip(*split, strict=True))
    assert build_stream(config, DATA).fingerprint() == stream.fingerprint()
    other = build_stream(dataclasses.replace(config, method="co2l", label_noise=0.2), DATA)
    assert images_of(other, "train") == images_of(stream, "train")


def test_imbalance_takes_as_many_as_the_smallest_class_allows() -> None:
    labels = np.repeat([0, 1, 2], [20, 50, 8])
    index = imbalanced(labels, (1, 0, 2), 4.0, np.random.default_rng(0))
    assert np.bincount(labels[index]).tolist() == [16, 32, 8] and (np.diff(index) > 0).all()
    assert not np.array_equal(index, imbalanced(labels, (1, 0, 2), 4.0, np.random.default_rng(1)))


def test_too_much_imbalance_names_task_and_split() -> None:
    message = r"the heldout data of task 1 \(0-1\): imbalance 40 leaves 1 of 5\d samples of a class: lower it"
    with pytest.raises(ValueError, match=message):
        build_stream(dataclasses.replace(TINY, imbalance=40.0), DATA)


SEEDS: dict[Purpose, int] = {
    "split": 3760501395151065059,
    "classes": 1982602371787776500,
    "pretraining": 593536150078615928,
    "weights": 2325557173004347257,
    "batches": 18279919665243319,
    "epoch": 3865190650862912169,
    "buffer": 1014686538598015491,
    "tuples": 3411758247507203375,
    "probe": 1174573574712696465,
    "angles": 4227811709105862802,
}


def test_new_purposes_leave_the_seeds_of_others_alone() -> None:
    assert {purpose: derive(7, purpose, 1, 2) for purpose in SEEDS} == SEEDS
    assert len({derive(7, purpose) for purpose in get_args(Purpose)}) == len(get_args(Purpose)) > len(SEEDS)


def test_images_for_pretraining_are_used_for_nothing_else() -> None:
    stream, whole = build_stream(dataclasses.replace(TINY, pretrain_fraction=0.5), DATA), build_stream(TINY, DATA)
    assert stream.pretrain is not None
    total = sum(len(task.train.labels) for task in whole.tasks)
    assert len(stream.pretrain.labels) == pytest.approx(total / 2, abs=10)
    rest: list[bytes] = [image.tobytes() for image in stream.pretrain.images]
    for task, before in zip(stream.tasks, whole.tasks, strict=True):
        assert np.array_equal(task.splits["heldout"].images, before.splits["heldout"].images)
        rest += [image.tobytes() for image in task.train.images]
    assert sorted(rest) == sorted(image.tobytes() for task in whole.tasks for image in task.train.images)
