"""Every figure from a tiny study, and what a folder without usable runs gets."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cila_bound import certify
from experiments.config import RunConfig
from experiments.sweep import sweep
from paper_figures.__main__ import DATA, main
from paper_figures.figures import FIGURES, measured_vs_bounds
from paper_figures.runs import load_studies, mean_and_std
from paper_figures.tables import summary


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    base = RunConfig(n_tasks=2, epochs_first=1, epochs=1, buffer_size=20, tuple_rounds=2)
    assert sweep(base, ["cila-max", "finetune"], [0, 1, 2], 1, folder) == []
    return folder


def test_all_figures_are_written_and_reproducible(runs: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert main((), runs, tmp_path / folder) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    drawn = [f"digits-{name}.{kind}" for name in FIGURES for kind in ("pdf", "png")]
    assert names == sorted([*drawn, "digits-summary.md"])
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert len(content) > 5000 or name.endswith(".md")
        assert content == (tmp_path / "b" / name).read_bytes()


def test_named_figures_only(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("accuracy",), runs, tmp_path) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"digits-accuracy.{kind}") for kind in ("pdf", "png")]


def test_figures_can_be_read_alone(runs: Path) -> None:
    """Units on the axes, n and error bars in the title, every series in the legend, every value on the page."""
    (study,) = load_studies(runs)
    drawing = measured_vs_bounds(study)
    title = drawing.get_suptitle()
    assert "mean ± std over n = 3 seeds" in title
    assert "temperature 0.5" in title
    axes = drawing.axes[0]
    assert "nats" in axes.get_ylabel()
    legend = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert {"measured on test tuples", "floor", "chance", "ceiling", "linear", "moment", "pointwise, refreshed"} <= set(
        legend
    )
    truth = [run.log.test(2, 1).contrastive.mean for run in study.methods["cila-max"]]
    (line,) = [shown for shown in axes.collections if shown.get_label() == "measured on test tuples"]
    assert line.get_segments()[0][0][1] == pytest.approx(np.mean(truth))
    (_, bottom), (_, top) = axes.containers[-1][2][0].get_segments()[0]  # the error bars drawn last
    assert top - bottom == pytest.approx(2 * np.std(truth, ddof=1))
    low, high = axes.get_ylim()
    drawn = [y for line in axes.lines for y in np.atleast_1d(line.get_ydata())]
    assert all(low <= y <= high for y in drawn)


def test_summary_table(runs: Path) -> None:
    (study,) = load_studies(runs)
    text = summary(study)
    assert "mean ± std over n = 3 seeds" in text
    head, _, cila, finetune = text.splitlines()[2:]
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    cells = dict(zip(columns, (cell.strip() for cell in cila.strip("|").split("|")), strict=True))
    totals = [certify(run.log, "moment").total for run in study.methods["cila-max"]]
    assert cells["moment"] == f"{np.mean(totals):.3g} ± {np.std(totals, ddof=1):.2g}"
    assert "infinite" in finetune  # no distillation: training losses alone say nothing


def test_mean_and_std() -> None:
    mean, spread = mean_and_std([[1.0, 2.0], [3.0, 2.0]])
    assert mean.tolist() == [2.0, 2.0]
    assert spread == pytest.approx([2.0**0.5, 0.0])
    assert mean_and_std([[1.0]])[1].tolist() == [0.0]


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main((), tmp_path, tmp_path / "out") == 2
    assert "holds no finished run" in capsys.readouterr().err


def copy_run(source: Path, target: Path, **config: object) -> None:
    """A copy of a run with changed options in its metrics."""
    target.mkdir(parents=True)
    metrics = json.loads((source / "metrics.json").read_text())
    metrics["config"] |= config
    (target / "metrics.json").write_text(json.dumps(metrics))
    (target / "losses.jsonl").write_bytes((source / "losses.jsonl").read_bytes())


def test_unlike_or_repeated_runs_are_not_averaged(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = runs / "digits/cila-max-seed0"
    copy_run(source, tmp_path / "a/one")
    copy_run(source, tmp_path / "a/two", seed=1, epochs=99)
    assert main((), tmp_path / "a", tmp_path / "out") == 2
    assert "differ in epochs, 1 and 99: keep them in separate folders" in capsys.readouterr().err
    (tmp_path / "a/two/losses.jsonl").unlink()
    assert main((), tmp_path / "a", tmp_path / "out") == 2
    assert "is missing beside metrics.json" in capsys.readouterr().err
    copy_run(source, tmp_path / "b/one")
    copy_run(source, tmp_path / "b/two")
    assert main((), tmp_path / "b", tmp_path / "out") == 2
    assert "b/one and" in (error := capsys.readouterr().err)
    assert "are the same method and seed" in error


def test_the_logs_of_the_repository_are_the_default() -> None:
    """What the README shows can be redrawn: three methods, three seeds."""
    (study,) = load_studies(DATA)
    assert {method: len(found) for method, found in study.methods.items()} == {"cila-max": 3, "co2l": 3, "finetune": 3}


def test_a_study_without_spread_still_draws(runs: Path) -> None:
    (study,) = load_studies(runs)
    alone = dataclasses.replace(study, methods={"cila-max": study.methods["cila-max"][:1]})
    assert "single n = 1 seed" in measured_vs_bounds(alone).get_suptitle()
