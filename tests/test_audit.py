"""The audit file names what was altered first; a run goes back to an earlier model; a gate refuses updates."""

import dataclasses
import hashlib
import itertools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cila_bound import certify, read_log
from experiments import __main__ as command_line
from experiments import audit, directory, gate, train
from experiments.config import RunConfig
from experiments.rollback import rollback

CONFIG = RunConfig(n_tasks=5, epochs_first=2, epochs=1, buffer_size=40, tuple_rounds=2, max_tuples=20, probe_epochs=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    train.run(CONFIG, path, show_progress=False)
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def lines(run: Path) -> list[str]:
    return (run / audit.FILE).read_text().splitlines(keepends=True)


def sealed(content: dict[str, Any]) -> str:
    """A line with the hash that belongs to it, as someone who knows the format would write it."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}) + "\n"


# --- the audit file


def test_every_task_is_on_file(run: Path) -> None:
    entries = audit.verify(run)
    assert [(entry.event, entry.task) for entry in entries] == [("task", t) for t in range(1, 6)]
    log = read_log(run / "losses.jsonl")
    for entry in entries:
        kept = entry.content["checkpoint"]
        assert kept == {"file": f"checkpoints/task-{entry.task}.pt", "sha256": audit.file_sha256(run / kept["file"])}
        records = [record for record in log.records if record.after_task <= entry.task]
        assert entry.content["logs"][0]["lines"] == 1 + len(records)
        for written in entry.content["certificates"]:
            options = {"chain": written["chain"], "after_task": entry.task, "confidence": 0.95}
            certificate = certify(log, written["step"], **options)
            assert written["per_task"] == list(certificate.per_task)
            assert written["statements"] == len(certificate.statements)
    assert entries[0].content["previous"] == ""
    assert all(b.content["previous"] == a.sha256 for a, b in itertools.pairwise(entries))


@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("clever", [False, True])
def test_the_first_altered_line_is_named(run: Path, number: int, clever: bool) -> None:
    """Also if its own hash was made to fit, which the next line, or the last one's hash kept elsewhere, gives away."""
    head = audit.read(run)[-1].sha256
    changed = lines(run)
    content = json.loads(changed[number - 1])
    content["certificates"][0]["total"] -= 0.5
    changed[number - 1] = sealed(content) if clever else json.dumps(content) + "\n"
    (run / audit.FILE).write_text("".join(changed))
    if not clever:
        with pytest.raises(audit.AuditError, match=f"line {number} was altered: it is not what its hash says"):
            audit.verify(run)
    elif number < 5:
        with pytest.raises(audit.AuditError, match=f"line {number + 1} does not follow from the line before"):
            audit.verify(run)
    else:
        audit.verify(run)
        with pytest.raises(audit.AuditError, match=f"no entry has the hash {head}"):
            audit.verify(run, head=head)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: [*rows[:1], *rows[2:]], "line 2 was altered"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "line 1 was altered"),
        (lambda rows: [*rows[:2], "\n", *rows[2:]], "line 3 is no entry"),
        (lambda rows: [*rows[:2], "[1]\n", *rows[2:]], "line 3 is no entry"),
        (lambda rows: [*rows[:2], '{"entry": 3}\n', *rows[2:]], "line 3 is no entry"),
        (lambda rows: [*rows[:2], "\udcff\n", *rows[2:]], "line 3 is no entry"),
        (lambda rows: [], "has no audit.jsonl, or an empty one"),
    ],
)
def test_lines_removed_swapped_or_put_in_are_named(run: Path, damage: Any, message: str) -> None:
    (run / audit.FILE).write_text("".join(damage(lines(run))), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(audit.AuditError, match=message):
        audit.verify(run)


def test_a_cut_file_passes_but_for_a_hash_noted_earlier(run: Path) -> None:
    head = audit.read(run)[-1].sha256
    assert len(audit.verify(run, head=head[:12])) == 5
    (run / audit.FILE).write_text("".join(lines(run)[:3]))
    with pytest.raises(audit.AuditError, match="ends with task 3, but the run is finished and has 5 tasks"):
        audit.verify(run)
    (run / "metrics.json").unlink()  # of an unfinished run only a hash can tell
    assert len(audit.verify(run)) == 3
    with pytest.raises(audit.AuditError, match="was cut or rewritten since that was noted"):
        audit.verify(run, head=head)


def test_a_line_torn_by_a_crash_is_passed_over_and_written_over(run: Path) -> None:
    with (run / audit.FILE).open("a") as file:
        file.write('{"entry": 6, "ev')
    assert len(audit.verify(run)) == 5
    audit.append(run, "rollback", 5, {"to_entry": 5})
    assert len(audit.verify(run)) == 6


@pytest.mark.parametrize("name", ["checkpoints/task-2.pt", "losses.jsonl"])
def test_an_altered_or_lost_file_is_named(run: Path, name: str) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content.replace(content[2000:2010], b"0123456789", 1))
    with pytest.raises(audit.AuditError, match=f"{name} is not the file that line [12] of audit.jsonl vouches for"):
        audit.verify(run)
    (run / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(audit.AuditError, match=f"{name} (has .* of the|is not the file)"):
        audit.verify(run)
    (run / name).unlink()
    with pytest.raises(audit.AuditError, match=f"{name}, which line [12] of audit.jsonl vouches for, is missing"):
        audit.verify(run)


def test_the_same_fact_is_put_on_file_once(run: Path) -> None:
    """As after a crash between the audit entry and the checkpoint that follows it."""
    last = audit.read(run)[-1]
    facts = {name: v for name, v in last.content.items() if name not in ("entry", "time", "previous", "event", "task")}
    audit.append(run, last.event, last.task, facts)
    assert len(audit.read(run)) == 5
    audit.append(run, last.event, last.task, facts | {"name": "other"})
    assert len(audit.read(run)) == 6


@pytest.mark.parametrize("at", ["task-2.pt", "audit", "checkpoint.pt"])
def test_a_crash_while_a_task_is_put_on_file_leaves_no_trace(
    at: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the task's checkpoint, before its audit entry, and before the running checkpoint."""
    path, save, append = tmp_path / "run", directory.Progress.save, audit.append

    def crash_saving(self: directory.Progress, target: Path) -> None:
        if target.name == at and self.task == 3 and self.epoch == 0:
            raise StopIteration
        save(self, target)

    def crash_appending(folder: Path, event: str, task: int, facts: dict[str, Any]) -> None:
        if at == "audit" and task == 2:
            raise StopIteration
        append(folder, event, task, facts)

    with monkeypatch.context() as patch:
        patch.setattr(directory.Progress, "save", crash_saving)
        patch.setattr(audit, "append", crash_appending)
        with pytest.raises(StopIteration):
            train.run(CONFIG, path, show_progress=False)
    train.run(CONFIG, path, show_progress=False)
    assert (path / "losses.jsonl").read_bytes() == (finished / "losses.jsonl").read_bytes()
    entries = audit.verify(path)
    assert [(entry.event, entry.task) for entry in entries] == [("task", t) for t in range(1, 6)]


def test_the_command_verifies(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["experiments", "audit", str(run)])
    assert command_line.main() == 0
    out = capsys.readouterr().out
    assert "5 entries, none altered; head " in out
    assert "task 2 (2-3)  certified at 0.95: total loss <= " in out
    (run / audit.FILE).write_text("".join(lines(run)[1:]))
    assert command_line.main() == 1
    assert "line 1 was altered" in capsys.readouterr().err


# --- going back


def test_a_run_goes_back_and_on_to_the_same_numbers(run: Path, finished: Path) -> None:
    config = rollback(run, 2)
    assert config == CONFIG
    assert not (run / "metrics.json").exists()
    log = read_log(run / "losses.jsonl")
    assert log.last_task == 2
    kept = json.loads(lines(run)[1])["logs"][0]["lines"]
    assert (run / "losses.jsonl").read_text() == "".join(
        (finished / "losses.jsonl").read_text().splitlines(keepends=True)[:kept]
    )
    train.run(config, run, show_progress=False)
    assert (run / "losses.jsonl").read_bytes() == (finished / "losses.jsonl").read_bytes()
    entries = audit.verify(run)
    assert [(e.event, e.task) for e in entries[5:]] == [("rollback", 2), ("task", 3), ("task", 4), ("task", 5)]
    assert [e.number for e in audit.standing(entries)] == [1, 2, 7, 8, 9]
    before, after = (json.loads((path / "metrics.json").read_text()) for path in (finished, run))
    assert before["accuracy"] == after["accuracy"]


@pytest.mark.parametrize("after", ["metrics", "audit", "checkpoint"])
def test_a_crash_while_going_back_leaves_a_run_that_goes_on_from_there(
    after: str, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After metrics.json was removed, after the audit entry, and before the logs were cut."""

    def crash(*_: Any, **__: Any) -> None:
        raise StopIteration

    with monkeypatch.context() as patch:
        if after == "metrics":
            patch.setattr("experiments.rollback.audit.append", crash)
        elif after == "audit":
            patch.setattr("experiments.rollback.write_atomic", crash)
        else:
            patch.setattr("experiments.rollback.LossLogWriter", crash)
        with pytest.raises(StopIteration):
            rollback(run, 2)
    assert [e.task for e in audit.standing(audit.verify(run))] == ([1, 2, 3, 4, 5] if after == "metrics" else [1, 2])
    train.run(CONFIG, run, show_progress=False)
    assert (run / "losses.jsonl").read_bytes() == (finished / "losses.jsonl").read_bytes()
    assert [e.task for e in audit.standing(audit.verify(run))] == [1, 2, 3, 4, 5]


def test_twice_back_stands_on_what_is_left(run: Path) -> None:
    rollback(run, 3)
    rollback(run, 1)
    assert [e.number for e in audit.standing(audit.verify(run))] == [1]
    with pytest.raises(ValueError, match=r"to_task must be a finished task of .*, one of 1, got 3"):
        rollback(run, 3)


def test_an_altered_checkpoint_is_not_gone_back_to(run: Path) -> None:
    state = torch.load(run / "checkpoints/task-2.pt", weights_only=True)
    state["seconds"] += 1.0
    torch.save(state, run / "checkpoints/task-2.pt")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(audit.AuditError, match=r"task-2.pt is not the file"):
        rollback(run, 2)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_runs_that_kept_no_checkpoint_or_are_none_say_so(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, keep_checkpoints=False)
    assert config.name == CONFIG.name
    train.run(config, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run/checkpoints").exists()
    assert len(audit.verify(tmp_path / "run")) == 5
    with pytest.raises(ValueError, match="kept no checkpoint of task 1: it was run with keep_checkpoints false"):
        rollback(tmp_path / "run", 1)
    with pytest.raises(ValueError, match="holds no run with a finished epoch"):
        rollback(tmp_path, 1)


def test_the_command_goes_back_and_on(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["experiments", "rollback", str(run), "--to-task", "4", "--stop"])
    assert command_line.main() == 0
    assert "back to the model after task 4" in capsys.readouterr().out
    assert not (run / "metrics.json").exists()
    monkeypatch.setattr("sys.argv", ["experiments", "rollback", str(run), "--to-task", "3"])
    assert command_line.main() == 0
    assert (run / "losses.jsonl").read_bytes() == (finished / "losses.jsonl").read_bytes()
    monkeypatch.setattr("sys.argv", ["experiments", "rollback", str(run), "--to-task", "9"])
    assert command_line.main() == 2
    assert "got 9" in capsys.readouterr().err


# --- the gate


def test_a_refused_update_leaves_the_old_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(CONFIG, max_bound_increase=0.0, learning_rate=0.1)
    metrics = train.run(config, tmp_path, show_progress=False)
    log, refused = read_log(tmp_path / "losses.jsonl"), metrics["refused"]
    assert refused
    err = capsys.readouterr().err
    for task in refused:
        assert f"task {task} (" in err and f"the model of task {task - 1} is kept" in err
        old, new = (torch.load(tmp_path / f"checkpoints/task-{t}.pt", weights_only=True) for t in (task - 1, task))
        assert all(torch.equal(old["model"][name], new["model"][name]) for name in old["model"])
        for past in range(1, task):
            assert log.measurement(task, past, "heldout").drift.mean == pytest.approx(0.0, abs=1e-12)
    for entry in audit.verify(tmp_path):
        assert entry.event == ("refused" if entry.task in refused else "task")
        decided = entry.content["gate"]
        if entry.task == 1:
            assert decided is None
        else:
            assert decided["accepted"] == (entry.task not in refused)
            assert decided["accepted"] == (decided["after"] - decided["before"] <= 0.0)
        assert entry.content["certificates"][0]["selections"] == 2 ** (entry.task - 1)


def test_a_gate_that_lets_all_pass_changes_no_number(finished: Path, tmp_path: Path) -> None:
    train.run(dataclasses.replace(CONFIG, max_bound_increase=100.0), tmp_path, show_progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated, free = read_log(tmp_path / "losses.jsonl"), read_log(finished / "losses.jsonl")
    assert gated.records == free.records


@pytest.mark.parametrize("bound", ["direct", "moment"])
def test_the_decision_is_the_rise_of_the_certified_mean(bound: Any, finished: Path) -> None:
    log = read_log(finished / "losses.jsonl")
    trial = type(log)(log.header)
    for record in log.records:
        if record.after_task <= 2:
            trial.add(record)
    update = [record for record in log.records if record.after_task == 3]
    config = dataclasses.replace(CONFIG, max_bound_increase=0.1, gate=bound)
    decision = gate.weigh(config, trial, update, 3)
    assert decision is not None
    options = {"chain": "refreshed", "confidence": 0.95}
    after = certify(log, bound, after_task=3, selections=4, **options)
    options["confidence"] = 1 - 0.05 * len(certify(log, bound, after_task=2, **options).statements) / len(
        after.statements
    )
    before = certify(log, bound, after_task=2, selections=4, **options)
    assert before.delta == pytest.approx(after.delta)
    assert (decision.before, decision.after) == pytest.approx((sum(before.per_task) / 2, sum(after.per_task[:2]) / 2))
    assert decision.accepted == (decision.after - decision.before <= 0.1)
    assert len(trial.records) == len([r for r in log.records if r.after_task <= 2])
    assert gate.weigh(dataclasses.replace(config, max_bound_increase=None), trial, update, 3) is None


def test_an_update_that_changes_nothing_is_accepted(finished: Path) -> None:
    log = read_log(finished / "losses.jsonl")
    trial = type(log)(log.header)
    for record in log.records:
        if record.after_task <= 3:
            trial.add(record)
    same = [dataclasses.replace(log.measurement(3, task, "heldout"), after_task=4) for task in (1, 2, 3)]
    update = [*same, log.measurement(4, 4, "heldout")]
    decision = gate.weigh(dataclasses.replace(CONFIG, max_bound_increase=0.0), trial, update, 4)
    assert decision is not None and decision.accepted and decision.after == pytest.approx(decision.before, abs=1e-12)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"entry": 2,', '{"gate": {"accepted": true}, "entry": 2,'),
        ('"task": 2,', '"task": Infinity,'),
        ('{"entry": 2,', "[" * 100_000 + '{"entry": 2,'),
        ("}\n", "}\r\n"),
    ],
)
def test_what_json_reads_the_same_is_altered_all_the_same(old: str, new: str, run: Path) -> None:
    found = lines(run)
    assert old in found[1]
    found[1] = found[1].replace(old, new)
    (run / audit.FILE).write_bytes("".join(found).encode())
    with pytest.raises(audit.AuditError, match="line 2"):
        audit.verify(run)


def test_an_acceptance_that_means_nothing_says_so() -> None:
    assert "was vacuous before it already" in gate.notice(gate.Decision(4.0, 4.0, 0.1, True), 3, "poly")
    assert gate.notice(gate.Decision(1.0, 1.05, 0.1, False), 3, "poly") == ""
    refusal = gate.notice(gate.Decision(1.0, 1.5, 0.1, False), 3, "poly")
    assert "update refused" in refusal and "from 1 to 1.5 nats a task, by more than the limit of 0.1" in refusal


def test_a_gated_run_resumes_to_the_same_decisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, max_bound_increase=0.05, learning_rate=0.1)
    whole = train.run(config, tmp_path / "whole", show_progress=False)
    save, count = directory.Progress.save, 0

    def crash(self: directory.Progress, target: Path) -> None:
        nonlocal count
        save(self, target)
        count += 1
        if count == 7:
            raise StopIteration

    with monkeypatch.context() as patch:
        patch.setattr(directory.Progress, "save", crash)
        with pytest.raises(StopIteration):
            train.run(config, tmp_path / "cut", show_progress=False)
    cut = train.run(config, tmp_path / "cut", show_progress=False)
    assert cut["refused"] == whole["refused"]
    assert (tmp_path / "cut/losses.jsonl").read_bytes() == (tmp_path / "whole/losses.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_bound_increase": -0.1}, "max_bound_increase must be finite and >= 0, or None, got -0.1"),
        ({"max_bound_increase": float("nan")}, "max_bound_increase must be finite"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), such as 0.95, got 1.0"),
        ({"gate": "pinsker"}, "gate must be one of direct, moment, got 'pinsker'"),
    ],
)
def test_options_of_the_gate_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_back_to_the_last_task_and_finished_again_is_finished(run: Path) -> None:
    rollback(run, 5)
    assert not (run / "metrics.json").exists()
    metrics = train.run(CONFIG, run, show_progress=False)
    written = (run / "metrics.json").stat().st_mtime_ns
    assert train.run(CONFIG, run, show_progress=False) == metrics
    assert (run / "metrics.json").stat().st_mtime_ns == written
    audit.verify(run)


def test_lines_cut_off_after_a_rollback_are_missed(run: Path) -> None:
    rollback(run, 2)
    train.run(CONFIG, run, show_progress=False)
    (run / audit.FILE).write_text("".join(lines(run)[:-3]))  # down to the rollback
    with pytest.raises(audit.AuditError, match="ends with task 2, but the run is finished and has 5 tasks"):
        audit.verify(run)
