"""Images of your own, as arrays: from one ``.npz`` file, or from a folder of image files for each class."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

LAYOUTS = (
    "an .npz file with arrays x and y (optionally task, x_test, y_test, task_test), a folder ROOT/<class>/<image>, "
    "or ROOT/train/<class>/<image> with ROOT/test/<class>/<image>"
)
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


class Labelled(NamedTuple):
    """images (n, channels, height, width) uint8; labels (n,), and tasks (n,) if known, the integers or text of the
    source.
    """

    images: np.ndarray
    labels: np.ndarray
    tasks: np.ndarray | None = None


def read_arrays(path: Path, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file that are both ``wanted`` and there.

    Raises ValueError if the file is damaged, is no ``.npz`` file, or has none of them; an array of objects is not
    unpickled.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file, or a truncated one: write it again with numpy.savez")
    arrays, name = {}, ""
    try:
        with np.load(path, allow_pickle=False) as file:
            present = file.files
            for name in wanted:
                if name in present:
                    arrays[name] = file[name]
    except (
        *(OSError, ValueError, EOFError, NotImplementedError),
        *(MemoryError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise ValueError(
            f"{path}: array {name!r} cannot be read ({error}): write the file again with numpy.savez, every array "
            "holding numbers or text and no objects"
        ) from error
    if not arrays:
        raise ValueError(f"{path} has none of the arrays {', '.join(wanted)}, only {_listed(present)}: rename them")
    return arrays


def read_npz(path: Path) -> tuple[Labelled, Labelled | None]:
    """Training images and, if the file has them, test images.

    ``x``: (n, H, W), (n, H, W, C) or (n, C, H, W) with C 1 or 3; uint8, or floating point in [0, 1], which is rounded
    to the 256 levels of uint8. ``y``: (n,) integers or text. ``task``: (n,) integers or text, optional. ``x_test``,
    ``y_test`` (and ``task_test`` if there is a ``task``): the same for an official test split.

    Raises ValueError, naming file, array and remedy, for anything else.
    """
    arrays = read_arrays(path, ("x", "y", "task", "x_test", "y_test", "task_test"))
    columns = ("x", "y", "task") if {"task", "task_test"} & arrays.keys() else ("x", "y")
    tested = any(name.endswith("_test") for name in arrays)
    missing = [name for name in (*columns, *(f"{name}_test" for name in columns if tested)) if name not in arrays]
    if missing:
        raise ValueError(
            f"{path} lacks the array {missing[0]!r} beside {_listed(arrays)}: add it (x and y; x_test and y_test for "
            "an official test split; task for both splits or neither)"
        )
    train = _npz_split(path, arrays, "")
    if not tested:
        return train, None
    test = _npz_split(path, arrays, "_test")
    if test.images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"{path}: images of 'x_test' are {test.images.shape[1:]} (channels, height, width), those of 'x' "
            f"{train.images.shape[1:]}: bring them to one size"
        )
    for name in ("y", "task"):
        kinds = {arrays[key].dtype.kind == "U" for key in (name, f"{name}_test") if key in arrays}
        if len(kinds) > 1:
            raise ValueError(f"{path}: one of {name!r} and '{name}_test' is text, the other is not: write both alike")
    return train, test


def _npz_split(path: Path, arrays: dict[str, np.ndarray], suffix: str) -> Labelled:
    images = _pixels(path, f"x{suffix}", arrays[f"x{suffix}"])
    labels = _column(path, f"y{suffix}", arrays[f"y{suffix}"], f"x{suffix}", len(images))
    task = arrays.get(f"task{suffix}")
    tasks = None if task is None else _column(path, f"task{suffix}", task, f"x{suffix}", len(images))
    return Labelled(images, labels, tasks)


def _pixels(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    where = f"{path}: array {name!r}"
    shape = values.shape
    if values.ndim not in (3, 4) or not values.size:
        raise ValueError(
            f"{where} has shape {shape}: give at least one image, as (n, H, W), (n, H, W, C) or (n, C, H, W)"
        )
    if values.ndim == 3:
        values = values[:, None]
    else:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and last:
            raise ValueError(
                f"{where} of shape {shape} is ambiguous, its channels may be axis 1 or 3: give grey images as "
                "(n, H, W), and pad colour images to more than 3 pixels a side"
            )
        if not first and not last:
            raise ValueError(f"{where} of shape {shape} has neither 1 nor 3 channels in axis 1 or 3: give grey or RGB")
        values = values if first else values.transpose(0, 3, 1, 2)
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind != "f":
        raise ValueError(f"{where} has dtype {values.dtype}: give uint8 in 0..255, or floating point in [0, 1]")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{where} has values that are NaN or infinite: give floating point in [0, 1]")
    if low < 0 or high > 1:
        raise ValueError(
            f"{where} has values from {low:g} to {high:g}, but floating point must be in [0, 1]: rescale it, or give "
            "pixels in 0..255 as uint8"
        )
    return np.ascontiguousarray(np.rint(255 * values).astype(np.uint8))


def _column(path: Path, name: str, values: np.ndarray, images: str, n_images: int) -> np.ndarray:
    where = f"{path}: array {name!r}"
    if values.dtype.kind not in "iuU":
        raise ValueError(f"{where} has dtype {values.dtype}: give integers or text (astype(int), astype(str))")
    if values.shape != (n_images,):
        raise ValueError(
            f"{where} has shape {values.shape} but {images!r} has {n_images} images: give one value an image"
        )
    return values if values.dtype.kind == "U" else values.astype(np.int64)


def read_folder(root: Path) -> tuple[Labelled, Labelled | None]:
    """Training images and, if there are any, test images; a folder's name is the label of the images in it.

    Reads ROOT/<class>/<image> or, if ROOT/train has folders, ROOT/train/<class>/<image> and ROOT/test/<class>/<image>
    (ROOT/val in its absence). Hidden files, and files whose suffix is not in ``SUFFIXES``, are passed over.

    Raises ValueError if there are no classes, a class has no images, or as ``decode`` does.
    """
    train_root, test_root = root, None
    if _folders(root / "train"):
        train_root = root / "train"
        test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    files, labels = _class_files(train_root)
    test_files, test_labels = ([], []) if test_root is None else _class_files(test_root)
    images = decode(files + test_files)
    train = Labelled(images[: len(files)], np.array(labels))
    return train, None if test_root is None else Labelled(images[len(files) :], np.array(test_labels))


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_files(root: Path) -> tuple[list[Path], list[str]]:
    files: list[Path] = []
    labels: list[str] = []
    for folder in _folders(root):
        members = image_files(folder)
        if not members:
            raise ValueError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}): add some, or remove it")
        files += members
        labels += [folder.name] * len(members)
    if not files:
        raise ValueError(f"{root} has no class folders: give {LAYOUTS}")
    return files, labels


def image_files(folder: Path) -> list[Path]:
    """The visible image files directly in a folder, by name."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def decode(files: Sequence[Path], *, keep_grey: bool = True) -> np.ndarray:
    """(n, channels, height, width) uint8: one channel if every file is grey and ``keep_grey``, otherwise RGB.
    Transparency is dropped.

    Raises ValueError, naming the file, if one is damaged, too large for Pillow's protection against decompression
    bombs, of more than 8 bits a channel, or of another size than the first.
    """
    images = np.empty((0, 3, 0, 0), np.uint8)
    for number, file in enumerate(tqdm(files, desc="decoding", unit=" images", delay=2)):
        pixels, grey = _decoded(file)
        keep_grey &= grey
        if number == 0:
            images = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            sizes = ["{2} x {1}".format(*shape) for shape in (images.shape[1:], pixels.shape)]
            raise ValueError(
                f"images must have one size (width x height), but {files[0]} is {sizes[0]} and {file} is {sizes[1]}: "
                "resize them"
            )
        images[number] = pixels
    return np.ascontiguousarray(images[:, :1]) if keep_grey else images


def _decoded(file: Path) -> tuple[np.ndarray, bool]:
    """(3, height, width), and whether the file is grey."""
    try:
        with Image.open(file) as image:
            mode = image.mode
            rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be decoded ({error}): replace or remove it") from error
    if mode.startswith(("I", "F")):
        raise ValueError(f"{file} has more than 8 bits a channel (mode {mode!r}): save it with 8")
    return np.asarray(rgb).transpose(2, 0, 1), mode in ("1", "L", "LA")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "nothing"
