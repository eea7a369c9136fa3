"""Trains the runs of a JSON file, one after the other; torchrun starts it on every rank."""

import json
import sys
from pathlib import Path

from experiments.config import RunConfig
from experiments.train import run
from experiments.world import joined


def main(spec: Path) -> None:
    with joined():
        for directory, options in json.loads(spec.read_text()):
            run(RunConfig.from_json(options), Path(directory), show_progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
