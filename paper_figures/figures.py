"""One pure function per figure: a study in, a drawing out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cila_bound import Certificate, Geometry, certify
from paper_figures.runs import Run, Study, mean_and_std
from paper_figures.style import BOUND_STYLE, MEASURED, METHOD_COLOUR, caption, panels


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
    """The measured test losses, one per task. Raises LookupError if the log lacks one: a figure compares with them."""
    for task, loss in zip(certificate.tasks, certificate.measured, strict=True):
        if loss is None:
            raise LookupError(f"the log has no test record of task {task}: log the losses on test tuples, too")
    return [loss for loss in certificate.measured if loss is not None]


def _by_method(study: Study) -> dict[str, list[dict[str, Certificate]]]:
    return {method: [certificates(run) for run in runs] for method, runs in study.methods.items()}


def measured_vs_bounds(study: Study) -> Figure:
    """Measured population loss of the final model on each task against every bound, one panel per method."""
    drawing, row = panels(len(study.methods), 3.3 * len(study.methods) + 1.6, 3.9, sharey=True)
    geometry, tasks = study.any_run.log.geometry, study.tasks
    x = np.arange(len(tasks))
    for axes, (method, found) in zip(row, _by_method(study).items(), strict=True):
        truth, spread = mean_and_std([measured(run["moment"]) for run in found])
        labels = [label for label in BOUND_STYLE if all(label in run for run in found)]
        for position, label in enumerate(labels):
            colour, marker = BOUND_STYLE[label]
            bound, error = mean_and_std([run[label].unclipped_per_task for run in found])
            shift = 0.6 * (position - (len(labels) - 1) / 2) / len(labels)
            axes.errorbar(
                x + shift, bound, error, fmt=marker, color=colour, markersize=5, capsize=2, linewidth=1, label=label
            )
        label = "measured on test tuples"
        axes.hlines(truth, x - 0.42, x + 0.42, color=MEASURED, linewidth=2, label=label)
        axes.errorbar(x, truth, spread, fmt="none", ecolor=MEASURED, capsize=4)
        highest = max(max(run[label].unclipped_per_task) for run in found for label in labels)
        _loss_lines(axes, geometry, highest)
        theorem = [certify(run.log, "theorem1").unclipped_total for run in study.methods[method]]
        total = f"{np.mean(theorem):.3g}" if np.isfinite(theorem).all() else "infinite"
        axes.set_title(f"{method}\nsum of tasks: {truth.sum():.3g} nats, Theorem 1 form {total}", fontsize=9)
        axes.set_yscale("log")
        axes.set_xticks(x, tasks)
        axes.set_xlabel("task (first to last)")
    row[0].set_ylabel("contrastive loss of the final model, nats")
    _legend(drawing, row)
    drawing.suptitle(
        f"Measured loss and its upper bounds\n{caption(study)}\n"
        "bounds from held-out tuples (after the last task: that task's held-out loss itself); hatched: vacuous",
        fontsize=10,
    )
    return drawing


def tightness(study: Study) -> Figure:
    """Bound / measured against the number of model updates since the task, one panel per method."""
    drawing, row = panels(len(study.methods), 3.0 * len(study.methods) + 1.6, 3.6, sharey=True)
    steps = np.arange(len(study.tasks))[::-1]
    for axes, (method, found) in zip(row, _by_method(study).items(), strict=True):
        for label, (colour, marker) in BOUND_STYLE.items():
            if all(label in run for run in found):
                ratios = [np.divide(run[label].unclipped_per_task, measured(run[label])) for run in found]
                mean, error = mean_and_std(ratios)
                axes.errorbar(
                    steps, mean, error, marker=marker, color=colour, markersize=4, capsize=2, linewidth=1, label=label
                )
        axes.axhline(1.0, color=MEASURED, linewidth=1)
        axes.set_title(method, fontsize=9)
        axes.set_yscale("log")
        axes.set_xticks(steps)
        axes.set_xlabel("model updates since the task")
    row[0].set_ylabel("tightness: bound / measured loss")
    _legend(drawing, row)
    drawing.suptitle(
        f"Tightness of the unclipped bounds\n{caption(study)}\n"
        "bounds from held-out tuples, losses on test tuples: values below 1 are sampling error",
        fontsize=10,
    )
    return drawing


def distill_weight(study: Study) -> Figure:
    """lambda over tasks, beside the two terms of the objective that adaptive rules compute it from."""
    methods = [
        method
        for method, runs in study.methods.items()
        if any(run.log.training(t).distill_weight for run in runs for t in _tasks(run))
    ]
    drawing, row = panels(3, 10.5, 3.3)
    for method in methods:
        runs = study.methods[method]
        t = np.arange(2, len(study.tasks) + 1)
        columns: list[Callable[[Run, int], float]] = [
            lambda run, t: run.log.training(t).distill_weight,
            lambda run, t: _or_nan(run.log.training(t).objective_contrastive),
            lambda run, t: _or_nan(run.log.training(t).objective_distillation),
        ]
        for panel, column in zip(row, columns, strict=True):
            mean, error = mean_and_std([[column(run, task) for task in t.tolist()] for run in runs])
            panel.errorbar(
                t,
                mean,
                error,
                marker="o",
                color=METHOD_COLOUR.get(method),
                markersize=4,
                capsize=2,
                linewidth=1,
                label=method,
            )
    names = ["distillation weight λ", "contrastive term, nats", "distillation term, nats"]
    for panel, name in zip(row, names, strict=True):
        panel.set_xlabel("task t")
        panel.set_ylabel(name)
        panel.set_xticks(np.arange(2, len(study.tasks) + 1))
    row[0].set_ylim(bottom=0.0)
    if methods:
        row[0].legend(frameon=False)
    drawing.suptitle(
        f"Distillation weight and training losses (last epoch of each task)\n{caption(study)}", fontsize=10
    )
    return drawing


def accuracy(study: Study) -> Figure:
    """Linear-probe accuracy matrix of each method, and forgetting and average accuracy side by side."""
    n_methods = len(study.methods)
    drawing, row = panels(n_methods + 2, 2.6 * (n_methods + 2), 3.2)
    tasks = study.tasks
    for panel, (method, runs) in zip(row, study.methods.items(), strict=False):
        mean, spread = mean_and_std([_square(run.metrics["class_il"]["accuracy_matrix"]) for run in runs])
        panel.imshow(100 * mean, cmap="cividis", vmin=0, vmax=100)
        panel.grid(False)
        for i, t in itertools.combinations_with_replacement(range(len(tasks)), 2):
            colour = "black" if mean[t, i] > 0.6 else "white"
            panel.text(
                i,
                t,
                f"{100 * mean[t, i]:.0f}\n±{100 * spread[t, i]:.0f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color=colour,
            )
        panel.set_xticks(range(len(tasks)), tasks, fontsize=7)
        panel.set_yticks(range(len(tasks)), tasks, fontsize=7)
        panel.set_xlabel("accuracy on task, %")
        panel.set_title(method, fontsize=9)
    row[0].set_ylabel("after task")
    for panel, name in zip(row[-2:], ("average_accuracy", "forgetting"), strict=True):
        for position, (method, runs) in enumerate(study.methods.items()):
            mean, spread = mean_and_std([run.metrics["class_il"][name] for run in runs])
            panel.bar(position, 100 * mean, 0.7, yerr=100 * spread, color=METHOD_COLOUR.get(method), capsize=3)
            panel.text(
                position,
                0,
                f"{100 * mean:.1f}\n±{100 * spread:.1f}",
                ha="center",
                va="bottom",
                fontsize=7,
                color="white",
            )
        panel.set_xticks(range(n_methods), list(study.methods), rotation=30, ha="right", fontsize=8)
        panel.set_title(f"{name.replace('_', ' ')}, %", fontsize=9)
    drawing.suptitle(
        f"Linear probe on frozen representations, argmax over all classes seen\n{caption(study)}", fontsize=10
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


def _legend(drawing: Figure, panels: list[Axes]) -> None:
    """One legend for all panels, at the right."""
    entries = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    drawing.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=8, frameon=False)


def _tasks(run: Run) -> range:
    return range(1, run.log.last_task + 1)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _square(matrix: list[list[float]]) -> np.ndarray:
    """A lower-triangular list of lists as a square array, NaN above the diagonal."""
    square = np.full((len(matrix), len(matrix)), np.nan)
    for t, row in enumerate(matrix):
        square[t, : len(row)] = row
    return square
