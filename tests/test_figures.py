"""Every figure from a tiny study, and what a folder without usable runs gets."""

import dataclasses
import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from cila_bound import certify
from experiments.config import RunConfig
from experiments.sweep import sweep
from paper_figures.__main__ import DATA, main
from paper_figures.figures import FIGURES, accuracy, distill_weight, measured_vs_bounds
from paper_figures.runs import load_studies, mean_and_std
from paper_figures.style import panels, task_ticks
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
    assert "The last task has had no step yet" in title and "sampling error" in title
    assert "one step" in drawing.legends[0].get_title().get_text()
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
    assert np.isnan(mean_and_std([[1.0]])[1]).all()


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


def texts(drawing: Figure) -> list[str]:
    """Everything written in the panels."""
    return [text.get_text() for axes in drawing.axes for text in axes.texts]


def test_one_seed_has_no_spread(runs: Path) -> None:
    (study,) = load_studies(runs)
    assert any("±" in text for text in texts(accuracy(study)))
    alone = dataclasses.replace(study, methods={"cila-max": study.methods["cila-max"][:1]})
    for draw in FIGURES.values():
        drawing = draw(alone)
        assert "one seed" in drawing.get_suptitle() and "±" not in drawing.get_suptitle()
        assert not any("±" in text for text in texts(drawing))
        drawing.savefig(io.BytesIO(), format="png")  # without a warning


def test_unequal_numbers_of_seeds_are_told_apart(runs: Path) -> None:
    (study,) = load_studies(runs)
    unequal = dataclasses.replace(study, methods=study.methods | {"finetune": study.methods["finetune"][:2]})
    drawing = measured_vs_bounds(unequal)
    assert [axes.get_title().splitlines()[0] for axes in drawing.axes] == ["cila-max (n = 3)", "finetune (n = 2)"]
    assert "mean ± std over n seeds" in drawing.get_suptitle()
    assert "| finetune (n = 2) |" in summary(unequal)
    assert measured_vs_bounds(study).axes[0].get_title().startswith("cila-max\n")


def test_panels_are_wrapped_into_rows() -> None:
    for count, columns in ((1, 1), (3, 3), (4, 4), (5, 3), (8, 4), (10, 4)):
        drawing, grid = panels(count, 1.0, 1.0)
        assert len(grid) == len(drawing.axes) == count
        place = grid[0].get_subplotspec()
        assert place is not None and place.get_gridspec().ncols == columns


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("n_methods", [1, 2])
def test_nothing_is_cut_off(name: str, n_methods: int, runs: Path) -> None:
    (study,) = load_studies(runs)
    drawing = FIGURES[name](dataclasses.replace(study, methods=dict([*study.methods.items()][:n_methods])))
    drawing.canvas.draw()
    title = drawing._suptitle.get_window_extent()  # type: ignore[attr-defined]
    assert title.x0 >= 0.0 and title.x1 <= drawing.bbox.x1 and title.y1 <= drawing.bbox.y1
    beside = [*(axes.get_tightbbox() for axes in drawing.axes), *(each.get_window_extent() for each in drawing.legends)]
    assert all(title.y0 >= box.y1 for box in beside)


@pytest.mark.parametrize("tasks", [["0-1", "2-3", "4-5", "6-7", "8-9"], [f"rotation {i}" for i in range(1, 6)]])
def test_names_of_tasks_do_not_overlap(tasks: list[str]) -> None:
    """Slanted lines of text are as far apart as the sine of their angle says."""
    drawing, (axes, *_) = panels(4, 2.0, 2.0)
    task_ticks(axes, tasks)
    drawing.canvas.draw()
    labels = axes.get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    slope = np.sin(np.deg2rad(labels[0].get_rotation()))
    points = np.diff([box.x1 for box in boxes]) * slope * 72 / drawing.dpi
    assert (points > 9.0).all() if slope else not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_distillation_weight_says_what_its_terms_are(runs: Path) -> None:
    (study,) = load_studies(runs)
    title = distill_weight(study).get_suptitle()
    assert "Objective on training batches; not comparable with the logged losses." in title
    assert "Without distillation, so not shown: finetune." in title
    assert "negative" not in title


def test_accuracy_uses_its_colours_and_units_well(runs: Path) -> None:
    (study,) = load_studies(runs)
    drawing = accuracy(study)
    *matrices, _, change = drawing.axes
    lowest = min(np.nanmin(np.ma.filled(axes.images[0].get_array(), np.nan)) for axes in matrices)
    for axes in matrices:
        low, high = axes.images[0].get_clim()
        assert high == 100.0 and low <= lowest < low + 5.0
    assert change.get_title() == "forgetting, pp"
    assert "temperature" not in drawing.get_suptitle()


def test_an_incomplete_or_damaged_run_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_run(runs / "digits/cila-max-seed0", tmp_path / "one")
    log, metrics = tmp_path / "one/losses.jsonl", tmp_path / "one/metrics.json"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert main((), tmp_path, tmp_path / "out") == 2
    assert f"{log}: the log has no record training (after task 2)" in capsys.readouterr().err
    for content in ("", "[]", "{}"):
        metrics.write_text(content)
        assert main((), tmp_path, tmp_path / "out") == 2
        assert f"{metrics} is damaged" in capsys.readouterr().err


def test_the_path_of_the_summary_is_printed(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("summary",), runs, tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "digits-summary.md")
