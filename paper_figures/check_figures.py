"""Figures of a check's report: what is certified of each task, and what errors cost."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from paper_figures.style import MEASURED, heading, legend, method_style, panels, task_ticks

_LOOK = {
    "moment chain": ("#0072B2", "o"),
    "moment, last step": ("#009E73", "D"),
    "pointwise, last step": ("#CC79A7", "P"),
    "measured directly": ("#E69F00", "s"),
}


def certified(found: dict[str, Any]) -> Figure:
    """Upper bounds at the confidence beside the estimates, and the measured loss, of the last stage's model."""
    drawing, (axes,) = panels(1, 7.0, 3.6)
    tasks, geometry = found["tasks"], found["geometry"]
    stage = next(stage for stage in found["stages"] if stage["variant"] == found["bounds_of"])
    x = np.arange(len(tasks))
    shown = [bound for bound in found["bounds"] if bound["name"] in _LOOK]
    for position, bound in enumerate(shown):
        colour, marker = _LOOK[bound["name"]]
        place = x + 0.7 * (position - (len(shown) - 1) / 2) / max(len(shown), 1)
        upper, estimate = _columns(bound["certified_per_task"]), _columns(bound["estimate_per_task"])
        axes.errorbar(place, *upper, color=colour, marker=marker, linestyle="none", capsize=3, label=bound["name"])
        axes.plot(place, estimate[0], color=colour, marker=marker, linestyle="none", markerfacecolor="none")
        axes.vlines(place, estimate[0], upper[0], color=colour, linewidth=0.8, alpha=0.6)
    truth, spread = _columns(stage["loss_per_task"])
    axes.hlines(truth, x - 0.45, x + 0.45, color=MEASURED, linewidth=2, label="measured on test tuples")
    axes.errorbar(x, truth, spread, fmt="none", ecolor=MEASURED, capsize=4)
    for name, style in (("floor", ":"), ("chance", "--"), ("ceiling", "-")):
        axes.axhline(geometry[name], color="#D55E00", linestyle=style, linewidth=1, label=name)
    axes.set_ylim(0.0, 1.06 * geometry["ceiling"])
    task_ticks(axes, tasks)
    axes.set_xlabel("task (first to last), independent held-out tuples: " + ", ".join(map(str, found["n_tuples"])))
    axes.set_ylabel("loss of the final model, nats")
    legend(drawing, [axes], "filled: certified\nopen: estimated")
    heading(
        drawing,
        f"Upper bounds on the contrastive loss of {found['bounds_of']} after the last task",
        f"{found['name']}; temperature {geometry['temperature']:g}, K = {geometry['n_negatives']}; mean ± std "
        f"over n = {stage['n']} seeds; filled: at confidence {found['confidence']:g}, for any of "
        f"{found['selections']} models and all bounds at once; open: logged means taken for the truth",
    )
    return drawing


def costs(found: dict[str, Any]) -> Figure:
    """Cost of errors per 1,000 items of each task, by stage, beside passing all and none."""
    kpi, stages, tasks = found["kpi"], found["stages"], found["tasks"]
    drawing, (axes,) = panels(1, 7.0, 3.2)
    x, width = np.arange(len(tasks)), 0.8 / len(stages)
    for position, stage in enumerate(stages):
        mean, spread = _columns(stage["cost_per_task"])
        place = x + width * (position - (len(stages) - 1) / 2)
        colour = method_style(stage["variant"])["color"]
        axes.bar(place, mean, 0.9 * width, yerr=spread, color=colour, capsize=3, label=stage["variant"])
    for values, name, style in (
        (kpi["all_pass"], "every item passed", "--"),
        (kpi["none_pass"], "every item rejected", ":"),
    ):
        axes.hlines(values, x - 0.45, x + 0.45, color=MEASURED, linestyle=style, linewidth=1, label=name)
    task_ticks(axes, tasks)
    axes.set_xlabel("task (first to last)")
    axes.set_ylabel("cost of errors per 1,000 items")
    legend(drawing, [axes])
    heading(
        drawing,
        "What the final model's errors cost",
        f"{found['name']}; {kpi['miss']:g} per missed {kpi['defect']}, {kpi['alarm']:g} per false alarm; at each "
        f"task's own share of {kpi['defect']}; mean ± std over n = {stages[0]['n']} seeds",
    )
    return drawing


def _columns(summaries: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations, NaN where there is none."""
    return tuple(  # type: ignore[return-value]
        np.array([np.nan if s[name] is None else s[name] for s in summaries]) for name in ("mean", "std")
    )
