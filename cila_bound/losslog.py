"""The loss log of a run: one JSON object a line, append-only. Schema: :mod:`cila_bound.records`, described in
docs/losslog.md.
"""

from __future__ import annotations

import gzip
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, get_args

from cila_bound.files import write_atomic
from cila_bound.geometry import Geometry
from cila_bound.records import Header, Measurement, Record, Split, TestLoss, Training, from_json, to_json

MAX_RECORDS = 1_000_000  # of a log in memory: under a gigabyte
_MAX_LINE = 2**27


class LogError(ValueError):
    """A damaged or contradictory log; the message holds file, line number, problem and remedy."""


class LogWarning(UserWarning):
    """A log that is usable, but was cut short."""


@dataclass
class LossLog:
    """Header and records of one run. ``add`` validates, so a LossLog that exists is a valid log."""

    header: Header
    _records: dict[tuple[Any, ...], Record] = field(default_factory=dict)

    @property
    def geometry(self) -> Geometry:
        return self.header.geometry

    @property
    def records(self) -> tuple[Record, ...]:
        """All records in the order of the file."""
        return tuple(self._records.values())

    @property
    def last_task(self) -> int:
        """The latest task after which anything was logged; 0 if nothing was."""
        return max((record.after_task for record in self._records.values()), default=0)

    def add(self, record: Record) -> None:
        """Appends a record. Raises ValueError if it is out of range, contradicts itself or repeats an earlier one."""
        record.check(self.header)
        if record.key in self._records:
            raise _duplicate(record)
        self._records[record.key] = record

    def measurement(self, after_task: int, task: int, split: Split) -> Measurement:
        """Raises LookupError if there is no such record; so do the next two."""
        return self._get((Measurement.kind, after_task, task, split))

    def training(self, after_task: int) -> Training:
        return self._get((Training.kind, after_task))

    def test(self, after_task: int, task: int) -> TestLoss:
        return self._get((TestLoss.kind, after_task, task))

    def _get(self, key: tuple[Any, ...]) -> Any:
        try:
            return self._records[key]
        except KeyError:
            raise LookupError(f"the log has no record {_describe(key)}") from None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole log atomically: a reader sees the old file or the new one, nothing in between."""
        write_atomic(Path(path), b"".join(map(_encode, (self.header, *self.records))))


class LossLogWriter:
    """Appends records to a log, each validated, written and flushed at once. A context manager.

    A new file gets the header. An existing one is continued only with ``resume=True`` and a header that is equal but
    for ``versions`` (LogError otherwise), and keeps its own; ``keep`` says how many of its records to keep, and later
    ones (made after the last checkpoint) are dropped, to be made again.
    """

    def __init__(
        self, path: str | os.PathLike[str], header: Header, *, resume: bool = False, keep: int | None = None
    ) -> None:
        self.path = Path(path)
        self.log = LossLog(header)
        if self.path.exists():
            if not resume:
                raise FileExistsError(f"{self.path} exists: resume the run or choose another directory")
            self._resume(header, keep)
        else:
            self.log.write(self.path)
        self._file: IO[bytes] = self.path.open("ab")

    def _resume(self, header: Header, keep: int | None) -> None:
        """Takes in what the file holds and is to be kept, which stays byte for byte, and cuts off the rest."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LogWarning)
            old = read_log(self.path)
        self.log = LossLog(old.header)
        if replace(old.header, versions=header.versions) != header:
            raise LogError(
                f"{self.path}: line 1: the header is that of another run; resume with the same configuration"
            )
        kept = old.records if keep is None else old.records[:keep]
        if keep is not None and len(kept) < keep:
            raise LogError(
                f"{self.path}: has {len(kept)} records where the checkpoint knows {keep}: start the run anew"
            )
        for record in kept:
            self.log.add(record)
        with self.path.open("r+b") as file:
            size, left = 0, 1 + len(kept)
            while left:
                line = file.readline()
                size, left = size + len(line), left - bool(line.strip())
            file.truncate(size)
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
            os.fsync(file.fileno())

    def append(self, record: Record) -> None:
        """Validates and writes one record; ValueError if it does not fit, OSError if the disk is full."""
        self.log.add(record)
        self._file.write(_encode(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> LossLogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_log(path: str | os.PathLike[str]) -> LossLog:
    """Reads and validates a log; a name ending in .gz is that of a gzip-compressed one.

    A last line without its newline that is no complete JSON object was torn by a crash: it is dropped with a
    LogWarning. Any other damage (bad JSON, missing or unknown field, NaN, a value out of its range, a duplicate
    record, another schema version) raises LogError, and so does a log of more records than ``MAX_RECORDS``, before
    they fill the memory: :func:`iter_log` reads that.
    """
    lines = iter_log(path)
    header = next(lines)
    assert isinstance(header, Header)  # iter_log begins with it
    log = LossLog(header)
    for count, record in enumerate(lines, start=1):
        if count > MAX_RECORDS:
            raise LogError(
                f"{path}: line {count + 1}: more than {MAX_RECORDS:,} records are too many for memory: "
                "read them one by one with iter_log"
            )
        assert not isinstance(record, Header)
        log._records[record.key] = record
    return log


def iter_log(path: str | os.PathLike[str]) -> Iterator[Header | Record]:
    """The header and then every record of a log, validated as :func:`read_log` does, one at a time: in memory that does
    not grow with the log, but for one bit a record.
    """
    path = Path(path)
    header: Header | None = None
    seen = _Seen()
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line, complete in _lines(path, file):
            try:
                record = from_json(_decode(line))
                if header is None:
                    if not isinstance(record, Header):
                        raise ValueError("the first line must be the header")
                    header = record
                elif isinstance(record, Header):
                    raise ValueError("a second header: one log holds one run; split the file")
                else:
                    record.check(header)
                    seen.add(record)
            except _BadJsonError as error:
                if complete or header is None:
                    raise LogError(f"{path}: line {number}: {error}; restore the line or remove it") from None
                warnings.warn(f"{path}: line {number}: the last line is torn and was dropped", LogWarning, stacklevel=2)
                continue
            except ValueError as error:
                raise LogError(f"{path}: line {number}: {error}") from None
            yield record
    if header is None:
        raise LogError(f"{path}: line 1: the file is empty; a log starts with its header")


class _Seen:
    """Which records there were: a bit for each (after_task, task, kind and split)."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, record: Record) -> None:
        """Raises ValueError if there was one with the same key."""
        t, i = record.after_task, record.task if not isinstance(record, Training) else 1
        place = 0 if isinstance(record, Training) else 1 if isinstance(record, TestLoss) else 2
        if isinstance(record, Measurement):
            place += get_args(Split).index(record.split)
        number = (t * (t - 1) // 2 + i - 1) * 5 + place
        byte, bit = number // 8, 1 << number % 8
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits)))
        if self._bits[byte] & bit:
            raise _duplicate(record)
        self._bits[byte] |= bit


class _BadJsonError(ValueError):
    """Not JSON at all, as a torn line is."""


def _lines(path: Path, file: gzip.GzipFile | IO[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, line, whether it ends in a newline); blank lines are passed over."""
    try:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), start=1):
            if len(line) == _MAX_LINE:
                raise LogError(f"{path}: line {number}: longer than {_MAX_LINE:,} bytes: this is no loss log")
            if line.strip():
                yield number, line, line.endswith(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LogError(f"{path} is no complete gzip file ({error}): compress the log again") from None


def _encode(record: Header | Record) -> bytes:
    return (json.dumps(to_json(record), allow_nan=False) + "\n").encode()


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_fields)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _BadJsonError(f"not valid JSON ({error})") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number: a run that diverged cannot be certified")


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError(f"a field is given twice among {[name for name, _ in pairs]}")
    return data


def _duplicate(record: Record) -> ValueError:
    return ValueError(f"duplicate record {_describe(record.key)}: a run logs each once; remove one of the two lines")


def _describe(key: tuple[Any, ...]) -> str:
    kind, after_task, *rest = key
    parts = [f"{kind} (after task {after_task}"]
    if rest:
        parts.append(f"on task {rest[0]}")
    if len(rest) > 1:
        parts.append(f"split {rest[1]}")
    return ", ".join(parts) + ")"
