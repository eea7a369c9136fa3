"""``python -m paper_figures [name ...]``: every figure and table, or the named ones, of every study below a folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal, get_args

import tyro

from cila_bound.files import write_atomic

DATA = Path(__file__).parent / "data"
Name = Literal[
    "measured-vs-bounds",
    "tightness",
    "distill-weight",
    "accuracy",
    "lambda-sweep",
    "pretraining",
    "temperature",
    "buffer",
    "bound-ranks",
    "robustness",
    "summary",
    "table1",
    "table2",
    "comparisons",
    "ranks",
]


def main(names: tyro.conf.Positional[tuple[Name, ...]] = (), runs: Path = DATA, out: Path = Path("figures")) -> int:
    """Draw figures (PDF and PNG) and tables (Markdown and LaTeX) from finished runs; nothing is trained.

    Args:
        names: what to make (default: all that there are runs for).
        runs: folder with run directories, at any depth; by default the logs that come with the repository.
        out: folder for the figures.
    """
    start = time.perf_counter()
    try:
        made = _make(names, runs, out)
    except (OSError, ValueError, LookupError) as error:
        print(f"paper_figures: {error}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - start:.1f} s")
    return 0 if made >= set(names) else 2


def _make(names: tuple[Name, ...], runs: Path, out: Path) -> set[str]:
    """Writes what is asked for and prints the paths; returns the names of what there were runs for."""
    from paper_figures.figures import FIGURES
    from paper_figures.runs import NoDataError, load_studies
    from paper_figures.style import save
    from paper_figures.tables import TABLES, Table, table1

    def write(table: Table, stem: str) -> list[Path]:
        paths = [out / f"{stem}.md", out / f"{stem}.tex"]
        for path, text in zip(paths, (table.markdown(), table.latex()), strict=True):
            write_atomic(path, text.encode())
        return paths

    studies = load_studies(runs)
    made: set[str] = set()
    for name in names or get_args(Name):
        if name == "table1":
            print(*write(table1(studies), name))
            made.add(name)
            continue
        for study in studies:
            stem = f"{study.name}-{name}"
            try:
                print(*(save(FIGURES[name](study), out, stem) if name in FIGURES else write(TABLES[name](study), stem)))
                made.add(name)
            except NoDataError as reason:
                if names:
                    print(f"paper_figures: no {name} of {study.name}: {reason}", file=sys.stderr)
    return made


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main, prog="python -m paper_figures"))
