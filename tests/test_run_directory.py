"""What a run directory goes through: finished, taken up by other versions, diverged, damaged, interrupted."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cila_bound import read_log
from experiments import __main__ as command_line
from experiments import directory, train, trainer, versions
from experiments.config import RunConfig

ROOT = Path(__file__).parent.parent
TINY = RunConfig(n_tasks=5, epochs_first=2, epochs=1, buffer_size=40, tuple_rounds=2, max_tuples=20, probe_epochs=2)


class StopError(Exception):
    """Raised in place of a crash."""


def crash_after_checkpoint(config: RunConfig, path: Path, monkeypatch: pytest.MonkeyPatch, number: int = 1) -> None:
    """Leaves what a crash right after the given checkpoint leaves."""
    save, count = directory.Progress.save, 0

    def crash(self: directory.Progress, target: Path) -> None:
        nonlocal count
        save(self, target)
        count += 1
        if count == number:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(directory.Progress, "save", crash)
        with pytest.raises(StopError):
            train.run(config, path, show_progress=False)


# --- finished runs


def test_a_finished_run_is_announced_with_its_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(TINY, tmp_path) == 0
    assert "finished already" not in capsys.readouterr().out
    notice = f"{tmp_path / TINY.name} is finished already, made with commit {versions.versions()['commit']}, torch "
    assert command_line.run(TINY, tmp_path) == 0
    shown = capsys.readouterr().out
    assert notice in shown and "nothing was trained" in shown and "average accuracy" in shown


def test_a_finished_run_without_its_log_is_refused(tmp_path: Path) -> None:
    train.run(TINY, tmp_path / TINY.name, show_progress=False)
    (tmp_path / TINY.name / "losses.jsonl").unlink()
    with pytest.raises(ValueError, match=r"losses.jsonl of a finished run is missing: restore it, or remove"):
        train.run(TINY, tmp_path / TINY.name, show_progress=False)


def test_lost_metrics_do_not_overwrite_the_log(tmp_path: Path) -> None:
    """They are made again from the last task's checkpoint; without one, the run is refused."""
    metrics = train.run(TINY, tmp_path, show_progress=False)
    (tmp_path / "metrics.json").unlink()
    before = (tmp_path / "losses.jsonl").read_bytes()
    again = train.run(TINY, tmp_path, show_progress=False)
    assert again == metrics
    assert (tmp_path / "losses.jsonl").read_bytes() == before
    (tmp_path / "metrics.json").unlink()
    (tmp_path / "audit.jsonl").unlink()
    with pytest.raises(ValueError, match=r"losses.jsonl has records, but checkpoint.pt or metrics.json is missing"):
        train.run(TINY, tmp_path, show_progress=False)
    assert (tmp_path / "losses.jsonl").read_bytes() == before


# --- versions


def test_a_run_resumed_with_other_versions_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    crash_after_checkpoint(TINY, tmp_path / "same", monkeypatch)
    crash_after_checkpoint(TINY, tmp_path / "other", monkeypatch)
    train.run(TINY, tmp_path / "same", show_progress=False)
    assert capsys.readouterr().err == ""
    newer = versions.versions() | {"torch": "99.0"}
    monkeypatch.setattr(train, "versions", lambda: newer)
    train.run(TINY, tmp_path / "other", show_progress=False)
    error = capsys.readouterr().err
    assert f"warning: {tmp_path / 'other'} is resumed with other versions" in error
    assert "-> 99.0)" in error and "commit" not in error


def test_a_start_without_a_checkpoint_leaves_no_versions_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it is used, so the log is that of the second start alone."""

    def crash(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(trainer.TaskTrainer, "epoch", crash)
        with pytest.raises(StopError):
            train.run(TINY, tmp_path, show_progress=False)
    newer = versions.versions() | {"torch": "99.0"}
    monkeypatch.setattr(train, "versions", lambda: newer)
    train.run(dataclasses.replace(TINY, learning_rate=0.02), tmp_path, show_progress=False)
    assert read_log(tmp_path / "losses.jsonl").header.versions["torch"] == "99.0"
    assert capsys.readouterr().err == ""


def test_uncommitted_changes_show_in_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "versions.py"
    module.write_text("one")
    monkeypatch.setattr(versions, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert versions.versions()["commit"] == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    clean = versions.versions()["commit"]
    assert len(clean) == 12
    module.write_text("two")
    assert versions.versions()["commit"] == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert versions.versions()["commit"] == "unknown"


# --- divergence


@pytest.mark.parametrize(("learning_rate", "batch_size"), [(1e9, 128), (1e9, 400), (1e30, 400)])
def test_a_diverging_run_says_so_and_can_be_retried(learning_rate: float, batch_size: int, tmp_path: Path) -> None:
    """With embeddings of norm 0 in training, NaN in evaluation alone, and infinite weights."""
    wild = dataclasses.replace(TINY, learning_rate=learning_rate, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"diverged .* in task 1, epoch 1: lower learning_rate \(now 1e\+\d\d\)"):
        train.run(wild, tmp_path, show_progress=False)
    assert not (tmp_path / "checkpoint.pt").exists()
    train.run(dataclasses.replace(wild, learning_rate=0.01), tmp_path, show_progress=False)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite weight that no embedding shows: behind a rectifier."""
    step = trainer.TaskTrainer._step

    def break_in_epoch_2(self: trainer.TaskTrainer, result: trainer.Loss, number: int) -> None:
        step(self, result, number)
        if number == 1:
            self.model.encoder[1].bias.data[:] = -float("inf")

    monkeypatch.setattr(trainer.TaskTrainer, "_step", break_in_epoch_2)
    with pytest.raises(ValueError, match=r"diverged .* in task 1, epoch 2: lower learning_rate \(now 0.01\)"):
        train.run(TINY, tmp_path, show_progress=False)
    assert directory.Progress.load(tmp_path / "checkpoint.pt").epoch == 1


# --- damaged files


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x80garbage"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_after_checkpoint(TINY, tmp_path, monkeypatch)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(ValueError, match=rf"{checkpoint} is damaged \(.+\): restore it, or remove {tmp_path}"):
        train.run(TINY, tmp_path, show_progress=False)


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
@pytest.mark.parametrize("content", [b"", b'{"a"', b"[]", b"\xff"])
def test_a_damaged_json_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").touch()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / name} is damaged \(.+\): restore it, or remove {tmp_path}"):
        train.run(TINY, tmp_path, show_progress=False)


def test_a_checkpoint_without_its_log_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_after_checkpoint(TINY, tmp_path, monkeypatch, number=3)
    (tmp_path / "losses.jsonl").unlink()
    with pytest.raises(ValueError, match=r"losses.jsonl of an unfinished run is missing: restore it, or remove"):
        train.run(TINY, tmp_path, show_progress=False)


# --- the command line


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments", "run", "--out", str(tmp_path), "--epochs-first", "10000"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background shells hand on "ignored"
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("**/checkpoint.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "the same command resumes after the last finished epoch" in error
    assert "Traceback" not in error
