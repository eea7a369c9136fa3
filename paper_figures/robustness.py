"""How losses, forgetting and bounds fare as training gets harder, and where a certificate stops saying anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.runs import METHODS, NoDataError, Run, Study
from paper_figures.stats import mean_and_std
from paper_figures.style import BOUND_STYLE, MEASURED, caption, heading, legend, method_style, panels

AXES = {
    "label_noise": "share of wrong training labels",
    "imbalance": "largest / smallest class",
    "buffer_size": "images in the buffer",
    "train_per_class": "training images per class",
}
CONFIDENCE = 0.95
_ESTIMATED = ("pinsker", "moment", "moment, refreshed", "pointwise, refreshed")
_CERTIFIED = ("moment", "moment, refreshed", "pointwise, refreshed")


def robustness(study: Study) -> Figure:
    """A column for each option that was varied: one method's loss and bounds, then accuracy and forgetting of all."""
    varied = {option: _sweeps(study, option) for option in AXES}
    bounded = max(METHODS, key=lambda name: sum(name in found for found in varied.values()))
    sweeps = {option: found for option, found in varied.items() if bounded in found}
    if len(sweeps) < 2:
        raise NoDataError(f"no two of {', '.join(AXES)} were varied")
    drawing, grid = panels(4 * len(sweeps), 3.1, 2.5, sharey="row", columns=len(sweeps))
    shown = study.only([v for found in sweeps.values() for places in found.values() for v in places.values()])
    geometry = study.any_run.losses.log.geometry
    for column, (option, found) in enumerate(sweeps.items()):
        estimated, certified, accuracy, forgetting = grid[column :: len(sweeps)]
        values = sorted({value for places in found.values() for value in places})
        runs = {values.index(value): study.variants[variant] for value, variant in found[bounded].items()}
        for label in _ESTIMATED:
            if all(label in run.losses.bounds() for group in runs.values() for run in group):
                _line(estimated, runs, lambda run, label=label: _mean(run, run.losses.total(label)), label)  # type: ignore[misc]
        for label in _CERTIFIED:
            if all(label in run.losses.bounds() for group in runs.values() for run in group):
                _line(certified, runs, lambda run, label=label: run.losses.certified(label, CONFIDENCE).mean, label)  # type: ignore[misc]
        for axes in (estimated, certified):
            _line(axes, runs, lambda run: _mean(run, run.losses.measured_total), "measured on test tuples")
            for value, name, style in (
                (geometry.floor, "floor", ":"),
                (geometry.chance, "chance", "--"),
                (geometry.ceiling, "ceiling", "-"),
            ):
                axes.axhline(value, color="#D55E00", linestyle=style, linewidth=1, label=name)
            axes.set_yscale("log")
            axes.set_ylim(0.7 * geometry.floor, 3.0 * geometry.ceiling)
        for axes, score in ((accuracy, "average_accuracy"), (forgetting, "forgetting")):
            for name, places in found.items():
                runs = {values.index(value): study.variants[variant] for value, variant in places.items()}
                _line(axes, runs, lambda run, score=score: 100.0 * run.scores[score], name, **method_style(name))  # type: ignore[misc]
        for axes in (estimated, certified, accuracy, forgetting):
            axes.set_xticks(range(len(values)), [f"{value:g}" for value in values], fontsize=8)
        forgetting.set_xlabel(AXES[option])
        estimated.set_title(AXES[option], fontsize=9)
    rows = (
        f"{bounded}: loss and bounds,\nestimated, nats a task",
        f"{bounded}: loss and bounds,\ncertified at {CONFIDENCE:g}, nats a task",
        "average accuracy, %",
        "forgetting, pp",
    )
    for row, label in enumerate(rows):
        grid[row * len(sweeps)].set_ylabel(label)
    count = len(sweeps)
    legend(drawing, grid[: 2 * count], bounded, beside=grid[count - 1])
    legend(drawing, grid[2 * count :], "methods", beside=grid[3 * count - 1])
    heading(
        drawing,
        "Harder training: measured loss, bounds, accuracy and forgetting",
        f"{caption(shown, labelled=False)}; one option varied at a time. Estimated bounds are unclipped and from "
        "held-out tuples; a certificate at the ceiling says nothing, one above chance less than that the encoder has "
        "not collapsed.",
    )
    return drawing


def _sweeps(study: Study, option: str) -> dict[str, dict[float, str]]:
    """Of each method trained with several values of the option: the variant of each value."""
    found = {name: study.sweep(name, option) for name in METHODS}
    return {name: places for name, places in found.items() if len(places) > 1}


def _mean(run: Run, total: float) -> float:
    return total / len(run.losses.log.header.tasks)


def _line(axes: Axes, runs: dict[int, list[Run]], quantity: Callable[[Run], float], label: str, **style: Any) -> None:
    """Mean and spread at each place."""
    if not style:
        colour, marker = BOUND_STYLE.get(label, (MEASURED, "_"))
        style = {"color": colour, "marker": marker}
    x = sorted(runs)
    mean, spread = np.transpose([mean_and_std([quantity(run) for run in runs[place]]) for place in x])
    axes.errorbar(x, mean, spread, label=label, linewidth=1, capsize=2, markersize=4, **style)
