"""Figures that compare bounds across temperatures, numbers of negatives and variants. One pure function each."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from paper_figures.bounds import BOUNDS, PER_TASK
from paper_figures.runs import NoDataError, Study, options
from paper_figures.stats import Agreement, agreement, mean_and_std
from paper_figures.style import (
    BOUND_STYLE,
    CUT,
    MEASURED,
    caption,
    heading,
    label_rows,
    legend,
    method_style,
    panels,
    plain_numbers,
)


def temperature(study: Study) -> Figure:
    """Bound / measured, both summed over tasks, by temperature and number of negatives of the logged losses."""
    shown = study.only([name for name, runs in study.plain.variants.items() if all(run.further for run in runs)])
    if not shown.variants:
        raise NoDataError("no method was measured at further theory_temperatures or n_negatives")
    common = sorted(set.intersection(*(set(run.all_losses) for run in shown.runs)), key=lambda g: g.temperature)
    counts = sorted({geometry.n_negatives for geometry in common})
    drawing, grid = panels(len(counts) * len(shown.variants), 2.8, 2.6, sharey=True, columns=len(shown.variants))
    highest = trivial_highest = 0.0
    cells = [(k, variant) for k in counts for variant in shown.variants]
    for axes, (k, variant) in zip(grid, cells, strict=True):
        at = [geometry for geometry in common if geometry.n_negatives == k]
        x = np.array([geometry.temperature for geometry in at])
        rows = [[run.all_losses[geometry] for geometry in at] for run in shown.variants[variant]]
        ceilings = np.array([len(study.tasks) * geometry.ceiling for geometry in at])
        trivial = np.mean([ceilings / [losses.measured_total for losses in row] for row in rows], axis=0)
        for label in PER_TASK:
            if not all(label in losses.bounds() for row in rows for losses in row):
                continue  # further logs hold no per-tuple values
            colour, marker = BOUND_STYLE[label]
            totals = np.array([[losses.total(label) for losses in row] for row in rows])
            mean, spread = mean_and_std(totals / [[losses.measured_total for losses in row] for row in rows])
            axes.errorbar(x, mean, spread, color=colour, linewidth=1, capsize=2, marker=marker, ms=5, label=label)
            vacuous = totals.mean(axis=0) >= ceilings
            hollow: Any = {"color": colour, "marker": marker, "ms": 5, "mfc": "white", "linestyle": "none"}
            axes.plot(x[vacuous], mean[vacuous], zorder=3, **hollow)
            highest = max(highest, mean.max())
        trivial_highest = max(trivial_highest, trivial.max())
        axes.plot(x, trivial, color="#D55E00", linewidth=1, label="ceiling / measured")
        axes.axhline(1.0, color=MEASURED, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.1)
        axes.set_title(f"{shown.label(variant)}, {k} negative{'s' if k > 1 else ''}", fontsize=9)
    cut = highest > CUT * trivial_highest
    if cut:
        grid[0].set_ylim(0.5, 10.0 * trivial_highest)
    for axes in grid[-len(shown.variants) :]:
        axes.set_xlabel("temperature of the logged losses")
    label_rows(grid, "bound / measured, sums")
    legend(drawing, grid, "refreshed: one step\nfrom the previous model")
    heading(
        drawing,
        "Tightness of the unclipped bounds on the sum over tasks, by temperature and number of negatives",
        caption(shown, tuples=False),
        "The same models, measured at several temperatures. Hollow: vacuous, the mean bound is at or above the sum of "
        f"the ceilings.{' Bounds beyond ten times that are cut off.' if cut else ''}",
    )
    return drawing


def bound_ranks(study: Study) -> Figure:
    """Every bound's total against the measured total, one point per variant."""
    distinct = study.distinct
    if len(distinct.variants) < 3:
        raise NoDataError("ranks need three variants with different losses")
    measured = measured_means(distinct)
    everywhere = {label: means for label in BOUNDS if len(means := bound_means(distinct, label)) > 2}
    shown = [label for label, means in everywhere.items() if np.isfinite(list(means.values())).any()]
    drawing, grid = panels(len(shown), 2.7, 2.8, columns=4)
    low, high = 0.8 * min(measured.values()), 1.25 * max(measured.values())
    ceiling = len(study.tasks) * study.any_run.losses.log.geometry.ceiling
    for axes, label in zip(grid, shown, strict=True):
        means = everywhere[label]
        finite = [variant for variant in means if np.isfinite(means[variant])]
        axes.axhline(ceiling, color="#D55E00", linewidth=1, label="sum of the ceilings")
        axes.plot([low, high], [low, high], color=MEASURED, linewidth=1, label="bound = measured")
        others = [variant for variant in finite if not is_plain(variant)]
        grey: Any = {"color": "#AAAAAA", "marker": ".", "markersize": 5, "linestyle": "none"}
        axes.plot([measured[v] for v in others], [means[v] for v in others], label="with options", **grey)
        for variant in filter(is_plain, finite):
            style = method_style(variant) | {"linestyle": "none", "markersize": 6, "markeredgewidth": 1.5}
            axes.plot(measured[variant], means[variant], label=variant, **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        plain_numbers(axes.xaxis)
        plain, every = rank_agreements(study, label)
        infinite = f", {len(means) - len(finite)} of {len(means)} infinite" if len(finite) < len(means) else ""
        ranks = f"{plain.spearman:.2f} ({plain.n} plain), {every.spearman:.2f} (all {every.n})"
        axes.set_title(f"{label}{infinite}\nSpearman {ranks}".replace("nan", "none"), fontsize=8)
        axes.set_xlabel("measured, nats")
    label_rows(grid, "bound, nats")
    legend(drawing, grid)
    heading(
        drawing,
        "Bounds on the final model's loss against the measured one, both summed over tasks; unclipped",
        f"{caption(study, labelled=False, what='means over ')}; one point per variant.",
        "Spearman's rank correlation over the plain methods and over all variants; infinite bounds rank last. Variants "
        "that trained the same models count once.",
        *(f"Infinite for all variants: {label}." for label in everywhere if label not in shown),
    )
    return drawing


def is_plain(variant: str) -> bool:
    """Whether one of the merged names of a variant is a method without options."""
    return any(not options(name) for name in variant.split(" = "))


def bound_means(study: Study, label: str, *, clipped: bool = False) -> dict[str, float]:
    """Of every variant that has this bound, its mean over seeds, summed over tasks."""
    found = {}
    for variant, runs in study.variants.items():
        if label not in PER_TASK or all(label in run.losses.bounds() for run in runs):
            certificates = [run.losses.bound(label) for run in runs]
            totals = [one.total if clipped else one.unclipped_total for one in certificates]
            found[variant] = float(np.mean(totals))
    return found


def measured_means(study: Study) -> dict[str, float]:
    """The measured loss, summed over tasks, of every variant."""
    return {v: float(np.mean([run.losses.measured_total for run in runs])) for v, runs in study.variants.items()}


def rank_agreements(study: Study, label: str, *, clipped: bool = False) -> tuple[Agreement, Agreement]:
    """Of a bound's mean with the measured mean: over the plain methods, and over all variants that have it."""
    distinct = study.distinct
    means, measured = bound_means(distinct, label, clipped=clipped), measured_means(distinct)
    plain = [variant for variant in means if is_plain(variant)]
    one, other = (agreement([means[v] for v in names], [measured[v] for v in names]) for names in (plain, list(means)))
    return one, other
