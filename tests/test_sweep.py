"""Lists of runs, and training them: one after another, in processes, and on a cluster of Dask workers."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import pytest
from filelock import FileLock

from experiments import directory
from experiments import sweep as module
from experiments.config import RunConfig
from experiments.methods import METHODS
from experiments.presets import preset
from experiments.spec import load_spec
from experiments.sweep import sweep

SPECS = sorted((Path(__file__).parent.parent / "experiments/specs").glob("*.toml"))
TINY = RunConfig(n_tasks=2, epochs_first=1, epochs=1, buffer_size=20, tuple_rounds=2, max_tuples=20, probe_epochs=2)
CELLS = [dataclasses.replace(TINY, method=method, seed=seed) for method in ("cila-max", "finetune") for seed in (0, 1)]
GRID = '\n[[grid]]\nmethod = "co2l"\n'


def written(text: str, folder: Path) -> Path:
    path = folder / "spec.toml"
    path.write_text(text)
    return path


def files(out: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file below a folder."""
    return {
        str(path.relative_to(out)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def logs(out: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files(out).items() if name.endswith("losses.jsonl")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CELLS, one after another in this process."""
    out = tmp_path_factory.mktemp("trained")
    assert sweep(CELLS, out) == []
    assert len(logs(out)) == len(CELLS)
    return out


# --- the file


def test_a_spec_lists_every_combination_of_each_grid(tmp_path: Path) -> None:
    text = """
        stream = "rotated-digits"
        schedule = "short"
        [base]
        epochs = 3
        kappa = 3
        theory_temperatures = [0.5, 1]
        [[grid]]
        method = ["cila-max", "co2l"]
        seed = [4, 5]
        [[grid]]
        kappa = [1, 2.5]
        n_negatives = [[1], [1, 4]]
        epochs = 5
        [[grid]]
        theory_temperatures = [0.1, 0.2]
        seed = 9
    """
    base = dataclasses.replace(
        preset("rotated-digits", "short"), epochs=3, kappa=3.0, theory_temperatures=(0.5, 1.0), log_tuples="none"
    )
    text = text.replace("epochs = 3", 'epochs = 3\nlog_tuples = "none"')
    configs = load_spec(written(text.replace("[1], [1, 4]", "[1, 4]"), tmp_path))
    assert configs == [
        *(dataclasses.replace(base, method=m, seed=s) for m in ("cila-max", "co2l") for s in (4, 5)),
        *(dataclasses.replace(base, kappa=kappa, n_negatives=(1, 4), epochs=5) for kappa in (1.0, 2.5)),
        dataclasses.replace(base, theory_temperatures=(0.1, 0.2), seed=9),
    ]
    assert all(isinstance(c.kappa, float) and isinstance(c.theory_temperatures[-1], float) for c in configs)
    with pytest.raises(ValueError, match=r"spec\.toml: two runs would share the directory .* not named after n_negat"):
        load_spec(written(text, tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stream = ", r"is not TOML: Invalid value \(at"),
        ('stream = "digits"', r"no grid: write \[\[grid\]\]"),
        ('stream = "digits"\ngrid = []', r"no grid: write \[\[grid\]\]"),
        ('stream = "digits"\n[grid]\nseed = [0, 1]', r"no grid: write \[\[grid\]\]"),
        (GRID, "stream is missing: begin with stream = one of digits, rotated-digits"),
        ('stream = "digit"' + GRID, "stream and schedule must be one of digits, .* got 'digit' and 'full'"),
        ('stream = ["digits"]' + GRID, r"the file: stream must be a string, got \['digits'\]"),
        ('stream = "digits"\nschedule = 1' + GRID, "the file: schedule must be a string, got 1"),
        ('stream = "digits"\nepochs = 3' + GRID, r"epochs is an option of runs: move it below \[base\]"),
        ('stream = "digits"\nshedule = "short"' + GRID, "unknown option shedule: did you mean schedule"),
        ('stream = "digits"\nbase = 3' + GRID, r"base must be a table, \[base\], got 3"),
        ('stream = "digits"\n[base]\nepoch = 3' + GRID, r"\[base\] has an unknown option epoch: did you mean epochs"),
        ('stream = "digits"\n[base]\nxyz = 3' + GRID, r"\[base\] has an unknown option xyz: known are stream, "),
        ('stream = "digits"\n[base]\nstream = "digits"' + GRID, r"\[base\] has stream, .* move it to the file's top"),
        ('stream = "digits"' + GRID + 'schedule = "short"', r"\[\[grid\]\] 1 has schedule, .* to the file's top"),
        ('stream = "digits"' + GRID + GRID + "sed = 3", r"\[\[grid\]\] 2 has an unknown option sed: did you mean seed"),
        ('stream = "digits"' + GRID + 'seed = "0-4"', r"\[\[grid\]\] 1: seed must be an integer, got '0-4'"),
        ('stream = "digits"' + GRID + "seed = [0, true]", "1: seed must be an integer, got True"),
        ('stream = "digits"' + GRID + "seed = 1.0", "1: seed must be an integer, got 1.0"),
        ('stream = "digits"' + GRID + 'kappa = "1"', "1: kappa must be a number, got '1'"),
        ('stream = "digits"' + GRID + "kappa = true", "1: kappa must be a number, got True"),
        ('stream = "digits"' + GRID + "compile = 0", "1: compile must be true or false, got 0"),
        ('stream = "digits"' + GRID + "positives = 0", "1: positives must be a string, got 0"),
        ('stream = "digits"' + GRID + "n_negatives = 4", "1: n_negatives must be a list, each an integer, got 4"),
        ('stream = "digits"' + GRID + "n_negatives = [[1.0]]", r"must be a list, each an integer, got \[1.0\]"),
        ('stream = "digits"' + GRID + "theory_temperatures = [0.1, [0.2]]", "a list, each a number, got 0.1"),
        ('stream = "digits"\n[base]\nseed = [0]' + GRID, r"got \[0\]: lists of runs go below \[\[grid\]\]"),
        ('stream = "digits"' + GRID + "seed = []", r"\[\[grid\]\] 1: seed is an empty list: give it a value"),
        ('stream = "digits"' + GRID + "n_negatives = []", r"\[\[grid\]\] 1: n_negatives is an empty list"),
        ('stream = "digits"\n[base]\nn_negatives = []' + GRID, "theory_temperatures and n_negatives need one value"),
        ('stream = "digits"' + GRID + "seed = [0, 1, 0]", "co2l-seed0 is listed twice"),
        ('stream = "digits"' + GRID + GRID + "kappa = 2.0", "co2l-seed0 is listed twice"),
        ('stream = "digits"' + GRID + "threads = [1, 2]", "share the directory digits/co2l-seed0, .* after threads:"),
        (
            'stream = "digits"' + GRID + "seed = [0, -1]",
            r"1, method = 'co2l', seed = -1: seed must be at least 0, got -1",
        ),
        (
            'stream = "digits"\n[[grid]]\nmethod = "co3l"',
            "1, method = 'co3l': method must be one of cila-max, .*'co3l'",
        ),
        ('stream = "digits"\n[base]\nqueue_size = 2\n[[grid]]\nmethod = "er"', "'er': er trains a classifier"),
    ],
)
def test_a_wrong_spec_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load_spec(written(text, tmp_path))
    assert str(refusal.value).startswith(str(tmp_path / "spec.toml"))


def test_a_spec_that_is_no_text_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.toml: no such file; give one such as experiments/specs/demo\.toml"):
        load_spec(tmp_path / "absent.toml")
    (tmp_path / "spec.toml").write_bytes(b"stream = '\xff'")
    with pytest.raises(ValueError, match=r"spec\.toml: 'utf-8' codec can't decode"):
        load_spec(tmp_path / "spec.toml")


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_shipped_specs_load(path: Path) -> None:
    configs = load_spec(path)
    assert len({config.name for config in configs}) == len(configs) >= 9
    assert {config.study for config in configs} == {path.stem if path.stem != "demo" else "digits"}
    if path.stem in ("digits", "rotated-digits"):
        plain = [config.method for config in configs if config.variant == config.method]
        assert sorted(plain) == sorted(5 * list(METHODS))


# --- on this machine


def test_finished_runs_are_left_alone_and_failed_ones_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    busy, other = CELLS[2], CELLS[3]
    note = tmp_path / busy.name / "failed.txt"
    note.parent.mkdir(parents=True)
    with FileLock(note.parent / ".lock"):
        [(name, reason)] = sweep([busy, other], tmp_path)
    assert name == busy.name and reason.startswith(f"ValueError: {tmp_path / name} is in use by another process")
    assert reason in note.read_text() and "Traceback" in note.read_text() and "+00:00 on " in note.read_text()
    before = files(tmp_path / other.name)
    capsys.readouterr()
    assert sweep([busy, other], tmp_path) == []
    assert capsys.readouterr().out.startswith(f"{tmp_path / other.name} is finished already, made with ")
    assert not note.exists() and (note.parent / "metrics.json").exists()
    assert files(tmp_path / other.name) == before
    note.touch()
    assert sweep([busy, other], tmp_path) == []
    assert not note.exists()


def test_many_finished_runs_are_counted(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(trained)
    assert sweep(CELLS, trained, jobs=2) == []
    assert capsys.readouterr().out == "4 of 4 runs are finished already, and skipped\n"
    assert files(trained) == before


def test_another_run_in_a_directory_is_refused_before_any_starts(trained: Path) -> None:
    new = dataclasses.replace(TINY, method="co2l")
    with pytest.raises(ValueError, match="holds a run with threads = 1, not 2"):
        sweep([new, dataclasses.replace(CELLS[0], threads=2)], trained)
    assert not (trained / new.name).exists()


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ([], {}, "at least one run and one job, got 0 and 1"),
        ([TINY], {"jobs": 0}, "at least one run and one job, got 1 and 0"),
        ([TINY], {"jobs": 2, "scheduler": "tcp://127.0.0.1:1"}, "jobs is 2, but counts runs on this machine"),
        ([TINY, TINY], {}, "-seed0 is listed twice"),
        ([TINY, dataclasses.replace(TINY, threads=2)], {}, "would share the directory .* not named after threads"),
    ],
)
def test_senseless_sweeps_are_refused(
    cells: list[RunConfig], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(cells, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_ends_a_sweep_that_can_be_resumed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saves = directory.Progress.save, []

    def interrupted(progress: directory.Progress, path: Path) -> None:
        save(progress, path)
        saves.append(path)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directory.Progress, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(CELLS, tmp_path)
    assert len(saves) == 2
    assert not [name for name in files(tmp_path) if name.endswith(("failed.txt", "metrics.json"))]
    assert sweep(CELLS, tmp_path) == []
    assert logs(tmp_path) == logs(trained)


def test_processes_train_the_same_runs(trained: Path, tmp_path: Path) -> None:
    lock = tmp_path / CELLS[0].name / ".lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        [(name, reason)] = sweep(CELLS, tmp_path, jobs=2)
    assert name == CELLS[0].name and "in use by another process" in reason
    assert sweep(CELLS, tmp_path, jobs=2) == []
    assert logs(tmp_path) == logs(trained)


def die(config: RunConfig, *rest: object) -> tuple[str, str]:
    if config.seed:
        os.kill(os.getpid(), signal.SIGKILL)
    return config.name, ""


def test_a_killed_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_train", die)
    failures = sweep(CELLS, tmp_path, jobs=2)
    assert {config.name for config in CELLS if config.seed} <= {name for name, _ in failures}
    assert all("was killed, perhaps for lack of memory" in reason for _, reason in failures)


# --- on a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        yield cluster


def test_workers_train_the_same_runs(cluster: Any, trained: Path, tmp_path: Path) -> None:
    lock = tmp_path / CELLS[0].name / ".lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        [(name, reason)] = sweep(CELLS, tmp_path, scheduler=cluster.scheduler_address)
    assert name == CELLS[0].name and "in use by another process" in reason
    assert sweep(CELLS, tmp_path, scheduler=cluster.scheduler_address) == []
    assert logs(tmp_path) == logs(trained)
    assert not [path for path in files(tmp_path) if ".sweep-" in path or path.endswith("failed.txt")]


def test_workers_that_see_another_folder_are_refused(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = SimpleNamespace(name=str(tmp_path / "elsewhere/marker"))
    monkeypatch.setattr(module, "NamedTemporaryFile", lambda **_: nullcontext(elsewhere))
    with pytest.raises(ValueError, match=r"worker tcp://.* does not see .*/elsewhere of this machine"):
        sweep(CELLS, tmp_path, scheduler=cluster.scheduler_address)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("deaths_allowed", [3, 0])
def test_a_killed_workers_run_is_finished_by_another_or_reported(
    deaths_allowed: int, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", deaths_allowed)
    config = dataclasses.replace(TINY, epochs_first=12, method="finetune")
    assert sweep([config], tmp_path / "whole") == []
    folder, killed = tmp_path / "killed" / config.name, []

    def kill_its_worker() -> None:
        deadline = time.monotonic() + 30
        while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        [busy] = [worker.nanny for worker in cluster.scheduler.workers.values() if worker.processing]
        [pid] = [nanny.pid for nanny in cluster.workers.values() if nanny.address == busy]
        os.kill(pid, signal.SIGKILL)
        killed.append((folder / "checkpoint.pt").exists())

    killer = threading.Thread(target=kill_its_worker)
    killer.start()
    failures = sweep([config], tmp_path / "killed", scheduler=cluster.scheduler_address)
    killer.join()
    assert killed == [True]
    if not deaths_allowed:
        [(name, reason)] = failures
        assert name == config.name and reason.startswith("KilledWorker: ")
        assert reason in (folder / "failed.txt").read_text()
        failures = sweep([config], tmp_path / "killed")
    assert failures == []
    assert logs(tmp_path / "killed") == logs(tmp_path / "whole")


def test_a_cluster_that_cannot_train_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker; one that finds no experiments.train; one with several threads."""
    monkeypatch.setattr(module, "_NO_WORKER_SECONDS", 0.5)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/__init__.py").touch()
    local = {"n_workers": 0, "processes": True, "dashboard_address": ":0"}
    with distributed.LocalCluster(**local) as cluster:
        address = cluster.scheduler_address

        def refused(message: str) -> None:
            with pytest.raises(ValueError, match=message):
                sweep(CELLS, tmp_path / "out", scheduler=address)

        refused(f"the scheduler at {address} has no workers: start some with `dask worker {address} --nthreads 1`")
        monkeypatch.setattr(module, "_NO_WORKER_SECONDS", 30.0)
        command = [sys.executable, "-m", "dask", "worker", address, "--no-nanny", "--no-dashboard", "--nthreads"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        for threads, message in (
            ("1", r"worker tcp://.* cannot import experiments \(No module named"),
            ("2", "2 threads"),
        ):
            worker = subprocess.Popen([*command, threads], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
            try:
                refused(message)
            finally:
                worker.terminate()
                worker.wait(20)
    assert not (tmp_path / "out/digits").exists()


def test_the_last_worker_leaving_ends_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NO_WORKER_SECONDS", 1.0)
    monkeypatch.setattr(module, "_check_workers", lambda *_: None)
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster:
        failures = sweep(CELLS, tmp_path, scheduler=cluster.scheduler_address)
    assert [name for name, _ in failures] == [config.name for config in CELLS]
    assert all(reason == "the scheduler has no workers any more: start some and try again" for _, reason in failures)


def test_an_unreachable_scheduler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"no Dask scheduler answers at {address} .*start one with `dask sched"):
            sweep(CELLS, tmp_path, scheduler=address)
        closed.listen()  # and never answers
        with pytest.raises(ValueError, match=rf"no Dask scheduler answers at {address} \(waited 0\.5 s\)"):
            sweep(CELLS, tmp_path, scheduler=address)
    with pytest.raises(ValueError, match="no Dask scheduler answers at nonsense://"):
        sweep(CELLS, tmp_path, scheduler="nonsense://")


def test_a_scheduler_needs_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"needs Dask: pip install 'dask\[distributed\]', or -e '\.\[cluster\]'"):
        sweep(CELLS, tmp_path, scheduler="tcp://127.0.0.1:8786")
