"""Takes a run back to the model after an earlier task, from the checkpoint that the audit file vouches for."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from cila_bound import LossLogWriter, read_log
from cila_bound.files import write_atomic
from experiments import audit
from experiments.config import RunConfig, read_json
from experiments.directory import log_names


def stored_config(directory: Path) -> RunConfig:
    """The configuration of the run in ``directory``. Raises ValueError if there is none, or one of another version."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds no run with a finished epoch ({path.name} is missing)")
    try:
        return RunConfig.from_json(read_json(path))
    except TypeError as error:
        raise ValueError(f"{path} is of another version ({error}): use the commit that the run was made with") from None


def rollback(directory: Path, to_task: int) -> RunConfig:
    """Makes the state after ``to_task`` the run's present one: its logs end there, and the run is unfinished; what came
    later stays in the audit file, as taken back. Returns the configuration, with which the run can go on.

    Raises ValueError if the run has no such task or kept no checkpoint of it, or is in use; AuditError if the audit
    file or what it vouches for was altered.
    """
    config = stored_config(directory)
    try:
        with FileLock(directory / ".lock", timeout=0):
            entries = audit.standing(audit.verify(directory))
            found = next((entry for entry in entries if entry.task == to_task), None)
            if found is None:
                tasks = ", ".join(str(entry.task) for entry in entries)
                raise ValueError(f"to_task must be a finished task of {directory}, one of {tasks}, got {to_task}")
            kept = found.content["checkpoint"]
            if kept is None:
                raise ValueError(
                    f"{directory} kept no checkpoint of task {to_task}: it was run with keep_checkpoints false"
                )
            content = (directory / kept["file"]).read_bytes()
            headers = [read_log(directory / name).header for name in log_names(config)]
            if len(headers) != len(found.content["logs"]):
                raise ValueError(f"{directory / 'config.json'} was altered: {directory} has other logs; restore it")
            (directory / "metrics.json").unlink(missing_ok=True)  # first: with it the run is finished
            audit.append(directory, "rollback", to_task, {"to_entry": found.number})
            write_atomic(directory / "checkpoint.pt", content)
            for name, header, log in zip(log_names(config), headers, found.content["logs"], strict=True):
                with LossLogWriter(directory / name, header, resume=True, keep=log["lines"] - 1):
                    pass  # cut off there
    except Timeout:
        raise ValueError(f"{directory} is in use by another process: wait for it") from None
    return config
