"""Atomic files: a reader sees the old file or the new one, whenever the writer is killed."""

from __future__ import annotations

import os
from pathlib import Path


def remove_stale(folder: Path) -> None:
    """Removes what writers left that were killed in the middle, also from the folders below. Nobody else may be writing
    there.
    """
    for path in folder.rglob(".*.[0-9]*"):
        if path.suffix[1:].isdigit():
            path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data`` and makes its folder if need be. Raises OSError that names it (disk full, no
    permission) with the old file intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
