"""Tables in Markdown."""

from __future__ import annotations

import numpy as np

from cila_bound import certify
from paper_figures.figures import certificates, measured
from paper_figures.runs import Study, mean_and_std
from paper_figures.style import BOUND_STYLE, caption


def summary(study: Study) -> str:
    """One row per method: measured loss, bounds and accuracy, as mean ± std over seeds, losses summed over tasks."""
    bounds = [
        label for label in BOUND_STYLE if all(label in certificates(r) for m in study.methods.values() for r in m)
    ]
    head = ["method", "measured", *bounds, "Theorem 1 form", "accuracy, %", "forgetting, pp"]
    rows = []
    for method, runs in study.methods.items():
        found = [certificates(run) for run in runs]
        values: list[list[float]] = [
            [sum(measured(run["moment"])) for run in found],
            *([run[label].unclipped_total for run in found] for label in bounds),
            [certify(run.log, "theorem1").unclipped_total for run in runs],
            *([100.0 * run.metrics["class_il"][name] for run in runs] for name in ("average_accuracy", "forgetting")),
        ]
        rows.append([study.label(method), *map(_cell, values)])
    geometry = study.any_run.log.geometry
    n = len(study.tasks)
    lines = [
        f"{caption(study)}. Losses of the final model in nats, summed over tasks; bounds unclipped, "
        f"from held-out tuples; chance {n * geometry.chance:.3g}, "
        f"ceiling {n * geometry.ceiling:.3g} (a bound above it is vacuous).",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not np.isfinite(values).all():
        return "infinite"
    mean, spread = mean_and_std(values)
    return f"{mean:.3g} ± {spread:.2g}" if len(values) > 1 else f"{mean:.3g}"
