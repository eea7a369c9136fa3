"""Many runs, several at a time, on this machine or on a Dask cluster.

A run that fails leaves ``failed.txt`` in its directory, with time, machine and traceback, until it succeeds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import platform
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, Queue
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from joblib import Parallel, delayed
from tqdm import tqdm

from cila_bound.files import write_atomic
from experiments.config import RunConfig
from experiments.directory import finished, finished_notice
from experiments.spec import check_distinct

if TYPE_CHECKING:
    from distributed import Client, Future

_CONNECT_SECONDS = 10.0
_NO_WORKER_SECONDS = 60.0


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
    check_distinct(configs)
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
