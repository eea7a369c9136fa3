"""One look for all figures: colour-blind-safe colours (Okabe and Ito), and files that do not change from day to day."""

from __future__ import annotations

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
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "svg.hashsalt": "cila-bound",
}


def panels(columns: int, width: float, height: float, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with one row of axes, sizes in inches, outside pyplot's global state."""
    with mpl.rc_context(_RC):
        drawing = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawing)
        axes = drawing.subplots(1, columns, squeeze=False, sharey=sharey)
        return drawing, list(axes[0])


def save(drawing: Figure, folder: Path, name: str) -> list[Path]:
    """PDF and PNG; equal input gives equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    with mpl.rc_context(_RC):
        drawing.savefig(paths[0], metadata={"CreationDate": None})
        drawing.savefig(paths[1], dpi=160)
    return paths


def caption(study: Study) -> str:
    """What every figure must say: stream, tuples, seeds, error bars."""
    header = study.any_run.log.header
    counts = sorted({len(runs) for runs in study.methods.values()})
    n = "/".join(map(str, counts))
    plural = "s" if header.n_negatives > 1 else ""
    spread = "mean ± std over" if counts[-1] > 1 else "single"
    return (
        f"{study.stream}, {len(header.tasks)} tasks; temperature {header.temperature:g}, "
        f"{header.n_negatives} negative{plural}; {spread} n = {n} seed{'s' if counts[-1] > 1 else ''}"
    )
