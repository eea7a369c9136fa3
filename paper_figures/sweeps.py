"""Figures over options of training: distillation weight, pre-training, buffer. One pure function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from paper_figures.runs import NoDataError, Run, Study, method, options
from paper_figures.stats import mean_and_std, paired
from paper_figures.style import BOUND_STYLE, MEASURED, caption, heading, legend, method_style, panels, plain_numbers

QUANTITIES: dict[str, Callable[[Run], float]] = {
    "measured loss, nats": lambda run: run.losses.measured_total,
    "moment chain, nats": lambda run: run.losses.total("moment"),
    "moment, refreshed, nats": lambda run: run.losses.total("moment, refreshed"),
    "average accuracy, %": lambda run: 100.0 * run.scores["average_accuracy"],
    "forgetting, pp": lambda run: 100.0 * run.scores["forgetting"],
}
_LOSSES = {
    "measured loss, nats": ("measured on test tuples", MEASURED, "_"),
    "moment chain, nats": ("moment", *BOUND_STYLE["moment"]),
    "moment, refreshed, nats": ("moment, refreshed", *BOUND_STYLE["moment, refreshed"]),
}


def lambda_sweep(study: Study) -> Figure:
    """Losses, bounds and accuracy against a constant lambda and against CILA's kappa."""
    constant, kappa = study.sweep("co2l", "distill_weight"), study.sweep("cila-pure", "kappa")
    sweeps = {
        name: found for name, found in (("constant λ (co2l)", constant), ("κ (cila-pure)", kappa)) if len(found) > 1
    }
    if not sweeps:
        raise NoDataError("neither co2l was trained with several distill_weight nor cila-pure with several kappa")
    rivals = ["contrastive-only"] if len(constant) > 1 else []
    shown = study.only([*(variant for found in sweeps.values() for variant in found.values()), *rivals])
    drawing, grid = panels(2 * len(sweeps), 3.6, 2.5, sharey="row", columns=len(sweeps))
    for column, (name, found) in enumerate(sweeps.items()):
        losses, accuracy = grid[column], grid[column + len(sweeps)]
        places = {place: study.variants[variant] for place, variant in found.items() if place > 0.0}
        ticks = {place: f"{place:g}" for place in places}
        apart = min(places) / 3.0
        if found is constant and "contrastive-only" in shown.variants:
            places = {apart: study.variants["contrastive-only"], **places}
            ticks[apart] = "0"
        for quantity, (label, colour, marker) in _LOSSES.items():
            _series(losses, places, apart, QUANTITIES[quantity], color=colour, marker=marker, label=label)
        _series(accuracy, places, apart, QUANTITIES["average accuracy, %"], color="#0072B2", marker="o")
        for axes in (losses, accuracy):
            axes.set_xscale("log")
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.xaxis.set_minor_locator(NullLocator())
            if apart in ticks:
                axes.axvline(apart * 1.7, color="#999999", linewidth=0.8, linestyle=":")
        losses.set_yscale("log")
        plain_numbers(losses.yaxis)
        losses.set_title(name, fontsize=9)
        accuracy.set_xlabel(name.partition(" (")[0])
    grid[0].set_ylabel("loss, sum over tasks, nats")
    grid[len(sweeps)].set_ylabel("average accuracy, %")
    legend(drawing, grid)
    lines = ["Left of the dotted line: contrastive-only, λ = 0."] if "contrastive-only" in shown.variants else []
    heading(
        drawing,
        "Distillation weight: measured loss of the final model, moment bounds and accuracy",
        caption(shown, labelled=False),
        *lines,
    )
    return drawing


def _series(
    axes: Axes,
    places: dict[float, list[Run]],
    apart: float,
    quantity: Callable[[Run], float],
    color: str,
    marker: str,
    label: str | None = None,
) -> None:
    """Mean and spread at every place, joined but for the one that stands apart."""
    for join in (True, False):
        x = sorted(place for place in places if (place != apart) is join)
        if x:
            values = [mean_and_std([quantity(run) for run in places[place]]) for place in x]
            mean, spread = np.transpose(values)
            style: Any = {"color": color, "marker": marker, "markersize": 8 if marker == "_" else 4, "capsize": 2}
            axes.errorbar(x, mean, spread, linewidth=1, label=label if join else None, **style)


def pretraining(study: Study) -> Figure:
    """With against without pre-training, seed by seed, and the paired difference."""
    pairs = study.partners("pretrain_epochs")
    if not pairs:
        raise NoDataError("no variant was trained with and without pretrain_epochs (at equal pretrain_fraction)")
    shown = study.only([variant for pair in pairs for variant in pair])
    names = ["measured loss, nats", "moment chain, nats", "average accuracy, %", "forgetting, pp"]
    drawing, grid = panels(4, 1.15 * max(3, len(pairs)), 3.2, columns=2 if len(pairs) > 3 else 4)
    for axes, name in zip(grid, names, strict=True):
        labels = []
        for position, (treated, control) in enumerate(pairs):
            before, after = ({run.seed: QUANTITIES[name](run) for run in study.variants[v]} for v in (control, treated))
            style, x = method_style(treated), (position - 0.2, position + 0.2)
            for seed in sorted(before.keys() & after.keys()):
                axes.plot(x, (before[seed], after[seed]), color=style["color"], alpha=0.45, linewidth=1, marker=".")
            means = [np.mean(list(values.values())) for values in (before, after)]
            axes.plot(x, means, color=style["color"], marker="_", markersize=13, markeredgewidth=2, linestyle="none")
            labels.append(f"{method(treated)}\n{_difference(after, before)}")
        axes.set_xticks(range(len(pairs)), labels, fontsize=7)
        axes.set_xlim(-0.6, len(pairs) - 0.4)
        axes.set_title(name, fontsize=9)
    epochs = sorted({options(treated)["pretrain_epochs"] for treated, _ in pairs})
    heading(
        drawing,
        f"Without (left) and with (right) {' or '.join(epochs)} epochs of pre-training on images set aside",
        f"{caption(shown, labelled=False, what='')}; points: seeds, bars: means; losses summed over tasks.",
        "Below: paired difference, with minus without, its 95% t interval and two-sided p, not corrected for their "
        "number.",
    )
    return drawing


def _difference(one: dict[int, float], other: dict[int, float]) -> str:
    found = paired(one, other)
    if found is None:
        return "no common seed"
    if found.n == 1:
        return f"{found.mean:+.2g}"
    return f"{found.mean:+.2g}\n[{found.low:+.2g}, {found.high:+.2g}]\np = {found.p:.2g}"


def buffer(study: Study) -> Figure:
    """Accuracy, forgetting and measured loss against the size of the buffer."""
    sweeps = {name: study.sweep(name, "buffer_size") for name in map(method, study.variants)}
    sweeps = {name: found for name, found in sweeps.items() if len(found) > 1}
    if not sweeps:
        raise NoDataError("no method was trained with several buffer_size")
    shown = study.only([variant for found in sweeps.values() for variant in found.values()])
    drawing, grid = panels(3, 3.0, 2.9)
    sizes: Sequence[float] = sorted({size for found in sweeps.values() for size in found})
    for axes, name in zip(grid, ("average accuracy, %", "forgetting, pp", "measured loss, nats"), strict=True):
        for position, (method_name, found) in enumerate(sweeps.items()):
            shift = 1.0 + 0.04 * (position - (len(sweeps) - 1) / 2)
            places = {shift * size: study.variants[variant] for size, variant in found.items() if size > 0}
            rows = {place: mean_and_std([QUANTITIES[name](run) for run in runs]) for place, runs in places.items()}
            mean, spread = np.transpose(list(rows.values()))
            style = method_style(method_name)
            axes.errorbar(list(rows), mean, spread, markersize=4, capsize=2, linewidth=1, label=method_name, **style)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("images in the buffer")
        axes.set_title(name, fontsize=9)
    legend(drawing, grid)
    heading(
        drawing,
        "Size of the buffer: accuracy over all classes, forgetting, and the final model's loss summed over tasks",
        caption(shown, labelled=False),
        "Methods are shifted sideways to keep their error bars apart.",
    )
    return drawing
