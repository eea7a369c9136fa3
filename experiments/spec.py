"""Which runs a sweep has: a TOML file of grids."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from experiments.config import RunConfig
from experiments.presets import preset

_KINDS = get_type_hints(RunConfig)
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_OF_THE_FILE = ("stream", "schedule")


def load_spec(path: Path) -> list[RunConfig]:
    """The runs that a TOML file lists: of every ``[[grid]]``, all combinations of its lists, on top of ``[base]`` and
    the preset of ``stream`` and ``schedule``.

    Raises ValueError that names file, table, option and value, and what to change.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one such as experiments/specs/demo.toml")
    try:
        configs = list(_cells(tomllib.loads(path.read_text(encoding="utf-8"))))
        check_distinct(configs)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return configs


def _cells(spec: dict[str, Any]) -> Iterator[RunConfig]:
    for name in spec:
        if name in _KINDS and name not in _OF_THE_FILE:
            raise ValueError(f"{name} is an option of runs: move it below [base] or a [[grid]]")
    _check_known("the file", spec, (*_OF_THE_FILE, "base", "grid"))
    if "stream" not in spec:
        raise ValueError(f"stream is missing: begin with stream = one of {', '.join(get_args(_KINDS['stream']))}")
    own = {name: _value("the file", name, spec[name]) for name in _OF_THE_FILE if name in spec}
    start = preset(**own)
    base, grids = spec.get("base", {}), spec.get("grid")
    if not isinstance(base, dict):
        raise ValueError(f"base must be a table, [base], got {base!r}")
    if not (isinstance(grids, list) and grids and all(isinstance(grid, dict) for grid in grids)):
        raise ValueError("no grid: write [[grid]], and below it lists such as method = ['co2l'] and seed = [0, 1]")
    _check_known("[base]", base, _KINDS)
    fixed = {name: _value("[base]", name, value) for name, value in base.items()}
    for number, grid in enumerate(grids, start=1):
        table = f"[[grid]] {number}"
        _check_known(table, grid, _KINDS)
        lists = {name: _values(table, name, value) for name, value in grid.items()}
        for values in itertools.product(*lists.values()):
            cell = dict(zip(lists, values, strict=True))
            try:
                yield dataclasses.replace(start, **(fixed | cell))
            except ValueError as error:
                assigned = "".join(f", {name} = {value!r}" for name, value in cell.items())
                raise ValueError(f"{table}{assigned}: {error}") from None


def _check_known(table: str, names: Iterable[str], legal: Collection[str]) -> None:
    for name in names:
        if name not in legal:
            close = get_close_matches(name, legal)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(legal)}"
            raise ValueError(f"{table} has an unknown option {name}: {hint}")
        if table != "the file" and name in _OF_THE_FILE:
            raise ValueError(f"{table} has {name}, which is the same for all runs of a file: move it to the file's top")


def _values(table: str, name: str, value: object) -> list[Any]:
    """Those of one option of a grid. A list of lists varies an option that is a list itself."""
    if value == []:
        raise ValueError(f"{table}: {name} is an empty list: give it a value, or remove it")
    if isinstance(value, list) and (get_origin(_KINDS[name]) is not tuple or any(isinstance(v, list) for v in value)):
        return [_value(table, name, one) for one in value]
    return [_value(table, name, value)]


def _value(table: str, name: str, value: object) -> Any:
    kind = _KINDS[name]
    several = get_origin(kind) is tuple
    one = get_args(kind)[0] if several else kind if kind in _WORDS else str
    try:
        return tuple(_exactly(one, v) for v in _exactly(list, value)) if several else _exactly(one, value)
    except TypeError:
        legal = f"a list, each {_WORDS[one]}" if several else _WORDS[one]
        hint = ": lists of runs go below [[grid]]" if isinstance(value, list) and table == "[base]" else ""
        raise ValueError(f"{table}: {name} must be {legal}, got {value!r}{hint}") from None


def _exactly(kind: type, value: Any) -> Any:
    """Raises TypeError for another type; an integer is a number, but a boolean is no integer."""
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise TypeError


def check_distinct(configs: Iterable[RunConfig]) -> None:
    """Raises ValueError that names two runs of one directory."""
    first: dict[str, RunConfig] = {}
    for config in configs:
        if config.name not in first:
            first[config.name] = config
            continue
        other = first[config.name]
        if other == config:
            raise ValueError(f"{config.name} is listed twice: list every run once")
        names = [field.name for field in dataclasses.fields(config)]
        differ = ", ".join(name for name in names if getattr(config, name) != getattr(other, name))
        raise ValueError(
            f"two runs would share the directory {config.name}, which is not named after {differ}: "
            "keep one, or move the other to a file of its own and give that another --out"
        )
