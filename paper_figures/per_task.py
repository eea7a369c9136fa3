"""Figures over tasks: losses and bounds, distillation weights, accuracy. One pure function each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cila_bound import Geometry, Training
from paper_figures.bounds import THEOREM1
from paper_figures.runs import NoDataError, Run, Study, method
from paper_figures.stats import mean_and_std
from paper_figures.style import (
    BOUND_STYLE,
    CUT,
    MANY_TASKS,
    MEASURED,
    band,
    caption,
    heading,
    label_rows,
    legend,
    line,
    method_style,
    number_ticks,
    panels,
    task_ticks,
)

REFRESHED = "refreshed: one step\nfrom the previous model"


def measured_vs_bounds(study: Study) -> Figure:
    """Measured population loss of the final model on each task against every bound, one panel per method."""
    study = study.principal
    drawing, grid = panels(len(study.variants), 3.3, 3.3, sharey=True)
    x, many = np.arange(len(study.tasks)), len(study.tasks) >= MANY_TASKS
    highest = 0.0
    for axes, (variant, runs) in zip(grid, study.variants.items(), strict=True):
        labels = _common_bounds(runs)
        for position, label in enumerate(labels):
            colour, marker = BOUND_STYLE[label]
            rows = [run.losses.bound(label).unclipped_per_task for run in runs]
            highest = max(highest, *map(max, rows))
            if many:
                band(axes, x, rows, colour, label=label)
            else:
                shift = 0.6 * (position - (len(labels) - 1) / 2) / len(labels)
                line(axes, x + shift, rows, color=colour, marker=marker, linestyle="none", markersize=5, label=label)
        truth, spread = mean_and_std([run.losses.measured for run in runs])
        name = "measured on test tuples"
        if many:
            band(axes, x, [run.losses.measured for run in runs], MEASURED, label=name)
        else:
            axes.hlines(truth, x - 0.42, x + 0.42, color=MEASURED, linewidth=2, label=name)
            axes.errorbar(x, truth, spread, fmt="none", ecolor=MEASURED, capsize=4)
        theorem = [run.losses.total(THEOREM1) for run in runs]
        total = f"{np.mean(theorem):.3g}" if np.isfinite(theorem).all() else "infinite"
        axes.set_title(f"{study.label(variant)}\nsum {truth.sum():.3g} nats, Theorem 1 form {total}", fontsize=9)
        axes.set_yscale("log")
        task_ticks(axes, study.tasks)
        axes.set_xlabel("task (first to last)")
    geometry = study.any_run.losses.log.geometry
    for axes in grid:
        _loss_lines(axes, geometry, highest)
    label_rows(grid, "loss of the final model, nats")
    legend(drawing, grid, REFRESHED)
    cut = f" Bounds beyond {CUT:g} ceilings are cut off." if 3.0 * highest > CUT * geometry.ceiling else ""
    heading(
        drawing,
        "Contrastive loss measured after the last task, and its upper bounds",
        caption(study),
        f"The last task has had no step yet: its values are its held-out loss, not bounds. Hatched: vacuous.{cut}",
        "Bounds are estimates from held-out tuples and can lie below the measured loss by sampling error.",
    )
    return drawing


def tightness(study: Study) -> Figure:
    """Bound / measured against the number of model updates since the task, one panel per method."""
    study = study.principal
    drawing, grid = panels(len(study.variants), 3.0, 3.0, sharey=True)
    steps, many = np.arange(len(study.tasks))[::-1], len(study.tasks) >= MANY_TASKS
    highest = 0.0
    for axes, (variant, runs) in zip(grid, study.variants.items(), strict=True):
        for label in _common_bounds(runs):
            colour, marker = BOUND_STYLE[label]
            ratios = [np.divide(run.losses.bound(label).unclipped_per_task, run.losses.measured) for run in runs]
            if many:
                band(axes, steps, ratios, colour, label=label)
            else:
                line(axes, steps, ratios, marker=marker, color=colour, label=label)
        ceiling = study.any_run.losses.log.geometry.ceiling
        trivial = [ceiling / np.array(run.losses.measured) for run in runs]
        axes.plot(steps, mean_and_std(trivial)[0], color="#D55E00", linewidth=1, label="ceiling / measured")
        axes.axhline(1.0, color=MEASURED, linewidth=1)
        axes.set_title(study.label(variant), fontsize=9)
        axes.set_yscale("log")
        if many:
            highest = max(highest, max(map(np.max, trivial)))
            axes.set_xticks(range(0, len(steps), 5))
        else:
            axes.set_xticks(steps)
        axes.set_xlabel("model updates since the task")
    if many:
        grid[0].set_ylim(0.5, CUT * highest)
    label_rows(grid, "tightness: bound / measured loss")
    legend(drawing, grid, REFRESHED)
    heading(
        drawing,
        "Tightness of the unclipped bounds",
        caption(study),
        "Bounds from held-out tuples, losses on test tuples: values below 1 are sampling error. Vacuous at or above "
        f"the ceiling.{f' Bounds beyond {CUT:g} ceilings are cut off.' if many else ''}",
    )
    return drawing


def distill_weight(study: Study) -> Figure:
    """lambda over tasks, beside the two terms of the objective that adaptive rules compute it from."""
    plain = study.plain if study.plain.variants else study
    shown = plain.only([variant for variant, runs in plain.variants.items() if any(map(_distils, runs))])
    if not shown.variants or len(study.tasks) < 2:
        raise NoDataError("no method distils")
    drawing, grid = panels(3, 3.2, 2.9)
    t = range(2, len(study.tasks) + 1)
    columns: dict[str, Callable[[Training], float | None]] = {
        "distillation weight λ": lambda record: record.distill_weight,
        "contrastive term, nats": lambda record: record.objective_contrastive,
        "distillation term, nats": lambda record: record.objective_distillation,
    }
    for axes, (name, column) in zip(grid, columns.items(), strict=True):
        for variant, runs in shown.variants.items():
            rows = [[_or_nan(column(run.losses.log.training(task))) for task in t] for run in runs]
            if not np.isnan(rows).all():
                line(axes, t, rows, label=shown.label(variant), **method_style(variant))
        axes.set_xlabel("task t")
        axes.set_ylabel(name)
        axes.set_xticks([number for number in t if len(t) < MANY_TASKS or number == 2 or number % 5 == 0])
    grid[0].set_ylim(bottom=0.0)
    legend(drawing, grid)
    lines = [
        "Distillation weight and the two terms of the objective, last epoch of each task",
        caption(shown, tuples=False),
        "Objective on training batches; not comparable with the logged losses. Methods that train the same models "
        "cover each other.",
    ]
    omitted = [variant for variant in plain.variants if variant not in shown.variants]
    if omitted:
        lines.append(f"Without distillation, so not shown: {', '.join(omitted)}.")
    heading(drawing, *lines)
    return drawing


def accuracy(study: Study) -> Figure:
    """Linear-probe accuracy matrix of each method, and forgetting and average accuracy side by side."""
    study = study.principal
    many = len(study.tasks) >= MANY_TASKS
    drawing, grid = panels(len(study.variants) + 2, 2.7, 3.0)
    matrices = {
        variant: mean_and_std([_square(run.scores["accuracy_matrix"]) for run in runs])
        for variant, runs in study.variants.items()
    }
    lowest = min(0.95, *(math.floor(20.0 * np.nanmin(mean)) / 20.0 for mean, _ in matrices.values()))
    *squares, average, change = grid
    for axes, (variant, (mean, spread)) in zip(squares, matrices.items(), strict=True):
        image = axes.imshow(100 * mean, cmap="cividis", vmin=100 * lowest, vmax=100)
        axes.grid(False)
        if many:
            places, numbers = number_ticks(len(study.tasks))
            axes.set_yticks(places, numbers)
            task_ticks(axes, study.tasks)
        else:
            _cell_numbers(axes, mean, spread, (1.0 + lowest) / 2)
            task_ticks(axes, study.tasks, 7)
            axes.set_yticks(range(len(study.tasks)), study.tasks, fontsize=7)
        axes.set_xlabel("accuracy on task, %")
        axes.set_ylabel("after task")
        axes.set_title(study.label(variant), fontsize=9)
    if many:
        drawing.colorbar(image, ax=squares, shrink=0.7, label="accuracy, %")
    for axes, name, unit in zip((average, change), ("average_accuracy", "forgetting"), ("%", "pp"), strict=True):
        for position, (variant, runs) in enumerate(study.variants.items()):
            mean, spread = mean_and_std([run.scores[name] for run in runs])
            colour = method_style(variant)["color"]
            axes.bar(position, 100 * mean, 0.7, yerr=100 * spread, color=colour, capsize=3)
            top = 100 * max(mean + np.nan_to_num(spread), 0.0)
            text = _with_spread(float(mean), float(spread), 1)
            axes.annotate(text, (position, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        axes.margins(y=0.15)
        labels = [study.label(variant) for variant in study.variants]
        axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_title(f"{name.replace('_', ' ')}, {unit}", fontsize=9)
    classifiers = [variant for variant in study.variants if method(variant) in ("er", "der++")]
    own = f" ({' and '.join(classifiers)}: own classifier)" if classifiers else ""
    heading(
        drawing,
        f"Linear probe on frozen representations{own}, argmax over all classes" + " seen" * study.class_incremental,
        f"{caption(study, tuples=False)}; colours from {100 * lowest:.0f}% to 100%",
    )
    return drawing


def _common_bounds(runs: list[Run]) -> list[str]:
    return [label for label in BOUND_STYLE if all(label in run.losses.bounds() for run in runs)]


def _loss_lines(axes: Axes, geometry: Geometry, highest: float) -> None:
    """Floor, chance and ceiling, and, up to beyond the highest bound, the region in which a bound says nothing."""
    lines = ((geometry.floor, "floor", ":"), (geometry.chance, "chance", "--"), (geometry.ceiling, "ceiling", "-"))
    for value, name, style in lines:
        axes.axhline(value, color="#D55E00", linestyle=style, linewidth=1, label=name)
    top = min(max(3.0 * highest, 10.0 * geometry.ceiling), CUT * geometry.ceiling)
    axes.axhspan(geometry.ceiling, top, facecolor="none", edgecolor="#D55E00", alpha=0.15, hatch="////", linewidth=0)
    axes.set_ylim(0.7 * geometry.floor, top)


def _distils(run: Run) -> bool:
    return any(run.losses.log.training(task).distill_weight for task in range(1, len(run.losses.log.header.tasks) + 1))


def _cell_numbers(axes: Axes, mean: np.ndarray, spread: np.ndarray, dark_from: float) -> None:
    for i, t in itertools.combinations_with_replacement(range(len(mean)), 2):
        colour = "black" if mean[t, i] > dark_from else "white"
        text = _with_spread(mean[t, i], spread[t, i], 0)
        axes.text(i, t, text, ha="center", va="center", fontsize=6.5, color=colour)


def _with_spread(mean: float, spread: float, digits: int) -> str:
    """A share in percent, above its spread if there is one."""
    text = f"{100 * mean:.{digits}f}"
    return text if np.isnan(spread) else f"{text}\n±{100 * spread:.{digits}f}"


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _square(matrix: list[list[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A lower-triangular list of lists as a square array, NaN above the diagonal."""
    square = np.full((len(matrix), len(matrix)), np.nan)
    for t, row in enumerate(matrix):
        square[t, : len(row)] = row
    return square
