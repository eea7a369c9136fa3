"""Processes that form a process group over gloo, and what they run on request: the ranks of tests/test_sharded.py.

A group of each size is started once and runs many calls. Functions get (rank, size, *arguments) and return something
that can be pickled; an exception comes back as a :class:`Failure`.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60.0  # after this a test fails instead of hanging
_FORK = multiprocessing.get_context("forkserver")  # torch is imported once, before anything runs in it
_FORK.set_forkserver_preload(["torch", "torch.distributed", "cila_kernels", "tests.ranks", "tests.test_kernels"])


class Failure:
    """What a rank raised."""

    def __init__(self, error: Exception) -> None:
        self.kind, self.text, self.trace = type(error).__name__, str(error), traceback.format_exc()

    def __repr__(self) -> str:
        return self.trace


class Group:
    """``size`` ranks in processes of their own."""

    def __init__(self, size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        pipes = [_FORK.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            _FORK.Process(target=_serve, args=(rank, size, Path(self.folder.name) / "store", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(rank, size, *arguments)`` returns on each rank, a :class:`Failure`, or None if it died."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: dict[Connection, Any] = {}
        while len(results) < len(self.pipes):
            ready = wait([pipe for pipe in self.pipes if pipe not in results], SECONDS)
            assert ready, f"no answer within {SECONDS} s from ranks {[p not in results for p in self.pipes]}"
            for pipe in ready:
                try:
                    results[pipe] = pipe.recv()
                except EOFError:
                    results[pipe] = None
        return [results[pipe] for pipe in self.pipes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self.folder.cleanup()


def _serve(rank: int, size: int, store: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # without waiting for other ranks
        try:
            result = function(rank, size, *arguments)
        except Exception as error:
            result = Failure(error)
        pipe.send(result)
