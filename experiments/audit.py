"""``audit.jsonl``: what became of a run's model, task by task, in entries that are only ever appended.

Each entry holds the SHA-256 of the entry before, of itself, and of the files that it vouches for: the checkpoint of the
model and the logs up to there. So an altered entry shows, and so does an altered file. Whoever can rewrite the file can
rewrite all of it: keep the last entry's hash elsewhere and pass it as ``head``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.config import read_json

FILE = "audit.jsonl"


class AuditError(ValueError):
    """The audit file or a file that it vouches for was altered; the message names the first such line or file."""


@dataclass(frozen=True)
class Entry:
    """One line: its number from 1, its ``event`` ("task", "refused" or "rollback"), the ``task`` whose end (or to
    whose end) it is about, its hash, and the whole JSON object.
    """

    number: int
    event: str
    task: int
    sha256: str
    content: dict[str, Any]


def append(directory: Path, event: str, task: int, facts: dict[str, Any]) -> None:
    """Adds an entry, flushed to the disk. One that says the same as the last (as after a crash) is not added twice.

    Raises AuditError if the file is damaged, OSError if it cannot be written.
    """
    path = directory / FILE
    entries = read(directory)
    last = entries[-1] if entries else None
    facts = {"event": event, "task": task, **facts}
    if last is not None and all(last.content.get(name) == value for name, value in _plain(facts).items()):
        return
    content = {
        "entry": len(entries) + 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "previous": last.sha256 if last else "",
    }
    line = _line(content)
    with path.open("ab") as file:
        file.truncate(sum(len(raw) for raw in _whole_lines(path)))  # a line torn by a crash
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> list[Entry]:
    """All entries, their chain of hashes checked; a last line that a crash tore is passed over.

    Raises AuditError that names the first line that was altered, or that does not follow from the one before.
    """
    path = directory / FILE
    entries: list[Entry] = []
    for number, raw in enumerate(_whole_lines(path), start=1):
        where = f"{path}: line {number}"
        try:
            content = json.loads(raw)
            own = content.pop("sha256")
            event, task, previous = str(content["event"]), int(content["task"]), content["previous"]
            intact = raw == _line(content)  # with the hash that the content has
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise AuditError(f"{where} is no entry ({error!r}): it was altered; restore the file") from None
        if not intact or content.get("entry") != number:
            raise AuditError(f"{where} was altered: it is not what its hash says; restore the file")
        if previous != (entries[-1].sha256 if entries else ""):
            raise AuditError(
                f"{where} does not follow from the line before: that one was replaced, or lines were removed or put in "
                "between; restore the file"
            )
        entries.append(Entry(number, event, task, own, content))
    return entries


def verify(directory: Path, *, head: str = "") -> list[Entry]:
    """Checks the chain and every file that a standing entry vouches for; returns all entries.

    ``head``: a hash (or its beginning) noted earlier, which must still be that of an entry: so not even a rewritten
    file passes.

    Raises AuditError that names the first altered line or file, or says that there is no audit file.
    """
    entries = read(directory)
    if not entries:
        raise AuditError(f"{directory} has no {FILE}, or an empty one: no task of it was finished")
    if head and not any(entry.sha256.startswith(head) for entry in entries):
        raise AuditError(
            f"{directory / FILE}: no entry has the hash {head}: the file was cut or rewritten since that was noted"
        )
    present = standing(entries)
    tasks = [entry.task for entry in present]
    if tasks != list(range(1, len(tasks) + 1)):
        raise AuditError(f"{directory / FILE} speaks of tasks {tasks} only, not of all since the first: restore it")
    _check_end(directory, len(tasks))
    for entry in present:
        for kept in _kept_files(entry):
            check_file(directory, entry, kept)
    return entries


def standing(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of the run's present past: of each task the last one, without what a rollback took back."""
    found: dict[int, Entry] = {}
    for entry in entries:
        found = {task: other for task, other in found.items() if task <= entry.task}
        if entry.event != "rollback":
            found[entry.task] = entry
    return [found[task] for task in sorted(found)]


def prefix_sha256(path: Path, lines: int) -> str:
    """Of the first ``lines`` lines of a file. Raises AuditError if there are fewer."""
    digest = hashlib.sha256()
    left = lines
    with path.open("rb") as file:
        for raw in file:
            if left == 0:
                break
            digest.update(raw)
            left -= 1
    if left:
        raise AuditError(f"{path} has {lines - left} of the {lines} lines that the audit file vouches for")
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_end(directory: Path, tasks: int) -> None:
    """Of a finished run: that no line was taken off the end."""
    metrics = directory / "metrics.json"
    if metrics.exists() and tasks != (n_tasks := len(read_json(metrics)["tasks"])):
        raise AuditError(
            f"{directory / FILE} ends with task {tasks}, but the run is finished and has {n_tasks} tasks: lines were "
            "taken off its end, restore it"
        )


def _kept_files(entry: Entry) -> Iterator[dict[str, Any]]:
    checkpoint = entry.content.get("checkpoint")
    if checkpoint:
        yield checkpoint
    yield from entry.content.get("logs", ())


def check_file(directory: Path, entry: Entry, kept: dict[str, Any]) -> None:
    """Raises AuditError if a file is not what ``kept``, one of the entry's files, says."""
    path = directory / kept["file"]
    if not path.is_file():
        raise AuditError(f"{path}, which line {entry.number} of {FILE} vouches for, is missing: restore it")
    found = prefix_sha256(path, kept["lines"]) if "lines" in kept else file_sha256(path)
    if found != kept["sha256"]:
        raise AuditError(f"{path} is not the file that line {entry.number} of {FILE} vouches for: restore it")


def _whole_lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from (raw for raw in file if raw.endswith(b"\n"))


def _line(content: dict[str, Any]) -> bytes:
    return (json.dumps(content | {"sha256": _sha256(content)}, allow_nan=False) + "\n").encode()


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return plain
