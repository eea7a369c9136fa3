"""One pure function per figure: a study in, a drawing out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cila_bound import Certificate, Geometry, Training, certify
from paper_figures.runs import Run, Study, mean_and_std
from paper_figures.style import BOUND_STYLE, MEASURED, METHOD_COLOUR, caption, heading, legend, panels, task_ticks

_REFRESHED = "refreshed: one step\nfrom the previous model"


def certificates(run: Run) -> dict[str, Certificate]:
    """One certificate per entry of BOUND_STYLE, as far as the log has what it needs."""
    chosen = {
        "linear": ("linear", "full"),
        "saturating": ("saturating", "full"),
        "pinsker": ("pinsker", "full"),
        "moment": ("moment", "full"),
        "moment, refreshed": ("moment", "refreshed"),
        "pointwise, refreshed": ("pointwise", "refreshed"),
    }
    found = {}
    for label, (step, chain) in chosen.items():
        try:
            found[label] = certify(run.log, step, chain=chain)  # type: ignore[arg-type]
        except LookupError:
            if step != "pointwise":  # per-tuple values are optional in a log
                raise
    return found


def measured(certificate: Certificate) -> list[float]:
    """The measured test losses, one per task; ``load_studies`` has seen that none is missing."""
    return [loss for loss in certificate.measured if loss is not None]


def _by_method(study: Study) -> dict[str, list[dict[str, Certificate]]]:
    return {method: [certificates(run) for run in runs] for method, runs in study.methods.items()}


def measured_vs_bounds(study: Study) -> Figure:
    """Measured population loss of the final model on each task against every bound, one panel per method."""
    drawing, grid = panels(len(study.methods), 3.3, 3.3, sharey=True)
    x = np.arange(len(study.tasks))
    highest = 0.0
    for axes, (method, found) in zip(grid, _by_method(study).items(), strict=True):
        truth, spread = mean_and_std([measured(run["moment"]) for run in found])
        labels = [label for label in BOUND_STYLE if all(label in run for run in found)]
        for position, label in enumerate(labels):
            colour, marker = BOUND_STYLE[label]
            bound, error = mean_and_std([run[label].unclipped_per_task for run in found])
            shift = 0.6 * (position - (len(labels) - 1) / 2) / len(labels)
            axes.errorbar(
                x + shift, bound, error, fmt=marker, color=colour, markersize=5, capsize=2, linewidth=1, label=label
            )
            highest = max(highest, *(max(run[label].unclipped_per_task) for run in found))
        label = "measured on test tuples"
        axes.hlines(truth, x - 0.42, x + 0.42, color=MEASURED, linewidth=2, label=label)
        axes.errorbar(x, truth, spread, fmt="none", ecolor=MEASURED, capsize=4)
        theorem = [certify(run.log, "theorem1").unclipped_total for run in study.methods[method]]
        total = f"{np.mean(theorem):.3g}" if np.isfinite(theorem).all() else "infinite"
        axes.set_title(f"{study.label(method)}\nsum {truth.sum():.3g} nats, Theorem 1 form {total}", fontsize=9)
        axes.set_yscale("log")
        task_ticks(axes, study.tasks)
        axes.set_xlabel("task (first to last)")
    for axes in grid:
        _loss_lines(axes, study.any_run.log.geometry, highest)
    _label_rows(grid, "loss of the final model, nats")
    legend(drawing, grid, _REFRESHED)
    heading(
        drawing,
        "Contrastive loss measured after the last task, and its upper bounds",
        caption(study),
        "The last task has had no step yet: its markers are its held-out loss, not bounds. Hatched: vacuous.",
        "Bounds are estimates from held-out tuples and can lie below the measured loss by sampling error.",
    )
    return drawing


def tightness(study: Study) -> Figure:
    """Bound / measured against the number of model updates since the task, one panel per method."""
    drawing, grid = panels(len(study.methods), 3.0, 3.0, sharey=True)
    steps = np.arange(len(study.tasks))[::-1]
    for axes, (method, found) in zip(grid, _by_method(study).items(), strict=True):
        for label, (colour, marker) in BOUND_STYLE.items():
            if all(label in run for run in found):
                ratios = [np.divide(run[label].unclipped_per_task, measured(run[label])) for run in found]
                _line(axes, steps, ratios, marker=marker, color=colour, label=label)
        axes.axhline(1.0, color=MEASURED, linewidth=1)
        axes.set_title(study.label(method), fontsize=9)
        axes.set_yscale("log")
        axes.set_xticks(steps)
        axes.set_xlabel("model updates since the task")
    _label_rows(grid, "tightness: bound / measured loss")
    legend(drawing, grid, _REFRESHED)
    heading(
        drawing,
        "Tightness of the unclipped bounds",
        caption(study),
        "Bounds from held-out tuples, losses on test tuples: values below 1 are sampling error.",
    )
    return drawing


def distill_weight(study: Study) -> Figure:
    """lambda over tasks, beside the two terms of the objective that adaptive rules compute it from."""
    methods = [method for method, runs in study.methods.items() if any(map(_distils, runs))]
    drawing, grid = panels(3, 3.2, 2.9)
    t = range(2, len(study.tasks) + 1)
    columns: dict[str, Callable[[Training], float | None]] = {
        "distillation weight λ": lambda record: record.distill_weight,
        "contrastive term, nats": lambda record: record.objective_contrastive,
        "distillation term, nats": lambda record: record.objective_distillation,
    }
    for axes, (name, column) in zip(grid, columns.items(), strict=True):
        for method in methods:
            rows = [[_or_nan(column(run.log.training(task))) for task in t] for run in study.methods[method]]
            _line(axes, t, rows, marker="o", color=METHOD_COLOUR.get(method), label=study.label(method))
        axes.set_xlabel("task t")
        axes.set_ylabel(name)
        axes.set_xticks(t)
    grid[0].set_ylim(bottom=0.0)
    legend(drawing, grid)
    lines = [
        "Distillation weight and the two terms of the objective, last epoch of each task",
        caption(study, tuples=False),
        "Objective on training batches; not comparable with the logged losses.",
    ]
    omitted = [method for method in study.methods if method not in methods]
    if omitted:
        lines.append(f"Without distillation, so not shown: {', '.join(omitted)}.")
    heading(drawing, *lines)
    return drawing


def accuracy(study: Study) -> Figure:
    """Linear-probe accuracy matrix of each method, and forgetting and average accuracy side by side."""
    drawing, grid = panels(len(study.methods) + 2, 2.7, 3.0)
    matrices = {
        method: mean_and_std([_square(run.metrics["class_il"]["accuracy_matrix"]) for run in runs])
        for method, runs in study.methods.items()
    }
    lowest = min(0.95, *(math.floor(20.0 * np.nanmin(mean)) / 20.0 for mean, _ in matrices.values()))
    for axes, (method, (mean, spread)) in zip(grid, matrices.items(), strict=False):
        axes.imshow(100 * mean, cmap="cividis", vmin=100 * lowest, vmax=100)
        axes.grid(False)
        for i, t in itertools.combinations_with_replacement(range(len(study.tasks)), 2):
            colour = "black" if mean[t, i] > (1.0 + lowest) / 2 else "white"
            text = _with_spread(mean[t, i], spread[t, i], 0)
            axes.text(i, t, text, ha="center", va="center", fontsize=6.5, color=colour)
        task_ticks(axes, study.tasks, 7)
        axes.set_yticks(range(len(study.tasks)), study.tasks, fontsize=7)
        axes.set_xlabel("accuracy on task, %")
        axes.set_ylabel("after task")
        axes.set_title(study.label(method), fontsize=9)
    for axes, name, unit in zip(grid[-2:], ("average_accuracy", "forgetting"), ("%", "pp"), strict=True):
        for position, (method, runs) in enumerate(study.methods.items()):
            mean, spread = mean_and_std([run.metrics["class_il"][name] for run in runs])
            axes.bar(position, 100 * mean, 0.7, yerr=100 * spread, color=METHOD_COLOUR.get(method), capsize=3)
            top = 100 * max(mean + np.nan_to_num(spread), 0.0)
            text = _with_spread(float(mean), float(spread), 1)
            axes.annotate(text, (position, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        axes.margins(y=0.15)
        labels = [study.label(method) for method in study.methods]
        axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_title(f"{name.replace('_', ' ')}, {unit}", fontsize=9)
    heading(
        drawing,
        "Linear probe on frozen representations, argmax over all classes seen",
        f"{caption(study, tuples=False)}; colours from {100 * lowest:.0f}% to 100%",
    )
    return drawing


FIGURES: dict[str, Callable[[Study], Figure]] = {
    "measured-vs-bounds": measured_vs_bounds,
    "tightness": tightness,
    "distill-weight": distill_weight,
    "accuracy": accuracy,
}


def _loss_lines(axes: Axes, geometry: Geometry, highest: float) -> None:
    """Floor, chance and ceiling, and, up to beyond the highest bound, the region in which a bound says nothing."""
    lines = ((geometry.floor, "floor", ":"), (geometry.chance, "chance", "--"), (geometry.ceiling, "ceiling", "-"))
    for value, name, style in lines:
        axes.axhline(value, color="#D55E00", linestyle=style, linewidth=1, label=name)
    top = max(3.0 * highest, 10.0 * geometry.ceiling, axes.get_ylim()[1])
    axes.axhspan(geometry.ceiling, top, facecolor="none", edgecolor="#D55E00", alpha=0.15, hatch="////", linewidth=0)
    axes.set_ylim(0.7 * geometry.floor, top)


def _label_rows(grid: list[Axes], label: str) -> None:
    """The label of a shared y axis, at the first panel of each row."""
    for axes in grid:
        place = axes.get_subplotspec()
        if place is not None and place.is_first_col():
            axes.set_ylabel(label)


def _line(axes: Axes, x: Sequence[int] | np.ndarray, rows: list[Any], **style: Any) -> None:
    """Mean and spread of ``rows``, one per seed, as a line."""
    axes.errorbar(x, *mean_and_std(rows), markersize=4, capsize=2, linewidth=1, **style)


def _distils(run: Run) -> bool:
    return any(run.log.training(task).distill_weight for task in range(1, len(run.log.header.tasks) + 1))


def _with_spread(mean: float, spread: float, digits: int) -> str:
    """A share in percent, above its spread if there is one."""
    text = f"{100 * mean:.{digits}f}"
    return text if np.isnan(spread) else f"{text}\n±{100 * spread:.{digits}f}"


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _square(matrix: list[list[float]]) -> np.ndarray:
    """A lower-triangular list of lists as a square array, NaN above the diagonal."""
    square = np.full((len(matrix), len(matrix)), np.nan)
    for t, row in enumerate(matrix):
        square[t, : len(row)] = row
    return square
