"""Every figure and table from a study with all kinds of variants, against numbers computed here, and what a folder
without usable runs gets.
"""

import dataclasses
import gzip
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from scipy import stats

from cila_bound import Measurement, Training, certify
from experiments.config import RunConfig
from experiments.train import run as train
from paper_figures.__main__ import DATA, Name, main
from paper_figures.across import bound_ranks, temperature
from paper_figures.figures import FIGURES
from paper_figures.per_task import accuracy, distill_weight, measured_vs_bounds, tightness
from paper_figures.published import RESULTS
from paper_figures.runs import PRINCIPAL, NoDataError, Run, Study, load_studies
from paper_figures.stats import agreement, holm, mean_and_std, paired
from paper_figures.style import panels, task_ticks
from paper_figures.sweeps import buffer, lambda_sweep, pretraining
from paper_figures.tables import TABLES, Table, comparisons, ranks, summary, table1, table2
from tests.simulate import simulate

FURTHER: dict[str, Any] = {"theory_temperatures": (0.5, 0.2), "n_negatives": (1, 4)}
PLAIN = ("cila-min", "contrastive-only", "distillation-only", "dual-price", "dual-price-per-task", "er", "der++")
VARIANTS: tuple[dict[str, Any], ...] = (
    *({"method": method, **FURTHER} for method in ("cila-max", "co2l", "finetune")),
    *({"method": method} for method in ("cila-pure", *PLAIN)),
    *({"method": "cila-pure", "kappa": kappa, "log_tuples": "none"} for kappa in (0.5, 4.0)),
    *({"method": "co2l", "distill_weight": weight, "log_tuples": "none"} for weight in (0.1, 10.0)),
    *({"method": method, "buffer_size": 50, "log_tuples": "none"} for method in ("co2l", "er")),
    {"method": "co2l", "positives": "view"},
    {"method": "cila-max", "label_noise": 0.2, "log_tuples": "none"},
    {"method": "cila-max", "imbalance": 10.0},
    {"method": "co2l", "queue_size": 512},
    *(
        {"method": method, "pretrain_fraction": 0.5, "pretrain_epochs": epochs}
        for method in ("co2l", "finetune")
        for epochs in (0, 40)
    ),
)


def scores(matrix: list[list[float]]) -> dict[str, Any]:
    last, n = matrix[-1], len(matrix)
    return {
        "accuracy_matrix": matrix,
        "average_accuracy": float(np.mean(last)),
        "forgetting": float(np.mean([max(matrix[t][i] for t in range(i, n - 1)) - last[i] for i in range(n - 1)])),
        "backward_transfer": float(np.mean([last[i] - matrix[i][i] for i in range(n - 1)])),
    }


def write_run(root: Path, config: RunConfig, *, n_tasks: int = 3, n: int = 16, draw: int = 0) -> Path:
    """A finished run of simulated losses, in the files that ``experiments`` writes."""
    folder = root / config.name
    folder.mkdir(parents=True)
    rng = np.random.default_rng([draw, config.seed])
    weight = 0.0 if config.method in ("finetune", "contrastive-only", "er", "der++") else config.distill_weight
    for position, geometry in enumerate(config.geometries):
        name = f"losses-temperature{geometry.temperature:g}-negatives{geometry.n_negatives}.jsonl"
        log = simulate(
            n_tasks,
            geometry.n_negatives,
            geometry.temperature,
            n=n,
            drift=0.02 + 0.01 * (draw % 17),
            distill_weight=weight,
            seed=100 * draw + config.seed,
        )
        for key, record in log._records.items():
            if isinstance(record, Measurement) and (position or config.log_tuples == "none"):
                log._records[key] = dataclasses.replace(record, tuples=None)
            if isinstance(record, Training):  # lambda rises from task to task
                rising = record.distill_weight * record.after_task / 2
                loss = record.contrastive + rising * (record.distillation or 0.0)
                log._records[key] = dataclasses.replace(record, distill_weight=rising, loss=loss)
        log.write(folder / ("losses.jsonl" if position == 0 else name))
    kinds = ("domain_il",) if config.scenario == "rotations" else ("class_il", "task_il")
    result = {
        "study": config.study,
        "variant": config.variant,
        "config": config.as_json(),
        "tasks": [f"task {i}" for i in range(1, n_tasks + 1)],
        "accuracy": {
            kind: scores([rng.uniform(0.6, 1.0, t).tolist() for t in range(1, n_tasks + 1)]) for kind in kinds
        },
        "objective": [],
        "training_seconds": 1.0,
        "versions": {"torch": "2.13.0", "processor": "toy", "gpu": "none", "commit": "abc"},
    }
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of every variant of digits; "cila-pure" is "cila-max" again, as it is at kappa = 2."""
    root = tmp_path_factory.mktemp("runs")
    for draw, options in enumerate(VARIANTS):
        for seed in range(3):
            write_run(root, RunConfig(seed=seed, **options), draw=0 if options == {"method": "cila-pure"} else draw)
    return root


@pytest.fixture(scope="module")
def study(runs: Path) -> Study:
    (found,) = load_studies(runs)
    return found


@pytest.fixture(scope="module")
def long_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Twenty tasks of rotations, two seeds, without tuples."""
    from experiments.presets import preset

    root = tmp_path_factory.mktemp("long")
    base = dataclasses.replace(preset("rotated-mnist", "short"), log_tuples="none", theory_temperatures=(0.5, 1.0))
    for draw, method in enumerate(("cila-max", "co2l")):
        for seed in range(2):
            config = dataclasses.replace(base, method=method, seed=seed)  # type: ignore[arg-type]
            write_run(root, config, n_tasks=20, n=6, draw=draw)
    (found,) = load_studies(root)
    return found


def cells(table: Table, *start: str) -> dict[str, str]:
    """The one row that starts with these cells, by column; a column's second occurrence has a star."""
    (row,) = (row for row in table.rows if tuple(row[: len(start)]) == start)
    names: list[str] = []
    for name in table.head:
        names.append(name + "*" * names.count(name))
    return dict(zip(names, row, strict=True))


def of(study: Study, variant: str, value: Callable[[Run], float]) -> np.ndarray:
    return np.array([value(run) for run in study.variants[variant]])


def average(run: Run) -> float:
    return 100 * run.metrics["accuracy"]["class_il"]["average_accuracy"]


def measured(run: Run) -> float:
    last = len(run.losses.log.header.tasks)
    return sum(run.losses.log.test(last, task).contrastive.mean for task in range(1, last + 1))


# --- everything


def test_all_is_written(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main((), runs, tmp_path) == 0
    drawn = {f"digits-{name}.{kind}" for name in FIGURES for kind in ("pdf", "png")}
    stems = ["table1", *(f"digits-{name}" for name in TABLES)]
    written = {f"{stem}.{kind}" for stem in stems for kind in ("md", "tex")}
    assert {path.name for path in tmp_path.iterdir()} == drawn | written
    assert all((tmp_path / name).stat().st_size > 5000 for name in drawn)
    printed = capsys.readouterr().out.split("\n")
    assert str(tmp_path / "digits-ranks.md") in " ".join(printed).split()
    assert re.fullmatch(r"\d+\.\d s", printed[-2])


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    """In another process too, whose sets have another order."""
    for draw, method in enumerate(("cila-max", "co2l", "finetune")):
        for seed in range(2):
            write_run(tmp_path / "runs", RunConfig(method=method, seed=seed), draw=draw)  # type: ignore[arg-type]
    names: tuple[Name, ...] = ("accuracy", "table1", "comparisons", "ranks")
    assert main(names, tmp_path / "runs", tmp_path / "a") == 0
    command = [sys.executable, "-m", "paper_figures", *names, "--runs", str(tmp_path / "runs")]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    folder = Path(__file__).parent.parent
    subprocess.run(
        [*command, "--out", str(tmp_path / "b")], check=True, capture_output=True, cwd=folder, env=environment
    )
    made = [path.name for path in (tmp_path / "b").iterdir()]
    assert len(made) == 2 * len(names)
    for name in made:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_name_can_be_asked_for() -> None:
    assert set(get_args(Name)) == FIGURES.keys() | TABLES.keys() | {"table1"}


def test_named_figures_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs", RunConfig())
    assert main(("accuracy", "summary"), tmp_path / "runs", tmp_path) == 0
    stems = [f"digits-{name}" for name in ("accuracy.pdf", "accuracy.png", "summary.md", "summary.tex")]
    assert capsys.readouterr().out.split()[:-2] == [str(tmp_path / stem) for stem in stems]


def test_what_there_are_no_runs_for_is_left_out_or_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        write_run(tmp_path / "runs", RunConfig(method="finetune", seed=seed))
    assert main((), tmp_path / "runs", tmp_path / "out") == 0
    assert capsys.readouterr().err == ""
    made = {path.name for path in (tmp_path / "out").iterdir()}
    absent = ("lambda-sweep", "pretraining", "temperature", "buffer", "bound-ranks", "distill-weight")
    assert not any(f"digits-{name}.png" in made for name in absent)
    assert {"digits-tightness.png", "digits-summary.md", "table1.md"} <= made
    for name in (*absent, "table2", "comparisons", "ranks"):
        assert main((name,), tmp_path / "runs", tmp_path / "out") == 2
        assert f"paper_figures: no {name} of digits: " in capsys.readouterr().err


def test_trained_runs_have_the_files_that_are_read(tmp_path: Path) -> None:
    """One real run, with an option that differs from the preset: shared by all, it is no part of the name."""
    options: dict[str, Any] = {"n_tasks": 2, "epochs_first": 1, "epochs": 1, "tuple_rounds": 2, "max_tuples": 20}
    config = RunConfig(**options, **FURTHER, probe_epochs=2, buffer_size=20)
    train(config, tmp_path / config.name, show_progress=False)
    (study,) = load_studies(tmp_path)
    assert list(study.variants) == ["cila-max"] and "buffer_size=20" in study.base
    assert "buffer_size=20" in measured_vs_bounds(study).get_suptitle()
    assert len(study.any_run.all_losses) == 4
    assert math.isfinite(study.any_run.losses.total("moment"))


def test_the_logs_of_the_repository_are_the_default() -> None:
    """What the README shows can be redrawn: the principal methods, three seeds at least."""
    runs = [json.loads(path.read_text()) for path in DATA.glob("**/metrics.json")]
    for method in PRINCIPAL:
        found = [run for run in runs if (run.get("study"), run.get("variant")) == ("digits", method)]
        assert len(found) >= 3


# --- reading and comparing


def test_runs_are_grouped_by_variant_and_sorted_by_seed(study: Study) -> None:
    assert all([run.seed for run in runs] == [0, 1, 2] for runs in study.variants.values())
    assert list(study.plain.variants)[:4] == list(study.principal.variants)
    assert set(study.plain.variants) == {"cila-max", "co2l", "finetune", "cila-pure", *PLAIN}
    assert study.sweep("co2l", "distill_weight") == {
        0.1: "co2l distill_weight=0.1",
        1.0: "co2l",
        10.0: "co2l distill_weight=10.0",
    }
    assert study.partners("pretrain_epochs") == [
        (f"{method} pretrain_epochs=40 pretrain_fraction=0.5", f"{method} pretrain_fraction=0.5")
        for method in ("co2l", "finetune")
    ]
    assert study.partners("positives") == [("co2l positives=view", "co2l")]
    assert "cila-max = cila-pure" in study.distinct.variants
    assert len(study.distinct.variants) == len(study.variants) - 1


def test_further_logs_are_read_by_temperature_and_negatives(study: Study) -> None:
    run = study.variants["co2l"][0]
    found = {(g.temperature, g.n_negatives): losses for g, losses in run.all_losses.items()}
    assert found.keys() == {(0.5, 1), (0.5, 4), (0.2, 1), (0.2, 4)}
    assert found[0.2, 4].log.header.n_negatives == 4
    assert found[0.5, 1] is run.losses


def test_compressed_logs_are_read_alike(study: Study, runs: Path, tmp_path: Path) -> None:
    source = study.variants["co2l"][0].directory
    (tmp_path / "one").mkdir()
    (tmp_path / "one/metrics.json").write_bytes((source / "metrics.json").read_bytes())
    for log in source.glob("losses*.jsonl"):
        (tmp_path / "one" / f"{log.name}.gz").write_bytes(gzip.compress(log.read_bytes()))
    (found,) = load_studies(tmp_path)
    for plain, packed in zip(
        study.variants["co2l"][0].all_losses.values(), found.any_run.all_losses.values(), strict=True
    ):
        assert plain.log == packed.log


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main((), tmp_path, tmp_path / "out") == 2
    assert "holds no finished run" in capsys.readouterr().err


def copy_run(source: Path, target: Path, variant: str | None = None, **config: object) -> None:
    """A copy of a run with changed options in its metrics."""
    target.mkdir(parents=True)
    metrics = json.loads((source / "metrics.json").read_text())
    metrics["config"] |= config
    metrics["variant"] = variant or metrics["variant"]
    (target / "metrics.json").write_text(json.dumps(metrics))
    for log in source.glob("losses*.jsonl"):
        (target / log.name).write_bytes(log.read_bytes())


def test_unlike_or_repeated_runs_are_not_averaged(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = runs / "digits/cila-max-seed0"

    def refusal(folder: str) -> str:
        assert main(("summary",), tmp_path / folder, tmp_path / "out") == 2
        return capsys.readouterr().err

    copy_run(source, tmp_path / "a/one")
    copy_run(source, tmp_path / "a/two", seed=1, epochs=99)
    assert "cila-max, below" in (error := refusal("a"))
    assert "differ in epochs, 20 and 99: keep them in separate folders" in error
    copy_run(source, tmp_path / "b/one")
    copy_run(source, tmp_path / "b/two")
    assert "b/one and" in (error := refusal("b"))
    assert "are the same method and seed" in error
    copy_run(source, tmp_path / "c/one")
    copy_run(source, tmp_path / "c/two", "co2l buffer_size=50", method="co2l", buffer_size=50, epochs=99)
    assert "runs of digits below" in (error := refusal("c"))
    assert "differ in epochs, 20 and 99" in error
    metrics = json.loads((tmp_path / "c/two/metrics.json").read_text())
    copy_run(source, tmp_path / "d/one")
    copy_run(runs / "digits/co2l-seed0", tmp_path / "d/two")
    write_run(tmp_path / "d", RunConfig(method="finetune", theory_temperatures=(0.2,)))
    assert "the main logs of digits" in (error := refusal("d"))
    assert "differ in temperature, 0.2 and 0.5" in error
    for name, value in {"epochs": 20, "seed": 5, "device": "cpu", "threads": 8}.items():
        metrics["config"][name] = value
    (tmp_path / "c/two/metrics.json").write_text(json.dumps(metrics))
    assert main(("summary",), tmp_path / "c", tmp_path / "out") == 0


def test_an_incomplete_or_damaged_run_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_run(runs / "digits/cila-max-seed0", tmp_path / "one")
    log, metrics = tmp_path / "one/losses.jsonl", tmp_path / "one/metrics.json"
    further = tmp_path / "one/losses-temperature0.2-negatives4.jsonl"

    def refusal(name: Name = "summary") -> str:
        assert main((name,), tmp_path, tmp_path / "out") == 2
        return capsys.readouterr().err

    whole = further.read_text()
    further.write_text(whole[:-2])
    with pytest.warns(match="torn"):
        assert f"{further}: the log has no record training (after task 3)" in refusal("temperature")
    further.unlink()
    assert f"{further} (or {further.name}.gz) is missing beside metrics.json" in refusal()
    further.write_text(whole)
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert f"{log}: the log has no record training (after task 3)" in refusal()
    content = json.loads(metrics.read_text())
    for damaged in ("", "[]", "{}", json.dumps(content | {"accuracy": {}}), json.dumps(content | {"config": {}})):
        metrics.write_text(damaged)
        assert f"{metrics} is damaged" in refusal()
    log.unlink()
    assert f"{log} (or losses.jsonl.gz) is missing" in refusal()


def test_mean_and_std() -> None:
    mean, spread = mean_and_std([[1.0, 2.0], [3.0, 2.0]])
    assert mean.tolist() == [2.0, 2.0]
    assert spread == pytest.approx([2.0**0.5, 0.0])
    assert np.isnan(mean_and_std([[1.0]])[1]).all()


def test_paired_differences_are_those_of_scipy() -> None:
    one, other = {0: 3.0, 1: 5.0, 2: 4.5, 7: 100.0}, {2: 4.0, 0: 1.0, 1: 2.0, 9: -100.0}
    found = paired(one, other)
    assert found is not None
    expected = stats.ttest_rel([3.0, 5.0, 4.5], [1.0, 2.0, 4.0])
    interval = expected.confidence_interval(0.95)
    assert (found.n, found.mean) == (3, pytest.approx(5.5 / 3))
    assert found.std == pytest.approx(np.std([2.0, 3.0, 0.5], ddof=1))
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))
    assert paired({0: 1.0}, {1: 1.0}) is None
    alone = paired({0: 1.0}, {0: 3.0})
    assert alone is not None and alone.mean == -2.0 and math.isnan(alone.p) and math.isnan(alone.std)
    equal, shifted = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}), paired({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0})
    assert equal is not None and equal.p == 1.0
    assert shifted is not None and shifted.p == 0.0


def test_holm() -> None:
    """The example by hand: 0.01 x 4, 0.02 x 3, 0.03 x 2 (not below the one before), 0.5."""
    assert holm([0.5, 0.01, math.nan, 0.03, 0.02])[:2] == pytest.approx([0.5, 0.04])
    assert holm([0.5, 0.01, math.nan, 0.03, 0.02])[3:] == pytest.approx([0.06, 0.06])
    assert math.isnan(holm([0.5, math.nan])[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_agreement_of_ranks() -> None:
    """Infinite bounds tie for the last rank."""
    bounds, truth = [2.0, 1.0, math.inf, math.inf, 3.0], [1.0, 2.0, 5.0, 4.0, 3.0]
    found = agreement(bounds, truth)
    assert found.spearman == pytest.approx(stats.spearmanr([2, 1, 4, 4, 3], truth).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau([2, 1, 4, 4, 3], truth, variant="b").statistic)
    assert found.n == 5 and not found.same_lowest
    assert agreement([1.0, 2.0, 2.0], [1.0, 4.0, 3.0]).same_lowest
    assert math.isnan(agreement([math.inf] * 4, [1.0, 2.0, 3.0, 4.0]).spearman)
    assert math.isnan(agreement([1.0, 2.0], [1.0, 2.0]).spearman)


# --- tables


def test_tables_have_one_content_in_two_formats() -> None:
    table = Table("Loss_1 of 5%.", ["a & b", "λ"], [["x_y", "-1.5 ± 0.2"], ["0-1 vs b", "-"]], ["p < 0.05 [-2, +3]"])
    assert table.markdown().splitlines() == [
        "Loss_1 of 5%.",
        "",
        "| a & b | λ |",
        "| --- | --- |",
        "| x_y | -1.5 ± 0.2 |",
        "| 0-1 vs b | - |",
        "",
        "p < 0.05 [-2, +3]",
    ]
    latex = table.latex()
    assert r"\caption{Loss\_1 of 5\%. p $<$ 0.05 [$-$2, +3]}" in latex
    body = latex[latex.index(r"\toprule") : latex.index(r"\bottomrule")].splitlines()
    assert body == [
        r"\toprule",
        r"a \& b & $\lambda$ \\",
        r"\midrule",
        r"x\_y & $-$1.5 $\pm$ 0.2 \\",
        r"0-1 vs b & -- \\",
    ]


def test_latex_is_ascii_with_balanced_rows(study: Study) -> None:
    for table in (table1([study]), *(make(study) for make in TABLES.values())):
        latex = table.latex()
        assert latex.isascii()
        rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
        assert len(rows) == len(table.rows) + 1
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table.head) - 1}


def test_summary(study: Study) -> None:
    table = summary(study)
    assert "mean ± std over n = 3 seeds" in table.caption
    found = cells(table, "cila-max")
    truth = of(study, "cila-max", measured)
    totals = [certify(run.losses.log, "moment").total for run in study.variants["cila-max"]]
    assert found["measured"] == f"{truth.mean():.3g} ± {truth.std(ddof=1):.2g}"
    ratio = np.mean(totals / truth)
    assert found["moment"] == f"{np.mean(totals):.3g} ± {np.std(totals, ddof=1):.2g} ({ratio:.3g}x)"
    assert cells(table, "finetune")["Theorem 1 form"] == "infinite"  # no distillation: training losses say nothing
    assert [row[0] for row in table.rows] == list(study.plain.variants)


def test_table1_is_measured_beside_published(study: Study, long_study: Study) -> None:
    table = table1([study, long_study])
    ours = cells(table, "digits", "50", "co2l")
    for column, kind, score in (
        ("Class-IL or Domain-IL, %", "class_il", "average_accuracy"),
        ("Task-IL, %", "task_il", "average_accuracy"),
        ("forgetting, pp", "class_il", "forgetting"),
        ("backward transfer, pp", "class_il", "backward_transfer"),
    ):
        values = [100 * run.metrics["accuracy"][kind][score] for run in study.variants["co2l buffer_size=50"]]
        assert ours[column] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert ours["n"] == "3" and ours["published"] == "-"
    plain = of(study, "co2l", average)
    full = cells(table, "digits", "200", "co2l")
    assert full["Class-IL or Domain-IL, %"] == f"{plain.mean():.2f} ± {plain.std(ddof=1):.2f}"
    absent = cells(table, "Seq-CIFAR-10", "200", "co2l")
    assert absent["Class-IL or Domain-IL, %"] == absent["Task-IL, %"] == "not measured"
    assert (absent["published"], absent["published*"]) == ("65.57 ± 1.37", "93.43 ± 0.78")
    domain = cells(table, "R-MNIST (rotated-mnist-short)", "200", "co2l")
    values = [100 * run.metrics["accuracy"]["domain_il"]["average_accuracy"] for run in long_study.variants["co2l"]]
    assert domain["Class-IL or Domain-IL, %"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert (domain["published"], domain["Task-IL, %"]) == ("97.90 ± 1.92", "-")
    assert cells(table, "R-MNIST (rotated-mnist-short)", "500", "der++")["n"] == "-"
    assert not any("pretrain" in row[2] or "=" in row[2] for row in table.rows)
    (reduced,) = [note for note in table.notes if note.startswith("rotated-mnist-short: ")]
    config = long_study.any_run.config
    changed = [("epochs_first", 100), ("epochs", 20), ("batch_size", 512), ("train_per_class", "all")]
    for name, full in changed:
        assert f" {name} {config[name]} ({full})," in reduced
    assert "2 seeds (10); 4 runs with torch 2.13.0, processor toy, gpu none, commit abc." in reduced
    assert len({(entry.stream, entry.buffer_size, entry.method) for entry in RESULTS}) == len(RESULTS)


def test_table2_has_the_weights_and_losses_of_cilas_rules(study: Study) -> None:
    table = table2(study)
    assert [row[:2] for row in table.rows] == [
        ["cila-pure", "2"],
        ["cila-pure kappa=0.5", "0.5"],
        ["cila-pure kappa=4.0", "4"],
        ["cila-min", "2"],
        ["cila-max", "2"],
        ["co2l", "-"],
    ]
    totals = [certify(run.losses.log, "moment").total for run in study.variants["cila-min"]]
    weights = [run.losses.log.training(3).distill_weight for run in study.variants["cila-min"]]
    found = cells(table, "cila-min")
    assert found["moment chain, nats"] == f"{np.mean(totals):.3g} ± {np.std(totals, ddof=1):.2g}"
    assert found["last λ"] == f"{np.mean(weights):.3g} ± 0"


def test_comparisons_are_paired_by_seed(study: Study) -> None:
    table = comparisons(study)
    found = cells(table, "cila-max vs co2l", "accuracy, pp")
    one, other = of(study, "cila-max", average), of(study, "co2l", average)
    expected = stats.ttest_rel(one, other)
    interval = expected.confidence_interval(0.95)
    assert found["difference"] == f"{np.mean(one - other):+.2f} ± {np.std(one - other, ddof=1):.2f}"
    assert found["95% interval"] == f"[{interval.low:+.2f}, {interval.high:+.2f}]"
    assert found["p"] == f"{expected.pvalue:.2g}" and found["n"] == "3"
    pairs = [row[0] for row in table.rows if row[1].startswith("measured")]
    assert pairs == [
        "cila-max vs co2l",
        "dual-price vs co2l",
        "co2l vs contrastive-only",
        "co2l vs distillation-only",
        "co2l vs finetune",
        "cila-max vs er",
        "cila-max vs der++",
        "cila-pure kappa=4.0 vs cila-pure kappa=0.5",
        "co2l pretrain_epochs=40 pretrain_fraction=0.5 vs pretrain_epochs=0",
        "finetune pretrain_epochs=40 pretrain_fraction=0.5 vs pretrain_epochs=0",
        "co2l positives=view vs positives=class",
        "co2l queue_size=512 vs queue_size=0",
    ]
    p = []
    for name, quantity, *_ in table.rows:
        first, second = name.split(" vs ")
        if "=" in second and "kappa" not in second:  # an option's default, which names do not show
            option = second.partition("=")[0]
            second = re.sub(rf" {option}=\w+", "", first)
        value = average if quantity == "accuracy, pp" else measured
        p.append(stats.ttest_rel(of(study, first, value), of(study, second, value)).pvalue)
    order = np.argsort(p)
    running = np.minimum(np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1)), 1.0)
    for place, value in zip(order, running, strict=True):
        assert table.rows[place][5] == ("< 0.0001" if value < 1e-4 else f"{value:.2g}")
    assert f"for all {len(p)} of this table" in table.notes[0]


def test_comparisons_over_the_seeds_that_both_have(study: Study) -> None:
    fewer = {"cila-max": study.variants["cila-max"], "co2l": study.variants["co2l"][1:]}
    found = cells(comparisons(dataclasses.replace(study, variants=fewer)), "cila-max vs co2l", "accuracy, pp")
    difference = of(study, "cila-max", average)[1:] - of(study, "co2l", average)[1:]
    assert found["n"] == "2" and found["difference"].startswith(f"{difference.mean():+.2f} ± ")
    alone = {name: runs[:1] for name, runs in fewer.items()}
    with pytest.raises(NoDataError, match="share a seed"):
        comparisons(dataclasses.replace(study, variants=alone))


def test_ranks_are_those_of_scipy(study: Study) -> None:
    table = ranks(study)
    names = [name for name in study.variants if name != "cila-pure"]  # the same models as cila-max count once
    for label, chain in (("moment", "full"), ("moment, refreshed", "refreshed")):
        for which, prefix in ((names, "all: "), ([n for n in names if " " not in n], "plain: ")):
            bounds = [
                np.mean([certify(run.losses.log, "moment", chain=chain).total for run in study.variants[name]])  # type: ignore[arg-type]
                for name in which
            ]
            truth = [np.mean(of(study, name, measured)) for name in which]
            found, star = cells(table, label), "*" * (prefix == "all: ")
            assert found[f"{prefix}Spearman"] == f"{stats.spearmanr(bounds, truth).statistic:.2f}"
            assert found[f"Kendall{star}"] == f"{stats.kendalltau(bounds, truth).statistic:.2f}"
            assert found[f"n{star}"] == str(len(which))
            same = np.argmin(bounds) == np.argmin(truth)
            assert found[f"same best{star}"] == ("yes" if same else "no")
    assert any("cila-max = cila-pure" in note for note in table.notes)
    clipped = [certify(run.losses.log, "linear").total for run in study.variants["er"]]
    assert clipped[0] < certify(study.variants["er"][0].losses.log, "linear").unclipped_total
    assert cells(table, "linear, clipped")["n*"] == str(len(names))
    assert int(cells(table, "pointwise, refreshed")["n*"]) < len(names)


# --- figures


def errorbars(axes: Any, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean and spread of a labelled series."""
    (found,) = [one for one in axes.containers if isinstance(one, ErrorbarContainer) and one.get_label() == label]
    line, _, (bars,) = found.lines
    ends = np.array(bars.get_segments())
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), (ends[:, 1, 1] - ends[:, 0, 1]) / 2


def test_figures_can_be_read_alone(study: Study) -> None:
    """Units on the axes, n and error bars in the title, every series in the legend, every value on the page."""
    drawing = measured_vs_bounds(study)
    title = drawing.get_suptitle()
    assert "mean ± std over n = 3 seeds" in title
    assert "temperature 0.5, 1 negative" in title
    assert "The last task has had no step yet" in title and "sampling error" in title
    assert "one step" in drawing.legends[0].get_title().get_text()
    axes = drawing.axes[0]
    assert "nats" in axes.get_ylabel()
    legend = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert {"measured on test tuples", "floor", "chance", "ceiling", "linear", "moment", "pointwise, refreshed"} <= set(
        legend
    )
    truth = [run.losses.log.test(3, 1).contrastive.mean for run in study.variants["cila-max"]]
    (line,) = [shown for shown in axes.collections if shown.get_label() == "measured on test tuples"]
    assert line.get_segments()[0][0][1] == pytest.approx(np.mean(truth))  # type: ignore[attr-defined]
    (_, bottom), (_, top) = axes.containers[-1][2][0].get_segments()[0]  # the error bars drawn last
    assert top - bottom == pytest.approx(2 * np.std(truth, ddof=1))
    low, high = axes.get_ylim()
    drawn = [y for line in axes.lines for y in np.atleast_1d(line.get_ydata())]
    assert all(low <= y <= high for y in drawn)
    assert [one.get_title().splitlines()[0] for one in drawing.axes] == list(study.principal.variants)


def test_tightness_is_bound_by_measured(study: Study) -> None:
    axes = tightness(study).axes[1]
    assert axes.get_title() == "co2l"
    x, mean, spread = errorbars(axes, "moment")
    ratios = [
        np.divide(certify(run.losses.log, "moment").per_task, run.losses.measured) for run in study.variants["co2l"]
    ]
    assert x.tolist() == [2, 1, 0]
    assert mean == pytest.approx(np.mean(ratios, axis=0)) and spread == pytest.approx(np.std(ratios, axis=0, ddof=1))
    (trivial,) = [line for line in axes.lines if line.get_label() == "ceiling / measured"]
    ceiling = study.any_run.losses.log.geometry.ceiling
    assert np.asarray(trivial.get_ydata()) == pytest.approx(
        np.mean([ceiling / np.array(run.losses.measured) for run in study.variants["co2l"]], axis=0)
    )


def test_twenty_tasks_are_lines_with_numbers(long_study: Study) -> None:
    drawing = measured_vs_bounds(long_study)
    axes = drawing.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "5", "10", "15", "20"]
    (line,) = [one for one in axes.lines if one.get_label() == "measured on test tuples"]
    truth = np.mean([run.losses.measured for run in long_study.variants["cila-max"]], axis=0)
    assert np.asarray(line.get_ydata()) == pytest.approx(truth)
    ceiling = long_study.any_run.losses.log.geometry.ceiling
    assert axes.get_ylim()[1] == pytest.approx(100 * ceiling)
    assert "Bounds beyond 100 ceilings are cut off" in " ".join(drawing.get_suptitle().split())
    matrices = accuracy(long_study)
    assert not matrices.axes[0].texts
    assert matrices.axes[-1].get_ylabel() == "accuracy, %"  # the colour bar
    assert "are cut off" in " ".join(tightness(long_study).get_suptitle().split())


def texts(drawing: Figure) -> list[str]:
    """Everything written in the panels."""
    return [text.get_text() for axes in drawing.axes for text in axes.texts]


def test_one_seed_has_no_spread(study: Study) -> None:
    assert any("±" in text for text in texts(accuracy(study)))
    alone = dataclasses.replace(study, variants={name: runs[:1] for name, runs in study.variants.items()})
    for name, draw in FIGURES.items():
        drawing = draw(alone)
        assert "one seed" in drawing.get_suptitle() and "±" not in drawing.get_suptitle()
        assert not any("±" in text for text in texts(drawing))
        if name in ("accuracy", "lambda-sweep"):
            drawing.draw_without_rendering()  # nor a warning
    for make in (summary, table2, ranks, comparisons):
        assert not any("±" in cell for row in make(alone).rows for cell in row)
    assert all(row[4] == "-" for row in comparisons(alone).rows)  # p


def test_unequal_numbers_of_seeds_are_told_apart(study: Study) -> None:
    unequal = dataclasses.replace(study, variants=study.variants | {"finetune": study.variants["finetune"][:2]})
    drawing = measured_vs_bounds(unequal)
    titles = [axes.get_title().splitlines()[0] for axes in drawing.axes]
    assert titles[0] == "cila-max (n = 3)" and titles[-1] == "finetune (n = 2)"
    assert "mean ± std over n seeds" in drawing.get_suptitle()
    assert "means over n = 2 to 3 seeds" in bound_ranks(unequal).get_suptitle()
    assert cells(summary(unequal), "finetune (n = 2)")
    assert measured_vs_bounds(study).axes[0].get_title().startswith("cila-max\n")


def test_panels_are_wrapped_into_rows() -> None:
    for count, columns in ((1, 1), (3, 3), (4, 4), (5, 3), (8, 4), (10, 4)):
        drawing, grid = panels(count, 1.0, 1.0)
        assert len(grid) == len(drawing.axes) == count
        place = grid[0].get_subplotspec()
        assert place is not None and place.get_gridspec().ncols == columns


def check_nothing_is_cut_off(drawing: Figure) -> None:
    drawing.draw_without_rendering()
    title = drawing._suptitle.get_window_extent()  # type: ignore[attr-defined]
    assert title.x0 >= 0.0 and title.x1 <= drawing.bbox.x1 and title.y1 <= drawing.bbox.y1
    boxes = [axes.get_tightbbox() for axes in drawing.axes]
    beside = [*boxes, *(each.get_window_extent() for each in drawing.legends)]
    assert all(title.y0 >= box.y1 for box in beside)
    assert all(box.x1 <= drawing.bbox.x1 + 1 and box.y0 >= -1 for box in beside)
    for legend in drawing.legends:
        assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in drawing.axes)
    names = [axes.title.get_window_extent() for axes in drawing.axes if axes.get_title()]
    assert not any(a.overlaps(b) for i, a in enumerate(names) for b in names[i + 1 :])


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off(name: str, study: Study) -> None:
    check_nothing_is_cut_off(FIGURES[name](study))


@pytest.mark.parametrize(("name", "n_methods"), [("measured-vs-bounds", 1), ("tightness", 2), ("accuracy", 2)])
def test_few_methods_leave_room_for_the_title(name: str, n_methods: int, study: Study, long_study: Study) -> None:
    for one in (study, long_study):
        check_nothing_is_cut_off(FIGURES[name](one.only(["cila-max", "co2l"][:n_methods])))


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


def test_distillation_weight_says_what_its_terms_are(study: Study) -> None:
    drawing = distill_weight(study)
    title = drawing.get_suptitle()
    assert "Objective on training batches; not comparable with the logged losses." in title
    assert "Without distillation, so not shown: contrastive-only, finetune, er, der++." in title
    assert "negative" not in title
    weights = [[run.losses.log.training(t).distill_weight for t in (2, 3)] for run in study.variants["dual-price"]]
    assert errorbars(drawing.axes[0], "dual-price")[1] == pytest.approx(np.mean(weights, axis=0))


def test_accuracy_uses_its_colours_and_units_well(study: Study) -> None:
    drawing = accuracy(study)
    *matrices, average_axes, change = drawing.axes
    lowest = min(np.nanmin(np.ma.filled(axes.images[0].get_array(), np.nan)) for axes in matrices)
    for axes in matrices:
        low, high = axes.images[0].get_clim()
        assert high == 100.0 and low <= lowest < low + 5.0
    assert change.get_title() == "forgetting, pp"
    heights = [bar.get_height() for bar in average_axes.patches]  # type: ignore[attr-defined]
    assert heights == pytest.approx([of(study, name, average).mean() for name in study.principal.variants])
    assert "temperature" not in drawing.get_suptitle()


def test_lambda_sweep_shows_means_at_their_weights(study: Study) -> None:
    drawing = lambda_sweep(study)
    losses, kappa, shares, _ = drawing.axes
    x, mean, spread = errorbars(losses, "measured on test tuples")
    names = ["co2l distill_weight=0.1", "co2l", "co2l distill_weight=10.0"]
    values = [of(study, name, measured) for name in names]
    assert x.tolist() == [0.1, 1.0, 10.0]
    assert mean == pytest.approx([v.mean() for v in values]) and spread == pytest.approx(
        [v.std(ddof=1) for v in values]
    )
    moment = [certify(run.losses.log, "moment").total for run in study.variants["cila-pure kappa=4.0"]]
    x, mean, _ = errorbars(kappa, "moment")
    assert x.tolist() == [0.5, 2.0, 4.0] and mean[-1] == pytest.approx(np.mean(moment))
    apart = [c for c in losses.containers if c.lines[0].get_xdata()[0] < 0.1]  # type: ignore[attr-defined]
    assert len(apart) == 3
    assert apart[0].lines[0].get_ydata()[0] == pytest.approx(of(study, "contrastive-only", measured).mean())  # type: ignore[attr-defined]
    assert "0" in [text.get_text() for text in losses.get_xticklabels()]
    assert "contrastive-only, λ = 0" in drawing.get_suptitle()
    best = of(study, "co2l", average).mean()
    assert any(best == pytest.approx(y) for line in shares.lines for y in np.atleast_1d(line.get_ydata()))
    one_column = lambda_sweep(study.only(["cila-pure", "cila-pure kappa=0.5", "contrastive-only"]))
    assert len(one_column.axes) == 2 and "contrastive-only" not in one_column.get_suptitle()


def test_pretraining_joins_seeds_and_tests_their_difference(study: Study) -> None:
    axes = pretraining(study).axes[2]
    assert axes.get_title() == "average accuracy, %"
    after = of(study, "co2l pretrain_epochs=40 pretrain_fraction=0.5", average)
    before = of(study, "co2l pretrain_fraction=0.5", average)
    joined = [np.asarray(line.get_ydata()) for line in axes.lines[:3]]
    assert joined == [pytest.approx(pair) for pair in zip(before, after, strict=True)]
    assert np.asarray(axes.lines[3].get_ydata()) == pytest.approx([before.mean(), after.mean()])
    test = stats.ttest_rel(after, before)
    low, high = test.confidence_interval(0.95)
    difference = np.mean(after - before)
    label = axes.get_xticklabels()[0].get_text()
    assert label == f"co2l\n{difference:+.2g}\n[{low:+.2g}, {high:+.2g}]\np = {test.pvalue:.2g}"


def test_temperature_shows_tightness_and_what_is_vacuous(study: Study) -> None:
    drawing = temperature(study)
    titles = [axes.get_title() for axes in drawing.axes]
    assert titles == [f"{m}, {k}" for k in ("1 negative", "4 negatives") for m in ("cila-max", "co2l", "finetune")]
    axes = drawing.axes[4]
    logs = [[run.all_losses[g] for g in sorted(run.all_losses, key=lambda g: g.temperature) if g.n_negatives == 4]
            for run in study.variants["co2l"]]  # fmt: skip
    totals = np.array([[certify(one.log, "linear").unclipped_total for one in row] for row in logs])
    ratios = totals / [[sum(one.measured) for one in row] for row in logs]
    x, mean, spread = errorbars(axes, "linear")
    assert x.tolist() == [0.2, 0.5]
    assert mean == pytest.approx(ratios.mean(axis=0)) and spread == pytest.approx(ratios.std(axis=0, ddof=1))
    hollow = [
        y for line in axes.lines if line.get_markerfacecolor() == "white" for y in np.atleast_1d(line.get_ydata())
    ]
    ceilings = [3 * one.log.geometry.ceiling for one in logs[0]]
    vacuous = [y for y, total, ceiling in zip(mean, totals.mean(axis=0), ceilings, strict=True) if total >= ceiling]
    assert vacuous and all(y in hollow for y in vacuous)
    assert not any(y in hollow for y in errorbars(axes, "moment, refreshed")[1])


def test_buffer_sizes_are_on_the_axis(study: Study) -> None:
    drawing = buffer(study)
    assert [axes.get_title() for axes in drawing.axes] == [
        "average accuracy, %",
        "forgetting, pp",
        "measured loss, nats",
    ]
    x, mean, _ = errorbars(drawing.axes[2], "co2l")
    assert x == pytest.approx([50, 200], rel=0.1)
    assert mean == pytest.approx([of(study, name, measured).mean() for name in ("co2l buffer_size=50", "co2l")])
    assert {text.get_text() for text in drawing.legends[0].get_texts()} == {"co2l", "er"}


def test_bound_ranks_has_a_point_for_every_distinct_variant(study: Study) -> None:
    drawing = bound_ranks(study)
    panel = {axes.get_title().splitlines()[0]: axes for axes in drawing.axes}
    points = {
        (float(x), float(y))
        for line in panel["moment"].lines
        if line.get_linestyle() == "None"
        for x, y in zip(*map(np.atleast_1d, line.get_data()), strict=True)
    }
    expected = {
        (
            float(of(study, name, measured).mean()),
            float(np.mean([certify(run.losses.log, "moment").total for run in study.variants[name]])),
        )
        for name in study.variants
        if name != "cila-pure"
    }
    assert sorted(points) == [pytest.approx(pair) for pair in sorted(expected)]
    found = cells(ranks(study), "moment")
    title = panel["moment"].get_title().splitlines()[1]
    assert (
        title
        == f"Spearman {found['plain: Spearman']} ({found['n']} plain), {found['all: Spearman']} (all {found['n*']})"
    )
    means = [np.mean([certify(run.losses.log, "theorem1").unclipped_total for run in runs]) for runs in
             study.distinct.variants.values()]  # fmt: skip
    assert f"Theorem 1 form, {np.isinf(means).sum()} of {len(means)} infinite" in panel
    assert "cila-max = cila-pure" in [text.get_text() for text in drawing.legends[0].get_texts()]
