"""``python -m experiments``: ``run`` trains one method on one stream, ``sweep`` all that a file lists, ``check`` finds
out about a dataset of your own; ``audit`` verifies the record of a run's models, ``rollback`` takes the run back to an
earlier one; ``fetch`` downloads.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.config import RunConfig
from experiments.presets import preset


def run(
    config: Annotated[RunConfig, tyro.conf.arg(name="")], out: Path = Path("runs"), data_root: Path = Path("data")
) -> int:
    """Train one method on one stream with one seed, or resume it. --stream and --schedule set all other defaults.

    Args:
        config: the run.
        out: folder below which <stream>/<method>-seed<seed>/ is made.
        data_root: folder with the datasets.
    """
    from experiments.directory import finished, finished_notice
    from experiments.train import run as train
    from experiments.world import launched

    directory = out / config.name
    result = None if launched() else finished(config, directory)
    if result is None:
        result = train(config, directory, data_root=data_root)
    else:
        print(finished_notice(directory, result))
    if os.environ.get("RANK", "0") != "0":  # of several ranks the first speaks
        return 0
    for name, values in result["accuracy"].items():
        print(f"{name}: average accuracy {values['average_accuracy']:.3f}, forgetting {values['forgetting']:.3f}")
    print(f"log: {directory / 'losses.jsonl'}")
    return 0


def sweep(
    spec: tyro.conf.Positional[Path],
    jobs: int = 1,
    out: Path = Path("runs"),
    data_root: Path = Path("data"),
    scheduler: str = "",
) -> int:
    """Train every cell of a TOML file's grids; finished cells are skipped, unfinished ones resumed, failed ones are
    reported at the end and tried again by the next call.

    Args:
        spec: TOML file; docs/experiments.md describes it.
        jobs: runs at a time on this machine, each with its own number of threads.
        out: folder below which <stream>/<method>-seed<seed>/ is made.
        data_root: folder with the datasets.
        scheduler: address of a Dask scheduler, to train on its workers instead, which must see the same folders.
    """
    from experiments.spec import load_spec
    from experiments.sweep import sweep as train_all

    failures = train_all(load_spec(spec), out, data_root=data_root, jobs=jobs, scheduler=scheduler)
    for name, reason in failures:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def check(
    data: Path,
    label: str = "",
    threshold: float | None = None,
    tasks: str = "",
    image_size: int | None = None,
    images: str = "",
    out: Path = Path("checks"),
    name: str = "",
    minutes: float = 10.0,
    jobs: int = 0,
    confidence: float = 0.95,
    temperature: float = 0.5,
    buffer_size: int = 200,
    defect: str = "",
    miss_cost: float | None = None,
    alarm_cost: float | None = None,
) -> int:
    """Find out, for any dataset, what forgetting costs on it, what each part of the method is worth, and what can be
    guaranteed: trains fine-tuning, + contrast, + distillation and CILA, certifies them, and writes a page.

    Args:
        data: .npz or .csv file, folder of images, or Hugging Face dataset on disk.
        label: column of the classes (default: y, label, class, or the folders).
        threshold: make two classes of a numeric label: below it, and from it on.
        tasks: how the data arrive: a column (with an order if you like, such as kind=mono,poly), classes:N, order:N or
            rotations:N.
        image_size: bring all images to so many pixels a side.
        images: name of the array or column of the images, where it is not obvious.
        out: folder below which the check's own is made.
        name: of that folder (default: that of the data).
        minutes: time to spend; sets the number of epochs and seeds.
        jobs: runs at a time (default: one for each processor).
        confidence: of the certificates.
        temperature: of the logged losses, and so of the bounds.
        buffer_size: images of past tasks kept.
        defect: class that must not be missed, for costs.
        miss_cost: of one missed defect.
        alarm_cost: of one false alarm.
    """
    from experiments.check import Request
    from experiments.check import check as find_out

    request = Request(
        data=str(data),
        label=label,
        threshold=threshold,
        tasks=tasks,
        image_size=image_size,
        images=images,
        minutes=minutes,
        jobs=jobs or len(os.sched_getaffinity(0)),
        confidence=confidence,
        temperature=temperature,
        buffer_size=buffer_size,
        defect=defect,
        miss_cost=miss_cost,
        alarm_cost=alarm_cost,
    )
    return find_out(request, out / (name or data.resolve().stem))


def audit(directory: tyro.conf.Positional[Path], head: str = "") -> int:
    """Verify a run's audit file and every checkpoint and log that it vouches for; name the first altered line or file.

    Args:
        directory: the run's directory.
        head: hash of an entry noted earlier, which must still be there: not even a file rewritten as a whole passes.
    """
    from experiments.audit import standing, verify

    entries = verify(directory, head=head)
    present = {entry.number for entry in standing(entries)}
    for entry in entries:
        print(_audit_line(entry.content, entry.event, entry.task, entry.number in present))
    print(f"{len(entries)} entries, none altered; head {entries[-1].sha256}")
    return 0


def _audit_line(content: dict[str, Any], event: str, task: int, present: bool) -> str:
    line = f"{content['entry']:>3}  {content['time']}  {event:<8}  task {task}"
    if event == "rollback":
        return f"{line}  back to entry {content['to_entry']}"
    bounds = {(c["step"], c["chain"]): c for c in content["certificates"]}
    moment, direct = bounds["moment", "refreshed"], bounds["direct", "refreshed"]
    line += f" ({content['name']})  certified at {moment['confidence']:g}: total loss <= {moment['total']:.4g} nats "
    line += f"(moment, refreshed), {direct['total']:.4g} (direct)"
    return line if present else f"{line}  [taken back]"


def rollback(
    directory: tyro.conf.Positional[Path], to_task: int, stop: bool = False, data_root: Path = Path("data")
) -> int:
    """Take a run back to its model after an earlier task, and train on from there.

    Args:
        directory: the run's directory.
        to_task: number of the task, from 1, whose model is to be the present one.
        stop: do not train on; `run` with the same options does later.
        data_root: folder with the datasets.
    """
    from experiments.rollback import rollback as take_back
    from experiments.train import run as train

    config = take_back(directory, to_task)
    print(f"{directory}: back to the model after task {to_task}")
    if not stop:
        train(config, directory, data_root=data_root)
        print(f"log: {directory / 'losses.jsonl'}")
    return 0


def fetch(
    dataset: tyro.conf.Positional[Literal["mnist", "cifar10", "tiny-imagenet"]], data_root: Path = Path("data")
) -> int:
    """Download a dataset from its official address, check it and unpack it.

    Args:
        dataset: which one.
        data_root: folder for the datasets.
    """
    from experiments.fetch import fetch as download

    print(download(dataset, data_root))
    return 0


def _defaults() -> RunConfig:
    """The preset of the --stream and --schedule on the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stream", default="digits")
    parser.add_argument("--schedule", default="full")
    chosen, _ = parser.parse_known_args()
    return preset(chosen.stream, chosen.schedule)


def main() -> int:
    try:
        commands: dict[str, Any] = {
            "run": partial(run, config=_defaults()),
            "sweep": sweep,
            "check": check,
            "audit": audit,
            "rollback": rollback,
            "fetch": fetch,
        }
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            commands = {name: commands[name] for name in ("run", "fetch")}  # of several ranks; the others start runs
        status: int = tyro.extras.subcommand_cli_from_dict(commands, prog="python -m experiments")
        return status
    except (ValueError, OSError) as error:
        alone = type(error).__name__ == "DivergedError"
        if os.environ.get("LOCAL_RANK", "0") != "0" and not alone:  # once a node: what is missing may be so on one
            return 2
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = ": free some space; the same command goes on after the last finished epoch" if full else ""
        print(f"experiments: {error}{remedy}", file=sys.stderr)
        return 1 if type(error).__name__ == "AuditError" else 2
    except KeyboardInterrupt:
        print("experiments: stopped; the same command resumes after the last finished epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
