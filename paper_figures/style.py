"""One look for all figures: colour-blind-safe colours (Okabe and Ito), and files that do not change from day to day."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from paper_figures.runs import Study

BOUND_STYLE = {
    "linear": ("#999999", "v"),
    "saturating": ("#56B4E9", "s"),
    "pinsker": ("#E69F00", "^"),
    "moment": ("#0072B2", "o"),
    "moment, refreshed": ("#009E73", "D"),
    "pointwise, refreshed": ("#CC79A7", "P"),
}
MEASURED = "#000000"
METHOD_COLOUR = {
    "cila-max": "#0072B2",
    "co2l": "#D55E00",
    "finetune": "#009E73",
    "cila-pure": "#56B4E9",
    "cila-min": "#332288",
    "dual-price": "#CC79A7",
    "contrastive-only": "#E69F00",
    "distillation-only": "#999999",
}

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


def panels(count: int, width: float, height: float, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes of the given size in inches, four to a row at most, outside pyplot's global state.

    At least 8 inches wide, so that heading and legend have room.
    """
    rows = math.ceil(count / 4)
    columns = math.ceil(count / rows)
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


def legend(drawing: Figure, axes: Sequence[Axes], title: str | None = None) -> None:
    """One legend for all panels, at the right."""
    entries = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    drawing.legend(
        entries.values(),
        entries.keys(),
        loc="outside right center",
        title=title,
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )


def task_ticks(axes: Axes, tasks: Sequence[str], size: float = 9.0) -> None:
    """Names of the tasks below the panel, slanted if they are too long to stand side by side."""
    slanted: Any = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, tasks)) > 30 else {}
    axes.set_xticks(range(len(tasks)), tasks, fontsize=size, **slanted)


def save(drawing: Figure, folder: Path, name: str) -> list[Path]:
    """PDF and PNG; equal input gives equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    with mpl.rc_context(_RC):
        drawing.savefig(paths[0], metadata={"CreationDate": None})
        drawing.savefig(paths[1], dpi=160)
    return paths


def caption(study: Study, *, tuples: bool = True) -> str:
    """What every figure must say: stream, tuples if losses are measured on them, seeds, error bars."""
    header = study.any_run.log.header
    parts = [f"{study.stream}, {len(header.tasks)} task{'s' if len(header.tasks) > 1 else ''}"]
    if tuples:
        plural = "s" if header.n_negatives > 1 else ""
        parts.append(f"temperature {header.temperature:g}, {header.n_negatives} negative{plural}")
    counts = study.seeds
    if len(counts) > 1:
        parts.append("mean ± std over n seeds")
    elif counts == {1}:
        parts.append("one seed")
    else:
        parts.append(f"mean ± std over n = {min(counts)} seeds")
    return "; ".join(parts)
