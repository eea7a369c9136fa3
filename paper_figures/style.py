"""One look for all figures: colour-blind-safe colours (Okabe and Ito), and files that do not change from day to day."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from paper_figures.runs import Study, method
from paper_figures.stats import mean_and_std

BOUND_STYLE = {
    "linear": ("#999999", "v"),
    "saturating": ("#56B4E9", "s"),
    "pinsker": ("#E69F00", "^"),
    "moment": ("#0072B2", "o"),
    "moment, refreshed": ("#009E73", "D"),
    "pointwise, refreshed": ("#CC79A7", "P"),
}
MEASURED = "#000000"
METHOD_STYLE = {
    "cila-max": ("#0072B2", "o"),
    "co2l": ("#D55E00", "s"),
    "finetune": ("#009E73", "v"),
    "cila-pure": ("#56B4E9", "x"),
    "cila-min": ("#332288", "+"),
    "dual-price": ("#CC79A7", "D"),
    "dual-price-per-task": ("#882255", "d"),
    "contrastive-only": ("#E69F00", "^"),
    "distillation-only": ("#999999", "P"),
    "er": ("#666666", "<"),
    "der++": ("#222222", ">"),
}
CUT = 100.0  # the highest bound on an axis, in ceilings
MANY_TASKS = 9  # from here on, lines and numbers instead of markers and names

_RC: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "svg.hashsalt": "cila-bound",
}


def method_style(variant: str) -> dict[str, Any]:
    """Colour and marker of the variant's method."""
    colour, marker = METHOD_STYLE.get(method(variant), ("#000000", "."))
    return {"color": colour, "marker": marker}


def panels(
    count: int,
    width: float,
    height: float,
    *,
    sharey: bool | Literal["row"] = False,
    columns: int | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes of the given size in inches, in so many columns (by default four to a row at most),
    outside pyplot's global state.

    At least 8 inches wide, so that heading and legend have room.
    """
    columns = columns or math.ceil(count / math.ceil(count / 4))
    rows = math.ceil(count / columns)
    with mpl.rc_context(_RC):
        drawing = Figure(figsize=(max(columns * width + 1.8, 8.0), rows * height + 0.8), layout="constrained")
        FigureCanvasAgg(drawing)
        axes = drawing.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
        for empty in axes[count:]:
            empty.remove()
        return drawing, axes[:count]


def heading(drawing: Figure, *lines: str) -> None:
    """Lines above all panels, wrapped to the width of the figure."""
    width = int(13 * drawing.get_figwidth())  # characters of this size
    drawing.suptitle("\n".join(textwrap.fill(line, width) for line in lines), fontsize=10)


def legend(drawing: Figure, axes: Sequence[Axes], title: str | None = None, beside: Axes | None = None) -> None:
    """One legend for all panels given, at the right of the figure, or of the panel ``beside`` it."""
    entries = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    style: Any = {"title": title, "fontsize": 8, "title_fontsize": 8, "frameon": False}
    if beside is None:
        drawing.legend(entries.values(), entries.keys(), loc="outside right center", **style)
    else:
        place: Any = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0)}
        beside.legend(list(entries.values()), list(entries), **place, **style)


def task_ticks(axes: Axes, tasks: Sequence[str], size: float = 9.0) -> None:
    """Names of the tasks below the panel, slanted if they are too long to stand side by side; of many, numbers."""
    if len(tasks) >= MANY_TASKS:
        axes.set_xticks(*number_ticks(len(tasks)), fontsize=size)
        return
    slanted: Any = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, tasks)) > 30 else {}
    axes.set_xticks(range(len(tasks)), tasks, fontsize=size, **slanted)


def number_ticks(n_tasks: int) -> tuple[list[int], list[str]]:
    """Places (from 0) and numbers (from 1) of the first task, the last, and about four between."""
    every = max(1, round(n_tasks / 4))
    numbers = [1, *range(every, n_tasks + 1, every)]
    return [number - 1 for number in numbers], [str(number) for number in numbers]


def label_rows(grid: Sequence[Axes], label: str) -> None:
    """The label of a shared y axis, at the first panel of each row."""
    for axes in grid:
        place = axes.get_subplotspec()
        if place is not None and place.is_first_col():
            axes.set_ylabel(label)


def line(axes: Axes, x: Sequence[float] | np.ndarray, rows: list[Any], **style: Any) -> None:
    """Mean and spread of ``rows``, one per seed, as a line."""
    style = {"markersize": 4, "capsize": 2, "linewidth": 1} | style
    axes.errorbar(x, *mean_and_std(rows), **style)


def band(axes: Axes, x: Sequence[float] | np.ndarray, rows: list[Any], color: str, **style: Any) -> None:
    """The same as a line in a band, for many points."""
    mean, spread = mean_and_std(rows)
    axes.plot(x, mean, color=color, linewidth=1.2, **style)
    if not np.isnan(spread).all():
        low = np.maximum(mean - spread, 0.05 * mean)  # visible on a logarithmic axis
        axes.fill_between(x, low, mean + spread, color=color, alpha=0.2, linewidth=0)


def save(drawing: Figure, folder: Path, name: str) -> list[Path]:
    """PDF and PNG; equal input gives equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    engine = drawing.get_layout_engine()
    if engine is not None:
        engine.execute(drawing)
    drawing.set_layout_engine(None)  # laid out once for both files
    with mpl.rc_context(_RC | {"figure.constrained_layout.use": False}):
        drawing.savefig(paths[0], metadata={"CreationDate": None})
        drawing.savefig(paths[1], dpi=160)
    return paths


def svg(drawing: Figure) -> str:
    """The drawing as text for a page, as a data URI; equal input gives equal text."""
    content = io.BytesIO()
    with mpl.rc_context(_RC):
        drawing.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def plain_numbers(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 3, 5, 10 and so on, written as such."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def caption(study: Study, *, tuples: bool = True, labelled: bool = True, what: str = "mean ± std over ") -> str:
    """What every figure must say: study, tuples if losses are measured on them, seeds, error bars.

    Different numbers of seeds stand in the labels of the variants or, without such, here.
    """
    header = study.any_run.losses.log.header
    base = f" ({study.base})" if study.base else ""
    parts = [f"{study.name}{base}, {len(header.tasks)} task{'s' if len(header.tasks) > 1 else ''}"]
    if tuples:
        plural = "s" if header.n_negatives > 1 else ""
        parts.append(f"temperature {header.temperature:g}, {header.n_negatives} negative{plural}")
    counts = study.seeds
    if len(counts) > 1:
        parts.append(f"{what}n seeds" if labelled else f"{what}n = {min(counts)} to {max(counts)} seeds")
    elif counts == {1}:
        parts.append("one seed")
    else:
        parts.append(f"{what}n = {min(counts)} seeds")
    return "; ".join(parts)
