"""Finished runs on disk, grouped by study and variant."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cila_bound import Geometry, read_log
from paper_figures.bounds import Losses

METHODS = (
    *("cila-max", "co2l", "contrastive-only", "finetune", "cila-pure", "cila-min", "dual-price"),
    *("dual-price-per-task", "distillation-only", "er", "der++"),
)
PRINCIPAL = METHODS[:4]
_FREE = {"seed", "device", "threads", "precision", "compile"}
_MEASURING = {"theory_temperatures", "n_negatives", "log_tuples", "defect_class", "miss_cost", "alarm_cost"}
_KEYS = {"study", "variant", "config", "tasks", "accuracy"}
_SCORES = {"accuracy_matrix", "average_accuracy", "forgetting", "backward_transfer"}


class NoDataError(Exception):
    """A study has not the runs that a figure or table shows; the message says which."""


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run: its directory, its main loss log, the content of its ``metrics.json`` and the paths of the logs
    at other temperatures and numbers of negatives, which are read when they are asked for.
    """

    directory: Path
    losses: Losses
    metrics: dict[str, Any]
    further: tuple[Path, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        return self.metrics["config"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def scores(self) -> dict[str, Any]:
        """Accuracy matrix, average accuracy, forgetting and backward transfer over all classes seen."""
        kinds = self.metrics["accuracy"]
        return kinds["class_il"] if "class_il" in kinds else kinds["domain_il"]

    @cached_property
    def all_losses(self) -> dict[Geometry, Losses]:
        """The main log and all further ones, by temperature and number of negatives.

        Raises ValueError that names a damaged log.
        """
        found = [self.losses, *map(_losses, self.further)]
        return {losses.log.geometry: losses for losses in found}


@dataclass(frozen=True)
class Study:
    """Runs that are compared: for each variant (a method, and the options in which it differs), one run per seed.

    Options that all variants of a study share, such as a smaller buffer, are part of ``base`` and not of their names.
    """

    name: str
    variants: dict[str, list[Run]]
    base: str = ""

    @property
    def any_run(self) -> Run:
        return next(iter(self.variants.values()))[0]

    @property
    def runs(self) -> Iterable[Run]:
        return itertools.chain.from_iterable(self.variants.values())

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.any_run.losses.log.header.tasks

    @property
    def class_incremental(self) -> bool:
        return "class_il" in self.any_run.metrics["accuracy"]

    @property
    def seeds(self) -> set[int]:
        """The numbers of seeds of the variants; one number if all have the same."""
        return {len(runs) for runs in self.variants.values()}

    def label(self, variant: str) -> str:
        """The variant's name, with its number of seeds if that differs between variants."""
        return f"{variant} (n = {len(self.variants[variant])})" if len(self.seeds) > 1 else variant

    def only(self, variants: Collection[str]) -> Study:
        """The same study with these variants, in the order given."""
        return replace(self, variants={name: self.variants[name] for name in variants if name in self.variants})

    @property
    def plain(self) -> Study:
        """The methods without options."""
        return self.only([variant for variant in self.variants if not options(variant)])

    @property
    def principal(self) -> Study:
        """The four methods that say most, as far as they are there; without any, all there is."""
        found = self.only(PRINCIPAL)
        return found if found.variants else self.plain if self.plain.variants else self

    def partners(self, option: str) -> list[tuple[str, str]]:
        """(with, without): variants that have the option, and those that differ from them in nothing else."""
        found = []
        for variant in self.variants:
            own = options(variant)
            if own.pop(option, None) is not None and named(method(variant), own) in self.variants:
                found.append((variant, named(method(variant), own)))
        return found

    def sweep(self, method_name: str, option: str) -> dict[float, str]:
        """The method's variants that differ in a numeric option alone, by its value; the plain one among them."""
        found = {}
        for variant, runs in self.variants.items():
            value = runs[0].config.get(option)  # None: run before there was the option
            if method(variant) == method_name and not options(variant).keys() - {option} and value is not None:
                found[float(value)] = variant
        return dict(sorted(found.items()))

    @property
    def distinct(self) -> Study:
        """Variants that trained the same models (equal losses of every seed) as one, named "a = b"."""
        merged: dict[tuple[Any, ...], list[str]] = {}
        for variant, runs in self.variants.items():
            key = tuple((run.seed, run.losses.measured) for run in runs)
            merged.setdefault(key, []).append(variant)
        return replace(self, variants={" = ".join(names): self.variants[names[0]] for names in merged.values()})


def method(variant: str) -> str:
    return variant.partition(" ")[0]


def options(variant: str) -> dict[str, str]:
    """Those that a variant's name lists, with their values as written."""
    return dict(part.split("=", 1) for part in re.split(r" (?=\w+=)", variant)[1:])


def named(method: str, options: dict[str, str]) -> str:
    """The variant of that method and options, in their order."""
    return " ".join([method, *(f"{name}={value}" for name, value in options.items())])


def load_studies(root: Path) -> list[Study]:
    """Every finished run below ``root``, grouped by study and variant; runs sorted by seed.

    Raises ValueError if there is none, if a file is damaged or missing, if a variant has a seed twice, or if runs
    differ in more than what tells them apart (their mean or comparison would mean nothing).
    """
    studies: dict[str, dict[str, list[Run]]] = {}
    for metrics_path in sorted(root.glob("**/metrics.json")):
        run = _load(metrics_path)
        same = studies.setdefault(run.metrics["study"], {}).setdefault(run.metrics["variant"], [])
        for other in same:
            if other.seed == run.seed:
                raise ValueError(
                    f"{other.directory} and {run.directory} are the same method and seed: a mean would count it twice; "
                    "pass a folder that holds one of them"
                )
        same.append(run)
    if not studies:
        raise ValueError(
            f"{root} holds no finished run (a directory with losses.jsonl and metrics.json): train some, or pass --runs"
        )
    return [_study(name, studies[name], root) for name in sorted(studies)]


def _study(name: str, variants: dict[str, list[Run]], root: Path) -> Study:
    for variant, runs in variants.items():
        _check_equal(f"runs of {name}, {variant},", runs, _FREE, root)
    listed = _FREE | _MEASURING | {"method"}
    every = [(run, listed | options(variant).keys()) for variant, runs in variants.items() for run in runs]
    _check_comparable(name, every, root)
    shared = set.intersection(*(set(options(variant).items()) for variant in variants))
    found = {}
    for variant in sorted(variants, key=_order):
        own = {option: value for option, value in options(variant).items() if (option, value) not in shared}
        found[named(method(variant), own)] = sorted(variants[variant], key=lambda run: run.seed)
    first = options(next(iter(variants)))
    return Study(name, found, ", ".join(f"{option}={first[option]}" for option in first if option in dict(shared)))


def _order(variant: str) -> tuple[int, bool, list[tuple[str, bool, float, str]]]:
    """Plain methods first, in the order of METHODS; then by options, numbers by their size."""
    place = METHODS.index(method(variant)) if method(variant) in METHODS else len(METHODS)
    values = []
    for name, value in options(variant).items():
        try:
            values.append((name, False, float(value), ""))
        except ValueError:
            values.append((name, True, 0.0, value))
    return place, bool(values), values


def _check_equal(what: str, runs: list[Run], free: set[str], root: Path) -> None:
    first = runs[0].config
    for run in runs[1:]:
        for name in first | run.config:
            if name not in free and first.get(name) != run.config.get(name):
                raise _differ(what, name, first.get(name), run.config.get(name), root)


def _check_comparable(study: str, runs: list[tuple[Run, set[str]]], root: Path) -> None:
    """That runs differ in their variant's options only, and in what was measured not at all."""
    seen: dict[str, Any] = {}
    for run, free in runs:
        header = run.losses.log.header
        measuring = {"temperature": header.temperature, "n_negatives": header.n_negatives, "tasks": header.tasks}
        kinds = {"kinds of accuracy": sorted(run.metrics["accuracy"])}
        own = {name: value for name, value in run.config.items() if name not in free}
        for name, value in (own | measuring | kinds).items():
            if seen.setdefault(name, value) != value:
                what = f"the main logs of {study}" if name in measuring else f"runs of {study}"
                raise _differ(what, name, seen[name], value, root)


def _differ(what: str, name: str, one: object, other: object, root: Path) -> ValueError:
    return ValueError(f"{what} below {root} differ in {name}, {one!r} and {other!r}: keep them in separate folders")


def _load(metrics_path: Path) -> Run:
    directory = metrics_path.parent
    paths = [_log_path(directory, "losses.jsonl")]
    try:
        metrics = json.loads(metrics_path.read_text())
        _check_metrics(metrics)
    except ValueError as error:
        raise ValueError(f"{metrics_path} is damaged ({error}): restore it, or train the run anew") from None
    config = metrics["config"]
    measured = list(itertools.product(config.get("theory_temperatures", ()), config.get("n_negatives", ())))
    paths += [_log_path(directory, f"losses-temperature{tau:g}-negatives{k}.jsonl") for tau, k in measured[1:]]
    return Run(directory, _losses(paths[0]), metrics, tuple(paths[1:]))


def _check_metrics(metrics: Any) -> None:
    """Raises ValueError that says what ``metrics.json`` lacks."""
    if not (isinstance(metrics, dict) and metrics.keys() >= _KEYS):
        raise ValueError(f"it lacks one of {', '.join(sorted(_KEYS))}")
    kinds = metrics["accuracy"]
    if not (isinstance(kinds, dict) and kinds.keys() & {"class_il", "domain_il"}):
        raise ValueError("accuracy has neither class_il nor domain_il")
    if not all(isinstance(scores, dict) and scores.keys() >= _SCORES for scores in kinds.values()):
        raise ValueError(f"accuracy lacks one of {', '.join(sorted(_SCORES))}")
    if not (isinstance(metrics["config"], dict) and isinstance(metrics["config"].get("seed"), int)):
        raise ValueError("config has no seed")


def _log_path(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.exists():
            return path
    raise ValueError(f"{directory / name} (or {name}.gz) is missing beside metrics.json: copy the whole run directory")


def _losses(path: Path) -> Losses:
    log = read_log(path)
    losses = Losses(log)
    try:
        losses.check_complete()
    except LookupError as error:
        raise ValueError(f"{path}: {error}: restore it, or train the run anew") from None
    return losses
