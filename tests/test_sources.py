"""Datasets that users bring, in every format, made ready for a stream."""

import csv
import dataclasses
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cila_bound import read_log
from cila_bound.report import Report
from experiments import train
from experiments.datasets import load
from experiments.presets import preset
from experiments.sources import Prepared, prepare
from experiments.streams import TaskStream, build_stream

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (48, 8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (48, 8, 8, 3), dtype=np.uint8)
Y = np.arange(48) % 4
SITE = np.repeat(["wet", "dry"], 24)
FEATURES = RNG.normal(size=(48, 5))


def npz(tmp_path: Path, **arrays: Any) -> Path:
    """x and y unless they are given; None leaves one out."""
    path = tmp_path / "cells.npz"
    np.savez(path, **{name: value for name, value in {"x": X, "y": Y, **arrays}.items() if value is not None})
    return path


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_images(root: Path, images: np.ndarray, folders: list[str]) -> Path:
    for number, (image, folder) in enumerate(zip(images, folders, strict=True)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / folder / f"{number:03}.png")
    return root


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(str(path)) + message):
        prepare(path, **options)


def stream_of(prepared: Prepared, path: Path) -> TaskStream:
    prepared.save(path)
    config = dataclasses.replace(
        preset("custom"), dataset=str(path), scenario=prepared.scenario, n_tasks=prepared.n_tasks
    )
    return build_stream(config, Path("nowhere"))


# --- .npz files


def test_npz_with_a_threshold_and_tasks_in_the_wanted_order(tmp_path: Path) -> None:
    crack = np.array([0.0, 1 / 3, 2 / 3, 1.0])[Y]
    prepared = prepare(
        npz(tmp_path, y=None, crack=crack, site=SITE), label="crack", threshold=0.5, tasks="site=wet,dry"
    )
    assert prepared.class_names == ("<0.5", ">=0.5") and prepared.task_names == ("wet", "dry")
    assert (prepared.train.images == X[:, None]).all() and prepared.train.labels.tolist() == (Y // 2).tolist()
    assert prepared.train.tasks is not None and prepared.train.tasks.tolist() == np.repeat([0, 1], 24).tolist()
    assert (prepared.scenario, prepared.n_tasks, prepared.test, prepared.tabular) == ("task-column", 2, None, False)
    assert prepared.counts.tolist() == [[12, 12], [12, 12]] and prepared.test_counts is None
    assert prepared.remarks == (
        "48 images of 8 x 8 pixels, grey; labels in 'crack', tasks in 'site'",
        "'crack' is cut in two at 0.5",
    )
    at_the_threshold = prepare(npz(tmp_path, y=Y, site=SITE), threshold=1, tasks="site")
    assert at_the_threshold.class_names == ("<1", ">=1") and at_the_threshold.counts.sum(0).tolist() == [12, 36]


def test_what_was_prepared_is_what_the_stream_has(tmp_path: Path) -> None:
    arrays = {"x_test": X[::-1] ^ 1, "y_test": Y[::-1], "site_test": SITE[::-1]}
    prepared = prepare(npz(tmp_path, site=SITE, **arrays), tasks="site=wet,dry")
    stream = stream_of(prepared, tmp_path / "ready.npz")
    assert [task.name for task in stream.tasks] == ["wet", "dry"] and stream.kind == "domain-incremental"
    assert prepared.test is not None and prepared.test_counts is not None
    assert prepared.test_counts.tolist() == prepared.counts.tolist() == [[6] * 4] * 2
    data = load(str(tmp_path / "ready.npz"), Path("nowhere"))
    assert data.test is not None and data.train_task is not None and data.test_task is not None
    assert data.class_names == prepared.class_names and data.task_names == prepared.task_names
    for part, images, labels, tasks in (
        (prepared.train, *data.train, data.train_task),
        (prepared.test, *data.test, data.test_task),
    ):
        assert part.tasks is not None and (part.images == images).all()
        assert (part.labels == labels).all() and (part.tasks == tasks).all()


@pytest.mark.parametrize(
    ("y", "names", "labels"),
    [
        (Y.astype(float), ("0", "1", "2", "3"), Y),
        (Y - 2, ("-2", "-1", "0", "1"), Y),
        (Y * 5, ("0", "5", "10", "15"), Y),
        ((Y * 5).astype(str), ("0", "5", "10", "15"), Y),
        (np.array(["oak", "elm", "ash", "yew"])[Y], ("ash", "elm", "oak", "yew"), np.array([2, 1, 0, 3])[Y]),
        (Y[:, None].astype(np.uint8), ("0", "1", "2", "3"), Y),
        (Y >= 2, ("0", "1"), Y // 2),
        (np.array(["1", "2.0", "3", "x"])[Y], ("1", "2.0", "3", "x"), Y),
    ],
)
def test_labels_are_numbered_in_order(
    y: np.ndarray, names: tuple[str, ...], labels: np.ndarray, tmp_path: Path
) -> None:
    prepared = prepare(npz(tmp_path, y=y, site=SITE), tasks="site")
    assert prepared.class_names == names and prepared.train.labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (X.astype(np.int64), X[:, None]),
        (X.astype(np.float32), X[:, None]),
        (X.astype(np.uint16), X[:, None]),
        (X / 255, X[:, None]),
        ((X > 99).astype(np.float32), 255 * (X > 99)[:, None]),
        (X.reshape(48, 64), X[:, None]),
        (X.reshape(48, 64).astype(float), X[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2).reshape(48, 192), COLOUR.transpose(0, 3, 1, 2)),
        (FEATURES, FEATURES[:, None, None]),
        (X.reshape(48, 64)[:, :49], X.reshape(48, 1, 1, 64)[..., :49]),  # 7 x 7 pixels are too few for an image
        (X.reshape(48, 64).astype(int) * 1000, X.reshape(48, 1, 1, 64).astype(int) * 1000),
        (X.reshape(48, 64) / 256, X.reshape(48, 1, 1, 64) / 256),
    ],
)
def test_images_and_features_in_any_type(x: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    prepared = prepare(npz(tmp_path, x=x))
    assert (prepared.train.images == expected).all() and prepared.tabular == (expected.shape[2] == 1)
    assert prepared.task_names == ("0-1", "2-3")


def test_names_that_others_give_their_arrays(tmp_path: Path) -> None:
    arrays = {"x_train": X, "y_train": Y, "x_test": 255 - X, "y_test": Y, "x": None, "y": None}
    prepared = prepare(npz(tmp_path, **arrays))
    assert prepared.test is not None and (prepared.test.images == 255 - X[:, None]).all()
    for name in ("photos", "photos_train"):
        path = npz(tmp_path, x=FEATURES, photos_train=X, photos_test=255 - X, y_test=Y)
        prepared = prepare(path, images=name)
        assert (prepared.train.images == X[:, None]).all() and prepared.test is not None
    assert prepared.remarks[1] == "arrays that are not used: x"


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("label", "class"), {}, "label"),
        (("y", "label"), {}, "y"),
        (("kind", "class"), {}, "class"),
        (("kind", "y"), {"label": "kind"}, "kind"),
    ],
)
def test_the_column_of_labels(names: tuple[str, ...], options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    columns = {name: Y + number for number, name in enumerate(names)}
    prepared = prepare(npz(tmp_path, **{"y": None, **columns}), **options)
    assert prepared.class_names[0] == str(names.index(expected))


# --- tasks


def test_tasks_by_default(tmp_path: Path) -> None:
    assert prepare(npz(tmp_path, task=SITE)).task_names == ("dry", "wet")
    assert prepare(npz(tmp_path, task=SITE), tasks="classes:2").task_names == ("0-1", "2-3")
    many = prepare(npz(tmp_path, x=RNG.integers(0, 256, (154, 8, 8), dtype=np.uint8), y=np.arange(154) % 11))
    assert many.task_names == ("0-1-2", "3-4", "5-6", "7-8", "9-10")
    assert many.counts.tolist()[0] == [14] * 3 + [0] * 8
    refused(npz(tmp_path, y=Y % 3), " has 3 classes, too few for tasks of their own: give tasks")


def test_groups_of_many_classes_are_named_by_first_and_last(tmp_path: Path) -> None:
    path = npz(tmp_path, x=RNG.integers(0, 256, (54, 8, 8), dtype=np.uint8), y=np.arange(54) % 9)
    assert prepare(path, tasks="classes:2").task_names == ("1: 0 ... 4", "2: 5 ... 8")
    refused(path, " has 9 classes, but classes:5 needs two for each task: give at most classes:4", tasks="classes:5")


def test_the_order_of_arrival_is_cut_into_equal_parts(tmp_path: Path) -> None:
    path = npz(tmp_path, y=Y % 2, x_test=255 - X, y_test=Y % 2)
    prepared = prepare(path, tasks="order:4")
    assert prepared.task_names == ("part 1", "part 2", "part 3", "part 4") and prepared.test is None
    assert prepared.train.tasks is not None and prepared.train.tasks.tolist() == np.repeat(range(4), 12).tolist()
    assert "the 48 samples of the test split, which have no place in the order, are left out" in prepared.remarks
    assert stream_of(prepared, tmp_path / "ready.npz").kind == "domain-incremental"


def test_rotations(tmp_path: Path) -> None:
    prepared = prepare(npz(tmp_path, task=SITE), tasks="rotations:3")
    assert (prepared.scenario, prepared.n_tasks, prepared.task_names) == ("rotations", 3, ())
    assert prepared.train.tasks is None and prepared.counts.tolist() == [[12] * 4] * 3
    stream = stream_of(prepared, tmp_path / "ready.npz")
    assert [task.name for task in stream.tasks] == ["rotation 1", "rotation 2", "rotation 3"]
    refused(npz(tmp_path, x=FEATURES), r" holds features, which cannot be rotated \(rotations:3\)", tasks="rotations:3")


def test_values_that_are_not_wanted_are_left_out(tmp_path: Path) -> None:
    site = np.repeat(["c", "b", "a"], 16)
    prepared = prepare(npz(tmp_path, y=Y % 2, site=site), tasks="site=c,a")
    assert (
        prepared.task_names == ("c", "a") and prepared.remarks[1] == "16 samples of other values of 'site' are left out"
    )
    assert (prepared.train.images == X[np.r_[:16, 32:48], None]).all()
    years = prepare(npz(tmp_path, y=Y % 2, site=np.repeat([2021.0, 2010.0, 999.0], 16)), tasks="site")
    assert years.task_names == ("999", "2010", "2021")
    refused(npz(tmp_path, site=site), ": column 'site' has the values a, b, c, not 'd': choose", tasks="site=a,d")
    refused(npz(tmp_path, site=["a"] * 48), ": column 'site' has the values a, one task; at least two", tasks="site")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("classes:1", "give a whole number of at least 2 tasks, as in classes:3"),
        ("order:two", "as in order:3"),
        ("rotations:-3", "as in rotations:3"),
        ("rotations:99999999999", "as in rotations:3"),
        ("", "give a column"),
        ("=a,b", "give a column"),
        ("site=a", "at least two different values"),
        ("site=a,a", "at least two different values"),
        ("site=a,,b", "at least two different values"),
    ],
)
def test_rules_that_make_no_tasks(tasks: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"tasks '{re.escape(tasks)}': .*{message}"):
        prepare(npz(tmp_path), tasks=tasks)


# --- copies and constants


@pytest.mark.parametrize("x", [X, FEATURES])
def test_copies_are_dropped_and_contradictions_altogether(x: np.ndarray, tmp_path: Path) -> None:
    """Images 0 and 1 again as they are, 2 three times with other labels, and 3 and 0 in the test split."""
    more, labels = np.concatenate([x, x[[0, 1, 1, 2, 2, 2]]]), np.concatenate([Y, [0, 1, 1, 0, 2, 1]])
    official = x[::-1].copy()
    official[:-4] += 1
    prepared = prepare(npz(tmp_path, x=more, y=labels, x_test=official, y_test=Y[::-1]))
    assert prepared.remarks[1:] == (
        "5 samples are left out, as they equal others with another label (1 different samples)",
        "6 exact copies are left out, the first of each is kept",
    )
    assert prepared.test is not None and len(prepared.test.labels) == 44
    with pytest.raises(ValueError, match=r"48 samples are left out, as they equal others .* so that none is left"):
        prepare(npz(tmp_path, x=np.tile(x[:2], (24, *[1] * (x.ndim - 1))), y=np.arange(48) // 2 % 4))
    kept = prepared.train.images.reshape(47, -1)
    assert (kept == np.delete(x, 2, 0).reshape(48 - 1, -1)).all()


def test_plus_and_minus_zero_are_one_feature(tmp_path: Path) -> None:
    x = FEATURES.copy()
    x[:, 0] = np.repeat([0.0, 1.0], 24)
    twin = x[:4].copy()
    twin[:, 0] = -0.0
    prepared = prepare(npz(tmp_path, x=np.concatenate([x, twin]), y=np.concatenate([Y, Y[:4]])))
    assert "4 exact copies are left out, the first of each is kept" in prepared.remarks


def test_constant_features_are_dropped_by_name(tmp_path: Path) -> None:
    rows = [[label, *values, 7, "x"] for label, values in zip(Y, FEATURES.tolist(), strict=True)]
    path = write_csv(tmp_path / "a.csv", ["y", "a", "b", "c", "d", "e", "speed", "note"], rows)
    prepared = prepare(path)
    assert prepared.train.images.shape == (48, 1, 1, 5)
    assert "1 constant features are left out: speed" in prepared.remarks
    assert "columns of text are not used as features: note" in prepared.remarks
    x = FEATURES.copy()
    x[:, [0, 3]] = 2.5
    official = npz(tmp_path, x=x, x_test=FEATURES + 1, y_test=Y)
    prepared = prepare(official)
    assert "2 constant features are left out: 0, 3" in prepared.remarks and prepared.test is not None
    assert (prepared.test.images[:, 0, 0] == FEATURES[:, [1, 2, 4]] + 1).all()
    refused(npz(tmp_path, x=np.ones((48, 5))), ": all 5 features are constant: give features that differ")


# --- image sizes


def test_images_are_resized_with_antialiasing(tmp_path: Path) -> None:
    stripes = np.zeros((48, 30, 60), np.uint8)
    stripes[:, :, ::2] = 200
    stripes[np.arange(48), :, np.arange(48)] = 50  # all different
    path = npz(tmp_path, x=stripes)
    refused(path, " has images of 60 x 30 pixels, but they must be square .* give an image_size")
    prepared = prepare(path, image_size=8)
    assert (
        prepared.train.images.shape == (48, 1, 8, 8) and np.abs(prepared.train.images[:, 0, :, 6:] - 100.0).max() < 30
    )
    assert "all images are resized to 8 x 8 pixels, whatever their shape" in prepared.remarks
    colour = prepare(npz(tmp_path, x=COLOUR), image_size=12).train.images
    with_pillow = Image.fromarray(COLOUR[5]).resize((12, 12), Image.Resampling.BILINEAR)
    assert (colour[5] == np.asarray(with_pillow).transpose(2, 0, 1)).all()
    assert (prepare(npz(tmp_path), image_size=8).train.images == X[:, None]).all()


def test_images_of_different_sizes_need_an_image_size(tmp_path: Path) -> None:
    root = write_images(tmp_path / "trees", X, [f"c{label}" for label in Y])
    Image.fromarray(np.resize(X[0], (9, 11))).save(root / "c1/other.png")
    with pytest.raises(
        ValueError, match=r"000.png is 8 x 8 and .*other.png is 11 x 9: resize them, or give an image_si"
    ):
        prepare(root)
    assert prepare(root, image_size=10).train.images.shape == (49, 1, 10, 10)


@pytest.mark.parametrize("size", [3, 1025])
def test_odd_options_are_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"image_size must be in 4..1024 pixels, got {size}"):
        prepare(npz(tmp_path), image_size=size)
    with pytest.raises(ValueError, match="threshold must be a finite number, got nan"):
        prepare(npz(tmp_path), threshold=float("nan"))
    refused(npz(tmp_path, x=FEATURES), r" holds features, which image_size \(8\) cannot resize", image_size=8)


# --- folders


def test_folders_of_tasks_and_of_classes(tmp_path: Path) -> None:
    root = write_images(tmp_path / "trees", X, [f"{site}/{label}" for site, label in zip(SITE, Y, strict=True)])
    prepared = prepare(root, tasks="task=wet,dry")
    assert prepared.task_names == ("wet", "dry") and prepared.class_names == ("0", "1", "2", "3")
    order = np.lexsort((np.arange(48), Y, SITE))
    assert (prepared.train.images == X[order, None]).all() and prepared.train.labels.tolist() == Y[order].tolist()
    assert prepare(root).task_names == ("dry", "wet")
    assert prepare(root, tasks="classes:2").task_names == ("0-1", "2-3")
    assert prepare(root / "wet").task_names == ("0-1", "2-3")
    with pytest.raises(ValueError, match=r"wet has no column 'task', given as tasks: choose one of 'class'"):
        prepare(root / "wet", tasks="task")


def test_a_folder_with_a_test_split(tmp_path: Path) -> None:
    write_images(tmp_path / "train", X[:40], [f"c{label}" for label in Y[:40]])
    write_images(tmp_path / "test", 255 - X, [f"c{label}" for label in Y])
    prepared = prepare(tmp_path)
    assert prepared.test_counts is not None and prepared.test_counts.sum(0).tolist() == [12] * 4
    assert prepared.counts.sum(0).tolist() == [10] * 4


# --- .csv files


def test_csv_lists_of_image_files(tmp_path: Path) -> None:
    write_images(tmp_path / "a b", COLOUR, [""] * 48)
    rows = [[n, f"a b/{n:03}.png", ["oak", "ash"][n % 2], SITE[n]] for n in range(48)]
    path = write_csv(tmp_path / "trees.csv", ["", "file", "class", "site"], rows)
    prepared = prepare(path, tasks="site")
    assert (prepared.train.images == COLOUR.transpose(0, 3, 1, 2)).all()
    assert prepared.class_names == ("ash", "oak") and prepared.counts.tolist() == [[12, 12], [12, 12]]
    assert prepared.remarks[1] == "trees.csv lists 48 image files"
    twice = write_csv(tmp_path / "two.csv", ["a", "b", "y"], [[row[1], row[1], n % 4] for n, row in enumerate(rows)])
    refused(twice, r" has image files in \['a', 'b'\]: choose one as images")
    assert prepare(twice, images="b").train.images.shape == (48, 3, 8, 8)
    refused(twice, r" has no column 'c', given as images: choose one of \['a', 'b', 'y'\]", images="c")


@pytest.mark.parametrize("channels", [1, 3])
def test_csv_of_pixels(channels: int, tmp_path: Path) -> None:
    x = X[:, None] if channels == 1 else COLOUR.transpose(0, 3, 1, 2)
    d = 64 * channels
    rows = [[label, *values] for label, values in zip(Y, x.reshape(48, d).tolist(), strict=True)]
    prepared = prepare(write_csv(tmp_path / "a.csv", ["label", *map(str, range(d))], rows))
    assert prepared.train.images.dtype == np.uint8 and (prepared.train.images == x).all()
    assert prepared.train.labels.tolist() == Y.tolist()
    rows[-1][-1] = 256
    assert prepare(write_csv(tmp_path / "a.csv", ["label", *map(str, range(d))], rows)).tabular


def test_csv_of_features_longer_than_a_block(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2500, 3))
    x[:1500] = rng.integers(0, 256, (1500, 3))  # the first block would fit into bytes
    text = "\ufeffy, a,b ,c,task\r\n" + "".join(
        f"{n % 4},{a!r},{b!r}, {c!r} ,{n % 2}\r\n\r\n" for n, (a, b, c) in enumerate(x.tolist())
    )
    (tmp_path / "a.csv").write_text(text, newline="")
    prepared = prepare(tmp_path / "a.csv", tasks="classes:2")
    assert (prepared.train.images[:, 0, 0] == x).all() and prepared.tabular
    assert prepared.remarks[0] == "2,500 rows of 3 features; labels in 'y'"


def test_csv_columns_that_are_no_features(tmp_path: Path) -> None:
    rows = [[n, Y[n], SITE[n], 2000 + n, f'say "{n}", twice', *FEATURES[n]] for n in range(48)]
    path = write_csv(tmp_path / "a.csv", ["", "y", "site", "task", "note", *"abcde"], rows)
    prepared = prepare(path, tasks="site=wet,dry")
    assert (prepared.train.images[:, 0, 0] == FEATURES).all() and prepared.task_names == ("wet", "dry")
    assert "a column without a name, which may count the rows, is not used as a feature" in prepared.remarks


# --- Hugging Face datasets


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def hugging_face(images: np.ndarray = COLOUR, **columns: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    types = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["yew", "elm", "ash", "oak"]),
        "site": datasets.Value("string"),
    }
    values = {"image": [Image.fromarray(image) for image in images], "label": Y, "site": SITE, **columns}
    values = {name: list(value)[: len(images)] for name, value in values.items() if value is not None}
    return datasets.Dataset.from_dict(
        values, features=datasets.Features({name: kind for name, kind in types.items() if name in values})
    )


def saved(folder: Path) -> Path:
    hugging_face().save_to_disk(folder, num_shards=3)
    return folder


def parquet(folder: Path) -> Path:
    folder.mkdir()
    hugging_face(COLOUR[:30]).to_parquet(folder / "train-00000-of-00002.parquet")
    hugging_face(COLOUR[30:], label=Y[30:], site=SITE[30:]).to_parquet(folder / "train-00001-of-00002.parquet")
    return folder


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("write", [saved, parquet])
def test_hugging_face_datasets(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "trees")
    files = sorted(tmp_path.rglob("*"))
    prepared = prepare(folder, tasks="site=wet,dry")
    assert (prepared.train.images == COLOUR.transpose(0, 3, 1, 2)).all()
    assert prepared.class_names == ("ash", "elm", "oak", "yew")
    assert prepared.train.labels.tolist() == np.array([3, 1, 0, 2])[Y].tolist()
    assert prepared.task_names == ("wet", "dry") and prepared.test is None
    assert sorted(tmp_path.rglob("*")) == files
    assert prepare(folder, image_size=6, images="image").train.images.shape == (48, 3, 6, 6)


@pytest.mark.parametrize("test_name", ["test", "validation"])
def test_hugging_face_splits(test_name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": hugging_face(X), test_name: hugging_face(255 - X), "extra": hugging_face(X[:4])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for name, part in parts.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        if name != "extra":
            part.to_parquet(tmp_path / f"files/{name}.parquet")
    for folder in (tmp_path / "saved", tmp_path / "files"):
        prepared = prepare(folder)
        assert prepared.test is not None and (prepared.test.images == 255 - X[:, None]).all()
        assert ("split 'extra' is not used" in prepared.remarks) == (folder.name == "saved")
    datasets.DatasetDict({"a": parts["train"], "b": parts["train"]}).save_to_disk(tmp_path / "none")
    refused(tmp_path / "none", " has the splits a, b, but none called train")


def test_hugging_face_columns_of_labels(tmp_path: Path) -> None:
    """The only classes that are declared, plain numbers, and names with a gap."""
    datasets = pytest.importorskip("datasets")
    dataset = hugging_face().rename_column("label", "kind")
    dataset.save_to_disk(tmp_path / "a")
    assert prepare(tmp_path / "a").class_names == ("ash", "elm", "oak", "yew")
    plain = dataset.cast_column("kind", datasets.Value("float32"))
    plain.save_to_disk(tmp_path / "b")
    refused(tmp_path / "b", ": which column holds the labels. Give label, one of 'image', 'kind', 'site'")
    assert prepare(tmp_path / "b", label="kind").class_names == ("0", "1", "2", "3")
    assert prepare(tmp_path / "b", label="kind", threshold=2.0, tasks="site").class_names == ("<2", ">=2")
    hugging_face(site=[None, *SITE[1:]]).save_to_disk(tmp_path / "c")
    assert prepare(tmp_path / "c").n_tasks == 2
    refused(tmp_path / "c", ": column 'site' is empty in 1 rows, the first of them row 1", tasks="site")
    hugging_face(label=[-1, *Y[1:]]).save_to_disk(tmp_path / "d")
    refused(tmp_path / "d", ": column 'label' is -1 in row 1, which is none of its 4 classes")
    dataset.cast_column("kind", datasets.Value("timestamp[s]")).save_to_disk(tmp_path / "e")
    refused(tmp_path / "e", r": column 'kind' has the type timestamp\[s\]: choose", label="kind")
    dataset.add_column("label", [list(range(3))] * 48).save_to_disk(tmp_path / "f")
    refused(tmp_path / "f", ": column 'label' has the type list")


# --- end to end


def test_features_from_a_csv_file_to_bounds_that_hold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6))
    y = np.arange(240) % 4
    x = centres[y] + 0.3 * rng.normal(size=(240, 6))
    rows = [[f"kind{label}", *values] for label, values in zip(y, x.tolist(), strict=True)]
    prepared = prepare(write_csv(tmp_path / "a.csv", ["class", *"abcdef"], rows))
    prepared.save(tmp_path / "a.npz")
    config = dataclasses.replace(
        preset("custom"),
        method="co2l",
        dataset=str(tmp_path / "a.npz"),
        scenario=prepared.scenario,
        n_tasks=prepared.n_tasks,
        model="mlp",
        width=32,
        augmentation="features",
        epochs_first=20,
        epochs=10,
        batch_size=32,
        tuple_rounds=2,
        probe_epochs=20,
    )
    metrics = train.run(config, tmp_path / "run", show_progress=False)
    log = read_log(tmp_path / "run/losses.jsonl")
    assert Report.of(log).violations == [] and log.header.tasks == ("kind0-kind1", "kind2-kind3")
    assert metrics["accuracy"]["task_il"]["average_accuracy"] > 0.9
