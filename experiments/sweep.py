"""Several runs at a time on one machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from joblib import Parallel, delayed
from tqdm import tqdm

from experiments.config import RunConfig
from experiments.directory import finished, finished_notice
from experiments.methods import MethodName


def sweep(
    base: RunConfig, methods: Sequence[MethodName], seeds: Sequence[int], jobs: int, out: Path
) -> list[tuple[str, str]]:
    """Trains every method with every seed in ``jobs`` processes, and says which are finished already; returns
    (run, reason) of each that failed.

    Raises ValueError if there is nothing to do or a run's directory holds another run or a damaged file: before any run
    starts.
    """
    configs = [dataclasses.replace(base, method=method, seed=seed) for method in methods for seed in seeds]
    if not configs or jobs < 1:
        raise ValueError(
            f"a sweep needs at least one method, one seed and one job, got {len(methods)}, {len(seeds)} and {jobs}"
        )
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated} is asked for twice: give every method and every seed once")
    found = {config: finished(config, out / config.name) for config in configs}
    for config, metrics in found.items():
        if metrics is not None:
            print(finished_notice(out / config.name, metrics))
    missing = [config for config, metrics in found.items() if metrics is None]
    results = Parallel(n_jobs=jobs, return_as="generator_unordered")(
        delayed(_run)(config, out, jobs == 1) for config in missing
    )
    return [failure for failure in tqdm(results, total=len(missing), desc="runs", unit="run") if failure is not None]


def _run(config: RunConfig, out: Path, show_progress: bool) -> tuple[str, str] | None:
    from experiments.train import run

    try:
        run(config, out / config.name, show_progress=show_progress)
    except (ValueError, OSError, RuntimeError) as error:
        return config.name, f"{type(error).__name__}: {error}"
    return None
