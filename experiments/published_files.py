"""MNIST, CIFAR-10 and Tiny ImageNet, read in the files that their authors distribute.

Each reader takes the folder with the files, returns the training part, the test part and the class names, and raises
ValueError, naming the file, if one is missing or damaged.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.image_files import Labelled, decode, image_files
from experiments.npz_files import read_arrays, write_arrays

Parts = tuple[Labelled, Labelled, tuple[str, ...]]

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_RECORDS = 10_000
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32


def read_mnist(folder: Path) -> Parts:
    """Four idx files, compressed or not (LeCun et al. 1998)."""
    parts = []
    for part in ("train", "t10k"):
        images = _idx(folder / f"{part}-images-idx3-ubyte", 3)
        labels = _idx(folder / f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels) or labels.max() > 9:
            raise ValueError(
                f"{folder}: {part} has {len(images):,} images but {len(labels):,} labels, the largest {labels.max()}, "
                "so one of its two files is not MNIST's"
            )
        parts.append(Labelled(images[:, None], labels.astype(np.int64)))
    return parts[0], parts[1], tuple("0123456789")


def _idx(path: Path, n_axes: int) -> np.ndarray:
    """The unsigned bytes of an idx file: the compressed one, which is what is fetched, or in its absence the plain."""
    compressed = path.with_name(f"{path.name}.gz")
    path = compressed if compressed.is_file() else path
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path == compressed else content
    except FileNotFoundError as error:
        raise ValueError(f"{path} (or {compressed.name}) is missing") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, {len(content):,} bytes, is truncated or damaged ({error})") from error
    start = 4 + 4 * n_axes
    magic, *shape = np.frombuffer(content[:start].ljust(start, b"\0"), ">u4").tolist()
    if magic != 0x0800 + n_axes:
        raise ValueError(f"{path} does not begin as an idx file of {n_axes} axes does")
    expected = start + math.prod(shape)
    if len(content) != expected or expected == start:
        raise ValueError(
            f"{path} has {len(content):,} bytes (uncompressed); its header, of shape {shape}, expects {expected:,}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def read_cifar10(folder: Path) -> Parts:
    """The binary version, six batches of records (Krizhevsky 2009)."""
    batches = [_cifar_batch(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    meta = folder / "batches.meta.txt"
    names = tuple(meta.read_text().split()) if meta.is_file() else CIFAR_CLASSES
    if len(names) != 10:
        raise ValueError(f"{meta} has {len(names)} class names instead of 10")
    train = Labelled(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    return train, Labelled(*_cifar_batch(folder / "test_batch.bin")), names


def _cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels; a record is a label byte, then the red, green and blue plane of 32 x 32 pixels."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    found, expected = path.stat().st_size, CIFAR_RECORDS * CIFAR_RECORD_BYTES
    if found != expected:
        raise ValueError(f"{path} has {found:,} bytes instead of {expected:,}")
    records = np.fromfile(path, np.uint8).reshape(CIFAR_RECORDS, CIFAR_RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise ValueError(f"{path} has a label {labels.max()}, but CIFAR-10's are 0 to 9")
    return np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32), labels


def read_tiny_imagenet(folder: Path) -> Parts:
    """JPEG files, class by class (Stanford CS231n); grey ones become RGB.

    Classes are in the order of their WordNet ids. The validation part is the test part here, as the labels of the
    original one are not public. The decoded arrays are kept in an ``.npz`` file beside the folder, if that can be
    written, and used as long as names, sizes and times of the files stay the same.
    """
    folder = folder.resolve()
    try:
        names = sorted((folder / "wnids.txt").read_text().split())
        by_class = [image_files(folder / "train" / name / "images") for name in names]
        annotations = [line.split("\t") for line in (folder / "val/val_annotations.txt").read_text().splitlines()]
        test_files = [folder / "val/images" / row[0] for row in annotations]
        test_labels = np.array([names.index(row[1]) for row in annotations], np.int64)
        stamp = _stamp(folder, [*(file for files in by_class for file in files), *test_files], test_labels)
    except (FileNotFoundError, NotADirectoryError, ValueError, IndexError) as error:
        raise ValueError(f"{folder} is incomplete or damaged ({error})") from error
    counts = [len(files) for files in by_class]
    if not test_files or len(set(counts)) != 1 or not counts[0]:
        raise ValueError(
            f"{folder} has {len(names)} classes of {min(counts, default=0)} to {max(counts, default=0)} training "
            f"images, and {len(test_files)} test images: it must have as many of each class"
        )
    train_files = [file for files in by_class for file in files]
    images = _cached(folder, stamp, [*train_files, *test_files])
    train = Labelled(images[: len(train_files)], np.repeat(np.arange(len(names)), counts))
    return train, Labelled(images[len(train_files) :], test_labels), tuple(names)


def _stamp(folder: Path, files: Sequence[Path], test_labels: np.ndarray) -> str:
    digest = hashlib.sha256(test_labels.tobytes())
    for file in files:
        status = file.stat()
        digest.update(f"{file.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _cached(folder: Path, stamp: str, files: Sequence[Path]) -> np.ndarray:
    """The decoded files: from the ``.npz`` file beside the folder if it bears this stamp, which is otherwise made."""
    cache = folder.with_name(f"{folder.name}.npz")
    with contextlib.suppress(OSError, ValueError, KeyError):
        arrays = read_arrays(cache, ("stamp", "images"))
        if arrays["stamp"].tolist() == stamp:
            return arrays["images"]
    images = decode(files, keep_grey=False)
    with contextlib.suppress(OSError):
        write_arrays(cache, stamp=np.array(stamp), images=images)
    return images
