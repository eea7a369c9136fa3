"""Image files as arrays, also from a folder of them for each class."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.limits import check_size

LAYOUTS = (
    "an .npz file with arrays x and y (optionally task, x_test, y_test, task_test), a folder ROOT/<class>/<image>, "
    "ROOT/<task>/<class>/<image>, or ROOT/train/... with ROOT/test/..."
)
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others, whatever the suffix, may start a program (EPS)


class Labelled(NamedTuple):
    """images (n, channels, height, width) uint8, or features (n, 1, 1, d) float64; labels (n,), and tasks (n,) if
    known, the integers or text of the source.
    """

    images: np.ndarray
    labels: np.ndarray
    tasks: np.ndarray | None = None


class Own(NamedTuple):
    """A dataset of the user's. ``names`` of "class" and "task": what the integers 0, 1, ... stand for; empty where
    labels stand for themselves.
    """

    train: Labelled
    test: Labelled | None
    names: dict[str, tuple[str, ...]]


class Encoded(NamedTuple):
    """An image file, or the content of one; ``name`` is what errors call it."""

    name: str
    file: Path | BytesIO


def read_folder(root: Path, size: int | None = None) -> Own:
    """Training images and, if there are any, test images; a folder's name is the label of the images in it.

    Reads ROOT/<class>/<image>, ROOT/<task>/<class>/<image> or, if ROOT/train has folders, the same below ROOT/train and
    ROOT/test (ROOT/val in its absence). Hidden files, and files whose suffix is not in ``SUFFIXES``, are passed over.

    Raises ValueError if there are no classes, a class has no images, a link leads out of ROOT, or as ``decode`` does.
    """
    train_root, test_root = root, None
    if _folders(root / "train"):
        train_root = root / "train"
        test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    train = _class_files(root, inside(root, train_root))
    test = [] if test_root is None else _class_files(root, inside(root, test_root))
    if test and (train[0][2] is None) != (test[0][2] is None):
        raise ValueError(
            f"one of {train_root} and {test_root} has folders of tasks, the other has none: use one layout"
        )
    images = decode([file for file, *_ in train + test], size=size)
    official = _labelled(images[len(train) :], test) if test else None
    return Own(_labelled(images[: len(train)], train), official, {})


def _labelled(images: np.ndarray, entries: list[tuple[Path, str, str | None]]) -> Labelled:
    _, labels, tasks = zip(*entries, strict=True)
    return Labelled(images, np.array(labels), None if tasks[0] is None else np.array(tasks))


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_files(root: Path, folder: Path) -> list[tuple[Path, str, str | None]]:
    """Every image below ``folder``, with its class and task."""
    folders = [inside(root, child) for child in _folders(folder)]
    nested = [child for child in folders if _folders(child) and not image_files(child)]
    if not folders:
        raise ValueError(f"{folder} has no class folders: give {LAYOUTS}")
    if not nested:
        return [(file, child.name, None) for child in folders for file in _members(root, child)]
    other = next((child for child in folders if child not in nested), None)
    if other is not None:
        raise ValueError(f"{nested[0]} has folders, but {other} has none: give {LAYOUTS}")
    return [
        (file, child.name, task.name)
        for task in folders
        for child in _folders(task)
        for file in _members(root, inside(root, child))
    ]


def _members(root: Path, folder: Path) -> list[Path]:
    members = [inside(root, file) for file in image_files(folder)]
    if not members:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}): add some, or remove it")
    return members


def inside(root: Path, path: Path) -> Path:
    """``path``. Raises ValueError if it is a link that leads out of ``root``."""
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} is a link out of {root}, to {path.resolve()}: copy what it leads to, or remove it")
    return path


def image_files(folder: Path) -> list[Path]:
    """The visible image files directly in a folder, by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def decode(files: Sequence[Path], *, keep_grey: bool = True, size: int | None = None) -> np.ndarray:
    """As ``decode_all``, for files."""
    return decode_all((Encoded(str(file), file) for file in files), len(files), keep_grey=keep_grey, size=size)


def decode_all(files: Iterable[Encoded], count: int, *, keep_grey: bool = True, size: int | None = None) -> np.ndarray:
    """``count`` images (n, channels, height, width) uint8: one channel if every file is grey and ``keep_grey``,
    otherwise RGB. Transparency is dropped; with a ``size`` all are resized to size x size, antialiased.

    Raises ValueError, naming the file, if one is damaged, too large for Pillow's protection against decompression
    bombs, of more than 8 bits a channel, or (without a ``size``) of another size than the first; and if together they
    are too large for ``check_size``.
    """
    images = np.empty((0, 3, 0, 0), np.uint8)
    first = ""
    for number, (name, file) in enumerate(tqdm(files, desc="decoding", unit=" images", total=count, delay=2)):
        image, grey = _decoded(name, file)
        pixels = np.asarray(image if size is None else resized(image, size)).transpose(2, 0, 1)
        keep_grey &= grey
        if number == 0:
            check_size(f"{count:,} images as large as {name}", count * pixels.size)
            images, first = np.empty((count, *pixels.shape), np.uint8), name
        if pixels.shape != images.shape[1:]:
            sizes = ["{2} x {1}".format(*shape) for shape in (images.shape[1:], pixels.shape)]
            raise ValueError(
                f"images must have one size (width x height), but {first} is {sizes[0]} and {name} is {sizes[1]}: "
                "resize them, or give an image_size"
            )
        images[number] = pixels
    return np.ascontiguousarray(images[:, :1]) if keep_grey else images


def resized(image: Image.Image, size: int) -> Image.Image:
    """To size x size pixels; bilinear, over all pixels that a new one covers."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _decoded(name: str, file: Path | BytesIO) -> tuple[Image.Image, bool]:
    """In RGB, and whether the file is grey."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damage elsewhere than in the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as image:
                mode = image.mode
                deep = mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", ""))
                rgb = image.convert("RGB")
    except Exception as error:  # Pillow's readers have no common one for what hostile bytes do to them
        raise ValueError(f"{name} cannot be decoded ({error}): replace or remove it") from error
    if deep:
        raise ValueError(f"{name} has more than 8 bits a channel (mode {mode!r}): save it with 8")
    return rgb, mode in ("1", "L", "LA")
