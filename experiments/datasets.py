"""Datasets as arrays: digits, which ship with scikit-learn; published ones, which ``experiments.fetch`` downloads; and
your own, from an ``.npz`` file or a folder of images.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from experiments.image_files import LAYOUTS, Own, read_folder
from experiments.npz_files import read_npz
from experiments.published_files import Parts, read_cifar10, read_mnist, read_tiny_imagenet

PublishedName = Literal["mnist", "cifar10", "tiny-imagenet"]


class Dataset(NamedTuple):
    """images (n, channels, height, width) uint8 (or, until a stream has quantised them, rows of features (n, 1, 1, d)
    float64); labels (n,) int64 in 0..n_classes-1.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ImageData:
    """A dataset as its source delivers it.

    ``test`` is the official test split, None if the source has none. Label k stands for ``class_names[k]``. ``mean``
    and ``std`` are the published ones per channel, of pixels / 255; None: those of the training split are to be used.
    ``train_task`` and ``test_task``, (n,) int64, say which task an image belongs to, k standing for ``task_names[k]``;
    None if the source does not say.
    """

    name: str
    train: Dataset
    test: Dataset | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    train_task: np.ndarray | None = None
    test_task: np.ndarray | None = None
    task_names: tuple[str, ...] = ()


class Published(NamedTuple):
    """How to find and read a published dataset: in the first of ``places``, folders below the data root, that has a
    file of ``markers``. It is fetched to the first place. ``mean`` and ``std`` are the ones commonly used.
    """

    read: Callable[[Path], Parts]
    places: tuple[str, ...]
    markers: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


PUBLISHED: dict[PublishedName, Published] = {
    "mnist": Published(
        read_mnist,
        places=("MNIST/raw", "mnist", "MNIST", "."),
        markers=("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte"),
        mean=(0.1307,),
        std=(0.3081,),
    ),
    "cifar10": Published(
        read_cifar10,
        places=("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "."),
        markers=("data_batch_1.bin",),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "tiny-imagenet": Published(
        read_tiny_imagenet,
        places=("tiny-imagenet-200", "tiny-imagenet/tiny-imagenet-200", "."),
        markers=("wnids.txt",),
        mean=(0.4802, 0.4480, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
    ),
}


def load(dataset: str, data_root: Path) -> ImageData:
    """The dataset "digits"; "mnist", "cifar10" or "tiny-imagenet", from ``data_root``; or the ``.npz`` file or image
    folder at the path ``dataset``, in the layout of ``npz_files.read_npz`` or ``image_files.read_folder``.

    Raises ValueError, with the remedy, if the dataset is unknown, missing, damaged or inconsistent.
    """
    if dataset == "digits":
        return _digits()
    if dataset in PUBLISHED:
        return _published(dataset, data_root)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _own(path, read_folder(path))
    if path.is_file():
        return _own(path, read_npz(path))
    if path.suffix or len(path.parts) > 1:
        raise ValueError(f"no such file or folder: {dataset}; give the path of {LAYOUTS}")
    known = ", ".join(("digits", *PUBLISHED))
    raise ValueError(f"dataset must be one of {known}, or the path of {LAYOUTS}; got {dataset!r}")


def locate(dataset: PublishedName, data_root: Path) -> Path | None:
    """The folder below ``data_root`` that ``load`` reads a published dataset from, None if there is none."""
    _, places, markers, *_ = PUBLISHED[dataset]
    folders = (data_root / place for place in places)
    return next((folder for folder in folders if any((folder / marker).is_file() for marker in markers)), None)


def _digits() -> ImageData:
    """1,797 handwritten digits, 8 x 8 grey (UCI Optical Recognition of Handwritten Digits, test part); their 17 levels
    are spread over 0..255. All of them are training images, so that mean and std are over all.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    train = Dataset(images, data.target.astype(np.int64))
    return ImageData("digits", train, None, tuple("0123456789"), *statistics(images, "digits"))


def _published(dataset: PublishedName, data_root: Path) -> ImageData:
    source, folder = PUBLISHED[dataset], locate(dataset, data_root)
    command = f"python -m experiments fetch {dataset} --data-root {shlex.quote(str(data_root))}"
    if folder is None:
        places = ", ".join(str(data_root / place) for place in source.places)
        raise ValueError(f"{dataset} ({' or '.join(source.markers)}) is in none of {places}; download it: {command}")
    try:
        train, test, class_names = source.read(folder)
    except ValueError as error:
        raise ValueError(f"{error}; fetch it again: {command}") from error
    return ImageData(
        dataset,
        Dataset(train.images, train.labels),
        Dataset(test.images, test.labels),
        class_names,
        source.mean,
        source.std,
    )


def _own(path: Path, own: Own) -> ImageData:
    train, test = own.train, own.test
    class_names, labels, test_labels = _numbered(path, "class", train.labels, test and test.labels, own.names)
    task_names: tuple[str, ...] = ()
    train_task = test_task = None
    if train.tasks is not None:
        task_names, train_task, test_task = _numbered(path, "task", train.tasks, test and test.tasks, own.names)
    return ImageData(
        path.resolve().name.removesuffix(".npz"),
        Dataset(train.images, labels),
        None if test is None or test_labels is None else Dataset(test.images, test_labels),
        class_names,
        train_task=train_task,
        test_task=test_task,
        task_names=task_names,
    )


def _numbered(
    path: Path, what: str, train: np.ndarray, test: np.ndarray | None, known: dict[str, tuple[str, ...]]
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """The names, those ``known`` or else sorted, and both columns as positions in them, int64."""
    values, numbers = np.unique(train, return_inverse=True)
    names = tuple(map(str, values.tolist()))
    unknown = [] if test is None else np.setdiff1d(test, values).tolist()
    if unknown:
        raise ValueError(
            f"{path}: {what} {unknown[0]!r} of the test images is no {what} of the training images, which are "
            f"{', '.join(names)}: add training images of it, or remove the test images"
        )
    if known.get(what):
        if values.tolist() != list(range(len(known[what]))):
            raise ValueError(
                f"{path}: {what}_names holds {len(known[what])} names, but the training images have the {what} numbers "
                f"{', '.join(names)}: number them from 0, one for each name"
            )
        return known[what], train, test
    return names, numbers, None if test is None else np.searchsorted(values, test)


def statistics(images: np.ndarray, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels / 255, channel by channel.

    Raises ValueError if a channel is constant.
    """
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256)
        for start in range(0, len(images), 1024):
            counts += np.bincount(images[start : start + 1024, channel].ravel(), minlength=256)
        if np.count_nonzero(counts) == 1:
            raise ValueError(
                f"{where}: channel {channel} of the training images is {counts.argmax()} everywhere, so that it cannot "
                "be standardised: give images that differ"
            )
        means.append(float(np.average(levels, weights=counts)))
        deviations.append(float(np.average((levels - means[-1]) ** 2, weights=counts) ** 0.5))
    return tuple(means), tuple(deviations)


def quantised(train: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Rows of features (n, 1, 1, d) as uint8: each feature's level is its quantile in the rows of ``train``, in 256ths;
    that of a value which many of them share is the middle of its quantiles.
    """
    edges = np.quantile(train, np.arange(1, 256) / 256, axis=0, method="inverted_cdf")
    levels = np.empty(features.shape, np.uint8)
    for column in range(features.shape[3]):
        own, values = edges[:, 0, 0, column], features[:, 0, 0, column]
        levels[:, 0, 0, column] = (np.searchsorted(own, values) + np.searchsorted(own, values, side="right")) // 2
    return levels
