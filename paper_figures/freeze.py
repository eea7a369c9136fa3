"""``python -m paper_figures.freeze RUNS``: copies the finished runs below a folder to the data that figures are drawn
from by default, compressed: logs and metrics, no checkpoints.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import tyro

from cila_bound import read_log
from cila_bound.files import write_atomic
from paper_figures.__main__ import DATA


def freeze(runs: tyro.conf.Positional[Path], out: Path = DATA) -> int:
    """Copy finished runs, compressed; equal runs give equal bytes.

    Args:
        runs: folder with run directories, at any depth; their places below it are kept.
        out: where to.
    """
    try:
        found = sorted(runs.glob("**/metrics.json"))
        if not found:
            raise ValueError(f"{runs} holds no finished run (a directory with metrics.json)")
        for metrics in found:
            target = out / metrics.parent.relative_to(runs)
            for log in sorted(metrics.parent.glob("losses*.jsonl")):
                read_log(log)
                write_atomic(target / f"{log.name}.gz", gzip.compress(log.read_bytes(), mtime=0))
            write_atomic(target / "metrics.json", (json.dumps(json.loads(metrics.read_text())) + "\n").encode())
    except (OSError, ValueError) as error:
        print(f"paper_figures.freeze: {error}", file=sys.stderr)
        return 2
    print(f"{len(found)} runs copied to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(tyro.cli(freeze, prog="python -m paper_figures.freeze"))
