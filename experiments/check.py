"""One command for a dataset never seen before: what forgetting costs on it, what each part of the method is worth, and
what can be guaranteed.

Everything goes below one folder NAME: ``NAME.npz``, the dataset in one shape; ``check.json``, what was asked for, found
and decided; ``runs/``, the trained runs; ``report.html`` and ``report.json``. The same command again goes on where it
was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cila_bound import Geometry
from cila_bound.files import write_atomic
from experiments.audit import file_sha256
from experiments.config import RunConfig, read_json
from experiments.methods import MethodName
from experiments.models import ModelName
from experiments.sources import Prepared, prepare
from experiments.streams import build_stream
from experiments.sweep import sweep
from experiments.train import run as train

STAGES: dict[MethodName, str] = {
    "finetune": "the current task alone",
    "contrastive-only": "+ contrast with a rehearsal buffer",
    "co2l": "+ distillation from the previous model",
    "cila-max": "+ an adaptive weight of the distillation",
}
_FEWEST, _MOST = 5, 50  # epochs on a later task; twice as many on the first
_MINUTES = 7 * 24 * 60
_AROUND = 25.0  # seconds for starting the program and its workers, and for the report
_ENOUGH = 10  # epochs that are worth more than another seed


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    data: str
    label: str
    threshold: float | None
    tasks: str
    image_size: int | None
    images: str
    minutes: float
    jobs: int
    confidence: float
    temperature: float
    buffer_size: int
    defect: str
    miss_cost: float | None
    alarm_cost: float | None


def check(request: Request, folder: Path) -> int:
    """Prepares, plans, trains and reports; returns the exit status of the report, or 1 if a run failed.

    Raises ValueError, before anything is trained, if the data or the request cannot be used, or the folder holds
    another check.
    """
    _check_request(request)
    planned = folder / "check.json"
    if planned.exists():
        decided = read_json(planned)
        _check_same(decided["request"], request, folder)
        if decided.get("fingerprint") != _fingerprint(Path(request.data), folder):
            raise ValueError(
                f"{request.data} has changed since {folder} was begun: choose another --out, or remove that folder"
            )
    else:
        prepared = prepare(
            Path(request.data),
            label=request.label or None,
            threshold=request.threshold,
            tasks=request.tasks or None,
            image_size=request.image_size,
            images=request.images or None,
        )
        _check_defect(request, prepared)
        data = folder / f"{folder.name}.npz"
        if data.resolve() == Path(request.data).resolve():
            raise ValueError(f"the prepared data would be written over {request.data}: choose another --out")
        base = _base(request, prepared, data)  # refuses what cannot be used before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        prepared.save(data)
        decided = _decide(request, prepared, base, folder)
        write_atomic(planned, (json.dumps(decided, indent=2) + "\n").encode())
    for remark in decided["remarks"]:
        print(f"data: {remark}")
    print(f"plan: {_in_words(decided['plan'])}", flush=True)
    configs = [RunConfig.from_json(options) for options in decided["runs"]]
    failures = sweep(configs, folder / "runs", jobs=request.jobs)
    for name, reason in failures:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    if failures:
        return 1
    report = [sys.executable, "-m", "paper_figures.report", str(folder.resolve())]
    return subprocess.run(report, cwd=Path(__file__).parents[1], check=False).returncode


def _decide(request: Request, prepared: Prepared, base: RunConfig, folder: Path) -> dict[str, Any]:
    """The content of ``check.json``."""
    stages = stages_of(prepared.n_tasks)
    plan = _plan(base, request, prepared, len(stages))
    plan["old_images"] = sum(len(task.train.labels) for task in build_stream(base, Path()).tasks[:-1])
    runs = [
        dataclasses.replace(
            base, method=method, seed=seed, epochs_first=2 * plan["epochs"], epochs=plan["epochs"]
        ).as_json()
        for method in stages
        for seed in range(plan["seeds"])
    ]
    return {
        "request": dataclasses.asdict(request),
        "name": folder.name,
        "source": request.data,
        "fingerprint": _fingerprint(Path(request.data), folder),
        "remarks": list(prepared.remarks),
        "classes": list(prepared.class_names),
        "counts": _counts(prepared),
        "stages": [{"variant": method, "adds": adds} for method, adds in stages.items()],
        "confidence": request.confidence,
        "selections": len(runs),
        "defect": request.defect or None,
        "costs": None if base.costs is None else {"miss": base.costs.miss, "alarm": base.costs.alarm},
        "plan": plan,
        "runs": runs,
    }


def stages_of(n_tasks: int) -> dict[MethodName, str]:
    """CILA's weight is 1, that of Co2L, at the second task and adapts from the third on: with two tasks they are the
    same method.
    """
    if n_tasks > 2:
        return STAGES
    return {method: STAGES[method] for method in ("finetune", "contrastive-only")} | {"cila-max": STAGES["co2l"]}


def _base(request: Request, prepared: Prepared, data: Path) -> RunConfig:
    """What all runs have in common."""
    side = prepared.train.images.shape[-1]
    model: ModelName = "mlp" if prepared.tabular else "strided" if side >= 16 else "small"
    base = RunConfig(
        stream="custom",
        dataset=str(data.resolve()),
        scenario=prepared.scenario,
        n_tasks=prepared.n_tasks,
        model=model,
        augmentation="features" if prepared.tabular else "generic",
        buffer_size=request.buffer_size,
        epochs_first=1,
        epochs=1,
        learning_rate=0.05,
        theory_temperatures=(request.temperature,),
        n_negatives=(1,),
        tuple_rounds=4,
        log_tuples="all",
        confidence=request.confidence,
        keep_checkpoints=True,
    )
    if request.miss_cost is None or request.alarm_cost is None:
        return base
    defect = prepared.class_names.index(request.defect)
    return dataclasses.replace(base, defect_class=defect, miss_cost=request.miss_cost, alarm_cost=request.alarm_cost)


def _plan(base: RunConfig, request: Request, prepared: Prepared, n_stages: int) -> dict[str, Any]:
    """Seeds and epochs that fit the minutes, from the time that one epoch of the dearest method takes here."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        pilot = dataclasses.replace(base, method="cila-max", log_tuples="none", keep_checkpoints=False)
        training = train(pilot, Path(scratch) / "pilot", show_progress=False)["training_seconds"]
    overhead = max(time.perf_counter() - start - training, 0.0)
    of_tasks = prepared.counts.sum(axis=1)
    per_epoch = training * (1 + of_tasks[0] / of_tasks.sum())  # twice as many epochs on the first task
    left = max(60.0 * request.minutes - (time.perf_counter() - start) - _AROUND, 0.0) * 0.9 * request.jobs / n_stages

    def affordable(seeds: int) -> int:
        return math.floor((left / seeds - overhead) / per_epoch)

    seeds = next((n for n in (3, 2) if affordable(n) >= _ENOUGH), 1)
    epochs = min(max(affordable(seeds), _FEWEST), _MOST)
    if epochs == _MOST:
        seeds = next((n for n in (5, 4, 3, 2) if affordable(n) >= _MOST), seeds)
    expected = ((overhead + epochs * per_epoch) * seeds * n_stages / request.jobs + _AROUND) / 60.0
    return {
        "stages": n_stages,
        "minutes": request.minutes,
        "expected_minutes": round(expected, 1),
        "seeds": seeds,
        "epochs_first": 2 * epochs,
        "epochs": epochs,
        "model": base.model,
        "augmentation": base.augmentation,
        "batch_size": base.batch_size,
        "learning_rate": base.learning_rate,
        "buffer_size": base.buffer_size,
        "jobs": request.jobs,
        "too_short": affordable(seeds) < _FEWEST,
    }


def _counts(prepared: Prepared) -> dict[str, dict[str, int]]:
    """Of each task and class; those of an official test split are taken together with the others."""
    counts = prepared.counts + (0 if prepared.test_counts is None else prepared.test_counts)
    tasks = prepared.task_names or ("every rotation",)
    rows = (dict(zip(prepared.class_names, row.tolist(), strict=True)) for row in counts)
    return dict(zip(tasks, rows, strict=False))


def _in_words(plan: dict[str, Any]) -> str:
    seeds = f"{plan['seeds']} seed{'s' if plan['seeds'] > 1 else ''}"
    epochs = f"{plan['epochs_first']} epochs on the first task and {plan['epochs']} on later ones"
    text = f"{plan['stages']} methods x {seeds}, {epochs}, about {plan['expected_minutes']:g} minutes"
    if plan["too_short"]:
        text += f": the least that makes sense, though {plan['minutes']:g} were allowed"
    if plan["buffer_size"] >= plan["old_images"]:
        text += (
            f"; the buffer of {plan['buffer_size']:,} holds all {plan['old_images']:,} training images of earlier "
            "tasks, so that nothing has to be forgotten: consider a smaller --buffer-size"
        )
    return text


def _check_request(request: Request) -> None:
    if not 0 < request.minutes <= _MINUTES:
        raise ValueError(f"minutes must be > 0 and at most {_MINUTES:,}, a week, got {request.minutes}")
    if request.jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {request.jobs}")
    Geometry(request.temperature, 1)  # raises on an illegal one
    costs = {"miss_cost": request.miss_cost, "alarm_cost": request.alarm_cost}
    for name, cost in costs.items():
        if cost is not None and not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {cost}")
    given = [name for name, cost in costs.items() if cost is not None]
    if len(given) == 1 or bool(given) != bool(request.defect):
        raise ValueError("defect, miss_cost and alarm_cost go together: give all three, or none for accuracies alone")
    if given and not any(costs.values()):
        raise ValueError("miss_cost and alarm_cost are 0 both: give what errors cost, or neither for accuracies alone")


def _check_defect(request: Request, prepared: Prepared) -> None:
    if request.defect and request.defect not in prepared.class_names:
        names = ", ".join(prepared.class_names)
        raise ValueError(f"defect must be one of the classes {names}, got {request.defect!r}")


def _fingerprint(data: Path, out: Path) -> str:
    """SHA-256 of a file; of a folder, of the names, sizes and times of its files (but of those in ``out``)."""
    if not data.exists():
        raise ValueError(f"no such file or folder: {data}")
    if data.is_file():
        return file_sha256(data)
    own = out.resolve()
    files = [path for path in sorted(data.rglob("*")) if path.is_file() and own not in path.resolve().parents]
    listing = [(str(path.relative_to(data)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _check_same(asked: dict[str, Any], request: Request, folder: Path) -> None:
    for name, value in dataclasses.asdict(request).items():
        if name != "jobs" and asked.get(name) != value:
            raise ValueError(
                f"{folder} holds a check with {name} = {asked.get(name)!r}, not {value!r}: choose another --out, or "
                "remove it"
            )
