"""Datasets, read from small files in the layouts of the real ones, and fetched from a server on this machine."""

import gzip
import hashlib
import io
import os
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import fetch as fetching
from experiments import limits, published_files
from experiments.datasets import ImageData, load, locate, quantised, statistics
from experiments.fetch import SOURCES, Source, fetch

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])
FEATURES = np.array([[0.5, -2.0, 1e300], [1.5, 3.0, 0.0], [0.5, 7.0, -1.0]] * 2)


def refused(dataset: str | Path, data_root: Path, *parts: str | Path) -> None:
    """Loading raises a ValueError that contains every part."""
    with pytest.raises(ValueError, match=r"(?s:.*)".join(re.escape(str(part)) for part in parts)):
        load(str(dataset), data_root)


def own(path: Path) -> ImageData:
    return load(str(path), Path("nowhere"))


# --- digits


def test_digits_are_those_of_scikit_learn_on_the_scale_of_bytes() -> None:
    from sklearn.datasets import load_digits

    data, source = load("digits", Path("nowhere")), load_digits()
    assert data.train.images.shape == (1797, 1, 8, 8) and data.train.images.dtype == np.uint8
    assert np.abs(data.train.images[:, 0] * (16 / 255) - source.images).max() <= 0.5 * 16 / 255
    assert data.train.images.min() == 0 and data.train.images.max() == 255
    assert (data.train.labels == source.target).all() and data.train.labels.dtype == np.int64
    assert data.test is None and data.class_names == tuple("0123456789")
    pixels = data.train.images / 255
    np.testing.assert_allclose((data.mean, data.std), ([pixels.mean()], [pixels.std()]))


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    refused("cifar100", tmp_path, "digits, mnist, cifar10, tiny-imagenet", "x and y", "ROOT/<class>", "'cifar100'")


@pytest.mark.parametrize("name", ["photos.npz", "some/photos"])
def test_a_path_to_nothing_is_answered_with_the_layouts(name: str, tmp_path: Path) -> None:
    refused(tmp_path / name, tmp_path, "no such file or folder", name, "x and y", "ROOT/<class>")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tiny-imagenet"])
def test_a_missing_dataset_says_where_it_was_looked_for_and_how_to_get_it(name: str, tmp_path: Path) -> None:
    root = tmp_path / "a b"
    places = {"mnist": "MNIST/raw", "cifar10": "cifar10/cifar-10-batches-bin", "tiny-imagenet": "tiny-imagenet-200"}
    refused(name, root, root / places[name], f"python -m experiments fetch {name} --data-root '{root}'")


# --- MNIST


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


MNIST = {
    "train-images-idx3-ubyte": idx(GREY),
    "train-labels-idx1-ubyte": idx(np.array([3, 9, 0, 1, 3, 7])),
    "t10k-images-idx3-ubyte": idx(GREY[:2, ::-1]),
    "t10k-labels-idx1-ubyte": idx(np.array([9, 1])),
}


def write_mnist(folder: Path, compressed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in MNIST.items():
        (folder / (f"{name}.gz" if compressed else name)).write_bytes(
            gzip.compress(content, 1) if compressed else content
        )
    return folder


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("place", ["MNIST/raw", "mnist", "MNIST", "."])
def test_mnist_is_read_from_every_place(place: str, compressed: bool, tmp_path: Path) -> None:
    write_mnist(tmp_path / place, compressed)
    data = load("mnist", tmp_path)
    assert data.test is not None
    assert (data.train.images == GREY[:, None]).all() and data.train.labels.tolist() == [3, 9, 0, 1, 3, 7]
    assert (data.test.images == GREY[:2, None, ::-1]).all() and data.test.labels.tolist() == [9, 1]
    assert data.train.labels.dtype == np.int64 and data.train.images.flags.writeable
    assert (data.mean, data.std, data.class_names) == ((0.1307,), (0.3081,), tuple("0123456789"))
    assert data.train_task is None and data.task_names == ()


def test_the_compressed_file_which_fetch_replaces_is_preferred(tmp_path: Path) -> None:
    (write_mnist(tmp_path) / "train-images-idx3-ubyte").write_bytes(b"damaged")
    assert len(load("mnist", tmp_path).train.images) == 6


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            MNIST["train-images-idx3-ubyte"][:-1],
            "135 bytes (uncompressed); its header, of shape [6, 5, 4], expects 136",
        ),
        (MNIST["train-images-idx3-ubyte"] + b"0", "137 bytes"),
        (idx(GREY[:0]), "16 bytes"),
        (MNIST["train-labels-idx1-ubyte"], "does not begin as an idx file of 3 axes"),
        (b"", "does not begin as an idx file of 3 axes"),
        (None, "is missing"),
    ],
)
def test_a_damaged_idx_file_is_named(content: bytes | None, complaint: str, tmp_path: Path) -> None:
    folder = write_mnist(tmp_path)
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.unlink() if content is None else path.write_bytes(gzip.compress(content))
    refused("mnist", tmp_path, folder / "t10k-images-idx3-ubyte", complaint, "python -m experiments fetch mnist")


def test_a_truncated_gz_file_is_named_with_its_size(tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:50])
    refused("mnist", tmp_path, path, "50 bytes, is truncated or damaged", "fetch mnist")
    path.write_bytes(MNIST["train-images-idx3-ubyte"])
    refused("mnist", tmp_path, path, "136 bytes, is truncated or damaged", "fetch mnist")


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 1, 2, 3, 4, 10]])
def test_labels_that_are_not_those_of_the_images_are_refused(labels: list[int], tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.array(labels))))
    refused("mnist", tmp_path, f"6 images but {len(labels)} labels, the largest {labels[-1]}", "fetch mnist")


# --- CIFAR-10


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six batches of three records; pixel p of record r in batch b is (7 b + 5 r + p) mod 256, its label (b + r)."""
    monkeypatch.setattr(published_files, "CIFAR_RECORDS", 3)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for b, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        records = [bytes([b + r]) + bytes((7 * b + 5 * r + p) % 256 for p in range(3072)) for r in range(3)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    return folder


@pytest.mark.parametrize("place", ["cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "."])
def test_cifar_is_read_from_every_place(place: str, cifar: Path) -> None:
    target = cifar.parent / "root" / place
    target.parent.mkdir(parents=True, exist_ok=True)
    cifar.rename(target)
    data = load("cifar10", cifar.parent / "root")
    assert data.train.images.shape == (15, 3, 32, 32) and data.test is not None
    assert data.train.labels.tolist() == [b + r for b in range(5) for r in range(3)]
    assert data.test.labels.tolist() == [5, 6, 7]
    for b, r, channel, row, column in [(0, 0, 0, 0, 0), (4, 2, 1, 3, 9), (2, 1, 2, 31, 30)]:
        assert (
            data.train.images[3 * b + r, channel, row, column]
            == (7 * b + 5 * r + 1024 * channel + 32 * row + column) % 256
        )
    assert data.test.images[2, 0, 0, 1] == 46
    assert data.class_names[0] == "airplane" and data.class_names[9] == "truck"
    assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def test_cifar_takes_class_names_from_its_meta_file(cifar: Path) -> None:
    (cifar / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert load("cifar10", cifar).class_names == tuple("abcdefghij")
    (cifar / "batches.meta.txt").write_text("a\nb\n")
    refused("cifar10", cifar, cifar / "batches.meta.txt", "2 class names instead of 10", "fetch cifar10")


def test_a_damaged_cifar_batch_is_named(cifar: Path) -> None:
    path = cifar / "data_batch_4.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-3073])
    refused("cifar10", cifar, path, "6,146 bytes instead of 9,219", "fetch cifar10 --data-root")
    path.write_bytes(b"\x0a" + content[1:])
    refused("cifar10", cifar, path, "a label 10", "fetch cifar10")
    path.unlink()
    refused("cifar10", cifar, path, "is missing", "fetch cifar10")


# --- Tiny ImageNet


def picture(file: Path | io.BytesIO, seed: int, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> None:
    """A smooth random image of that width and height, in the format of the suffix or as JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    image = small.resize(size, Image.Resampling.BILINEAR).convert(mode)
    image.save(file, format=None if isinstance(file, Path) else "JPEG")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three classes of two training images and one test image, one of them grey."""
    folder = tmp_path / "tiny-imagenet-200"
    ids = ["n03", "n01", "n02"]
    for number, wnid in enumerate(ids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
        for k in range(2):
            mode = "L" if (number, k) == (0, 0) else "RGB"
            picture(folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", 2 * number + k, mode=mode)
    (folder / "val/images").mkdir(parents=True)
    for k in range(3):
        picture(folder / f"val/images/val_{k}.JPEG", 10 + k)
    (folder / "wnids.txt").write_text("\n".join(ids) + "\n")
    rows = [f"val_{k}.JPEG\t{wnid}\t0\t1\t2\t3\n" for k, wnid in enumerate(["n02", "n03", "n01"])]
    (folder / "val/val_annotations.txt").write_text("".join(rows))
    return folder


def test_tiny_imagenet_is_read_in_the_order_of_its_sorted_ids(tiny: Path) -> None:
    data = load("tiny-imagenet", tiny.parent)
    assert data.class_names == ("n01", "n02", "n03") and data.test is not None
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test.labels.tolist() == [1, 2, 0]
    assert data.train.labels.dtype == np.int64 and data.train.images.shape == (6, 3, 6, 8)
    with Image.open(tiny / "train/n02/images/n02_1.JPEG") as image:
        assert (data.train.images[3] == np.asarray(image).transpose(2, 0, 1)).all()
    with Image.open(tiny / "train/n03/images/n03_0.JPEG") as image:
        assert image.mode == "L" and (data.train.images[4] == np.asarray(image)).all()
    with Image.open(tiny / "val/images/val_2.JPEG") as image:
        assert (data.test.images[2] == np.asarray(image).transpose(2, 0, 1)).all()
    assert (data.mean, data.std) == ((0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821))


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_files, "decode", lambda *_, **__: pytest.fail("decoded again"))


def test_tiny_imagenet_is_decoded_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = load("tiny-imagenet", tiny.parent)
    assert sorted(path.name for path in tiny.parent.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.npz"]
    forbid_decoding(monkeypatch)
    monkeypatch.chdir(tiny)
    for root in (tiny.parent, tiny, Path()):
        again = load("tiny-imagenet", root)
        assert (again.train.images == first.train.images).all() and (again.train.labels == first.train.labels).all()


def test_a_stale_cache_is_made_again(tiny: Path) -> None:
    before = load("tiny-imagenet", tiny.parent).train.images
    file = tiny / "train/n01/images/n01_0.JPEG"
    picture(file, 99)
    after = load("tiny-imagenet", tiny.parent).train.images
    assert (after[0] != before[0]).any() and (after[1:] == before[1:]).all()
    with np.load(tiny.with_name("tiny-imagenet-200.npz"), allow_pickle=False) as cache:
        assert (cache["images"][:6] == after).all()


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda _: b"", None])
def test_a_damaged_cache_is_made_again(
    damage: Callable[[bytes], bytes] | None, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load("tiny-imagenet", tiny.parent).train.images
    cache = tiny.with_name("tiny-imagenet-200.npz")
    if damage is None:
        np.savez(cache, images=before)
    else:
        cache.write_bytes(damage(cache.read_bytes()))
    assert (load("tiny-imagenet", tiny.parent).train.images == before).all()
    forbid_decoding(monkeypatch)
    assert (load("tiny-imagenet", tiny.parent).train.images == before).all()


def test_a_cache_that_cannot_be_written_is_done_without(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: io.BufferedWriter, **_: np.ndarray) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    assert len(load("tiny-imagenet", tiny.parent).train.images) == 6
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny-imagenet-200"]


def test_an_all_grey_tiny_imagenet_is_still_rgb(tiny: Path) -> None:
    for file in tiny.rglob("*.JPEG"):
        picture(file, 0, mode="L")
    assert load("tiny-imagenet", tiny.parent).train.images.shape == (6, 3, 6, 8)


def no_training_images(folder: Path) -> None:
    for file in (folder / "train").rglob("*.JPEG"):
        file.unlink()


def unknown_class(folder: Path) -> None:
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn77\n")


def cut_annotation(folder: Path) -> None:
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn01\nval_1.J")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "train/n02/images/n02_1.JPEG").unlink(), "3 classes of 1 to 2 training images"),
        (lambda folder: (folder / "val/val_annotations.txt").unlink(), "val_annotations.txt"),
        (lambda folder: (folder / "val/val_annotations.txt").write_text(""), "0 test images"),
        (lambda folder: (folder / "val/images/val_1.JPEG").unlink(), "val_1.JPEG"),
        (lambda folder: (folder / "train/n02/images").rename(folder / "elsewhere"), "train/n02/images"),
        (lambda folder: (folder / "train/n02/images/n02_1.JPEG").write_bytes(b"\xff\xd8"), "n02_1.JPEG cannot be"),
        (lambda folder: (folder / "wnids.txt").write_text(""), "'n02' is not in list"),
        (no_training_images, "3 classes of 0 to 0 training images"),
        (unknown_class, "'n77' is not in list"),
        (cut_annotation, "list index out of range"),
    ],
)
def test_an_incomplete_tiny_imagenet_says_what_lacks(
    damage: Callable[[Path], object], complaint: str, tiny: Path
) -> None:
    damage(tiny)
    refused("tiny-imagenet", tiny.parent, str(tiny), complaint, "python -m experiments fetch tiny-imagenet")


# --- .npz files


def save(tmp_path: Path, **arrays: np.ndarray) -> Path:
    path = tmp_path / "photos.npz"
    np.savez(path, **{"x": GREY, "y": Y, **arrays})
    return path


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (GREY, GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
        (GREY / 255, GREY[:, None]),
        ((GREY / 255).astype(np.float16), GREY[:, None]),
        (np.where(GREY > 99, 0.0999, 0.7), np.where(GREY > 99, 25, 178)[:, None]),
    ],
)
def test_npz_layouts(x: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    data = own(save(tmp_path, x=x))
    assert data.train.images.dtype == np.uint8 and data.train.images.flags.c_contiguous
    np.testing.assert_array_equal(data.train.images, expected)
    assert data.name == "photos" and data.test is None and data.train_task is None and data.task_names == ()
    assert data.mean is None and data.std is None


def test_statistics_are_over_all_images_channel_by_channel() -> None:
    images = np.random.default_rng(1).integers(0, 256, (2500, 3, 2, 2), dtype=np.uint8)
    mean, std = statistics(images, "")
    np.testing.assert_allclose(mean, (images / 255).mean((0, 2, 3)))
    np.testing.assert_allclose(std, (images / 255).std((0, 2, 3)))
    images[:, 1] = 17
    with pytest.raises(ValueError, match=r"trees: channel 1 of the training images is 17 everywhere"):
        statistics(images, "trees")


@pytest.mark.parametrize(
    ("y", "names", "labels"),
    [
        (["oak", "ash", "oak", "elm", "ash", "ash"], ("ash", "elm", "oak"), [2, 0, 2, 1, 0, 0]),
        ([10, -2, 10, 3, -2, -2], ("-2", "3", "10"), [2, 0, 2, 1, 0, 0]),
        (np.array([7, 7, 7, 200, 200, 9], np.uint8), ("7", "9", "200"), [0, 0, 0, 2, 2, 1]),
    ],
)
def test_npz_labels_are_numbered_in_order_and_keep_their_names(
    y: list[int], names: tuple[str, ...], labels: list[int], tmp_path: Path
) -> None:
    data = own(save(tmp_path, y=np.array(y)))
    assert data.class_names == names and data.train.labels.tolist() == labels and data.train.labels.dtype == np.int64


def test_npz_test_split_and_tasks_are_numbered_as_the_training_images_are(tmp_path: Path) -> None:
    tasks = np.array(["poly", "mono", "mono", "poly", "poly", "thin"])
    path = save(
        tmp_path,
        y=Y * 10,
        task=tasks,
        x_test=COLOUR[:2, :, :, 0],
        y_test=np.array([20, 0]),
        task_test=np.array(["thin", "mono"]),
    )
    data = own(path)
    assert data.test is not None and data.train_task is not None and data.test_task is not None
    assert (data.test.images == COLOUR[:2, None, :, :, 0]).all() and data.test.labels.tolist() == [2, 0]
    assert data.task_names == ("mono", "poly", "thin")
    assert data.train_task.tolist() == [1, 0, 0, 1, 1, 2] and data.test_task.tolist() == [2, 0]
    assert data.train_task.dtype == data.test_task.dtype == data.test.labels.dtype == np.int64


def test_npz_tasks_need_no_test_split(tmp_path: Path) -> None:
    data = own(save(tmp_path, task=np.array([2021, 2020, 2021, 2020, 2021, 2020])))
    assert data.train_task is not None and data.train_task.tolist() == [1, 0, 1, 0, 1, 0]
    assert data.task_names == ("2020", "2021") and data.test_task is None


def holed(value: float) -> np.ndarray:
    x = GREY / 255
    x[3, 2, 1] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"x": GREY[0]}, ("'x' has shape (5, 4)", "(n, H, W, C)")),
        ({"x": GREY[:0], "y": Y[:0]}, ("'x' has shape (0, 5, 4)", "at least one image")),
        ({"x": np.zeros((6, 2, 4, 5), np.uint8)}, ("'x' of shape (6, 2, 4, 5)", "neither 1 nor 3 channels")),
        ({"x": np.zeros((6, 3, 4, 3), np.uint8)}, ("'x' of shape (6, 3, 4, 3) is ambiguous", "pad")),
        ({"x": GREY.astype(int)}, ("'x' has dtype int64", "uint8")),
        ({"x": np.full((6, 5, 4), "a")}, ("'x' has dtype <U1", "uint8")),
        ({"x": holed(np.nan)}, ("'x' has values that are NaN or infinite",)),
        ({"x": holed(np.inf)}, ("'x' has values that are NaN or infinite",)),
        ({"x": holed(1.25)}, ("'x' has values from 0", "to 1.25", "rescale")),
        ({"x": holed(-0.5)}, ("'x' has values from -0.5 to", "rescale")),
        ({"x": GREY * 1.0}, ("'x' has values from", "as uint8")),
        ({"x": GREY[0].reshape(2, 10), "y": Y[:2]}, ("'x' has shape (2, 10) and dtype uint8", "(n, d) in floating")),
        ({"x": np.ones((6, 0))}, ("'x' has shape (6, 0)",)),
        ({"x": np.array([[1.0, 2], [np.nan, 1], [0, np.inf]]), "y": Y[:3]}, ("2 values", "row 1, column 0", "fill")),
        ({"x": FEATURES, "x_test": GREY, "y_test": Y}, ("'x_test' are (1, 5, 4)", "'x' (1, 1, 3)")),
        ({"class_names": np.array(["a", "b"])}, ("class_names holds 2 names", "numbers 0, 1, 2", "number them from 0")),
        ({"class_names": np.array(["a", "b", "b"])}, ("'class_names' has dtype <U1", "different texts")),
        ({"class_names": np.arange(3)}, ("'class_names' has dtype int64",)),
        ({"class_names": np.array([["a"], ["b"], ["c"]])}, ("shape (3, 1)",)),
        ({"y": Y + 1, "class_names": np.array(["a", "b", "c"])}, ("the class numbers 1, 2, 3",)),
        ({"task": Y % 2, "task_names": np.array(["a"])}, ("task_names holds 1 names", "task numbers 0, 1")),
        ({"y": Y[:5]}, ("'y' has shape (5,) but 'x' has 6 images",)),
        ({"y": Y[:, None]}, ("'y' has shape (6, 1) but 'x' has 6 images",)),
        ({"y": Y / 2}, ("'y' has dtype float64", "astype(int)")),
        ({"y": Y == 1}, ("'y' has dtype bool", "astype(int)")),
        ({"y": Y.astype(object)}, ("'y' cannot be read", "no objects")),
        ({"x": GREY.astype(object)}, ("'x' cannot be read", "no objects")),
        ({"task": Y[:4]}, ("'task' has shape (4,) but 'x' has 6 images",)),
        ({"task": Y / 2}, ("'task' has dtype float64",)),
        ({"x_test": GREY}, ("lacks the array 'y_test' beside 'x', 'x_test', 'y'",)),
        ({"y_test": Y}, ("lacks the array 'x_test'",)),
        ({"x_test": GREY, "y_test": Y, "task": Y}, ("lacks the array 'task_test'",)),
        ({"x_test": GREY, "y_test": Y, "task_test": Y}, ("lacks the array 'task'",)),
        ({"x_test": GREY, "y_test": Y[:5]}, ("'y_test' has shape (5,) but 'x_test' has 6 images",)),
        ({"x_test": GREY[:, :3], "y_test": Y}, ("'x_test' are (1, 3, 4)", "'x' (1, 5, 4)")),
        ({"x_test": COLOUR, "y_test": Y}, ("'x_test' are (3, 5, 4)", "'x' (1, 5, 4)")),
        ({"x_test": holed(np.nan), "y_test": Y}, ("'x_test' has values that are NaN",)),
        ({"x_test": GREY, "y_test": Y + 1}, ("class 3 of the test images", "0, 1, 2")),
        ({"x_test": GREY, "y_test": Y.astype(str)}, ("one of 'y' and 'y_test' is text",)),
        ({"x_test": GREY, "y_test": Y, "task": Y, "task_test": Y + 5}, ("task 5 of the test images", "0, 1, 2")),
        ({"x_test": GREY, "y_test": Y, "task": Y, "task_test": Y.astype(str)}, ("one of 'task' and 'task_test'",)),
    ],
)
def test_npz_errors_name_file_array_and_value(
    arrays: dict[str, np.ndarray], parts: tuple[str, ...], tmp_path: Path
) -> None:
    path = save(tmp_path, **arrays)
    refused(path, tmp_path, path, *parts)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_features_stay_as_they_are_until_they_are_split(dtype: type, tmp_path: Path) -> None:
    x = np.where(FEATURES > 99, 9.0, FEATURES).astype(dtype)
    data = own(save(tmp_path, x=x, x_test=x[:3], y_test=Y[:3]))
    assert data.test is not None and data.train.images.dtype == np.float64
    assert (data.train.images == x[:, None, None]).all() and (data.test.images == x[:3, None, None]).all()


def test_npz_names_of_numbered_classes_and_tasks(tmp_path: Path) -> None:
    names, titles = np.array(["oak", "elm", "ash"]), np.array(["wet", "dry"])
    arrays = {"x_test": GREY[:1], "y_test": Y[1:2], "task_test": Y[1:2] % 2, "task": Y % 2}
    data = own(save(tmp_path, class_names=names, task_names=titles, **arrays))
    assert data.class_names == ("oak", "elm", "ash") and data.task_names == ("wet", "dry")
    assert data.train.labels.tolist() == Y.tolist() and data.train_task is not None
    assert data.train_task.tolist() == (Y % 2).tolist()
    assert data.test is not None and data.test.labels.tolist() == [1]


def test_npz_without_x_or_y_lists_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "photos.npz"
    np.savez(path, images=GREY, labels=Y)
    refused(path, tmp_path, path, "none of the arrays x, y", "only 'images', 'labels'")
    np.savez(path, x=GREY)
    refused(path, tmp_path, path, "lacks the array 'y' beside 'x'")


def test_a_damaged_npz_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path)
    content = path.read_bytes()
    for damaged in (content[:-30], b"", b"text"):
        path.write_bytes(damaged)
        refused(path, tmp_path, f"{path} is no .npz file, or a truncated one")
    flipped = bytearray(content)
    flipped[200] ^= 0xFF
    path.write_bytes(flipped)
    refused(path, tmp_path, f"{path}: array 'x' cannot be read", "write the file again")
    np.save(path.with_suffix(".npy"), GREY)
    refused(path.with_suffix(".npy"), tmp_path, "photos.npy is no .npz file")


# --- quantised features


def test_features_become_their_quantiles_in_the_training_rows() -> None:
    rng = np.random.default_rng(0)
    train = np.stack([rng.exponential(size=4096), rng.integers(0, 2, 4096), np.full(4096, 7.0)], 1)[:, None, None]
    levels = quantised(train, train)
    assert levels.dtype == np.uint8 and levels.shape == train.shape
    ranks = train[:, 0, 0, 0].argsort().argsort()
    assert np.abs(levels[:, 0, 0, 0] - ranks / 16).max() <= 1
    zeros = np.mean(train[:, 0, 0, 1] == 0)
    expected = np.where(train[:, 0, 0, 1] == 0, 128 * zeros, 128 * (1 + zeros))
    assert np.abs(levels[:, 0, 0, 1] - expected).max() <= 1
    other = np.array([[-1.0, -5.0, 6.0], [1e300, 0.5, 7.0], [train[:, 0, 0, 0].max(), 2.0, 8.0]])[:, None, None]
    middle = round(256 * zeros)
    assert (
        np.abs(quantised(train, other)[:, 0, 0] - np.array([[0, 0, 0], [255, middle, 127], [255, 255, 255]])).max() <= 1
    )
    assert (
        quantised(train[:3], train[:3])[:, 0, 0, 0] == np.array([42, 127, 212])[train[:3, 0, 0, 0].argsort().argsort()]
    ).all()


# --- folders of images


def write_folder(
    root: Path, suffix: str = ".png", mode: str = "RGB", classes: tuple[str, ...] = ("oak", "ash")
) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(2):
            picture(root / name / f"{k}{suffix}", 2 * number + k, mode=mode)
    return root


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".bmp", ".webp", ".tif", ".ppm"])
def test_a_folder_of_class_folders(suffix: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "trees", suffix)
    (root / "readme.txt").write_text("trees")
    (root / "oak/notes.txt").write_text("oaks")
    (root / "oak/._0.png").write_bytes(b"resource fork")
    (root / ".cache").mkdir()
    data = own(root)
    assert data.name == "trees" and data.class_names == ("ash", "oak") and data.test is None
    assert data.train.labels.tolist() == [0, 0, 1, 1] and data.train.images.shape == (4, 3, 6, 8)
    with Image.open(root / f"oak/0{suffix}") as image:
        assert (data.train.images[2] == np.asarray(image).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_a_folder_with_a_test_split(test_name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", classes=("ash", "oak", "elm"))
    write_folder(tmp_path / test_name, classes=("oak",))
    data = own(tmp_path)
    assert data.class_names == ("ash", "elm", "oak") and data.test is not None
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test.labels.tolist() == [2, 2]
    with Image.open(tmp_path / test_name / "oak/1.png") as image:
        assert (data.test.images[1] == np.asarray(image).transpose(2, 0, 1)).all()
    write_folder(tmp_path / test_name, classes=("yew",))
    refused(tmp_path, tmp_path, str(tmp_path), "class 'yew' of the test images", "ash, elm, oak")


def test_a_folder_of_task_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "wet", classes=("ash", "oak"))
    write_folder(tmp_path / "dry", classes=("oak", "elm"))
    data = own(tmp_path)
    assert data.task_names == ("dry", "wet") and data.class_names == ("ash", "elm", "oak")
    assert data.train_task is not None and data.train_task.tolist() == [0] * 4 + [1] * 4
    assert data.train.labels.tolist() == [1, 1, 2, 2, 0, 0, 2, 2]
    with Image.open(tmp_path / "wet/oak/1.png") as image:
        assert (data.train.images[7] == np.asarray(image).transpose(2, 0, 1)).all()
    write_folder(tmp_path / "cold")
    picture(tmp_path / "cold/loose.png", 0)
    refused(tmp_path, tmp_path, f"{tmp_path / 'dry'} has folders, but {tmp_path / 'cold'} has none", "<task>/<class>")


def test_a_folder_of_tasks_with_a_test_split(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for task in ("dry", "wet"):
            write_folder(tmp_path / part / task)
    data = own(tmp_path)
    assert data.test_task is not None and data.test_task.tolist() == [0] * 4 + [1] * 4
    (tmp_path / "test").rename(tmp_path / "other")
    write_folder(tmp_path / "val")
    refused(tmp_path, tmp_path, f"{tmp_path / 'train'} and {tmp_path / 'val'} has folders of tasks, the other has none")


def test_links_must_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "trees")
    (root / "oak/2.png").symlink_to(root / "ash/0.png")
    assert len(own(root).train.images) == 5
    secret = write_folder(tmp_path / "secret", classes=("a", "b")) / "a/0.png"
    for link, target in (
        (root / "oak/3.png", secret),
        (root / "elm", secret.parent),
        (root / "train", secret.parents[1]),
    ):
        link.symlink_to(target)
        refused(root, tmp_path, f"{link} is a link out of {root}", target, "copy")
        link.unlink()


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "trees")
    os.mkfifo(root / "oak/2.png")  # opening it would never return
    (root / "oak/3.png").mkdir()
    assert len(own(root).train.images) == 4


def test_test_is_preferred_to_val(tmp_path: Path) -> None:
    for name, classes in (("train", ("ash", "oak")), ("val", ("ash",)), ("test", ("oak",))):
        write_folder(tmp_path / name, classes=classes)
    test = own(tmp_path).test
    assert test is not None and test.labels.tolist() == [1, 1]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert own(write_folder(tmp_path, classes=("train", "bus"))).class_names == ("bus", "train")


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_images_keep_one_channel_unless_others_are_coloured(mode: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "trees", mode=mode)
    grey = own(root).train.images
    assert grey.shape == (4, 1, 6, 8)
    with Image.open(root / "oak/0.png") as image:
        assert (grey[2, 0] == np.asarray(image.convert("L"))).all()
    picture(root / "oak/2.png", 5)
    mixed = own(root).train.images
    assert mixed.shape == (5, 3, 6, 8) and (mixed[:4] == grey).all()


def test_images_of_two_sizes_are_named_with_their_sizes(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "trees")
    picture(root / "oak/1.png", 0, (9, 6))
    refused(root, tmp_path, f"{root / 'ash/0.png'} is 8 x 6 and {root / 'oak/1.png'} is 9 x 6", "resize")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "trees") / "oak/1.png"
    for content in (path.read_bytes()[:-40], b"text", b""):
        path.write_bytes(content)
        refused(path.parent.parent, tmp_path, f"{path} cannot be decoded", "replace or remove")


def test_an_image_of_16_bits_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "trees") / "oak/1.png"
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8)).save(path)
    refused(path.parent.parent, tmp_path, f"{path} has more than 8 bits a channel", "save it with 8")
    path.write_bytes(png_of_16_bits(8, 6))
    with Image.open(path) as image:
        assert image.mode == "RGB"  # which does not tell
    refused(path.parent.parent, tmp_path, f"{path} has more than 8 bits a channel", "save it with 8")


def png_of_16_bits(width: int, height: int) -> bytes:
    """In colour, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(6 * width)) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_format_that_may_start_a_program_is_not_decoded(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "trees") / "oak/1.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    refused(path.parent.parent, tmp_path, f"{path} cannot be decoded (cannot identify")


def test_images_that_would_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "trees")
    monkeypatch.setattr(limits, "memory_limit", lambda: 4 * 6 * 8 * 3 - 1)
    refused(root, tmp_path, f"4 images as large as {root / 'ash/0.png'} would take", "fewer or smaller")
    monkeypatch.setattr(limits, "memory_limit", lambda: 4 * 6 * 8 * 3)
    assert len(own(root).train.images) == 4


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "trees")
    for most in (20, 40):  # Pillow warns beyond it, and refuses beyond twice as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        refused(root, tmp_path, f"{root / 'ash/0.png'} cannot be decoded", "decompression bomb")


def test_folders_without_classes_or_images_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path, f"{tmp_path} has no class folders", "ROOT/<class>/<image>")
    root = write_folder(tmp_path / "trees")
    (root / "elm").mkdir()
    refused(root, tmp_path, f"{root / 'elm'} holds no images", ".png", "remove it")


# --- fetch


class Server(ThreadingHTTPServer):
    """Serves a folder and notes what is asked for."""

    requests: list[str]
    folder: Path

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def put(self, name: str, content: bytes) -> Source:
        (self.folder / name).write_bytes(content)
        return Source(self.url(name), f"sha256:{hashlib.sha256(content).hexdigest()}")


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as http:
        http.requests, http.folder = [], folder
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield http
        http.shutdown()
        thread.join()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def serve_mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [server.put(f"{name}.gz", gzip.compress(content, mtime=0)) for name, content in MNIST.items()]
    monkeypatch.setitem(SOURCES, "mnist", tuple(sources))


def tar_of(folder: Path, **members: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(folder, folder.name)
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def zip_of(folder: Path, **members: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
        for name, content in members.items():
            file.writestr(name, content)
    return archive.getvalue()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_sources_are_those_of_every_published_dataset() -> None:
    assert {name: len(sources) for name, sources in SOURCES.items()} == {"mnist": 4, "cifar10": 1, "tiny-imagenet": 1}
    for source in (source for sources in SOURCES.values() for source in sources):
        assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", source.checksum)


def test_mnist_is_fetched_once(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_mnist(server, monkeypatch)
    folder = fetch("mnist", root)
    assert folder == locate("mnist", root) == root / "MNIST/raw" and len(server.requests) == 4
    assert names_in(folder) == sorted(f"{name}.gz" for name in MNIST)
    assert load("mnist", root).train.labels.tolist() == [3, 9, 0, 1, 3, 7]
    capsys.readouterr()
    assert fetch("mnist", root) == folder and len(server.requests) == 4
    assert f"complete in {folder}, nothing was downloaded" in capsys.readouterr().out


def test_only_what_is_damaged_or_missing_is_fetched_again(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_mnist(server, monkeypatch)
    folder = fetch("mnist", root)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    server.requests.clear()
    fetch("mnist", root)
    assert sorted(server.requests) == ["/t10k-labels-idx1-ubyte.gz", "/train-images-idx3-ubyte.gz"]
    assert "damaged" in capsys.readouterr().out and len(load("mnist", root).train.images) == 6


def test_files_elsewhere_count_as_complete(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_mnist(server, monkeypatch)
    write_mnist(root / "mnist", compressed=False)
    assert fetch("mnist", root) == root / "mnist" and not server.requests


def test_cifar_is_fetched_and_unpacked(
    cifar: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "cifar10", (server.put("cifar.tar.gz", tar_of(cifar)),))
    assert fetch("cifar10", root) == root / "cifar-10-batches-bin"
    assert names_in(root) == ["cifar-10-batches-bin", "cifar.tar.gz"]
    assert len(load("cifar10", root).train.images) == 15
    (root / "cifar-10-batches-bin/data_batch_2.bin").write_bytes(b"damaged")
    (root / "cifar-10-batches-bin/stray").write_bytes(b"")
    fetch("cifar10", root)
    assert len(load("cifar10", root).train.images) == 15 and len(server.requests) == 1
    assert names_in(root / "cifar-10-batches-bin") == names_in(cifar)


def test_tiny_imagenet_is_fetched_and_unpacked(
    tiny: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "tiny-imagenet", (server.put("tiny.zip", zip_of(tiny)),))
    assert fetch("tiny-imagenet", root) == root / "tiny-imagenet-200"
    assert names_in(root) == ["tiny-imagenet-200", "tiny.zip"]
    assert len(load("tiny-imagenet", root).train.images) == 6


def test_an_archive_put_by_hand_is_used(
    cifar: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = server.put("cifar.tar.gz", tar_of(cifar))
    monkeypatch.setitem(SOURCES, "cifar10", (source,))
    root.mkdir()
    (server.folder / "cifar.tar.gz").rename(root / "cifar.tar.gz")
    fetch("cifar10", root)
    assert not server.requests and len(load("cifar10", root).train.images) == 15


def test_a_wrong_checksum_leaves_nothing(
    cifar: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = server.put("cifar.tar.gz", tar_of(cifar))
    monkeypatch.setitem(SOURCES, "cifar10", (Source(source.url, "md5:" + "0" * 32),))
    with pytest.raises(ValueError, match=rf"{source.url} is not the file.*by hand at {root / 'cifar.tar.gz'} \(md5:0"):
        fetch("cifar10", root)
    assert names_in(root) == []


def test_a_missing_file_on_the_server_names_address_and_remedy(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("gone.tar.gz")
    monkeypatch.setitem(SOURCES, "cifar10", (Source(url, "md5:" + "0" * 32),))
    with pytest.raises(OSError, match=rf"{url} could not be .*404.*by hand at {root / 'gone.tar.gz'} \(md5:0"):
        fetch("cifar10", root)
    assert names_in(root) == []


def test_no_server_names_address_and_remedy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:9/cifar.tar.gz"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(SOURCES, "cifar10", (Source(url, "md5:" + "0" * 32),))
    with pytest.raises(OSError, match=rf"{url} could not be downloaded.*by hand at {root / 'cifar.tar.gz'}"):
        fetch("cifar10", root)


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_an_archive_that_reaches_out_of_its_folder_is_refused(
    pack: Callable[..., bytes], cifar: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = pack(cifar, **{"../../escaped": b"out"})
    monkeypatch.setitem(SOURCES, "cifar10", (server.put("bad.archive", content),))
    with pytest.raises(ValueError, match=r"bad.archive cannot be unpacked .*escaped.* outside"):
        fetch("cifar10", root)
    assert names_in(root) == ["bad.archive"] and not list(root.parent.rglob("escaped"))


def test_an_archive_without_its_folder_is_refused(
    tmp_path: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.setitem(SOURCES, "cifar10", (server.put("bad.tar.gz", tar_of(tmp_path / "other")),))
    with pytest.raises(ValueError, match=r"bad.tar.gz has no folder cifar-10-batches-bin"):
        fetch("cifar10", root)
    assert names_in(root) == ["bad.tar.gz"]


def test_a_failed_repair_keeps_what_was_there(
    cifar: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "cifar10", (server.put("bad.tar.gz", b"no archive"),))
    (cifar / "data_batch_5.bin").write_bytes(b"damaged")
    root.mkdir()
    cifar.rename(root / cifar.name)
    before = names_in(root / cifar.name)
    with pytest.raises(ValueError, match=r"bad.tar.gz cannot be unpacked"):
        fetch("cifar10", root)
    assert names_in(root) == ["bad.tar.gz", cifar.name] and names_in(root / cifar.name) == before


def test_an_interrupted_unpacking_leaves_the_dataset_missing(
    cifar: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "cifar10", (server.put("cifar.tar.gz", tar_of(cifar)),))
    extract = fetching._extract

    def interrupted(archive: Path, folder: Path) -> None:
        extract(archive, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("cifar10", root)
    assert locate("cifar10", root) is None and names_in(root) == ["cifar.tar.gz"]
