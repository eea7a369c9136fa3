"""``.csv`` files: lists of image files, images as columns of pixels, or columns of features."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from experiments.image_files import SUFFIXES, decode
from experiments.limits import check_size
from experiments.tables import Options, Source, Table, bytes_if_whole, from_matrix, texts

_LONGEST_LINE = 1 << 24
_BLOCK = 1000

Row = tuple[int, list[str]]


def read_csv(path: Path, options: Options) -> Source:
    """Rows below a header. Comma-separated, UTF-8.

    A column of paths of image files (``options.images``, or the one whose first cell ends as those do), relative to the
    file's folder, makes a list of images. Otherwise every column but those of labels and tasks is a feature if its
    first cell is a number; features that are bytes and fill a square are pixels (``tables.from_matrix``).

    Raises ValueError, naming line and column, for rows of another length than the header, cells that are no finite
    number, paths that lead out of the folder, and all that is no such file.
    """
    check_size(f"{path}, read as numbers,", 4 * path.stat().st_size)
    reader = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(_lines(path, file), strict=True)
            header = _header(path, next(reader, []))
            rows = _rows(path, reader, len(header))
            first = next(rows, None)
            if first is None:
                raise ValueError(f"{path} has a header but no rows: add samples")
            label, task = options.roles(path, [name for name in header if name])
            image = _image_column(path, header, first[1], options)
            rows = itertools.chain([first], rows)
            columns = {name: header.index(name) for name in (label, task) if name is not None}
            if image is not None:
                return _listed(path, rows, image, columns, label, task, options)
            return _numeric(path, rows, header, first[1], columns, label, task)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as CSV in UTF-8") from None
    except csv.Error as error:
        line = 0 if reader is None else reader.line_num
        raise ValueError(f"{path}, line {line}: {error}: write the file again, quotes closed and doubled") from None


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"{path} has a line of {_LONGEST_LINE:,} characters or more: it is no table of samples")
        yield line


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not any(names):
        raise ValueError(f"{path} is empty, or begins with an empty line: begin with the names of the columns")
    if all(_is_number(name) for name in names if name):
        raise ValueError(
            f"{path} begins with numbers ({', '.join(names[:3])}, ...) and so without a header: add a first line with "
            "the names of the columns"
        )
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ValueError(f"{path} has the column {twice[0]!r} twice: begin with a header of different names")
    if len(names) < 2:
        raise ValueError(
            f"{path} has a single column, {names[0][:60]!r}: separate columns by commas, labels from samples"
        )
    return names


def _rows(path: Path, reader: Iterator[list[str]], width: int) -> Iterator[Row]:
    """With their line numbers; empty lines are passed over."""
    for row in reader:
        line: int = reader.line_num  # type: ignore[attr-defined]
        if len(row) != width and row:
            raise ValueError(f"{path}, line {line}: {len(row)} cells, but the header has {width}: give as many")
        if row:
            yield line, row


def _image_column(path: Path, header: list[str], first: list[str], options: Options) -> int | None:
    if options.images is not None:
        if options.images not in header:
            raise ValueError(f"{path} has no column {options.images!r}, given as images: choose one of {header}")
        return header.index(options.images)
    found = [number for number, cell in enumerate(first) if Path(cell.strip()).suffix.lower() in SUFFIXES]
    if len(found) > 1:
        raise ValueError(f"{path} has image files in {[header[number] for number in found]}: choose one as images")
    return found[0] if found else None


def _listed(
    path: Path,
    rows: Iterator[Row],
    image: int,
    columns: dict[str, int],
    label: str,
    task: str | None,
    options: Options,
) -> Source:
    folder = path.parent.resolve()
    files: list[Path] = []
    cells: dict[str, list[str]] = {name: [] for name in columns}
    for line, row in rows:
        file = (folder / row[image].strip()).resolve()
        if not file.is_relative_to(folder):
            raise ValueError(f"{path}, line {line}: {row[image]!r} is outside {folder}: copy the image into the folder")
        if not file.is_file():
            raise ValueError(f"{path}, line {line}: there is no file {row[image]!r} in {folder}")
        files.append(file)
        for name, number in columns.items():
            cells[name].append(row[number])
    table = _table(path, decode(files, size=options.size), cells, label, task)
    return Source(table, None, label, task, [f"{path.name} lists {len(files):,} image files"])


def _numeric(
    path: Path,
    rows: Iterator[Row],
    header: list[str],
    first: list[str],
    columns: dict[str, int],
    label: str,
    task: str | None,
) -> Source:
    others = [n for n, name in enumerate(header) if name and n not in columns.values() and name != "task"]
    chosen = [n for n in others if _is_number(first[n]) or not first[n].strip()]
    names = [header[n] for n in chosen]
    if not chosen:
        raise ValueError(
            f"{path} has neither a column of image files nor columns of numbers beside {', '.join(columns)}: add them"
        )
    remarks = []
    if len(chosen) < len(others):
        text = ", ".join(header[n] for n in others if n not in chosen)
        remarks.append(f"columns of text are not used as features: {text}")
    if "" in header:
        remarks.append("a column without a name, which may count the rows, is not used as a feature")
    cells: dict[str, list[str]] = {name: [] for name in columns}
    blocks = []
    while block := list(itertools.islice(rows, _BLOCK)):
        blocks.append(_numbers(path, block, chosen, names))
        for name, number in columns.items():
            cells[name] += [row[number] for _, row in block]
    whole = all(part.dtype == np.uint8 for part in blocks)
    values = from_matrix(np.concatenate(blocks, dtype=np.uint8 if whole else np.float64, casting="unsafe"))
    return Source(
        _table(path, values, cells, label, task),
        None,
        label,
        task,
        remarks,
        tuple(names) if values.dtype != np.uint8 else (),
    )


def _numbers(path: Path, block: Sequence[Row], chosen: Sequence[int], names: Sequence[str]) -> np.ndarray:
    """(rows, columns): uint8 if they all fit, otherwise float64."""
    cells = [[row[number] for number in chosen] for _, row in block]
    try:
        values = np.array(cells, np.float64)
    except ValueError:
        values = np.array([[float(cell) if _is_number(cell) else np.nan for cell in row] for row in cells])
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{path}, line {block[row][0]}, column {names[column]!r}: {cells[row][column][:40]!r} is no finite number: "
            "fill it in, or remove the row or the column"
        )
    return bytes_if_whole(values)


def _table(path: Path, values: np.ndarray, cells: dict[str, list[str]], label: str, task: str | None) -> Table:
    columns = {name: texts(f"{path}: column {name!r}", found) for name, found in cells.items()}
    return Table(values, columns[label], None if task is None else columns[task])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
