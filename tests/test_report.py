"""The report of a check: its numbers against the runs' files, its words, and the page in a browser."""

import base64
import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cila_bound import certify, read_log
from experiments.config import RunConfig
from paper_figures import report
from paper_figures.advice import advice, headline
from paper_figures.check_numbers import assemble, load_check
from paper_figures.runs import load_studies
from tests.test_figures import write_run

STAGES = {
    "finetune": "the current task alone",
    "contrastive-only": "+ contrast with a rehearsal buffer",
    "co2l": "+ distillation from the previous model",
    "cila-max": "+ an adaptive weight of the distillation",
}
CHECK: dict[str, Any] = {
    "name": "cells <1>",
    "source": "/data/cells.npz",
    "remarks": ["3 images were there twice & were dropped"],
    "classes": ["bad", "good"],
    "counts": {"task 1": {"bad": 30, "good": 70}, "task 2": {"bad": 50, "good": 50}, "task 3": {"bad": 9, "good": 91}},
    "stages": [{"variant": variant, "adds": adds} for variant, adds in STAGES.items()],
    "confidence": 0.95,
    "selections": 12,
    "defect": "bad",
    "costs": {"miss": 100.0, "alarm": 7.0},
    "plan": {"minutes": 10.0, "seeds": 3, "epochs": 20, "buffer_size": 200, "old_images": 500, "too_short": False},
}


def confusion(rng: np.random.Generator) -> list[list[int]]:
    return rng.integers(1, 60, (2, 2)).tolist()


def write_check(folder: Path, check: dict[str, Any], *, n: int = 40, seeds: int = 3) -> None:
    folder.mkdir()
    (folder / "check.json").write_text(json.dumps(check))
    rng = np.random.default_rng(0)
    for draw, stage in enumerate(check["stages"]):
        for seed in range(seeds):
            config = RunConfig(method=stage["variant"], seed=seed, log_tuples="all")
            path = write_run(folder / "runs", config, draw=draw, n=n) / "metrics.json"
            metrics = json.loads(path.read_text())
            metrics["confusion"] = {name: [confusion(rng) for _ in range(3)] for name in ("own", "last")}
            path.write_text(json.dumps(metrics))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "cells"
    write_check(path, CHECK)
    assert report.main(path) == 0
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def metrics_of(folder: Path, method: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"runs/digits/{method}-seed{seed}/metrics.json").read_text()) for seed in range(3)]


def test_stages_are_those_of_the_runs(folder: Path, found: dict[str, Any]) -> None:
    assert [stage["variant"] for stage in found["stages"]] == list(STAGES)
    for stage in found["stages"]:
        runs = metrics_of(folder, stage["variant"])
        accuracy = [run["accuracy"]["class_il"]["average_accuracy"] for run in runs]
        assert stage["accuracy"]["mean"] == pytest.approx(np.mean(accuracy))
        assert stage["accuracy"]["std"] == pytest.approx(np.std(accuracy, ddof=1))
        costs = []
        for run in runs:
            per_task = []
            for (_, missed), (alarms, _), total in ((*table, np.sum(table)) for table in run["confusion"]["last"]):
                per_task.append(1000 * (100.0 * missed + 7.0 * alarms) / total)
            costs.append(per_task)
        assert [c["mean"] for c in stage["cost_per_task"]] == pytest.approx(np.mean(costs, axis=0))
        assert stage["cost"]["mean"] == pytest.approx(np.mean(costs))
        table, own = (np.array(runs[0]["confusion"][name][0]) for name in ("last", "own"))
        if stage["n"] == 1:
            assert stage["missed_per_task"][0]["mean"] == pytest.approx(table[0, 1] / table.sum())
        assert own.shape == (2, 2)


def test_the_cost_of_forgetting_is_now_minus_then(folder: Path, found: dict[str, Any]) -> None:
    for stage in found["stages"]:
        assert len(stage["cost_of_forgetting"]) == 2  # the last task is new
        changes = []
        for run in metrics_of(folder, stage["variant"]):
            now, then = (np.array(run["confusion"][name][0], float) for name in ("last", "own"))
            price = np.array([[0.0, 100.0], [7.0, 0.0]])
            changes.append(1000 * ((price * now).sum() / now.sum() - (price * then).sum() / then.sum()))
        assert stage["cost_of_forgetting"][0]["mean"] == pytest.approx(np.mean(changes))


def test_parts_are_paired_over_seeds(folder: Path, found: dict[str, Any]) -> None:
    for part, (before, after) in zip(found["parts"], zip(STAGES, list(STAGES)[1:], strict=False), strict=True):
        assert (part["before"], part["after"]) == (before, after)
        values = [
            [run["accuracy"]["class_il"]["average_accuracy"] for run in metrics_of(folder, method)]
            for method in (after, before)
        ]
        difference = np.subtract(*values)
        interval = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference))
        assert (part["accuracy"]["low"], part["accuracy"]["high"]) == pytest.approx(interval)


def test_bounds_are_certificates_for_any_of_the_models(folder: Path, found: dict[str, Any]) -> None:
    logs = [read_log(folder / f"runs/digits/cila-max-seed{seed}/losses.jsonl") for seed in range(3)]
    rows = {row["name"]: row for row in found["bounds"]}
    assert list(rows) == [
        "Theorem 1 form", "linear chain", "moment chain", "moment, last step", "pointwise, last step",
        "measured directly",
    ]  # fmt: skip
    assert rows["Theorem 1 form"]["certified"] is None
    for name, step, chain in (("moment chain", "moment", "full"), ("measured directly", "direct", "refreshed")):
        certificates = [certify(log, step, chain=chain, confidence=0.99, selections=12) for log in logs]
        assert rows[name]["certified"]["mean"] == pytest.approx(np.mean([c.total / 3 for c in certificates]))
        assert rows[name]["estimate"]["mean"] == pytest.approx(
            np.mean([certify(log, step, chain=chain).total / 3 for log in logs])
        )
        below = [sum(b < log.geometry.ceiling for b in c.per_task) for c, log in zip(certificates, logs, strict=True)]
        assert rows[name]["below_ceiling"] == min(below)
        assert rows[name]["inequalities"] == sorted({s.inequality for s in certificates[0].statements})
    assert found["selections"] == 12
    assert any("among 12" in text for text in rows["moment chain"]["assumptions"])


def test_the_page_is_whole_in_itself(folder: Path, found: dict[str, Any]) -> None:
    page = (folder / "report.html").read_text()
    assert "cells &lt;1&gt;" in page and "twice &amp; were dropped" in page
    assert "<1>" not in page
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == 4
    for image in images:
        assert base64.b64decode(image).startswith(b"<?xml")
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for text in (*found["headline"], *found["advice"]):
        assert text.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;").replace(">", "&gt;") in page
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b|\de[+-]\d", re.sub(r"base64,[^\"]+", "", page))


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_page_opens_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """Every figure is decoded and as wide as it says, and no table is cut off."""
    probe = (
        "<script>window.onload=()=>{const wide=[...document.images].every(i=>i.complete&&i.naturalWidth>300);"
        "document.title=`figures ${document.images.length} ${wide} rows ${document.querySelectorAll('tr').length}`}"
        "</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", probe))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [CHROMIUM, *options.split(), "--disable-component-update", "--disable-sync", "--virtual-time-budget=5000"]
    shown = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title is not None
    assert title[1].startswith("figures 4 true rows ")
    assert int(title[1].split()[-1]) > 25


def test_without_costs_there_is_no_talk_of_them(tmp_path: Path) -> None:
    write_check(tmp_path / "cells", CHECK | {"costs": None, "defect": None}, n=16, seeds=1)
    assert report.main(tmp_path / "cells") == 0
    page = (tmp_path / "cells/report.html").read_text()
    assert "per missed" not in page
    assert page.count("data:image/svg") == 3


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    write_check(tmp_path / "cells", CHECK, n=16, seeds=1)
    (study,) = load_studies(tmp_path / "cells/runs")
    found = assemble(load_check(tmp_path / "cells"), study)
    assert found["parts"][0]["accuracy"]["low"] is None
    assert found["stages"][0]["accuracy"]["std"] is None
    assert any("rests on 1 seed " in text for text in advice(found))


def test_a_bound_that_fails_is_said_first_and_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cila_bound import LossLog, Statistic, TestLoss

    write_check(tmp_path / "cells", CHECK, n=400, seeds=1)
    path = tmp_path / "cells/runs/digits/cila-max-seed0/losses.jsonl"
    log = read_log(path)
    false = LossLog(log.header)
    for record in log.records:
        if isinstance(record, TestLoss) and (record.after_task, record.task) == (3, 3):
            record = dataclasses.replace(record, contrastive=Statistic(0.9 * log.geometry.ceiling, 1e-6))
        false.add(record)
    false.write(path)
    assert report.main(tmp_path / "cells") == 1
    found = json.loads((tmp_path / "cells/report.json").read_text())
    assert "A bound failed on the data" in found["advice"][0]
    assert "A bound failed on the data" in (tmp_path / "cells/report.html").read_text()
    capsys.readouterr()


def summary(mean: float, std: float | None = 0.01) -> dict[str, Any]:
    return {"mean": mean, "std": std, "n": 3}


def test_advice_follows_the_numbers(found: dict[str, Any]) -> None:
    """Each rule, switched on and off."""

    def change(**changes: Any) -> dict[str, Any]:
        return json.loads(json.dumps(found | {"violations": []})) | changes

    def part(low: float, mean: float, high: float) -> dict[str, Any]:
        interval = {"low": low, "mean": mean, "high": high, "n": 3}
        undecided = {"low": -0.1, "mean": 0.0, "high": 0.1, "n": 3}
        return dict(found["parts"][0]) | {
            "cost": interval, "accuracy": interval, "forgetting": undecided, "loss": undecided
        }  # fmt: skip

    for interval, expected in (
        (
            (-30.0, -20.0, -10.0),
            "Keep it: contrastive-only (+ contrast with a rehearsal buffer) against finetune, cost -20",
        ),
        ((10.0, 20.0, 30.0), "Leave it out: "),
        ((-5.0, 1.0, 8.0), "No difference in cost shown: "),
    ):
        assert any(text.startswith(expected) for text in advice(change(parts=[part(*interval)])))
    for interval, expected in (((0.01, 0.02, 0.03), "Keep it: "), ((-0.03, -0.02, -0.01), "Leave it out: ")):
        texts = advice(change(parts=[part(*interval)], kpi=None))
        assert any(text.startswith(expected) and "accuracy" in text and "points" in text for text in texts)

    lower = part(-0.05, 0.01, 0.08) | {"loss": {"low": -0.3, "mean": -0.2, "high": -0.1, "n": 3}}
    texts = advice(change(parts=[lower], kpi=None))
    assert any(
        t.startswith("No difference in accuracy shown") and "But loss -0.200 nats [-0.300, -0.100]" in t for t in texts
    )

    def last_stage(**values: Any) -> list[dict[str, Any]]:
        return [*found["stages"][:-1], found["stages"][-1] | values]

    assert any(
        "try a larger buffer (200 of 500 training images" in t
        for t in advice(change(stages=last_stage(forgetting=summary(0.2))))
    )
    plan = found["plan"] | {"old_images": 200}
    texts = advice(change(stages=last_stage(forgetting=summary(0.2)), plan=plan))
    assert any("holds all 200 training images of earlier tasks" in text for text in texts)
    assert not any("try a larger buffer" in text for text in texts)
    assert any("forgets next to nothing" in t for t in advice(change(stages=last_stage(forgetting=summary(0.001)))))

    def with_bounds(pointwise: int | None = None, **values: Any) -> list[dict[str, Any]]:
        """The same for all that can be certified, but the number of tuples for chance of one of them."""
        changed = [b | values if b["certified"] else b for b in found["bounds"]]
        fewer = {"needed": values["needed"] | {"chance": pointwise}} if pointwise else {}
        return [b | fewer if b["step"] == "pointwise" else b for b in changed]

    needed = {"ceiling": 1234, "chance": 2_000_000}
    texts = advice(change(bounds=with_bounds(below_ceiling=1, below_chance=0, needed=needed)))
    assert any("1,234 independent tuples a task (" in text and "3,702 held-out images if" in text for text in texts)
    never = "No number of held-out images (up to 100,000 tuples a task) would certify a loss "
    assert any(text.startswith(never + "below chance on every task") for text in texts)
    texts = advice(change(bounds=with_bounds(pointwise=999, below_ceiling=3, below_chance=0, needed=needed)))
    assert any(
        "below chance on every task, hold out more: about 999 independent tuples a task (poi" in t for t in texts
    )
    texts = advice(change(bounds=with_bounds(below_ceiling=3, below_chance=3, needed=needed)))
    assert not any(text.startswith(never) or "hold out more" in text for text in texts)
    direct = "measuring the new model on them certifies most (0.5 nats a task, against 0.7 by the "
    certified = [
        b | {"certified": b["certified"] and summary(0.5 if b["step"] == "direct" else 0.7)} for b in with_bounds()
    ]
    assert any(direct in text for text in advice(change(bounds=certified)))
    equal = [b | {"certified": b["certified"] and summary(0.5)} for b in with_bounds()]
    assert not any("measuring the new model on them" in text for text in advice(change(bounds=equal)))
    assert any("were copies of training images" in text for text in advice(change(leaked=4)))
    plan = found["plan"] | {"too_short": True}
    assert any("Training was cut short (10 minutes allowed)" in text for text in advice(change(plan=plan)))


def test_the_headline_says_what_is_guaranteed(found: dict[str, Any]) -> None:
    def with_bounds(ceiling: int, chance: int) -> str:
        bounds = [
            b if b["certified"] is None else b | {"below_ceiling": ceiling, "below_chance": chance}
            for b in found["bounds"]
        ]
        return headline(found | {"bounds": bounds})[-1]

    assert "nothing is guaranteed with so few held-out tuples" in with_bounds(0, 0)
    assert "better than a collapsed encoder on every task, guaranteed" in with_bounds(3, 3)
    assert "not vacuous for 2 of 3 tasks, better than a collapsed encoder for none of them" in with_bounds(2, 0)
    assert "for 1 of them" in with_bounds(2, 1)
    assert math.isfinite(found["bounds"][1]["certified"]["mean"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "check.json").unlink(), "check.json is missing: give the folder"),
        (lambda folder: (folder / "check.json").write_text("{}"), "check.json is damaged .it lacks one of name"),
        (lambda folder: (folder / "check.json").write_text("{"), "check.json is damaged"),
        (lambda folder: shutil.rmtree(folder / "runs"), "holds no finished run"),
    ],
)
def test_a_damaged_folder_is_refused(
    damage: Any, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    assert report.main(copy) == 2
    assert re.search(message, capsys.readouterr().err)
