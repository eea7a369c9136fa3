"""What a check found, as plain numbers: stages, what each part adds, costs, and bounds with and without confidence."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cila_bound import certify, tuples_needed
from cila_bound.certificate import StepName
from cila_bound.chain import Chain
from cila_bound.violations import find_violations
from paper_figures.runs import Run, Study
from paper_figures.stats import mean_and_std, paired

_BOUNDS: dict[str, tuple[StepName, Chain]] = {
    "Theorem 1 form": ("theorem1", "full"),
    "linear chain": ("linear", "full"),
    "moment chain": ("moment", "full"),
    "moment, last step": ("moment", "refreshed"),
    "pointwise, last step": ("pointwise", "refreshed"),
    "measured directly": ("direct", "refreshed"),
}
_KEYS = (
    "name",
    "source",
    "remarks",
    "classes",
    "counts",
    "stages",
    "confidence",
    "selections",
    "defect",
    "costs",
    "plan",
)


def load_check(folder: Path) -> dict[str, Any]:
    """``check.json``. Raises ValueError if it is missing or damaged."""
    path = folder / "check.json"
    try:
        check = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{path} is missing: give the folder that `experiments check` wrote") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run the check again") from None
    if not (isinstance(check, dict) and check.keys() >= set(_KEYS)):
        raise ValueError(f"{path} is damaged (it lacks one of {', '.join(_KEYS)}): run the check again")
    return check


def assemble(check: dict[str, Any], study: Study) -> dict[str, Any]:
    """Everything that the page shows. Losses in nats; shares in [0, 1]; costs per 1,000 items of a task."""
    stages = [stage for stage in check["stages"] if stage["variant"] in study.variants]
    if not stages:
        raise ValueError(f"the runs below runs/ are none of {', '.join(s['variant'] for s in check['stages'])}")
    header = study.any_run.losses.log.header
    geometry = header.geometry
    kpi = _Kpi.of(check) if check["costs"] else None
    found = [_stage(stage, study.variants[stage["variant"]], kpi) for stage in stages]
    runs = [run for stage in stages for run in study.variants[stage["variant"]]]
    return {
        "name": check["name"],
        "source": check["source"],
        "remarks": check["remarks"],
        "classes": check["classes"],
        "counts": check["counts"],
        "plan": check["plan"],
        "tasks": list(header.tasks),
        "geometry": {
            "temperature": header.temperature,
            "n_negatives": header.n_negatives,
            "floor": geometry.floor,
            "chance": geometry.chance,
            "ceiling": geometry.ceiling,
        },
        "confidence": check["confidence"],
        "selections": check["selections"],
        "kpi": None if kpi is None else kpi.as_json(found),
        "stages": found,
        "parts": [_part(before, after, study, kpi) for before, after in itertools.pairwise(stages)],
        "bounds": [bound for name in _BOUNDS if (bound := _bound(name, check, study.variants[stages[-1]["variant"]]))],
        "bounds_of": stages[-1]["variant"],
        "n_tuples": _tuples(study.variants[stages[-1]["variant"]]),
        "violations": [text for run in runs for text in _violations(run)],
        "versions": study.any_run.metrics.get("versions", {}),
        "seconds": math.fsum(run.metrics.get("training_seconds", 0.0) for run in runs),
        "leaked": max(run.metrics.get("leaked", 0) for run in runs),
    }


class _Kpi:
    """Costs of a missed defect and of a false alarm, and which classes are defects."""

    def __init__(self, positive: list[int], miss: float, alarm: float, defect: str) -> None:
        self.positive, self.miss, self.alarm, self.defect = positive, miss, alarm, defect

    @staticmethod
    def of(check: dict[str, Any]) -> _Kpi:
        names = [str(name) for name in check["classes"]]
        return _Kpi([names.index(check["defect"])], check["costs"]["miss"], check["costs"]["alarm"], check["defect"])

    def rates(self, counts: list[list[int]]) -> tuple[float, float]:
        """Missed defects and false alarms per item, from counts[true][predicted]."""
        table = np.asarray(counts, dtype=np.float64)
        positive = np.zeros(len(table), bool)
        positive[self.positive] = True
        total = table.sum()
        return float(table[positive][:, ~positive].sum() / total), float(table[~positive][:, positive].sum() / total)

    def cost(self, counts: list[list[int]]) -> float:
        """Per 1,000 items."""
        missed, alarms = self.rates(counts)
        return 1000.0 * (missed * self.miss + alarms * self.alarm)

    def as_json(self, stages: list[dict[str, Any]]) -> dict[str, Any]:
        share = stages[0]["defect_share"]
        return {
            "defect": self.defect,
            "miss": self.miss,
            "alarm": self.alarm,
            "defect_share": share,
            "all_pass": [1000.0 * s * self.miss for s in share],
            "none_pass": [1000.0 * (1.0 - s) * self.alarm for s in share],
        }


def _stage(stage: dict[str, str], runs: list[Run], kpi: _Kpi | None) -> dict[str, Any]:
    last = len(runs[0].losses.log.header.tasks)
    result = {
        **stage,
        "n": len(runs),
        "loss": _over(runs, lambda run: run.losses.measured_total / last),
        "loss_per_task": [_over(runs, lambda run, i=i: run.losses.measured[i]) for i in range(last)],  # type: ignore[misc]
        "accuracy": _over(runs, lambda run: run.scores["average_accuracy"]),
        "accuracy_per_task": [_over(runs, lambda run, i=i: run.scores["accuracy_matrix"][-1][i]) for i in range(last)],  # type: ignore[misc]
        "forgetting": _over(runs, lambda run: run.scores["forgetting"]),
    }
    if kpi is not None:
        confusion = [run.metrics["confusion"] for run in runs]
        tables = np.asarray(confusion[0]["last"], dtype=np.float64)
        result |= {
            "cost": _over(runs, lambda run: _mean_cost(run, kpi)),
            "cost_per_task": [_summary([kpi.cost(c["last"][i]) for c in confusion]) for i in range(last)],
            "missed_per_task": [_summary([kpi.rates(c["last"][i])[0] for c in confusion]) for i in range(last)],
            "alarms_per_task": [_summary([kpi.rates(c["last"][i])[1] for c in confusion]) for i in range(last)],
            "cost_of_forgetting": [
                _summary([kpi.cost(c["last"][i]) - kpi.cost(c["own"][i]) for c in confusion]) for i in range(last - 1)
            ],
            "defect_share": [float(table[kpi.positive].sum() / table.sum()) for table in tables],
        }
    return result


def _mean_cost(run: Run, kpi: _Kpi) -> float:
    counts = run.metrics["confusion"]["last"]
    return math.fsum(kpi.cost(table) for table in counts) / len(counts)


def _part(before: dict[str, str], after: dict[str, str], study: Study, kpi: _Kpi | None) -> dict[str, Any]:
    """What the later stage changes: paired over seeds, with the 95% t interval of the mean."""

    def change(value: Callable[[Run], float]) -> dict[str, float | int | None]:
        one, other = ({run.seed: value(run) for run in study.variants[s["variant"]]} for s in (after, before))
        difference = paired(one, other)
        assert difference is not None  # all stages have the same seeds
        numbers = {"mean": difference.mean, "low": difference.low, "high": difference.high}
        return {"n": difference.n, **{name: _finite(value) for name, value in numbers.items()}}

    result: dict[str, Any] = {
        "adds": after["adds"],
        "before": before["variant"],
        "after": after["variant"],
        "loss": change(lambda run: run.losses.measured_total / len(run.losses.measured)),
        "accuracy": change(lambda run: run.scores["average_accuracy"]),
        "forgetting": change(lambda run: run.scores["forgetting"]),
    }
    if kpi is not None:
        result["cost"] = change(lambda run: _mean_cost(run, kpi))
    return result


def _bound(name: str, check: dict[str, Any], runs: list[Run]) -> dict[str, Any] | None:
    """One bound on the mean loss a task, as an estimate and at the confidence; None if the logs lack what it needs."""
    step, chain = _BOUNDS[name]
    if step == "pointwise" and not all(run.losses.has_tuples for run in runs):
        return None
    logs = [run.losses.log for run in runs]
    geometry, last = logs[0].geometry, len(logs[0].header.tasks)
    estimates = [certify(log, step, chain=chain) for log in logs]
    result: dict[str, Any] = {
        "name": name,
        "step": step,
        "chain": chain,
        "estimate": _summary([e.total / last for e in estimates]),
        "formula": _summary([e.unclipped_total / last for e in estimates]),
        "estimate_per_task": [_summary([e.per_task[i] for e in estimates]) for i in range(last)],
        "certified": None,
    }
    if step == "theorem1":
        return result
    rows = sum(other != "theorem1" for other, _ in _BOUNDS.values())  # they share delta: the reader takes the tightest
    level = {"confidence": 1.0 - (1.0 - check["confidence"]) / rows, "selections": check["selections"]}
    certificates = [certify(log, step, chain=chain, **level) for log in logs]
    uppers = np.array([c.per_task for c in certificates])
    needed = {
        word: [tuples_needed(log, step, chain=chain, below=below, **level) for log in logs]
        for word, below in (("ceiling", geometry.ceiling), ("chance", geometry.chance))
    }
    return result | {
        "certified": _summary([c.total / last for c in certificates]),
        "certified_per_task": [_summary(uppers[:, i]) for i in range(last)],
        "certified_lower_per_task": [_summary([c.lower_per_task[i] for c in certificates]) for i in range(last)],
        "below_ceiling": int((uppers < geometry.ceiling).sum(axis=1).min()),
        "below_chance": int((uppers < geometry.chance).sum(axis=1).min()),
        "statements": len(certificates[0].statements),
        "delta": certificates[0].delta,
        "inequalities": sorted({s.inequality for s in certificates[0].statements}),
        "assumptions": list(certificates[0].assumptions),
        "needed": {
            word: None if any(n is None for n in counts) else max(n for n in counts if n is not None)
            for word, counts in needed.items()
        },
    }


def _tuples(runs: list[Run]) -> list[int]:
    """Independent held-out tuples of each task, the fewest over seeds."""
    last = len(runs[0].losses.log.header.tasks)
    return [
        min(run.losses.log.measurement(last, task, "heldout").n_effective for run in runs)
        for task in range(1, last + 1)
    ]


def _violations(run: Run) -> list[str]:
    log, found = run.losses.log, []
    for step, chain in _BOUNDS.values():
        if step == "pointwise" and not run.losses.has_tuples:
            continue
        for v in find_violations(log, certify(log, step, chain=chain)):
            loss = f"loss {v.measured:.4g} +- {v.margin:.2g}, {v.side} bound {v.bound:.4g}"
            found.append(f"{run.directory.name}: {step} ({chain}), task {v.task}: {loss}")
    return found


def _over(runs: list[Run], value: Callable[[Run], float]) -> dict[str, float | int | None]:
    return _summary([value(run) for run in runs])


def _summary(values: Any) -> dict[str, float | int | None]:
    """Mean, standard deviation (None for a single value) and n; None where infinite."""
    mean, spread = mean_and_std(values)
    return {"mean": _finite(float(mean)), "std": _finite(float(spread)), "n": len(values)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
