"""``python -m paper_figures [name ...]``: every figure and table, or the named ones, of every stream below a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, get_args

import tyro

from cila_bound.files import write_atomic

DATA = Path(__file__).parent / "data"
Name = Literal["measured-vs-bounds", "tightness", "distill-weight", "accuracy", "summary"]


def main(names: tyro.conf.Positional[tuple[Name, ...]] = (), runs: Path = DATA, out: Path = Path("figures")) -> int:
    """Draw figures (PDF and PNG) and a summary table (Markdown) from finished runs; nothing is trained.

    Args:
        names: what to make (default: all).
        runs: folder with run directories, at any depth; by default the logs that come with the repository.
        out: folder for the figures.
    """
    from paper_figures.figures import FIGURES
    from paper_figures.runs import load_studies
    from paper_figures.style import save
    from paper_figures.tables import summary

    try:
        for study in load_studies(runs):
            for name in names or get_args(Name):
                if name == "summary":
                    text = summary(study)
                    path = out / f"{study.stream}-summary.md"
                    write_atomic(path, text.encode())
                    print(f"{path}\n\n{text}")
                else:
                    print(*save(FIGURES[name](study), out, f"{study.stream}-{name}"))
    except (OSError, ValueError, LookupError) as error:
        print(f"paper_figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main, prog="python -m paper_figures"))
