"""Finished runs on disk, grouped by stream and method."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cila_bound import LossLog, read_log


@dataclass(frozen=True)
class Run:
    """One finished run: its directory, its loss log and the content of its ``metrics.json``."""

    directory: Path
    log: LossLog
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """All finished runs of one stream: for each method, one run per seed."""

    stream: str
    methods: dict[str, list[Run]]

    @property
    def any_run(self) -> Run:
        return next(iter(self.methods.values()))[0]

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.any_run.log.header.tasks

    @property
    def seeds(self) -> set[int]:
        """The numbers of seeds of the methods; one number if all have the same."""
        return {len(runs) for runs in self.methods.values()}

    def label(self, method: str) -> str:
        """The method's name, with its number of seeds if that differs between methods."""
        return f"{method} (n = {len(self.methods[method])})" if len(self.seeds) > 1 else method


def load_studies(root: Path) -> list[Study]:
    """Every run below ``root`` that has both files, grouped by stream.

    Raises ValueError if there is none, if a file is damaged or lacks something, or if runs of one stream differ in more
    than method and seed (their mean would mean nothing).
    """
    streams: dict[str, dict[str, list[Run]]] = {}
    for metrics_path in sorted(root.glob("**/metrics.json")):
        run = _load(metrics_path)
        config = run.metrics["config"]
        same = streams.setdefault(config["stream"], {}).setdefault(config["method"], [])
        for other in same:
            if other.metrics["config"]["seed"] == config["seed"]:
                raise ValueError(
                    f"{other.directory} and {run.directory} are the same method and seed: a mean would count it twice; "
                    "pass a folder that holds one of them"
                )
        same.append(run)
    if not streams:
        raise ValueError(
            f"{root} holds no finished run (a directory with losses.jsonl and metrics.json): train some, or pass --runs"
        )
    for stream, methods in streams.items():
        runs = [run for group in methods.values() for run in group]
        first = _shared(runs[0])
        for run in runs[1:]:
            for name, value in _shared(run).items():
                if value != first.get(name):
                    raise ValueError(
                        f"runs of {stream} below {root} differ in {name}, {first.get(name)!r} and {value!r}: "
                        "keep them in separate folders"
                    )
    return [Study(stream, methods) for stream, methods in streams.items()]


def _load(metrics_path: Path) -> Run:
    log_path = metrics_path.with_name("losses.jsonl")
    if not log_path.exists():
        raise ValueError(f"{log_path} is missing beside metrics.json: copy the whole run directory")
    try:
        metrics = json.loads(metrics_path.read_text())
        if not (isinstance(metrics, dict) and {"config", "class_il"} <= metrics.keys()):
            raise ValueError("it lacks config or class_il")
    except ValueError as error:
        raise ValueError(f"{metrics_path} is damaged ({error}): restore it, or train the run anew") from None
    log = read_log(log_path)
    try:
        _check_complete(log)
    except LookupError as error:
        raise ValueError(f"{log_path}: {error}: restore it, or train the run anew") from None
    return Run(metrics_path.parent, log, metrics)


def _check_complete(log: LossLog) -> None:
    """Raises LookupError if the log lacks a record that a figure needs."""
    last = len(log.header.tasks)
    for task in range(1, last + 1):
        log.training(task)
        log.test(last, task)
        for past in range(1, task + 1):
            log.measurement(task, past, "heldout")


def _shared(run: Run) -> dict[str, Any]:
    """What runs must have in common for a mean over them to mean something."""
    config = {name: value for name, value in run.metrics["config"].items() if name not in ("method", "seed")}
    return config | {"tasks": run.log.header.tasks}


def mean_and_std(rows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (divisor n - 1; NaN for n = 1, not drawn) over seeds, the first axis."""
    values = np.asarray(rows, dtype=np.float64)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), spread
