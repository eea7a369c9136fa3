"""The loss log: what is written is read, what is torn is dropped, what is damaged is refused with its line."""

import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cila_bound import (
    LogError,
    LogWarning,
    LossLog,
    LossLogWriter,
    Measurement,
    Statistic,
    TestLoss,
    iter_log,
    losslog,
    read_log,
)
from cila_bound.records import from_json, to_json
from tests.simulate import simulate

LOG = simulate(3, 2, 0.5, n=10)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines_of(log: LossLog) -> list[dict]:
    return [json.loads(json.dumps(to_json(record))) for record in (log.header, *log.records)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "losses.jsonl"
    LOG.write(target)
    return target


def test_round_trip(path: Path) -> None:
    copy = read_log(path)
    assert copy == LOG
    assert copy.records == LOG.records
    copy.write(path)
    assert read_log(path) == LOG
    assert not list(path.parent.glob(".*"))  # no temporary file stays


def test_a_compressed_log_reads_the_same_and_damage_to_it_is_named(path: Path, tmp_path: Path) -> None:
    packed = tmp_path / "losses.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_log(packed) == LOG
    whole = packed.read_bytes()
    for damaged in (whole[:-20], whole[:5], b"no gzip", whole[:40] + b"\xff" * 20 + whole[60:]):
        packed.write_bytes(damaged)
        with pytest.raises(LogError, match=r"losses\.jsonl\.gz is no complete gzip file .*: compress the log again"):
            read_log(packed)


means = st.floats(0.1, 3.0)
statistics = st.builds(Statistic, means, st.floats(0.0, 0.5))


@given(st.integers(2, 10**6), statistics, st.builds(Statistic, st.floats(0.1, 0.9), st.floats(0.0, 0.01)))
def test_records_round_trip_through_json(n: int, loss: Statistic, miss: Statistic) -> None:
    record = Measurement(1, 1, "heldout", n, n, loss, miss)
    again = from_json(json.loads(json.dumps(to_json(record))))
    assert again == record
    record.check(LOG.header)


def test_writer_appends_line_by_line(tmp_path: Path) -> None:
    target = tmp_path / "losses.jsonl"
    with LossLogWriter(target, LOG.header) as writer:
        for count, record in enumerate(LOG.records, start=1):
            writer.append(record)
            assert len(read_log(target).records) == count  # readable after every record, while still open
    assert read_log(target) == LOG


def test_writer_refuses_to_overwrite(path: Path) -> None:
    with pytest.raises(FileExistsError, match="resume the run or choose another directory"):
        LossLogWriter(path, LOG.header)


def test_writer_resumes_from_the_checkpoint(path: Path) -> None:
    """Records after the checkpoint, and a torn line, are dropped and made again."""
    with path.open("a") as file:
        file.write('{"record": "measu')
    with LossLogWriter(path, LOG.header, resume=True, keep=4) as writer:
        assert writer.log.records == LOG.records[:4]
        for record in LOG.records[4:]:
            writer.append(record)
    assert read_log(path) == LOG


def test_writer_keeps_the_first_versions_but_no_other_run(path: Path) -> None:
    newer = dataclasses.replace(LOG.header, versions={"numpy": "99"})
    with LossLogWriter(path, newer, resume=True) as writer:
        assert writer.log.header == LOG.header
    with pytest.raises(LogError, match="header is that of another run"):
        LossLogWriter(path, dataclasses.replace(LOG.header, seed=7), resume=True)
    with pytest.raises(LogError, match="checkpoint knows 999"):
        LossLogWriter(path, LOG.header, resume=True, keep=999)


def test_a_line_that_cannot_be_appended_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "losses.jsonl"
    with LossLogWriter(target, LOG.header) as writer:
        writer.append(LOG.records[0])
        with pytest.raises(ValueError, match="duplicate record"):
            writer.append(LOG.records[0])
    assert len(read_log(target).records) == 1


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_is_dropped_with_a_warning(path: Path, cut: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1][: -cut + 1] if cut > 1 else content[:-2])
    with pytest.warns(LogWarning, match=f"line {len(content.splitlines())}: the last line is torn"):
        log = read_log(path)
    assert log.records == LOG.records[:-1]


def test_a_complete_last_line_without_newline_is_kept(path: Path) -> None:
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_log(path) == LOG


def test_a_log_torn_at_any_byte_is_a_prefix_or_an_error(path: Path) -> None:
    content = path.read_bytes()
    first = len(content.splitlines()[0])
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LogWarning)
            if size < first:
                with pytest.raises(LogError, match="line 1"):
                    read_log(path)
            else:
                records = read_log(path).records
                assert records == LOG.records[: len(records)]


def edit(change: dict, *, remove: str | None = None, line: int = 2):  # type: ignore[no-untyped-def]
    """Changes one line (from 1) of a log, as a list of objects."""

    def apply(data: list[dict]) -> list[dict]:
        data[line - 1] = {k: v for k, v in {**data[line - 1], **change}.items() if k != remove}
        return data

    return apply


def statistic(mean: object, variance: object = 0.1) -> dict:
    return {"mean": mean, "variance": variance}


LAST = len(LOG.records) + 1  # line number of the last training record
TEACHER = ("distillation", "teacher_entropy", "drift", "teacher_contrastive", "teacher_miss_probability")
DAMAGE = {
    "missing field": (edit({}, remove="n"), 2, "missing field 'n'"),
    "unknown field": (edit({"notes": 1}), 2, "unknown field 'notes'"),
    "unknown kind": (edit({"record": "guess"}), 2, "must be one of .* got 'guess'"),
    "wrong type": (edit({"n": "10"}), 2, "n must be of type int, got '10'"),
    "boolean as number": (edit({"n": True}), 2, "n must be of type int, got True"),
    "illegal split": (edit({"split": "test"}), 2, "split must be one of .* got 'test'"),
    "negative loss": (edit({"contrastive": statistic(-0.1)}), 2, "contrastive.mean must lie in .* got -0.1"),
    "loss above ceiling": (edit({"contrastive": statistic(99.0)}), 2, "contrastive.mean must lie in .* got 99.0"),
    "huge integer": (edit({"contrastive": statistic(10**400)}), 2, "mean must be finite"),
    "impossible variance": (edit({"contrastive": statistic(1.0, 99.0)}), 2, "contrastive.variance must lie in"),
    "negative variance": (edit({"contrastive": statistic(1.0, -0.1)}), 2, "contrastive.variance must lie in"),
    "miss above one": (edit({"miss_probability": statistic(1.5)}), 2, "miss_probability.mean must lie in"),
    "more effective than real": (edit({"n_effective": 99}), 2, "n_effective <= n"),
    "no tuples": (edit({"n": 0, "n_effective": 0}), 2, "1 <= n_effective"),
    "task of the future": (edit({"task": 2}), 2, "task must be in 1..after_task = 1, got 2"),
    "no such task": (edit({"after_task": 9}), 2, "after_task must be in 1..3"),
    "teacher after task 1": (edit({name: statistic(0.5) for name in TEACHER}), 2, "distillation is set after task 1"),
    "half a teacher": (edit({"drift": None}, line=6), 6, "drift is null while"),
    "no teacher later": (edit(dict.fromkeys((*TEACHER, "tuples")), line=6), 6, "distillation is null"),
    "sum of losses": (
        edit({"distillation": statistic(0.9)}, line=6),
        6,
        "distillation.mean is 0.9, but teacher_entropy",
    ),
    "too few tuple values": (
        edit({"tuples": {"teacher_contrastive": [0.5], "drift": [0.1]}}, line=6),
        6,
        "has 1 values for n = 10",
    ),
    "training sum": (edit({"loss": 0.1}, line=5), 5, "loss is 0.1, but contrastive_weight x contrastive"),
    "lambda of task 1": (edit({"distill_weight": 1.0}, line=5), 5, "distill_weight must be 0 for task 1"),
    "shares": (edit({"mixture_weights": [0.5, 0.5, 0.5]}, line=LAST), LAST, "sum of mixture_weights is 1.5"),
    "number of shares": (edit({"mixture_weights": [1.0]}, line=LAST), LAST, "3 shares, one per task, got 1"),
    "other version": (edit({"schema": 2}, line=1), 1, "schema is version 2, this program reads 1"),
    "temperature": (edit({"temperature": -1.0}, line=1), 1, "temperature must be .* got -1.0"),
    "repeated task name": (edit({"tasks": ["a", "a"]}, line=1), 1, "different names"),
    "duplicate": (lambda data: [*data, data[3]], LAST + 1, "duplicate record test .after task 1, on task 1"),
    "second header": (lambda data: [*data, data[0]], LAST + 1, "a second header"),
    "no header": (lambda data: data[1:], 1, "the first line must be the header"),
    "not an object": (lambda data: [*data[:2], [1, 2], *data[2:]], 3, "must be a JSON object, got list"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_its_line(path: Path, name: str) -> None:
    change, number, message = DAMAGE[name]
    data = change(lines(path))
    path.write_text("".join(json.dumps(line) + "\n" for line in data))
    with pytest.raises(LogError, match=f"{re.escape(str(path))}: line {number}: .*{message}"):
        read_log(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"record": "test", "n": NaN}', "NaN is no JSON number"),
        ('{"record": "test", "n": 1, "n": 2}', "a field is given twice"),
        ('{"record": "test"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
    ],
)
def test_bad_json_in_the_middle_is_refused(path: Path, text: str, message: str) -> None:
    content = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([content[0], text.encode("latin-1"), *content[1:], b""]))
    with pytest.raises(LogError, match=f"line 2: {message}"):
        read_log(path)


def test_empty_file_is_refused(path: Path) -> None:
    path.write_text("")
    with pytest.raises(LogError, match="line 1: the file is empty"):
        read_log(path)


@given(st.binary(max_size=300), st.integers(0, 10**6))
def test_noise_gives_only_the_documented_exceptions(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    path = tmp_path_factory.mktemp("noise") / "losses.jsonl"
    LOG.write(path)
    content = path.read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + noise + content[at + len(noise) :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LogWarning)
        try:
            read_log(path)
        except LogError as error:
            assert re.match(rf"{re.escape(str(path))}: line \d+: .", str(error))  # noqa: PT017


FIELDS = sorted({name for record in lines_of(LOG) for name in record})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*FIELDS, "mean", "variance"]), inner),
    max_leaves=6,
)


@given(st.integers(0, len(LOG.records)), st.sampled_from([*FIELDS, "mean", "variance"]), JSON, st.booleans())
@settings(max_examples=400)
def test_any_value_in_any_field_is_read_or_refused_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, line: int, name: str, value: object, inside: bool
) -> None:
    """Fields replaced or added, at the top or in a statistic: a valid log or a LogError, nothing else."""
    data = lines_of(LOG)
    target = data[line]
    if inside and isinstance(target.get("contrastive"), dict):
        target["contrastive"][name] = value
    else:
        target[name] = value
    path = tmp_path_factory.mktemp("fuzz") / "losses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in data))
    try:
        log = read_log(path)
    except LogError as error:
        assert re.match(rf"{re.escape(str(path))}: line \d+: .", str(error))  # noqa: PT017
    else:
        assert len(log.records) == len(LOG.records)


def test_records_one_by_one_are_those_of_the_whole_log(path: Path) -> None:
    header, *records = iter_log(path)
    assert header == LOG.header
    assert tuple(records) == LOG.records
    with path.open("a") as file:
        file.write(json.dumps(lines(path)[3]) + "\n")
    with pytest.raises(LogError, match=f"line {len(LOG.records) + 2}: duplicate record test"):
        list(iter_log(path))


def test_a_long_log_is_streamed_and_too_long_a_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """120 tasks, 7,260 records: reading one by one takes no memory that grows with them."""
    header = dataclasses.replace(LOG.header, tasks=tuple(f"task {i}" for i in range(120)))
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        file.write(json.dumps(to_json(header)) + "\n")
        text = json.dumps(to_json(LOG.test(1, 1)))
        for t in range(1, 121):
            for i in range(1, t + 1):
                file.write(text.replace('"after_task": 1, "task": 1', f'"after_task": {t}, "task": {i}') + "\n")
    tracemalloc.start()
    assert sum(1 for _ in iter_log(path)) == 1 + 120 * 121 // 2
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()
    monkeypatch.setattr(losslog, "MAX_RECORDS", 1000)
    with pytest.raises(LogError, match=r"line 1002: more than 1,000 records are too many for memory: .* iter_log"):
        read_log(path)


def test_an_endless_line_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losslog, "_MAX_LINE", 10_000)
    with path.open("a") as file:
        file.write(" " * 20_000)
    with pytest.raises(LogError, match="longer than 10,000 bytes: this is no loss log"):
        read_log(path)


def test_more_tasks_than_anyone_has_are_refused() -> None:
    with pytest.raises(ValueError, match="tasks must be at most 10,000, got 10,001"):
        dataclasses.replace(LOG.header, tasks=tuple(map(str, range(10_001))))


def test_a_resumed_log_keeps_its_bytes(path: Path) -> None:
    """Also blank lines, spacing of another writer, and a last line without its newline."""
    first, second, *_ = path.read_text().splitlines()
    foreign = f"{first}\n\n{second.replace(': ', ':')}"
    for tail in ("", "\n", '\n{"record": "te'):
        path.write_text(foreign + tail)
        with LossLogWriter(path, LOG.header, resume=True, keep=1) as writer:
            assert path.read_text() == foreign + "\n"
            writer.append(LOG.records[1])
        assert read_log(path).records == LOG.records[:2]


def test_columns_of_tuples_may_be_left_out(path: Path) -> None:
    """As by a writer that logs what the pointwise bound needs; what is there is checked."""
    data = lines(path)
    record = next(d for d in data if d.get("tuples"))
    record["tuples"] = {name: record["tuples"][name] for name in ("teacher_contrastive", "drift")}
    path.write_text("".join(json.dumps(d) + "\n" for d in data))
    assert read_log(path).records[data.index(record) - 1].tuples.column("contrastive") is None
    for change, message in (
        ({"contrastive": [0.5] * 3}, "tuples.contrastive has 3 values for n = 10 tuples"),
        ({"contrastive": [0.5] * 10}, "contrastive.mean is .* but the mean of tuples.contrastive is 0.5"),
        ({"block": 0}, "tuples.block must be at least 1, got 0"),
        ({"surprise": []}, "unknown field 'surprise' in tuples"),
    ):
        changed = [d | {"tuples": d["tuples"] | change} if d is record else d for d in data]
        path.write_text("".join(json.dumps(d) + "\n" for d in changed))
        with pytest.raises(LogError, match=message):
            read_log(path)


def test_a_killed_writer_leaves_a_readable_log(tmp_path: Path) -> None:
    """A process that dies by SIGKILL in the middle of appending loses at most the line it was at."""
    target = tmp_path / "losses.jsonl"
    script = (
        "import os, sys, signal\n"
        "from cila_bound import LossLogWriter\n"
        "from tests.simulate import simulate\n"
        "log = simulate(3, 2, 0.5, n=10)\n"
        f"writer = LossLogWriter({str(target)!r}, log.header)\n"
        "for number, record in enumerate(log.records):\n"
        "    if number == 7:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    writer.append(record)\n"
    )
    root = Path(__file__).parent.parent
    died = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False
    )
    assert died.returncode == -9
    assert read_log(target).records == LOG.records[:7]


def test_values_off_by_rounding_are_accepted() -> None:
    """float32 means may lie beyond the ceiling by one part in ten million."""
    geometry = LOG.geometry
    TestLoss(1, 1, 10, 10, Statistic(geometry.ceiling * (1 + 1e-7), 0.0)).check(LOG.header)
    with pytest.raises(ValueError, match="must lie in"):
        TestLoss(1, 1, 10, 10, Statistic(geometry.ceiling * (1 + 1e-4), 0.0)).check(LOG.header)
