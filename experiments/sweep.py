"""Many runs: which ones, from a TOML file; and training them, several at a time, on this machine or on a Dask cluster.

A run that fails leaves ``failed.txt`` in its directory, with time, machine and traceback, until it succeeds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import platform
import time
import tomllib
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from queue import Empty, Queue
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from joblib import Parallel, delayed
from tqdm import tqdm

from cila_bound.files import write_atomic
from experiments.config import RunConfig
from experiments.directory import finished, finished_notice
from experiments.presets import preset

if TYPE_CHECKING:
    from distributed import Client, Future

_KINDS = get_type_hints(RunConfig)
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_OF_THE_FILE = ("stream", "schedule")

_CONNECT_SECONDS = 10.0
_NO_WORKER_SECONDS = 60.0


def load_spec(path: Path) -> list[RunConfig]:
    """The runs that a TOML file lists: of every ``[[grid]]``, all combinations of its lists, on top of ``[base]`` and
    the preset of ``stream`` and ``schedule``.

    Raises ValueError that names file, table, option and value, and what to change.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one such as experiments/specs/demo.toml")
    try:
        configs = list(_cells(tomllib.loads(path.read_text(encoding="utf-8"))))
        _check_distinct(configs)
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


def _check_distinct(configs: Iterable[RunConfig]) -> None:
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


def sweep(
    configs: Sequence[RunConfig], out: Path, *, data_root: Path = Path("data"), jobs: int = 1, scheduler: str = ""
) -> list[tuple[str, str]]:
    """Trains what is not finished: in ``jobs`` processes, or on the workers of the Dask scheduler at an address, which
    must see the same folders and be able to import ``experiments``. Returns (name, reason) of each run that failed.

    An interrupt stops this machine's runs; a cluster's waiting ones are withdrawn, while those under way go on.

    Raises ValueError, before any run starts, if there is nothing to do, a run is listed twice, a run's directory holds
    another run or a damaged file, or the cluster cannot be used.
    """
    if not configs or jobs < 1:
        raise ValueError(f"a sweep needs at least one run and one job, got {len(configs)} and {jobs}")
    if scheduler and jobs > 1:
        raise ValueError(f"jobs is {jobs}, but counts runs on this machine: leave it out with a scheduler")
    _check_distinct(configs)
    out, data_root = out.resolve(), data_root.resolve()
    found = {config: finished(config, out / config.name) for config in configs}
    done = {config: metrics for config, metrics in found.items() if metrics is not None}
    for config in done:
        (out / config.name / "failed.txt").unlink(missing_ok=True)
    if len(done) > 3:
        print(f"{len(done)} of {len(configs)} runs are finished already, and skipped")
    else:
        for config, metrics in done.items():
            print(finished_notice(out / config.name, metrics))
    missing = [config for config in configs if config not in done]
    if not missing:
        return []
    if not scheduler:
        return _failures(_train_here(missing, out, data_root, jobs), len(missing))
    with _connect(scheduler) as client:
        _check_workers(client, scheduler, out)
        return _failures(_train_on(client, missing, out, data_root), len(missing))


def _failures(results: Iterable[tuple[str, str]], total: int) -> list[tuple[str, str]]:
    return [(name, reason) for name, reason in tqdm(results, total=total, desc="runs", unit="run") if reason]


def _train_here(configs: Sequence[RunConfig], out: Path, data_root: Path, jobs: int) -> Iterator[tuple[str, str]]:
    """(name, reason) of each run as it ends; the reason is empty if it succeeded."""
    waiting = dict.fromkeys(config.name for config in configs)
    try:
        for name, reason in Parallel(n_jobs=jobs, return_as="generator_unordered")(
            delayed(_train)(config, out, data_root, jobs == 1) for config in configs
        ):
            del waiting[name]
            yield name, reason
    except BrokenProcessPool:
        reason = "a process of the sweep was killed, perhaps for lack of memory: try again, with fewer jobs if need be"
        yield from ((name, reason) for name in waiting)


def _train(config: RunConfig, out: Path, data_root: Path, show_progress: bool = False) -> tuple[str, str]:
    from experiments.train import run

    directory = out / config.name
    try:
        run(config, directory, data_root=data_root, show_progress=show_progress)
    except Exception as error:
        _note_failure(directory, traceback.format_exc())
        return config.name, f"{type(error).__name__}: {error}"
    (directory / "failed.txt").unlink(missing_ok=True)
    return config.name, ""


def _note_failure(directory: Path, reason: str) -> None:
    with suppress(OSError):
        heading = f"{datetime.now(UTC).isoformat(timespec='seconds')} on {platform.node()}"
        write_atomic(directory / "failed.txt", f"{heading}\n{reason.rstrip()}\n".encode())


def _connect(scheduler: str) -> Client:
    try:
        from distributed import Client, Security
        from distributed.comm.core import connect
    except ImportError:
        raise ValueError("a scheduler needs Dask: pip install 'dask[distributed]', or -e '.[cluster]'") from None

    async def knock() -> None:
        comm = await connect(scheduler, **Security().get_connection_args("client"))
        await comm.close()

    try:
        asyncio.run(asyncio.wait_for(knock(), _CONNECT_SECONDS))  # a Client waits without end for what is no scheduler
        return Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no Dask scheduler answers at {scheduler} ({str(error) or f'waited {_CONNECT_SECONDS:g} s'}): "
            "start one with `dask scheduler`, or correct the address"
        ) from None


def _check_workers(client: Client, scheduler: str, out: Path) -> None:
    """Raises ValueError if there is no worker, or one that cannot train a run or would store it elsewhere."""

    def look(marker: Path) -> str:
        from platform import node

        try:
            import experiments.train  # noqa: F401
        except ImportError as error:
            return f"cannot import experiments ({error}): start it in the checkout, or with PYTHONPATH set to that"
        return "" if marker.exists() else f"does not see {marker.parent} of this machine ({node()} has another one)"

    try:
        client.wait_for_workers(1, timeout=_NO_WORKER_SECONDS)
    except TimeoutError:
        raise ValueError(
            f"the scheduler at {scheduler} has no workers: start some with `dask worker {scheduler} --nthreads 1`"
        ) from None
    for worker, threads in client.nthreads().items():
        if threads > 1:
            raise ValueError(f"worker {worker} has {threads} threads, which runs cannot share: use --nthreads 1")
    out.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=out, prefix=".sweep-") as marker:
        for worker, problem in client.run(look, Path(marker.name), on_error="return").items():
            if problem:
                raise ValueError(f"worker {worker} {problem}")


def _train_on(client: Client, configs: Sequence[RunConfig], out: Path, data_root: Path) -> Iterator[tuple[str, str]]:
    """(name, reason) of each run as it ends. Dask gives a dead worker's run to another one, up to its limit."""

    # A nested function, and options as plain values: Dask sends these whole, so that the scheduler can do without
    # experiments.
    def train(options: dict[str, Any], out: Path, data_root: Path) -> str:
        from experiments.config import RunConfig
        from experiments.sweep import _train

        return _train(RunConfig(**options), out, data_root)[1]

    ended: Queue[Future[str]] = Queue()
    waiting: dict[object, tuple[str, Future[str]]] = {}
    for config in configs:
        future = client.submit(train, dataclasses.asdict(config), out, data_root, pure=False)
        waiting[future.key] = config.name, future
        future.add_done_callback(ended.put)
    seen = time.monotonic()
    while waiting:
        try:
            future = ended.get(timeout=_NO_WORKER_SECONDS / 10)
        except Empty:
            if client.nthreads():
                seen = time.monotonic()
            elif time.monotonic() - seen > _NO_WORKER_SECONDS:
                reason = "the scheduler has no workers any more: start some and try again"
                yield from ((name, reason) for name, _ in waiting.values())
                return
            continue
        seen = time.monotonic()
        name, _ = waiting.pop(future.key)
        try:
            reason = future.result()
        except CancelledError:
            reason = "the connection to the scheduler was lost: try again"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            _note_failure(out / name, reason)
        yield name, reason
