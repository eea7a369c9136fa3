"""Any dataset that a user brings, made ready for a stream: read, checked, cleaned, cut into tasks, and described."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from experiments import assembly
from experiments.arrow_files import is_arrow, read_arrow
from experiments.config import Scenario
from experiments.csv_files import read_csv
from experiments.image_files import LAYOUTS, Labelled, read_folder, resized
from experiments.limits import check_size
from experiments.npz_files import features, listed, pixels, read_arrays, write_arrays
from experiments.tables import Options, Source, Table, bytes_if_whole, from_matrix, parse_tasks


@dataclass(frozen=True)
class Prepared:
    """A dataset ready to be a stream: labels are numbered as in ``class_names``, tasks (unless they are rotations) as
    in ``task_names``; ``test`` is the official test split. ``remarks`` say what was found, left out and converted.
    """

    train: Labelled
    test: Labelled | None
    class_names: tuple[str, ...]
    task_names: tuple[str, ...]
    scenario: Scenario
    n_tasks: int
    remarks: tuple[str, ...]

    @property
    def tabular(self) -> bool:
        """Whether the samples are rows of features, not images."""
        return self.train.images.dtype != np.uint8

    @property
    def counts(self) -> np.ndarray:
        """Samples (n_tasks, classes), those of an official test split apart."""
        return assembly.counts(self.train, self.n_tasks, len(self.class_names))

    @property
    def test_counts(self) -> np.ndarray | None:
        """The same of the official test split."""
        return None if self.test is None else assembly.counts(self.test, self.n_tasks, len(self.class_names))

    def save(self, path: Path) -> None:
        """Writes, atomically, the ``.npz`` file for ``RunConfig(stream="custom", dataset=str(path), scenario=...,
        n_tasks=...)`` with this scenario and number of tasks.
        """
        arrays = {"class_names": np.array(self.class_names)}
        if self.task_names:
            arrays["task_names"] = np.array(self.task_names)
        for suffix, part in (("", self.train), ("_test", self.test)):
            if part is not None:
                single = part.images.shape[1] == 1
                values = part.images[:, 0] if single else part.images
                arrays[f"x{suffix}"] = values[:, 0] if self.tabular else values
                arrays[f"y{suffix}"] = part.labels
                if part.tasks is not None:
                    arrays[f"task{suffix}"] = part.tasks
        write_arrays(path, **arrays)


def prepare(
    path: Path | str,
    *,
    label: str | None = None,
    threshold: float | None = None,
    tasks: str | None = None,
    image_size: int | None = None,
    images: str | None = None,
) -> Prepared:
    """Reads an ``.npz`` or ``.csv`` file, or a folder of images, of ``.parquet`` files or of Hugging Face's
    ``save_to_disk``.

    ``label``: the column of labels; by default y, label or class, a Hugging Face dataset's only classes, or the names
    of the folders. ``threshold``: makes two classes of a column of numbers: from it on, and below. ``tasks``: a column
    ("site", or "site=a,b" for these values in this order), "classes:N" groups of classes, "order:N" parts of the rows
    as they arrive, or "rotations:N"; by default the column task, or else up to five groups of classes.
    ``image_size``: resizes all images to so many pixels a side. ``images``: the array or column of images; by default
    x, or the only one.

    Exact copies are left out but for the first, and all that differ in nothing but the label.

    Raises ValueError, with the value and the remedy, for what cannot become a stream; OSError for what cannot be read.
    """
    path = Path(path).expanduser()
    if image_size is not None and not 4 <= image_size <= 1024:
        raise ValueError(f"image_size must be in 4..1024 pixels, got {image_size}")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold}")
    options = Options(label, None if tasks is None else parse_tasks(tasks), images, image_size)
    try:
        source = _read(path, options)
    except PermissionError as error:
        name = error.filename or path
        raise PermissionError(f"{name} may not be read: give yourself permission (chmod u+rX)") from error
    train, test, class_names, task_names, rule = assembly.assemble(path, source, options.tasks, threshold)
    return Prepared(
        train,
        test,
        class_names,
        task_names,
        "rotations" if rule.kind == "rotations" else "task-column",
        len(task_names) or rule.count,
        tuple(source.remarks),
    )


def _read(path: Path, options: Options) -> Source:
    if path.is_dir():
        source = read_arrow(path, options) if is_arrow(path) else _read_folder(path, options)
    elif not path.is_file():
        raise ValueError(f"no such file or folder: {path}")
    elif path.suffix.lower() == ".csv":
        source = read_csv(path, options)
    elif path.suffix.lower() == ".npz":
        source = _read_npz(path, options)
    else:
        raise ValueError(f"{path} is neither .npz nor .csv: give {LAYOUTS}, a .csv file, or a folder of .parquet files")
    if options.size is not None:
        if source.train.values.dtype != np.uint8:
            raise ValueError(f"{path} holds features, which image_size ({options.size}) cannot resize: leave it out")
        source.remarks.append(f"all images are resized to {options.size} x {options.size} pixels, whatever their shape")
    return source


def _read_folder(path: Path, options: Options) -> Source:
    own = read_folder(path, options.size)
    label, task = options.roles(path, ["class"] if own.train.tasks is None else ["class", "task"])
    parts = [Table(part.images, part.labels, part.tasks) for part in (own.train, own.test) if part is not None]
    return Source(parts[0], parts[1] if own.test else None, label, task, [])


def _read_npz(path: Path, options: Options) -> Source:
    """Also with x_train for x, as many write it."""
    arrays = read_arrays(path)
    for name in [name for name in arrays if name.endswith("_train") and name.removesuffix("_train") not in arrays]:
        arrays[name.removesuffix("_train")] = arrays.pop(name)
    images = (options.images or "x").removesuffix("_train")
    if images not in arrays:
        raise ValueError(
            f"{path} has no array {images!r} but {listed(arrays)}: say which one holds the images with --images"
        )
    tested = f"{images}_test" in arrays
    n = len(arrays[images]) if arrays[images].ndim else 0
    asked = options.label_among(arrays)  # of whatever length: see below
    columns = [
        name
        for name, values in arrays.items()
        if name != images
        and not name.endswith("_test")
        and (values.shape in ((n,), (n, 1)) or (name == asked and values.ndim == 1))
    ]
    label, task = options.roles(path, columns)
    wanted = [images, label, *([task] if task else [])]
    parts = []
    for suffix in ("", "_test") if tested else ("",):
        missing = [name + suffix for name in wanted if name + suffix not in arrays]
        if missing:
            raise ValueError(
                f"{path} has {images + suffix!r} but no {missing[0]!r}: add it, or remove {images + suffix!r}"
            )
        values = _values(f"{path}: array {images + suffix!r}", arrays[images + suffix], options.size)
        found = [arrays[name + suffix].reshape(-1) for name in wanted[1:]]
        for name, column in zip(wanted[1:], found, strict=True):
            if len(column) != len(values):
                raise ValueError(
                    f"{path}: array {name + suffix!r} has {len(column)} values but {images + suffix!r} {len(values)}: "
                    "give one a sample"
                )
        parts.append(Table(values, *found))
    unused = arrays.keys() - {name + suffix for name in wanted for suffix in ("", "_test")}
    remarks = [f"arrays that are not used: {', '.join(sorted(unused))}"] if unused else []
    return Source(parts[0], parts[1] if tested else None, label, task, remarks)


def _values(where: str, values: np.ndarray, size: int | None) -> np.ndarray:
    """(n, channels, height, width) uint8 or (n, 1, 1, d) float64. Whole numbers in 0..255 are bytes, whatever their
    type, unless they are floating point and none exceeds 1.
    """
    if values.dtype.kind in "iu" or (values.dtype.kind == "f" and values.size and values.max() > 1):
        values = bytes_if_whole(values)
    if values.ndim == 2:
        if values.dtype.kind in "biu" and values.size:
            values = values if values.dtype == np.uint8 else values.astype(np.float64)
        return from_matrix(values) if values.dtype == np.uint8 and values.size else features(where, values)
    found = pixels(where, values)
    if size is None or found.shape[2:] == (size, size):
        return found
    n, channels = found.shape[:2]
    check_size(f"{where}, resized,", n * channels * size * size)
    new = np.empty((n, channels, size, size), np.uint8)
    for number, image in enumerate(found):
        whole = Image.fromarray(image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
        small = np.asarray(resized(whole, size))
        new[number] = small if channels == 1 else small.transpose(2, 0, 1)
    return new
