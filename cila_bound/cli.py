"""The console command ``cila-bound``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import get_args

from cila_bound.certificate import StepName
from cila_bound.chain import Chain, Data
from cila_bound.losslog import read_log
from cila_bound.means import Inequality
from cila_bound.report import Report

_EPILOG = """\
exit status: 0 if every bound holds on the measured test losses, 1 if one is violated beyond its sampling error,
2 on bad input (the other logs are evaluated all the same). Losses are in nats. A cell of the table is the bound and, in
brackets, bound / measured; "vac" marks a bound at or above the ceiling, which says nothing, with its unclipped value.
theorem1 bounds the sum over tasks only.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    status = 0
    for path in options.log:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                log = read_log(path)
            for warning in caught:
                print(f"cila-bound: warning: {warning.message}", file=sys.stderr)
            report = Report.of(
                log,
                steps=options.step,
                chains=get_args(Chain) if options.chain == "both" else (options.chain,),
                data=options.data,
                after_task=options.after_task,
                confidence=options.confidence,
                inequality=options.inequality,
                selections=options.selections,
                rigorous=options.rigorous,
                sigmas=options.sigmas,
            )
        except (OSError, ValueError, LookupError, ImportError) as error:
            print(f"cila-bound: {error}", file=sys.stderr)
            status = 2
            continue
        status = max(status, 1 if report.violations else 0)
        text = json.dumps({"log": path, **report.as_json()}, allow_nan=False) if options.json else report.as_text(path)
        try:
            print(text, flush=True)
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cila-bound", description="Bounds on the population loss, from the losses that a run logged."
    )
    evaluate = parser.add_subparsers(dest="command", required=True).add_parser(
        "evaluate",
        help="every bound of a loss log beside the measured test losses",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = evaluate.add_argument
    add("log", nargs="+", help="loss log of a run (losses.jsonl)")
    add("--step", action="append", choices=get_args(StepName), help="only this bound; may be repeated (default: all)")
    add(
        "--chain",
        choices=(*get_args(Chain), "both"),
        default="both",
        help="full: from each task's own model, a step per later task; refreshed: the last step alone (default: both)",
    )
    add(
        "--data",
        choices=get_args(Data),
        default="heldout",
        help="tuples that the bounds are computed from (default: heldout)",
    )
    add("--after-task", type=int, metavar="T", help="bound the model after task T (default: the last one logged)")
    add(
        "--confidence",
        type=float,
        metavar="P",
        help="certificates that hold with this probability, such as 0.95, instead of plug-in estimates",
    )
    add(
        "--inequality",
        choices=get_args(Inequality),
        default="auto",
        help="of the confidence bounds (default: betting where single tuples and block are logged, else chernoff)",
    )
    add(
        "--selections",
        type=int,
        default=1,
        metavar="N",
        help="models that the held-out tuples chose this one from; the certificate then holds for any (default: 1)",
    )
    add(
        "--rigorous",
        action="store_true",
        help="moment steps with machine-proven constants (needs python-flint: pip install 'cila-bound[rigorous]')",
    )
    add("--sigmas", type=_sigmas, default=3.0, help="standard errors of room before a bound is violated (default: 3)")
    add("--json", action="store_true", help="one JSON object per log instead of tables")
    return parser


def _sigmas(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {text}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
