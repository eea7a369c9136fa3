"""All figures by name: each a pure function, a study in, a drawing out; NoDataError if the study lacks the runs."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from paper_figures.across import bound_ranks, temperature
from paper_figures.per_task import accuracy, distill_weight, measured_vs_bounds, tightness
from paper_figures.robustness import robustness
from paper_figures.runs import Study
from paper_figures.sweeps import buffer, lambda_sweep, pretraining

FIGURES: dict[str, Callable[[Study], Figure]] = {
    "measured-vs-bounds": measured_vs_bounds,
    "tightness": tightness,
    "distill-weight": distill_weight,
    "accuracy": accuracy,
    "lambda-sweep": lambda_sweep,
    "pretraining": pretraining,
    "temperature": temperature,
    "buffer": buffer,
    "bound-ranks": bound_ranks,
    "robustness": robustness,
}
