"""Datasets that Hugging Face's ``datasets`` has saved (``save_to_disk``), and folders of ``.parquet`` files: read by
pyarrow alone, so that nothing is imported, fetched, unpickled or written on a dataset's behalf.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from experiments.image_files import Encoded, decode_all, inside
from experiments.limits import check_size
from experiments.tables import Options, Source, Table, texts

_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}


def is_arrow(folder: Path) -> bool:
    """Whether a folder is such a dataset."""
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return saved or any(folder.glob("*.parquet"))


def read_arrow(folder: Path, options: Options) -> Source:
    """The split "train", or the only one, and "test" (or "validation" in its absence) as its test split.

    The images are in ``options.images``, or in the only column of images; numbers that the dataset gives names to, as
    classes, become these names.

    Raises ValueError, naming file, column or row, if pyarrow is not installed, a file is damaged or missing, there is
    no column of images or labels, or an image is not in the file itself.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ValueError(f"{folder} needs pyarrow ({error}): pip install 'cila-bound[huggingface]'") from error
    files = _splits(folder)
    train = "train" if "train" in files else next(iter(files))
    if train != "train" and len(files) > 1:
        raise ValueError(f"{folder} has the splits {', '.join(files)}, but none called train: rename one")
    test = next((name for name in ("test", "validation") if name in files and name != train), None)
    tables = {name: _read(pa, files[name]) for name in (train, test) if name is not None}
    columns = tables[train].column_names
    names = _class_names(tables[train].schema)
    label, task = options.roles(folder, columns, next(iter(names)) if len(names) == 1 else None)
    image = _image_column(pa, folder, tables[train].schema, options)
    parts = [
        Table(
            decode_all(_encoded(folder, part.column(image), image), part.num_rows, size=options.size),
            _column(pa, folder, part, label, names),
            None if task is None else _column(pa, folder, part, task, names),
        )
        for part in map(tables.__getitem__, tables)
    ]
    remarks = [f"split {name!r} is not used" for name in files if name not in tables]
    return Source(parts[0], parts[1] if test else None, label, task, remarks)


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Names of the splits, and their files."""
    if (folder / "dataset_dict.json").is_file():
        names = _json(folder / "dataset_dict.json").get("splits")
        return {name: _saved(folder / name) for name in _plain(folder / "dataset_dict.json", names)}
    if (folder / "state.json").is_file():
        return {"train": _saved(folder)}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        prefix = path.name.lower().replace("_", "-").replace(".", "-").partition("-")[0]
        found.setdefault(_SPLITS.get(prefix, "train"), []).append(inside(folder, path))
    return found


def _saved(folder: Path) -> list[Path]:
    state = folder / "state.json"
    entries = _json(state).get("_data_files")
    listed = (
        [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    )
    return [inside(folder, folder / name) for name in _plain(state, listed)]


def _plain(path: Path, names: object) -> list[str]:
    """Raises ValueError unless they are names of files or folders beside ``path``."""
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        foreign = next((name for name in names if Path(name).name != name or name == ".."), None)
        if foreign is None:
            return names
        raise ValueError(f"{path} names {foreign!r}, which is outside its folder: save the dataset again")
    raise ValueError(f"{path} names no data, but {str(names)[:60]}: save the dataset again")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): save the dataset again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object): save the dataset again")
    return content


def _read(pa: Any, files: list[Path]) -> Any:
    """One table; what parquet files declare is checked before they are read, Arrow files are mapped into memory."""
    import pyarrow.parquet as parquet

    parts = []
    for path in files:
        with path.open("rb"):  # raises OSError that names it
            pass
        try:
            if path.suffix == ".parquet":
                file = parquet.ParquetFile(path)
                groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
                check_size("its content", sum(group.total_byte_size for group in groups), path.stat().st_size)
                part = file.read()
            else:
                part = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            check_size("its content", part.nbytes)
            part.validate(full=True)
            part.schema.names  # noqa: B018  (raises for names that are no UTF-8)
        except Exception as error:  # pyarrow has no common one for what hostile bytes do to it
            raise ValueError(f"{path} cannot be read ({error}): save the dataset again") from error
        parts.append(part)
    try:
        return pa.concat_tables(parts)
    except pa.ArrowException as error:
        raise ValueError(f"{files[0]} and the files beside it have different columns ({error})") from error


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Of each column that the dataset declares to hold classes."""
    try:
        declared = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        features = {name: feature for name, feature in declared.items() if feature.get("_type") == "ClassLabel"}
        return {name: list(map(str, feature["names"])) for name, feature in features.items() if name in schema.names}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _image_column(pa: Any, folder: Path, schema: Any, options: Options) -> str:
    def holds_bytes(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type)
        and field.type.get_field_index("bytes") >= 0
        and holds_bytes(field.type.field("bytes").type)
    ]
    plain = [field.name for field in schema if holds_bytes(field.type)]
    listed = ", ".join(map(repr, schema.names)) or "none"
    if options.images is not None:
        if options.images not in found + plain:
            raise ValueError(f"{folder} has no images in a column {options.images!r}; its columns are {listed}")
        return options.images
    if len(found) != 1:
        raise ValueError(
            f"{folder} has {len(found)} columns of encoded images; its columns are {listed}: give one as images, or "
            "save the dataset with a column of the type Image"
        )
    return found[0]


def _encoded(folder: Path, column: Any, name: str) -> Iterator[Encoded]:
    row = 0
    for chunk in column.chunks:
        place = chunk.type.get_field_index("bytes") if chunk.type.num_fields else None
        for scalar in chunk if place is None else chunk.flatten()[place]:
            row += 1
            where, content = f"{folder}, row {row}: column {name!r}", scalar.as_py()
            if content is None:
                raise ValueError(f"{where} holds no image, or only its path: save the dataset with the images in it")
            yield Encoded(where, BytesIO(content))


def _column(pa: Any, folder: Path, table: Any, name: str, names: dict[str, list[str]]) -> np.ndarray:
    if name not in table.column_names:
        raise ValueError(f"{folder}: only one of its splits has a column {name!r}: save both with it")
    column, where = table.column(name), f"{folder}: column {name!r}"
    if pa.types.is_integer(column.type) and name in names:
        values = column.to_pylist()
        wrong = next(
            (row for row, value in enumerate(values) if value is None or not 0 <= value < len(names[name])), None
        )
        if wrong is not None:
            raise ValueError(
                f"{where} is {values[wrong]} in row {wrong + 1}, which is none of its {len(names[name])} classes: "
                "remove such rows"
            )
        return texts(where, [names[name][value] for value in values])
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if any(check(column.type) for check in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)):
        if column.null_count:
            column = column.cast(pa.float64())
        return np.asarray(column.to_numpy())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return texts(where, column.to_pylist())
    raise ValueError(f"{where} has the type {column.type}: choose a column of numbers or text")
