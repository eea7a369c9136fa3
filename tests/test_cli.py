"""The console command: its three exit statuses, its table and its JSON."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from cila_bound import LossLog, Measurement, Training, certify
from cila_bound.cli import main
from tests.simulate import simulate
from tests.test_certificate import with_test_loss


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "losses.jsonl"
    simulate(4, 1, 0.5, drift=0.02, n=4000).write(target)
    return target


def test_status_0_and_table(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(path)]) == 0
    out = capsys.readouterr().out
    for word in ("theorem1", "linear", "saturating", "pinsker", "moment", "best", "pointwise", "measured", "total"):
        assert word in out
    assert " vac" in out
    assert "all bounds evaluated hold on the measured test losses of 4 of 4 tasks" in out
    assert "not evaluated" not in out


def test_status_1_on_a_violation(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = simulate(4, 1, 0.5, drift=0.02, n=4000)
    with_test_loss(log, 2, 0.9 * log.geometry.ceiling).write(path)
    assert main(["evaluate", str(path)]) == 1
    out = capsys.readouterr().out
    assert "VIOLATED: moment (full), task 2: loss 3.61633 on test tuples (margin " in out
    assert "hold on the measured" not in out
    assert main(["evaluate", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["holds"]
    assert {"task 2"} <= {violation["task"] for violation in report["violations"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{path}x"], "No such file"),
        (["{path}", "--after-task", "9"], "after_task must be in 1..4 and logged, got 9"),
        (["{path}", "--step", "pointwise", "--chain", "full"], "pointwise does not exist for the full chain"),
        (["{path}", "--step", "pointwise", "--data", "training"], "no per-tuple values"),
    ],
)
def test_status_2_on_bad_input(
    path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *(argument.format(path=path) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_status_2_on_a_damaged_log(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(path.read_text().replace('"task": 1', '"task": -1', 1))
    assert main(["evaluate", str(path)]) == 2
    assert f"{path}: line 2: task must be in" in capsys.readouterr().err


def test_status_2_on_a_log_without_records(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LossLog(simulate(2).header).write(path)
    assert main(["evaluate", str(path)]) == 2
    assert "a header and no records" in capsys.readouterr().err


def test_status_2_on_unknown_options(path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(path), "--step", "magic"])
    assert stop.value.code == 2


@pytest.mark.parametrize("value", ["-1", "nan", "three"])
def test_status_2_on_sigmas_that_are_no_margin(path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(path), "--sigmas", value])
    assert stop.value.code == 2
    assert "--sigmas" in capsys.readouterr().err


def test_a_bad_log_does_not_keep_the_others_from_being_evaluated(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(path.with_name("missing.jsonl")), str(path)]) == 2
    out, err = capsys.readouterr()
    assert "missing.jsonl" in err
    assert f"{path}: " in out


def test_totals_are_of_clipped_bounds_and_the_unclipped_follow(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate(6, 1, 0.5, drift=0.5, n=4000).write(path)
    assert main(["evaluate", str(path), "--step", "linear", "--chain", "full"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    certificate = certify(simulate(6, 1, 0.5, drift=0.5, n=4000), "linear")
    assert any(certificate.vacuous) and not certificate.vacuous_total
    assert rows["total"][1] == f"{certificate.total:.3g}"
    assert rows["unclipped"] == [f"{certificate.unclipped_total:.3g}"]


def test_point_estimates_on_the_wrong_side_are_counted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = simulate(2, 1, 0.5, n=400)
    test = log.test(2, 2)
    log = with_test_loss(log, 2, test.contrastive.mean + math.sqrt(test.contrastive.variance / test.n_effective))
    log.write(path)
    assert main(["evaluate", str(path), "--step", "moment"]) == 0
    out = capsys.readouterr().out
    assert "within 3 standard errors" in out
    assert "2 of 8 point estimates" in out  # task 2, full and refreshed: its upper bound is its own held-out loss


def test_json_holds_the_certificates(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(path), "--json", "--step", "moment", "--step", "theorem1"]) == 0
    report = json.loads(capsys.readouterr().out)
    log = simulate(4, 1, 0.5, drift=0.02, n=4000)
    by_name = {(c["step"], c["chain"]): c for c in report["certificates"]}
    assert set(by_name) == {("theorem1", "full"), ("moment", "full"), ("moment", "refreshed")}
    assert by_name["moment", "full"]["per_task"] == pytest.approx(certify(log, "moment").per_task)
    assert by_name["theorem1", "full"]["theorem"]["alpha"] == 4.0
    assert report["log"] == str(path)


def test_json_of_an_infinite_bound_is_legal_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate(3, 1, 0.5, distill_weight=0.0).write(path)
    assert main(["evaluate", str(path), "--json", "--step", "theorem1"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["certificates"][0]["unclipped_total"] == "inf"


def test_bounds_without_records_are_skipped_and_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = simulate(3, 2, 0.5)
    log = LossLog(full.header)
    for record in full.records:
        if not isinstance(record, Training):
            log.add(record)
    log.write(path)
    assert main(["evaluate", str(path)]) == 0
    assert "not evaluated: theorem1 (full): the log has no record training (after task 1)" in capsys.readouterr().out
    assert main(["evaluate", str(path), "--step", "theorem1"]) == 2


def test_a_torn_line_is_a_warning(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with path.open("a") as file:
        file.write('{"record": "te')
    assert main(["evaluate", str(path)]) == 0
    assert "the last line is torn" in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_error(path: Path) -> None:
    command = Path(sys.executable).with_name("cila-bound")
    with subprocess.Popen(
        [command, "evaluate", *[path] * 3], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_the_installed_command_runs(path: Path) -> None:
    command = Path(sys.executable).with_name("cila-bound")
    result = subprocess.run([command, "evaluate", path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "moment" in result.stdout


@pytest.mark.parametrize(
    ("options", "given"),
    [(["--selections", "5"], "selections = 5"), (["--inequality", "hoeffding"], 'inequality = "hoeffding"')],
)
def test_what_only_a_certificate_has_is_refused_without_a_confidence(
    options: list[str], given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "losses.jsonl"
    simulate(2, 1, 0.5).write(path)
    assert main(["evaluate", str(path), *options]) == 2
    assert f"cila-bound: {given} needs a confidence, such as 0.95" in capsys.readouterr().err


def test_all_that_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = simulate(2, 1, 0.5, n=20)
    bare = LossLog(log.header)
    for record in log.records:
        bare.add(dataclasses.replace(record, tuples=None) if isinstance(record, Measurement) else record)
    bare.write(tmp_path / "losses.jsonl")
    assert main(["evaluate", str(tmp_path / "losses.jsonl"), "--confidence", "0.9", "--inequality", "betting"]) == 2
    err = capsys.readouterr().err
    assert "no bound can be evaluated: betting needs the contrastive of every tuple after task 1 on task 1" in err
    assert "cut short" not in err
