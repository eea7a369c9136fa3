"""One command for any dataset: from files as users have them to a report, in little time, and again for nothing."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_wine

from cila_bound import certify, read_log
from experiments import __main__ as command_line
from experiments import audit, check
from experiments.check import Request


def digits(path: Path, classes: int = 4, n: int = 40) -> Path:
    """Images of a few digits in two sites, the second darker; classes are names, sites a column of their own."""
    data = load_digits()
    index = np.concatenate([np.flatnonzero(data.target == label)[: 2 * n] for label in range(classes)])
    images, site = data.images[index] / 16.0, np.tile(np.repeat(["north", "south"], n), classes)
    images[site == "south"] *= 0.6
    names = np.array(["zero", "one", "two", "three"])[data.target[index]]
    np.savez(path, x=images.astype(np.float32), kind=names, site=site)
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["experiments", "check", *arguments])
    return command_line.main()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A check by the command, with the shortest schedule that makes sense."""
    root = tmp_path_factory.mktemp("check")
    digits(root / "cells.npz")
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, *options(root)) == 0
    return root


def options(root: Path, *more: str) -> list[str]:
    fixed = "--label kind --tasks site=south,north --minutes 0.01 --jobs 1 --defect two --miss-cost 100 --alarm-cost 5"
    return ["--data", str(root / "cells.npz"), "--out", str(root / "checks"), *fixed.split(), *more]


def test_everything_is_there(done: Path) -> None:
    folder = done / "checks/cells"
    report = json.loads((folder / "report.json").read_text())
    assert [stage["variant"] for stage in report["stages"]] == ["finetune", "contrastive-only", "cila-max"]
    assert report["stages"][-1]["adds"] == "+ distillation from the previous model"  # two tasks: CILA is Co2L
    assert report["tasks"] == ["south", "north"]
    assert report["counts"] == {site: dict.fromkeys(["one", "three", "two", "zero"], 40) for site in ("south", "north")}
    assert report["plan"]["too_short"] and report["plan"]["seeds"] == 1 and report["plan"]["epochs"] == 5
    assert report["kpi"]["defect_share"] == pytest.approx([0.25, 0.25], abs=0.02)
    assert report["violations"] == []
    assert "<html" in (folder / "report.html").read_text()
    planned = json.loads((folder / "check.json").read_text())
    costs = [(run["defect_class"], run["miss_cost"], run["alarm_cost"]) for run in planned["runs"]]
    assert costs == [(2, 100.0, 5.0)] * 3  # classes: one, three, two, zero
    runs = sorted((folder / "runs").glob("*/*"))
    assert len(runs) == report["selections"] == 3
    for run in runs:
        assert [entry.task for entry in audit.verify(run)] == [1, 2]
        statements = certify(read_log(run / "losses.jsonl"), "moment", confidence=0.95).statements
        assert {statement.inequality for statement in statements} == {"chernoff"}  # four classes


def test_the_same_command_again_trains_nothing(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = {path: path.stat().st_mtime_ns for path in (done / "checks").rglob("losses.jsonl")}
    monkeypatch.setattr(check, "prepare", None)
    monkeypatch.setattr(check, "train", None)
    assert command(monkeypatch, *options(done)) == 0
    assert capsys.readouterr().out.count("nothing was trained") == 3
    assert {path: path.stat().st_mtime_ns for path in (done / "checks").rglob("losses.jsonl")} == logs


def test_other_options_need_another_folder(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *options(done, "--confidence", "0.9")) == 2
    assert "holds a check with confidence = 0.95, not 0.9: choose another --out" in capsys.readouterr().err


def test_two_tasks_need_a_stage_less() -> None:
    assert list(check.stages_of(3)) == ["finetune", "contrastive-only", "co2l", "cila-max"]
    assert list(check.stages_of(2)) == ["finetune", "contrastive-only", "cila-max"]


def test_data_that_have_changed_need_another_folder(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(done, tmp_path / "copy"))
    planned = root / "checks/cells/check.json"
    planned.write_text(planned.read_text().replace(str(done), str(root)))
    digits(root / "cells.npz", n=41)
    assert command(monkeypatch, *options(root)) == 2
    assert "cells.npz has changed since" in capsys.readouterr().err


def test_a_folder_is_told_from_another_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.png").write_bytes(b"1")
    before = check._fingerprint(tmp_path, tmp_path / "a/out")
    assert check._fingerprint(tmp_path, tmp_path / "a/out") == before
    (tmp_path / "a/out").mkdir()
    (tmp_path / "a/out/page.png").write_bytes(b"3")
    assert check._fingerprint(tmp_path, tmp_path / "a/out") == before
    (tmp_path / "a/two.png").write_bytes(b"2")
    assert check._fingerprint(tmp_path, tmp_path / "a/out") != before


def test_paths_may_be_relative(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done)
    (done / "checks/cells/report.html").unlink()
    assert command(monkeypatch, *options(done), "--out", "checks") == 0
    assert (done / "checks/cells/report.html").exists()


def test_the_users_data_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "train", None)
    (tmp_path / "cells").mkdir()
    data = digits(tmp_path / "cells/cells.npz")
    before = data.read_bytes()
    with pytest.raises(ValueError, match=r"would be written over .*cells\.npz: choose another --out"):
        check.check(dataclasses.replace(REQUEST, data=str(data)), tmp_path / "cells")
    assert data.read_bytes() == before


REQUEST = Request(
    data="", label="kind", threshold=None, tasks="site", image_size=None, images="", minutes=1.0, jobs=1,
    confidence=0.95, temperature=0.5, buffer_size=200, defect="", miss_cost=None, alarm_cost=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minutes": 0.0}, "minutes must be > 0 and at most 10,080, a week, got 0.0"),
        ({"minutes": float("nan")}, "minutes must be > 0"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"miss_cost": 3.0}, "defect, miss_cost and alarm_cost go together"),
        ({"defect": "two"}, "defect, miss_cost and alarm_cost go together"),
        ({"defect": "two", "miss_cost": -1.0, "alarm_cost": 1.0}, "miss_cost must be finite and >= 0, got -1.0"),
        ({"defect": "two", "miss_cost": 0.0, "alarm_cost": 0.0}, "miss_cost and alarm_cost are 0 both"),
        ({"defect": "ten", "miss_cost": 9.0, "alarm_cost": 1.0}, "defect must be one of the classes one, .* got 'ten'"),
        ({"confidence": 1.5}, "confidence must be in"),
        ({"temperature": -1.0}, "temperature"),
        ({"label": "colour"}, "colour"),
        ({"tasks": "classes:3"}, "3"),
        ({"data": "nowhere.npz"}, "no such file or folder: nowhere.npz"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "train", None)
    request = dataclasses.replace(REQUEST, data=str(digits(tmp_path / "cells.npz")))
    with pytest.raises(ValueError, match=message):
        check.check(dataclasses.replace(request, **change), tmp_path / "folder")
    assert not (tmp_path / "folder/check.json").exists()


@pytest.mark.parametrize(
    ("seconds", "minutes", "seeds", "epochs"),
    [(0.4, 0.01, 1, 5), (0.4, 10.0, 5, 50), (20.0, 10.0, 1, 9), (8.0, 10.0, 2, 11), (2.0, 10.0, 3, 30)],
)
def test_the_plan_fills_the_minutes(
    seconds: float, minutes: float, seeds: int, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pilot's time for one epoch of every task sets epochs and seeds; more seeds only with enough epochs."""
    monkeypatch.setattr(check, "train", lambda *_, **__: {"training_seconds": seconds})
    request = dataclasses.replace(REQUEST, data=str(digits(tmp_path / "cells.npz")), minutes=minutes, jobs=2)
    prepared = check.prepare(Path(request.data), label="kind", tasks="site")
    plan = check._plan(check._base(request, prepared, tmp_path / "data.npz"), request, prepared, 4)
    assert (plan["seeds"], plan["epochs_first"]) == (seeds, 2 * plan["epochs"])
    assert plan["epochs"] == pytest.approx(epochs, abs=2)
    assert plan["too_short"] == (minutes < 1)
    if not plan["too_short"]:
        assert plan["expected_minutes"] <= minutes


def test_a_table_of_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CSV of features and a class: no images anywhere."""
    data = load_wine()
    with (tmp_path / "wine.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*data.feature_names, "class", "batch"])
        for number, (row, label) in enumerate(zip(data.data, data.target, strict=True)):
            writer.writerow([*row, data.target_names[label], "old" if number % 2 else "new"])
    arguments = ["--tasks", "batch=old,new", "--minutes", "0.01", "--jobs", "2"]
    out = ["--out", str(tmp_path / "checks")]
    assert command(monkeypatch, "--data", str(tmp_path / "wine.csv"), *arguments, *out) == 0
    report = json.loads((tmp_path / "checks/wine/report.json").read_text())
    assert report["plan"]["model"] == "mlp"
    assert report["tasks"] == ["old", "new"]
    assert report["stages"][-1]["accuracy"]["mean"] > 0.6


def test_a_failed_run_is_said(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "sweep", lambda *_, **__: [("one", "ValueError: no")])
    assert command(monkeypatch, *options(done)) == 1
    assert "FAILED one: ValueError: no" in capsys.readouterr().err
