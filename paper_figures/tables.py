"""Tables, each one list of rows that is written as Markdown and as LaTeX (booktabs)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from paper_figures import published
from paper_figures.across import rank_agreements
from paper_figures.bounds import BOUNDS, PER_TASK, THEOREM1
from paper_figures.runs import METHODS, NoDataError, Run, Study, method, options
from paper_figures.stats import Paired, holm, mean_and_std, paired
from paper_figures.style import caption

_NONE = "-"
_LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "λ": r"$\lambda$",
    "κ": r"$\kappa$",
    "τ": r"$\tau$",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
}


@dataclass(frozen=True)
class Table:
    """Rows of finished cells under a head, with a caption and notes."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [
            self.caption,
            "",
            "| " + " | ".join(self.head) + " |",
            "|" + " --- |" * len(self.head),
            *("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in self.rows),
        ]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A table environment; needs the package booktabs."""
        rows = [[*map(_escaped, row)] for row in (self.head, *self.rows)]
        head, *body = (" & ".join(row) + r" \\" for row in rows)
        text = " ".join([self.caption, *self.notes])
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(text)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """For LaTeX, with proper minus signs."""
    text = "".join(_LATEX.get(character, character) for character in text)
    return "--" if text == _NONE else re.sub(r"(?<![\w)])-(?=\d)", "$-$", text)


def summary(study: Study) -> Table:
    """One row per plain method: measured loss, bounds, tightness and accuracy, losses summed over tasks."""
    shown = study.plain if study.plain.variants else study
    bounds = [label for label in PER_TASK if all(label in run.losses.bounds() for run in shown.runs)]
    head = ["method", "measured", *bounds, THEOREM1, "accuracy, %", "forgetting, pp"]
    rows = []
    for variant, runs in shown.variants.items():
        measured = [run.losses.measured_total for run in runs]
        cells = [_cell(measured)]
        for label in (*bounds, THEOREM1):
            totals = [run.losses.total(label) for run in runs]
            ratio = np.mean(np.divide(totals, measured))
            cells.append(_cell(totals) + (f" ({ratio:.3g}x)" if np.isfinite(ratio) else ""))
        cells += [_cell([100.0 * run.scores[name] for run in runs]) for name in ("average_accuracy", "forgetting")]
        rows.append([shown.label(variant), *cells])
    geometry, n = study.any_run.losses.log.geometry, len(study.tasks)
    text = (
        f"{caption(shown)}. Losses of the final model in nats, summed over tasks; bounds unclipped, from held-out "
        f"tuples ({THEOREM1}: training losses); in brackets the tightness, bound / measured; "
        f"chance {n * geometry.chance:.3g}, ceiling {n * geometry.ceiling:.3g} (a bound above it is vacuous)."
    )
    return Table(text, head, rows)


def table1(studies: Sequence[Study]) -> Table:
    """Accuracy of all methods on all streams, measured and published."""
    head = ["stream", "buffer", "method", "n", "Class-IL or Domain-IL, %", "published", "Task-IL, %", "published"]
    head += ["forgetting, pp", "backward transfer, pp"]
    rows: list[list[str]] = []
    for stream, name in published.STREAMS.items():
        found = [study for study in studies if study.any_run.config["stream"] == stream]
        for study in found:
            rows += _accuracies(f"{name} ({study.name})", stream, study.variants)
        if not found:
            rows += _accuracies(name, stream, {})
    for study in studies:
        if study.any_run.config["stream"] not in published.STREAMS:
            rows += _accuracies(study.name, "", study.variants)
    text = (
        "Accuracy after the last task, over all classes seen (Class-IL, or Domain-IL where every task has all classes) "
        "and over the task's own (Task-IL); forgetting and backward transfer of the former. Mean ± std over n seeds."
    )
    return Table(text, head, rows, [*published.NOTES, *map(_made, studies)])


def _accuracies(name: str, stream: str, variants: dict[str, list[Run]]) -> list[list[str]]:
    """Every plain method and its buffer sizes, and what is published of the stream."""
    measured = {}
    for variant, runs in variants.items():
        if not options(variant).keys() - {"buffer_size"}:
            measured[runs[0].config["buffer_size"], method(variant)] = runs
    known = {(entry.buffer_size, entry.method): entry for entry in published.RESULTS if entry.stream == stream}
    keys = sorted(measured.keys() | known.keys(), key=lambda key: (key[0], METHODS.index(key[1])))
    return [[name, str(key[0]), key[1], *_accuracy_cells(measured.get(key, []), known.get(key))] for key in keys]


def _accuracy_cells(runs: list[Run], entry: published.Published | None) -> list[str]:
    def percent(kind: str, score: str) -> str:
        if not runs:
            return "not measured"
        if kind not in runs[0].metrics["accuracy"]:
            return _NONE
        return _cell([100.0 * run.metrics["accuracy"][kind][score] for run in runs], ".2f", ".2f")

    main = "class_il" if not runs or "class_il" in runs[0].metrics["accuracy"] else "domain_il"
    return [
        str(len(runs)) if runs else _NONE,
        percent(main, "average_accuracy"),
        _published(entry.over_all if entry else None),
        percent("task_il", "average_accuracy"),
        _published(entry.task_il if entry else None),
        percent(main, "forgetting"),
        percent(main, "backward_transfer"),
    ]


def _published(value: tuple[float, float] | str | None) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.2f} ± {value[1]:.2f}"
    return value or _NONE


def _made(study: Study) -> str:
    """What was reduced from the published protocol, and with what the runs were made."""
    config, counts = study.any_run.config, study.seeds
    protocol = published.PROTOCOL.get(config["stream"])
    n = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(min(counts))
    if protocol is None:
        schedule = (
            f"no published numbers; {config['epochs_first']} then {config['epochs']} epochs, "
            f"batches of {config['batch_size']}, {n} seeds"
        )
    else:
        changed = [
            f"{name} {config[name]} ({value or 'all'})" for name, value in protocol.items() if config[name] != value
        ]
        if min(counts) < published.SEEDS:
            changed.append(f"{n} seeds ({published.SEEDS})")
        schedule = f"reduced (published): {', '.join(changed)}" if changed else "the published schedule"
    versions = [run.metrics.get("versions", {}) for run in study.runs]
    made = {name: sorted({str(known.get(name, "unknown")) for known in versions}) for name in _MADE_WITH}
    base = f" ({study.base})" if study.base else ""
    made_with = ", ".join(f"{name} {' and '.join(values)}" for name, values in made.items())
    return f"{study.name}{base}: {schedule}; {len(versions)} runs with {made_with}."


def table2(study: Study) -> Table:
    """CILA's three rules beside Co2L: accuracy, forgetting, losses, and the weight they end with."""
    names = ["cila-pure", *study.sweep("cila-pure", "kappa").values(), "cila-min", "cila-max", "co2l"]
    shown = study.only(list(dict.fromkeys(names)))
    if not any(variant.startswith("cila") for variant in shown.variants):
        raise NoDataError("no variant of CILA was trained")
    last = len(study.tasks)
    columns: dict[str, Callable[[Run], float]] = {
        "accuracy, %": lambda run: 100.0 * run.scores["average_accuracy"],
        "forgetting, pp": lambda run: 100.0 * run.scores["forgetting"],
        "measured loss, nats": lambda run: run.losses.measured_total,
        "moment chain, nats": lambda run: run.losses.total("moment"),
        "moment, refreshed, nats": lambda run: run.losses.total("moment, refreshed"),
        "last λ": lambda run: run.losses.log.training(last).distill_weight,
    }
    rows = [
        [shown.label(variant), f"{runs[0].config['kappa']:g}" if variant.startswith("cila") else _NONE]
        + [_cell([column(run) for run in runs]) for column in columns.values()]
        for variant, runs in shown.variants.items()
    ]
    text = f"CILA's rules for the distillation weight. {caption(shown)}. Losses of the final model summed over tasks."
    return Table(text, ["method", "κ", *columns], rows)


_MADE_WITH = ("torch", "processor", "gpu", "commit")
_COMPARED = (
    ("cila-max", "co2l"),
    ("dual-price", "co2l"),
    ("co2l", "contrastive-only"),
    ("co2l", "distillation-only"),
    ("co2l", "finetune"),
    ("cila-max", "er"),
    ("cila-max", "der++"),
    ("cila-pure kappa=4.0", "cila-pure kappa=0.5"),
)
_OPTIONS = ("pretrain_epochs", "positives", "queue_size")


def comparisons(study: Study) -> Table:
    """Paired differences over the seeds that two variants share, in accuracy and measured loss."""
    pairs = {pair: " vs ".join(pair) for pair in _COMPARED if set(pair) <= study.variants.keys()}
    for option in _OPTIONS:
        for one, other in study.partners(option):
            without = study.variants[other][0].config[option]
            pairs[one, other] = f"{one} vs {option}={without}"
    quantities: dict[str, tuple[str, Callable[[Run], float]]] = {
        "accuracy, pp": ("+.2f", lambda run: 100.0 * run.scores["average_accuracy"]),
        "measured loss, nats": ("+.3f", lambda run: run.losses.measured_total),
    }
    found: list[tuple[str, str, Paired]] = []
    for quantity, (_, value) in quantities.items():
        for (one, other), name in pairs.items():
            a, b = ({run.seed: value(run) for run in study.variants[variant]} for variant in (one, other))
            difference = paired(a, b)
            if difference is not None:
                found.append((name, quantity, difference))
    if not found:
        raise NoDataError("no two variants that are compared share a seed")
    adjusted = holm([difference.p for _, _, difference in found])
    rows = []
    for (name, quantity, gain), p in zip(found, adjusted, strict=True):
        form = quantities[quantity][0]
        spread = f" ± {gain.std:{form[1:]}}" if gain.n > 1 else ""
        interval = f"[{gain.low:{form}}, {gain.high:{form}}]" if gain.n > 1 else _NONE
        rows.append([name, quantity, f"{gain.mean:{form}}{spread}", interval, _p(gain.p), _p(p), str(gain.n)])
    base = f" ({study.base})" if study.base else ""
    text = (
        f"{study.name}{base}: differences, first minus second, over the n seeds that both have; mean ± std, 95% t "
        "interval of the mean, two-sided paired t-test. Accuracy: average over tasks, all classes; loss: final model, "
        "summed over tasks."
    )
    head = ["comparison", "quantity", "difference", "95% interval", "p", "p, Holm", "n"]
    notes = [f"p is not corrected for the number of comparisons; p, Holm is, for all {len(rows)} of this table."]
    return Table(text, head, rows, notes)


def ranks(study: Study) -> Table:
    """How far each bound orders methods and variants as the measured loss does."""
    if len(study.distinct.variants) < 3:
        raise NoDataError("ranks need three variants with different losses")
    rows = []
    for label in BOUNDS:
        for clipped in (False, True):
            if clipped and label not in ("linear", "saturating", "pinsker"):
                continue  # the others never pass the ceiling, or not as a sum of tasks
            plain, every = rank_agreements(study, label, clipped=clipped)
            if every.n < 3:
                continue
            cells = []
            for one in (plain, every):
                best = _NONE if math.isnan(one.spearman) else "yes" if one.same_lowest else "no"
                cells += [_number(one.spearman), _number(one.kendall), best, str(one.n)]
            rows.append([label + ", clipped" * clipped, *cells])
    head = ["bound", *("plain: Spearman", "Kendall", "same best", "n"), *("all: Spearman", "Kendall", "same best", "n")]
    text = (
        f"{caption(study, labelled=False, what='means over ')}. Spearman's rank correlation and Kendall's τ-b of each "
        "bound's total with the measured total, over the plain methods and over all variants; same best: whether bound "
        "and measured loss are lowest for the same one."
    )
    merged = [name for name in study.distinct.variants if " = " in name]
    notes = ["Infinite bounds share the last rank. Clipped: task by task at the ceiling. n variants have the bound."]
    if merged:
        notes.append(f"The same models, counted once: {'; '.join(merged)}.")
    return Table(text, head, rows, notes)


def _cell(values: Sequence[float], mean_format: str = ".3g", spread_format: str = ".2g") -> str:
    if not np.isfinite(values).all():
        return "infinite"
    mean, spread = mean_and_std(list(values))
    text = f"{mean:{mean_format}}"
    return f"{text} ± {spread:{spread_format}}" if len(values) > 1 else text


def _p(p: float) -> str:
    return _NONE if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _number(value: float) -> str:
    return _NONE if math.isnan(value) else f"{value:.2f}"


TABLES: dict[str, Callable[[Study], Table]] = {
    "summary": summary,
    "table2": table2,
    "comparisons": comparisons,
    "ranks": ranks,
}
