"""Damaged, careless and malicious datasets: each is answered with an error that names the value and the remedy."""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import csv_files, limits
from experiments.npz_files import read_arrays
from experiments.sources import prepare

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (48, 8, 8), dtype=np.uint8)
Y = np.arange(48) % 4
FEATURES = RNG.normal(size=(48, 5))


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(path, **options)


def npz(tmp_path: Path, **arrays: Any) -> Path:
    path = tmp_path / "cells.npz"
    np.savez(path, **{"x": X, "y": Y, **arrays})
    return path


def with_one(values: np.ndarray, value: Any) -> np.ndarray:
    """The values with another in row 7 (of 1)."""
    values = values.copy()
    values[6] = value
    return values


# --- labels, tasks and samples


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": with_one(X / 255, np.nan)}, "'x' has values that are NaN or infinite: give floating point"),
        ({"x": with_one(X / 255, np.inf)}, "'x' has values that are NaN or infinite"),
        ({"x": with_one(FEATURES, np.nan)}, "'x' has 5 values that are NaN or infinite, the first in row 6, column 0"),
        ({"x": with_one(FEATURES, -np.inf)}, "'x' has 5 values that are NaN or infinite"),
        ({"x": X.astype(np.uint16) * 257}, "'x' has dtype uint16: give uint8 in 0..255"),
        ({"x": X.astype(complex)}, "'x' has dtype complex128: give uint8"),
        ({"x": FEATURES * 1j}, "'x' has shape .48, 5. and dtype complex128: give images as"),
        ({"x": np.array(["a"] * 48)}, r"'x' has shape \(48,\)"),
        ({"x": np.uint8(3)}, r"array 'x' has shape \(\): give at least one image"),
        ({"x": X[:0], "y": Y[:0]}, r"'x' has shape \(0, 8, 8\): give at least one image"),
        (
            {"x": X[:, :3, :3]},
            "images of 3 x 3 pixels, but they must be square and 4 or more a side: give an image_size",
        ),
        (
            {"x": np.full_like(X, 9)},
            "channel 0 of the training images is 9 everywhere, so that it cannot be standardised",
        ),
        ({"x": np.stack([X, X, X * 0], 3)}, "channel 2 of the training images is 0 everywhere"),
        ({"x": X * FEATURES[:, :1, None] * 0 + 0.5}, "channel 0 of the training images is 128 everywhere"),
        ({"y": with_one(Y / 1, np.nan)}, "column 'y' is nan in 1 rows, the first of them row 7: fill it in, or remove"),
        ({"y": with_one(Y / 1, -np.inf)}, "column 'y' is -inf in 1 rows"),
        ({"y": with_one(Y.astype(str), " ")}, "column 'y' is empty in 1 rows, the first of them row 7"),
        ({"y": with_one(Y.astype("<U3"), "nan")}, "column 'y' is nan in 1 rows, the first of them row 7"),
        ({"y": with_one(Y / 1, 1.5)}, "column 'y' has fractions such as 1.5 in row 7: .* a threshold, which makes two"),
        ({"y": with_one(Y.astype("<U3"), "1.5")}, "column 'y' has fractions such as 1.5 in row 7"),
        ({"y": with_one(Y / 1, 1e300)}, r"column 'y' has numbers beyond 2\^53"),
        ({"y": with_one(Y.astype(np.uint64), 2**64 - 1)}, r"column 'y' has numbers beyond 2\^53"),
        ({"y": Y.astype("S1")}, "column 'y' has dtype .S1: give numbers or text"),
        ({"y": Y.astype("M8[s]")}, "column 'y' has dtype datetime64.s.: give numbers or text"),
        ({"y": Y * 0 + 3}, r"column 'y' has 1 classes \(3\), but two or more are needed"),
        (
            {"y": np.arange(48)},
            "task '1: 0 ... 9' has 1 samples of class '0', but needs 6: add some, leave the class out",
        ),
        ({"y": Y[:47]}, "array 'y' has 47 values but 'x' 48: give one a sample"),
        ({"x_test": X[:8]}, "has 'x_test' but no 'y_test': add it, or remove 'x_test'"),
        ({"x_test": 255 - X, "y_test": Y[:47]}, "array 'y_test' has 47 values but 'x_test' 48: give one a sample"),
        ({"x_test": X[:, :4, :4], "y_test": Y}, r"test split have the shape \(1, 4, 4\), the others \(1, 8, 8\)"),
        (
            {"x_test": 255 - X, "y_test": Y + 1},
            "class '4' of the test split is none of 0, 1, 2, 3: add training samples",
        ),
        ({"x_test": 255 - X[:46], "y_test": Y[:46] % 3}, "has 0 test samples of class '3', but needs 4"),
        ({"x_test": 255 - X[:13], "y_test": Y[:13]}, "has 3 test samples of class '1', but needs 4"),
        ({"x": X[:7], "y": Y[:7], "x_test": 255 - X, "y_test": Y}, "has 1 samples of class '3', but needs 2"),
    ],
)
def test_samples_and_labels_that_make_no_stream(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(npz(tmp_path, **arrays), message)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (np.where(Y == 3, "b", "a"), "task 'b' has 1 classes .3., but needs two: choose other tasks"),
        (np.where(np.arange(48) < 43, "a", "b"), "task 'b' has 1 samples of class '0', but needs 6"),
        (np.where(np.arange(48) < 28, "a", "b"), "task 'b' has 5 samples of class '0', but needs 6"),
        (with_one(Y / 1, np.nan), "column 'site' is nan in 1 rows"),
        (Y / 2, "column 'site' has fractions such as 0.5 in row 2"),
        (Y[:, None] * np.ones(2), "has no column 'site', given as tasks: choose one of 'y'"),
    ],
)
def test_tasks_that_make_no_stream(site: np.ndarray, message: str, tmp_path: Path) -> None:
    refused(npz(tmp_path, site=site), message, tasks="site")


def test_options_that_name_nothing(tmp_path: Path) -> None:
    refused(npz(tmp_path), "has no column 'kind', given as label: choose one of 'y'", label="kind")
    refused(npz(tmp_path), "has no array 'photos' but 'x', 'y': say which one holds the images", images="photos")
    refused(
        npz(tmp_path, y=np.array(["a", "b"])[Y % 2]), "has text such as 'a', but a threshold .1. needs", threshold=1
    )
    refused(tmp_path / "none.npz", "no such file or folder: .*none.npz")
    (tmp_path / "cells.xlsx").write_text("PK")
    refused(tmp_path / "cells.xlsx", "cells.xlsx is neither .npz nor .csv: give an .npz file .* a .csv file")


# --- .npz files


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    for name in ("x", "y", "meta"):
        refused(npz(tmp_path, **{name: np.array([Bomb()] * 48)}), rf"array '{name}' cannot be read .*unpickled")
    content = pickle.dumps(Bomb())
    (tmp_path / "cells.npz").write_bytes(content)
    refused(tmp_path / "cells.npz", "is no .npz file")
    assert not (tmp_path / "unpickled").exists()


def test_truncated_npz_files(tmp_path: Path) -> None:
    path = npz(tmp_path)
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path, "is no .npz file, or a truncated one|cannot be read")


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """Of a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    ("shape", "dtype", "claim"),
    [
        ((10**12, 8, 8), "|u1", "64,000,000,000,000 bytes"),
        ((10**30,), "|u1", "1,000,000,000,000,000,000,000,000,000,000 bytes"),
        ((47, 8, 8), "|u1", "3,008 bytes"),
        ((48, 8, 8), "<f8", "24,576 bytes"),
        ((10**12,), "|V0", "0 bytes"),
        ((10**12,), "<U0", "0 bytes"),
    ],
)
def test_an_array_that_claims_another_size_than_it_has(
    shape: tuple[int, ...], dtype: str, claim: str, tmp_path: Path
) -> None:
    path = archive(tmp_path / "a.npz", x=header(shape, dtype) + X.tobytes(), y=header((48,)) + bytes(48))
    refused(path, f"array 'x' cannot be read .its header claims {claim}, .* but the file holds 3,072")


def test_what_an_archive_declares_is_checked_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz(tmp_path)
    size = sum(member.file_size for member in zipfile.ZipFile(path).infolist())
    monkeypatch.setattr(limits, "memory_limit", lambda: size)
    assert prepare(path).n_tasks == 2
    monkeypatch.setattr(limits, "memory_limit", lambda: size - 1)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("was read"))
    refused(
        path, "the file would take 0.00 GiB, more than a quarter of this machine's memory .* fewer or smaller samples"
    )


def test_decompression_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros((2**20, 8, 8), np.uint8), y=np.zeros(2**20, np.int8))
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("was read"))
    refused(path, r"the file declares 68,\d+,\d+ bytes packed into \d\d,\d+, as a decompression bomb does")


def test_small_arrays_may_be_packed_tightly(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=X, y=Y, mask=np.zeros(10**6))
    assert prepare(path).n_tasks == 2


@pytest.mark.parametrize("factor", [0.5, 2, 1000])
def test_a_central_directory_that_lies(factor: float, tmp_path: Path) -> None:
    """About the unpacked size of x, with a header that claims as much."""
    claimed = int(48 * factor)
    path = archive(tmp_path / "a.npz", x=header((claimed, 8, 8)) + X.tobytes(), y=header((48,)) + bytes(48))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 24
    content[place : place + 4] = struct.pack("<I", len(header((claimed, 8, 8))) + claimed * 64)
    path.write_bytes(content)
    refused(path, "array 'x' cannot be read")


def test_an_archive_in_an_archive_stays_packed(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("x.npy", header((48, 8, 8)) + X.tobytes())
    path = archive(tmp_path / "a.npz", x=inner.getvalue(), y=header((48,)) + bytes(48))
    refused(path, "array 'x' cannot be read .the magic string is not correct")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("inner.npz", inner.getvalue())
    refused(path, "has none of the arrays , only nothing")


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {"a": np.asfortranarray(FEATURES), "b": np.array("text"), "c": FEATURES[::2, ::-1], "d": Y.astype(">i2")}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    found = read_arrays(tmp_path / "a.npz")
    assert found.keys() == arrays.keys() and read_arrays(tmp_path / "a.npz", ("b", "e")).keys() == {"b"}
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype and np.array_equal(found[name], values)


# --- .csv files


def csv_file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "cells.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


ROWS = [f"{label},{','.join(map(repr, values))}" for label, values in zip(Y.tolist(), FEATURES.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "cells.csv is empty, or begins with an empty line"),
        (["", "y,a"], "begins with an empty line"),
        (["y,a,b,c,d,e"], "has a header but no rows: add samples"),
        (ROWS, r"begins with numbers \(0, .* and so without a header: add a first line"),
        (["y,a,b,a,d,e", *ROWS], "has the column 'a' twice: begin with a header of different names"),
        (["y;a", "1;2"], "has a single column, 'y;a': separate columns by commas"),
        (["y,a,b,c,d,e", *ROWS[:9], "1,2,3", *ROWS[9:]], "line 11: 3 cells, but the header has 6: give as many"),
        (["y,a,b,c,d,e", *ROWS[:9], ROWS[9] + ","], "line 11: 7 cells, but the header has 6"),
        (["y,a,b,c,d,e", *ROWS[:9], "1,2,,4,5,6"], "line 11, column 'b': '' is no finite number: fill it in"),
        (["y,a,b,c,d,e", *ROWS[:9], "1,2,NaN,4,5,6"], "line 11, column 'b': 'NaN' is no finite number"),
        (["y,a,b,c,d,e", *ROWS[:9], "1,2,3,-1e999,5,6"], "line 11, column 'c': '-1e999' is no finite number"),
        (["y,a,b,c,d,e", *ROWS[:9], "1,2,3,unknown,5,6"], "line 11, column 'c': 'unknown' is no finite number"),
        (["y,a,b,c,d,e", "0,1,,3,4,5", *ROWS], "line 2, column 'b': '' is no finite number"),
        (["y,a,b,c,d,e", *ROWS[:9], ",2,3,4,5,6"], "column 'y' is empty in 1 rows, the first of them row 10"),
        (["y,a,b,c,d,e", *ROWS[:9], "1.5,2,3,4,5,6"], "column 'y' has fractions such as 1.5 in row 10"),
        (["y,a,b,c,d,e", *ROWS[:9], '1,2,3,4,5,"6'], "line 11: unexpected end of data: write the file again"),
        (["y,a,b,c,d,e", *ROWS[:9], '1,2,3,4,5,"6"7'], "line 11: ',' expected after"),
        (["y,a,b,c,d,e", *ROWS[:9], "1,2,3,4,5," + "6" * 200_000], "line 11: field larger than field limit"),
        (["kind,a,b,c,d,e", *ROWS], "which column holds the labels. Give label, one of 'kind', 'a'"),
        (
            ["y,note", "1,good", "2,bad"],
            "has neither a column of image files nor columns of numbers beside y: add them",
        ),
        (
            ["y,a", "n" * 300 + ",1"],
            "column 'y' has a value of 300 characters, but labels and tasks are names of at most",
        ),
    ],
)
def test_csv_files_with_mistakes(lines: list[str], message: str, tmp_path: Path) -> None:
    refused(csv_file(tmp_path, "\n".join(lines)), message)


@pytest.mark.parametrize("content", ["y,a\nä,1\n".encode("latin-1"), "y,a\n1,2\n".encode("utf-16"), b"y,a\n\xff,1\n"])
def test_csv_files_in_other_encodings(content: bytes, tmp_path: Path) -> None:
    refused(csv_file(tmp_path, content), r"cells.csv is not UTF-8 \(.*: save it as CSV in UTF-8")


def test_endless_lines_are_not_read_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "_LONGEST_LINE", 1000)
    refused(csv_file(tmp_path, "y,a\n1," + "1" * 10**6), "cells.csv has a line of 1,000 characters or more")
    refused(csv_file(tmp_path, "y," * 500 + "y"), "cells.csv has a line of 1,000 characters or more")


def test_csv_files_that_would_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = csv_file(tmp_path, "\n".join(["y,a,b,c,d,e", *ROWS]))
    monkeypatch.setattr(limits, "memory_limit", lambda: 4 * path.stat().st_size - 1)
    refused(path, "cells.csv, read as numbers, would take")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "a/../../secret.png", "link.png", "out/secret.png"]
)
def test_lists_of_images_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    Image.fromarray(X[0]).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data/out").symlink_to(tmp_path)
    path = csv_file(tmp_path / "data", f"y,file\n1,{name}\n")
    refused(path, rf"cells.csv, line 2: '{re.escape(name)}' is outside {tmp_path / 'data'}: copy the image into")


@pytest.mark.parametrize("name", ["gone.png", "folder.png", "pipe.png"])
def test_lists_of_what_is_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    refused(csv_file(tmp_path, f"y,file\n1,{name}\n"), f"line 2: there is no file '{name}' in {tmp_path}")
    with pytest.raises(ValueError, match="null"):
        prepare(csv_file(tmp_path, "y,file\n1,a\0.png\n"))


def test_a_list_with_a_damaged_image(tmp_path: Path) -> None:
    Image.fromarray(X[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    refused(csv_file(tmp_path, "y,file\n0,a.png\n1,b.png\n"), "b.png cannot be decoded .* replace or remove it")


# --- folders


def test_folders_with_too_few_classes(tmp_path: Path) -> None:
    refused(tmp_path, "has no class folders: give an .npz file")
    (tmp_path / "oak").mkdir()
    refused(tmp_path, "oak holds no images")
    for number, image in enumerate(X):
        Image.fromarray(image).save(tmp_path / f"oak/{number}.png")
    refused(tmp_path, r"column 'class' has 1 classes \(oak\), but two or more are needed")


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that others may enter, and a user who may not read what its owner keeps to himself."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield Path(name)
        os.seteuid(user)


def test_what_may_not_be_read_is_named(unprivileged: Path) -> None:
    user = os.geteuid()
    saved = ["saved/state.json"] if importlib.util.find_spec("pyarrow") else []
    for name in ("a.npz", "a.csv", "folder/oak/a.png", "locked/oak/a.png", *saved):
        os.seteuid(os.getuid())
        path = unprivileged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.fromarray(X[0]).save(path)
        else:
            path.write_text("PK")
        top = unprivileged / name.partition("/")[0]
        closed = top if top.name in ("a.npz", "a.csv", "locked") else path
        closed.chmod(0)
        os.seteuid(user)
        with pytest.raises(
            (PermissionError, ValueError), match=rf"{re.escape(str(top))}.*(may not be read|Permission de)"
        ):
            prepare(top)


# --- Hugging Face datasets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(image) for image in X]
    types = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    dataset = datasets.Dataset.from_dict({"image": images, "label": Y}, features=datasets.Features(types))
    dataset.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "state.json is damaged"),
        (b"[" * 100_000, "state.json is damaged"),
        (b"[1]", "state.json is damaged .no JSON object"),
        (b"{}", "state.json names no data, but"),
        (
            b'{"_data_files": [{"filename": "../../secret.arrow"}]}',
            "state.json names '../../secret.arrow', which is out",
        ),
        (b'{"_data_files": [{"filename": "/etc/passwd"}]}', "state.json names '/etc/passwd', which is outside"),
        (b'{"_data_files": [{"filename": ".."}]}', "names '..', which is outside"),
        (b'{"_data_files": [{"filename": 7}]}', "state.json names no data, but .7."),
        (b'{"_data_files": [7]}', "state.json names no data"),
    ],
)
def test_saved_datasets_with_a_damaged_state(content: bytes, message: str, saved: Path) -> None:
    (saved / "state.json").write_bytes(content)
    refused(saved, message)


def test_splits_that_are_elsewhere(saved: Path) -> None:
    (saved.parent / "dataset_dict.json").write_text(json.dumps({"splits": ["../saved"]}))
    refused(saved.parent, "dataset_dict.json names '../saved', which is outside its folder")
    (saved.parent / "dataset_dict.json").write_text(json.dumps({"splits": ["saved"]}))
    assert prepare(saved.parent).n_tasks == 2


def test_damaged_arrow_and_parquet_files(saved: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    arrow = next(saved.glob("*.arrow"))
    content = arrow.read_bytes()
    for size in (0, 1, 100, len(content) // 2):
        arrow.write_bytes(content[:size])
        refused(saved, "arrow cannot be read .*: save the dataset again")
    arrow.write_bytes(content)
    folder = saved.parent / "files"
    folder.mkdir()
    pyarrow.parquet.write_table(pa.ipc.open_stream(content).read_all(), folder / "a.parquet")
    assert prepare(folder).n_tasks == 2
    content = (folder / "a.parquet").read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        (folder / "a.parquet").write_bytes(content[:size])
        refused(folder, "a.parquet cannot be read .*: save the dataset again")
    arrow.unlink()
    with pytest.raises(OSError, match=re.escape(str(arrow))):
        prepare(saved)


def test_parquet_files_that_would_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"label": np.zeros(10**7, np.int64)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", lambda *_: pytest.fail("was read"))
    refused(tmp_path, "a.parquet cannot be read .its content declares 80,.* as a decompression bomb")
    monkeypatch.setattr(limits, "memory_limit", lambda: 10**7)
    refused(tmp_path, "a.parquet cannot be read .its content would take 0.07 GiB")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "row 1: column 'image' holds no image, or only its path: save the dataset with the images in it"),
        ({"bytes": None, "path": "/etc/passwd"}, "row 1: column 'image' holds no image, or only its path"),
        ({"bytes": b"text", "path": None}, "row 1: column 'image' cannot be decoded"),
        ("photo.png", "has 0 columns of encoded images; its columns are 'image', 'label': give one as images, or save"),
        (3.5, "has 0 columns of encoded images"),
    ],
)
def test_parquet_files_without_images(image: Any, message: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    kind = None if isinstance(image, str | float) else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array([image] * 8, kind), "label": np.arange(8) % 2})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path, message)
    if isinstance(image, str):
        refused(tmp_path, "has no images in a column 'image'; its columns are 'image', 'label'", images="image")


def test_text_that_is_none_is_found_when_a_file_is_read(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"label": pa.array([b"oak", b"\xff"]).cast(pa.string(), safe=False)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path, "a.parquet cannot be read .*UTF8.*: save the dataset again")


def test_parquet_files_of_different_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for name in ("a", "b"):
        pyarrow.parquet.write_table(pa.table({name: [1]}), tmp_path / f"{name}.parquet")
    refused(tmp_path, "a.parquet and the files beside it have different columns")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    refused(tmp_path, r"needs pyarrow .*pip install 'cila-bound\[huggingface\]'")


# --- any bytes


def whole_npz(compressed: bool) -> bytes:
    file = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(file, x=X[:24], y=np.array(["oak", "ash"])[Y[:24] % 2], task=np.repeat([1.0, 2.0], 12))
    return file.getvalue()


WHOLE = {
    "stored.npz": whole_npz(False),
    "packed.npz": whole_npz(True),
    "features.csv": "\n".join(["y,a,b,c,d,e", *ROWS]).encode(),
    "pixels.csv": "\n".join(
        [",".join(["y", "task", *map(str, range(64))])]
        + [",".join(map(str, [n % 2, n // 12, *X[n].ravel().tolist()])) for n in range(24)]
    ).encode(),
}


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes replaced, a part removed, repeated or replaced, or the end cut off."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(result)))
        end = min(start + draw(st.sampled_from([0, 1, 1, 2, 4, 100, 10**6])), len(result))
        new = draw(st.one_of(st.binary(max_size=8), st.just(bytes(result[start:end]) * 2), st.just(b"")))
        result[start:end] = new
    return bytes(result)


@pytest.mark.parametrize("name", WHOLE)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data.draw(mutated(WHOLE[name])))
        with contextlib.suppress(ValueError, OSError):
            prepared = prepare(path)
            assert np.isfinite(prepared.train.images).all() and (prepared.counts >= 0).all()


def test_the_files_that_are_mutated_are_whole(tmp_path: Path) -> None:
    for name, content in WHOLE.items():
        (tmp_path / name).write_bytes(content)
        assert prepare(tmp_path / name).n_tasks == 2
