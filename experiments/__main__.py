"""``python -m experiments run`` trains one method; ``sweep`` trains several with several seeds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.config import RunConfig, SweepConfig
from experiments.methods import MethodName


def run(config: Annotated[RunConfig, tyro.conf.arg(name="")], out: Path = Path("runs")) -> int:
    """Train one method on one stream with one seed, or resume it.

    Args:
        config: the run.
        out: folder below which <stream>/<method>-seed<seed>/ is made.
    """
    from experiments.directory import finished, finished_notice
    from experiments.train import run as train

    directory = out / config.name
    result = finished(config, directory)
    if result is None:
        result = train(config, directory)
    else:
        print(finished_notice(directory, result))
    accuracy = result["class_il"]
    average, forgotten = accuracy["average_accuracy"], accuracy["forgetting"]
    print(f"average accuracy {average:.3f}, forgetting {forgotten:.3f} (linear probe, all classes)")
    print(f"log: {directory / 'losses.jsonl'}")
    return 0


def sweep(
    config: Annotated[SweepConfig, tyro.conf.arg(name="")],
    methods: tuple[MethodName, ...] = ("cila-max", "co2l", "finetune"),
    seeds: tuple[int, ...] = (0, 1, 2),
    jobs: int = 1,
    out: Path = Path("runs"),
) -> int:
    """Train every method with every seed; finished runs are skipped, unfinished ones resumed, failed ones reported at
    the end.

    Args:
        config: everything but method and seed.
        methods: methods to train.
        seeds: one run of each method per seed.
        jobs: runs at a time, each with config's threads.
        out: folder below which <stream>/<method>-seed<seed>/ is made.
    """
    from experiments.sweep import sweep as train_all

    failures = train_all(config, methods, seeds, jobs, out)
    for name, reason in failures:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def main() -> int:
    try:
        status: int = tyro.extras.subcommand_cli_from_dict({"run": run, "sweep": sweep}, prog="python -m experiments")
        return status
    except (ValueError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments: stopped; the same command resumes after the last finished epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
