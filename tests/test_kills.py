"""kill -9 and a full disk at random points of training and logging: nothing finished is lost, no wrong number appears.

``python -m tests.test_kills 100`` kills runs a hundred times and prints what it met.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from cila_bound import LogWarning, read_log
from experiments import audit
from experiments.config import RunConfig
from experiments.train import run as train

CONFIG = RunConfig(
    n_tasks=5,
    epochs_first=3,
    epochs=2,
    buffer_size=40,
    tuple_rounds=4,
    max_tuples=40,
    probe_epochs=10,
    theory_temperatures=(0.5, 1.0),
    log_tuples="all",
    max_bound_increase=0.5,
)


def child(directory: Path, largest_file: int | None = None) -> None:
    """What the killed processes do. ``largest_file``: a disk that is full before a file has so many bytes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    train(CONFIG, directory, show_progress=False)


def check_prefix(directory: Path, reference: Path) -> str:
    """Whatever is there is what an uninterrupted run has there, as far as it goes; returns what stage it is at."""
    for path in directory.glob("losses*.jsonl"):
        if path.stat().st_size == 0:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LogWarning)  # a torn last line
            records = read_log(path).records
        assert records == read_log(reference / path.name).records[: len(records)]
    entries = audit.verify(directory) if (directory / audit.FILE).exists() else []
    for entry in audit.standing(entries):
        expected = audit.read(reference)[entry.task - 1].content
        assert entry.content["certificates"] == expected["certificates"]
        assert entry.content["gate"] == expected["gate"]
    if (directory / "metrics.json").exists():
        mine, theirs = (json.loads((path / "metrics.json").read_text()) for path in (directory, reference))
        assert (mine["accuracy"], mine["confusion"]) == (theirs["accuracy"], theirs["confusion"])
        return "finished"
    return f"task {len(audit.standing(entries)) + 1}" if (directory / "config.json").exists() else "beginning"


def kill_until_finished(reference: Path, directory: Path, kills: int, rng: random.Random) -> Counter[str]:
    """Starts, kills and starts again; in the end the files are those of the reference. Returns where kills struck."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_kills"])
    met: Counter[str] = Counter()
    while sum(met.values()) < kills:
        process = context.Process(target=child, args=(directory,))
        process.start()
        process.join(rng.uniform(0.0, 1.2))
        if process.is_alive():
            process.kill()
            process.join()
            met[check_prefix(directory, reference)] += 1
        elif (directory / "metrics.json").exists():
            check_finished(directory, reference)
            shutil.rmtree(directory)  # and once more from the beginning
    process = context.Process(target=child, args=(directory,))
    process.start()
    process.join()
    check_finished(directory, reference)
    return met


def check_finished(directory: Path, reference: Path) -> None:
    assert check_prefix(directory, reference) == "finished"
    for path in reference.glob("losses*.jsonl"):
        assert (directory / path.name).read_bytes() == path.read_bytes()
    assert [entry.task for entry in audit.verify(directory)] == [1, 2, 3, 4, 5]
    assert [path.name for path in directory.rglob(".*")] == [".lock"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kills") / "reference"
    train(CONFIG, path, show_progress=False)
    return path


def test_kills_at_random_times(reference: Path, tmp_path: Path) -> None:
    met = kill_until_finished(reference, tmp_path / "run", 12, random.Random(0))
    assert sum(met.values()) == 12


@pytest.mark.parametrize("largest_file", [500, 3_000, 20_000, 60_000, 200_000, 460_000])
def test_a_full_disk_is_said_and_the_run_goes_on_later(largest_file: int, reference: Path, tmp_path: Path) -> None:
    """A log, a checkpoint or the audit file that cannot grow: an error, nothing broken, the same numbers afterwards."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_kills"])
    process = context.Process(target=child, args=(tmp_path / "run", largest_file))
    process.start()
    process.join()
    assert process.exitcode == 1
    check_prefix(tmp_path / "run", reference)
    train(CONFIG, tmp_path / "run", show_progress=False)
    check_finished(tmp_path / "run", reference)


def main(kills: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        train(CONFIG, reference, show_progress=False)
        start = time.monotonic()
        met = kill_until_finished(reference, Path(folder) / "run", kills, random.Random(time.time_ns()))
        where = ", ".join(f"{count} in {stage}" for stage, count in sorted(met.items()))
        print(f"{kills} kills in {time.monotonic() - start:.0f} s: {where}; every file as without them")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
