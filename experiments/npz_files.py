"""``.npz`` files: any, with what they declare checked before it is read and nothing unpickled, and those that hold a
dataset.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.image_files import Labelled, Own
from experiments.limits import check_size

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_arrays(path: Path, wanted: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file that are both ``wanted`` (None: all) and there.

    Raises ValueError if the file is damaged, is no ``.npz`` file, has none of them, or declares more than its members
    hold or ``check_size`` allows; an array of objects is not unpickled. Raises OSError if it cannot be opened.
    """
    arrays: dict[str, np.ndarray] = {}
    name = ""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is no .npz file, or a truncated one: write it again with numpy.savez")
        try:
            with zipfile.ZipFile(file) as archive:
                members = {
                    member.filename.removesuffix(".npy"): member
                    for member in archive.infolist()
                    if member.filename.endswith(".npy")
                }
                names = list(members) if wanted is None else [name for name in wanted if name in members]
                chosen = [members[name] for name in names]
                unpacked = sum(member.file_size for member in chosen)
                check_size("the file", unpacked, sum(member.compress_size for member in chosen))
                for name, member in zip(names, chosen, strict=True):
                    arrays[name] = _array(archive, member)
        except Exception as error:  # zipfile, zlib and numpy have no common one for what hostile bytes do to them
            raise ValueError(
                f"{path}: array {name!r} cannot be read ({error}): write the file again with numpy.savez, every array "
                "holding numbers or text and no objects"
            ) from error
    if not arrays:
        raise ValueError(
            f"{path} has none of the arrays {', '.join(wanted or ())}, only {listed(members)}: rename them"
        )
    return arrays


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """``zipfile`` reads no more than the size that the archive declares, to which the array's own header must agree."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"its format has version {version}")
        shape, _, dtype = _HEADERS[version](file)
        if dtype.hasobject:
            raise ValueError("its objects would have to be unpickled")
        claimed, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if claimed != there or not dtype.itemsize:
            raise ValueError(f"its header claims {claimed:,} bytes, {shape} {dtype}, but the file holds {there:,}")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Replaces ``path`` by an ``.npz`` file, atomically. Raises OSError with the old file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes all keywords for allow_pickle
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_npz(path: Path) -> Own:
    """Training images and, if the file has them, test images; or rows of features in their place.

    ``x``: (n, H, W), (n, H, W, C) or (n, C, H, W) with C 1 or 3; uint8, or floating point in [0, 1], which is rounded
    to the 256 levels of uint8. Or features (n, d), floating point. ``y``: (n,) integers or text. ``task``: (n,)
    integers or text, optional. ``x_test``, ``y_test`` (and ``task_test`` if there is a ``task``): the same for an
    official test split. ``class_names`` and ``task_names``, text, optional: what the integers 0, 1, ... stand for.

    Raises ValueError, naming file, array and remedy, for anything else.
    """
    arrays = read_arrays(path, ("x", "y", "task", "x_test", "y_test", "task_test", "class_names", "task_names"))
    columns = ("x", "y", "task") if {"task", "task_test"} & arrays.keys() else ("x", "y")
    tested = any(name.endswith("_test") for name in arrays)
    missing = [name for name in (*columns, *(f"{name}_test" for name in columns if tested)) if name not in arrays]
    if missing:
        raise ValueError(
            f"{path} lacks the array {missing[0]!r} beside {listed(arrays)}: add it (x and y; x_test and y_test for "
            "an official test split; task for both splits or neither)"
        )
    names = {name: _names(path, f"{name}_names", arrays.get(f"{name}_names")) for name in ("class", "task")}
    train = _split(path, arrays, "")
    if not tested:
        return Own(train, None, names)
    test = _split(path, arrays, "_test")
    if test.images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"{path}: images of 'x_test' are {test.images.shape[1:]} (channels, height, width), those of 'x' "
            f"{train.images.shape[1:]}: bring them to one size"
        )
    for name in ("y", "task"):
        kinds = {arrays[key].dtype.kind == "U" for key in (name, f"{name}_test") if key in arrays}
        if len(kinds) > 1:
            raise ValueError(f"{path}: one of {name!r} and '{name}_test' is text, the other is not: write both alike")
    return Own(train, test, names)


def _names(path: Path, name: str, values: np.ndarray | None) -> tuple[str, ...]:
    if values is None:
        return ()
    if values.dtype.kind != "U" or values.ndim != 1 or len(np.unique(values)) < len(values):
        raise ValueError(
            f"{path}: array {name!r} has dtype {values.dtype} and shape {values.shape}: give different texts, one for "
            "each number"
        )
    return tuple(values.tolist())


def _split(path: Path, arrays: dict[str, np.ndarray], suffix: str) -> Labelled:
    values = arrays[f"x{suffix}"]
    images = (features if values.ndim == 2 else pixels)(f"{path}: array 'x{suffix}'", values)
    labels = _column(path, f"y{suffix}", arrays[f"y{suffix}"], f"x{suffix}", len(images))
    task = arrays.get(f"task{suffix}")
    tasks = None if task is None else _column(path, f"task{suffix}", task, f"x{suffix}", len(images))
    return Labelled(images, labels, tasks)


def features(where: str, values: np.ndarray) -> np.ndarray:
    """(n, d) floating point as (n, 1, 1, d) float64. Raises ValueError for anything else, and for NaN or infinity."""
    if values.dtype.kind != "f" or not values.size:
        raise ValueError(
            f"{where} has shape {values.shape} and dtype {values.dtype}: give images as (n, H, W), (n, H, W, C) or "
            "(n, C, H, W), or features (n, d) in floating point"
        )
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{where} has {len(bad):,} values that are NaN or infinite, the first in row {row}, column {column}: "
            "remove those rows, or fill them in"
        )
    return values.astype(np.float64)[:, None, None, :] + 0.0  # no -0, which equals 0 but for its bytes


def pixels(where: str, values: np.ndarray) -> np.ndarray:
    """Images in any layout of ``read_npz`` as (n, channels, height, width) uint8. Raises ValueError for others."""
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


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "nothing"
