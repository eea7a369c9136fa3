"""``python -m paper_figures.report FOLDER``: one page on what ``experiments check`` found, and the same as JSON.

Reads ``check.json`` and the finished runs below ``runs/``; writes ``report.json`` and ``report.html``, which needs no
other file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import tyro

from cila_bound.files import write_atomic
from paper_figures.advice import advice, headline, short
from paper_figures.check_figures import certified, costs
from paper_figures.check_numbers import assemble, load_check
from paper_figures.per_task import accuracy, measured_vs_bounds
from paper_figures.runs import load_studies
from paper_figures.style import svg


def write_report(folder: Path) -> dict[str, Any]:
    """Writes both files and returns what is in ``report.json``.

    Raises ValueError if a file is missing or damaged.
    """
    check = load_check(folder)
    (study,) = load_studies(folder / "runs")
    found = assemble(check, study)
    found["headline"], found["advice"] = headline(found), advice(found)
    drawings = {
        "What is certified, and what was measured": certified(found),
        "Accuracy on each task after each task": accuracy(study),
        "Measured loss and every bound, estimated": measured_vs_bounds(study),
    }
    if found["kpi"]:
        drawings = {"What errors cost": costs(found), **drawings}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = short
    page = environment.get_template("report.html.jinja").render(
        report=found, figures={title: svg(drawing) for title, drawing in drawings.items()}
    )
    write_atomic(folder / "report.json", (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())
    write_atomic(folder / "report.html", page.encode())
    return found


def main(folder: tyro.conf.Positional[Path]) -> int:
    """Write the report of a check. Exit status 1 if a bound failed on the data.

    Args:
        folder: with check.json and the finished runs below runs/.
    """
    try:
        found = write_report(folder)
    except (OSError, ValueError, LookupError) as error:
        print(f"paper_figures.report: {error}", file=sys.stderr)
        return 2
    print(*found["headline"], sep="\n")
    print(f"report: {folder / 'report.html'} (and report.json)")
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main, prog="python -m paper_figures.report"))
