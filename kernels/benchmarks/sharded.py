"""Peak memory and bytes sent of sharded keys, on CPU processes over gloo; and what they cost on GPUs, by a model.

    python kernels/benchmarks/sharded.py           # writes kernels/benchmarks/results/sharded-cpu.json and .md
    python kernels/benchmarks/sharded.py --model   # the model's table alone; nothing is run
    python kernels/benchmarks/sharded.py --smoke   # both in miniature; writes nothing

Every method runs forward + backward once in fresh processes, one thread each, after a call on 8 rows. Memory: growth of
the peak resident set (VmHWM in /proc) during the call, the largest of all ranks, whose inputs exist before; glibc gives
freed blocks of 64 KiB or more back at once, or what it keeps would count. Bytes: what the loopback device sent during
the call, by the number of ranks (nothing else may use it: what it sends when idle is stored too); beside it, what the
model's formulas say. No time is measured: ranks share the cores, and loopback is no network.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from methods import TEMPERATURES, Problem, naive, reduced
from torch import Tensor

from cila_kernels import info_nce_distill_loss

RESULTS = Path(__file__).parent / "results"
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
ROWS, WIDTH, SIZES = 2048, 768, (2, 4, 8)  # queries and keys of a rank; of student and teacher; ranks

# Assumptions of the model. Widths of student and teacher are one; bytes a second are those of one GPU, one way.
MODEL_WIDTH, MODEL_ROWS = 768, 32768  # queries, and keys, of a GPU
HALF, FLOAT = 2, 4  # bytes
MATRIX_RATE = 790e12  # bf16 operations a second, as in the kernels' README
LINKS = {8: ("NVLink, 450 GB/s", 450e9), 64: ("InfiniBand, 400 Gb/s a GPU", 50e9)}  # GPUs -> slowest link of the ring
GPU_BYTES = 80e9  # all of it for the loss: encoders, activations and optimiser states are not counted
DENSE_BYTES_PER_PAIR = 20  # of naive PyTorch with a teacher: 1283 MiB at 8192 x 8192 in float32 (results/cpu.json)
WORKSPACE = 2**28  # of the wide kernels' backward pass
PRODUCTS = 6  # of student and teacher: 2 forward, 4 backward


class GatherWithGrad(torch.autograd.Function):
    """The keys of all ranks; gradients are added up and scattered to the owners."""

    @staticmethod
    def forward(ctx: Any, key: Tensor) -> Tensor:
        parts = [torch.empty_like(key) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, key)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = list(gradient.chunk(dist.get_world_size()))
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own


def gathered(problem: Problem) -> Problem:
    """This rank's queries and the keys of all ranks, as code that gathers features with their gradients has them."""
    query, key, teacher_query, teacher_key, positive = problem
    assert teacher_key is not None
    everyone = GatherWithGrad.apply(key), teacher_query, GatherWithGrad.apply(teacher_key)
    return Problem(query, *everyone, positive + dist.get_rank() * len(key))


def sharded(exchange: Any) -> Callable[[Problem], Tensor]:
    def method(problem: Problem) -> Tensor:
        options: dict[str, Any] = {"impl": "streaming", "group": dist.group.WORLD, "exchange": exchange, **TEMPERATURES}
        first = dist.get_rank() * len(problem.key)
        return info_nce_distill_loss(*problem[:4], positive=first + problem.positive, **options).loss

    return method


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    'exchange="ring"': sharded("ring"),
    'exchange="all_gather"': sharded("all_gather"),
    "gather with gradients, then streaming": lambda problem: reduced("streaming")(gathered(problem)),
    "gather with gradients, then dense": lambda problem: naive(gathered(problem)),
}


class Sent(NamedTuple):
    """Bytes that each rank sends in the forward and in the backward pass."""

    forward: float
    backward: float

    @staticmethod
    def of(method: str, ranks: int, m: int, width: int, element: int) -> Sent:
        """With m keys a rank, of student and teacher, and indices as positives (labels and ids: 8 bytes a key each).

        Keys pass W - 1 links in the forward pass, and in the ring's backward pass again. Gradients of the keys, summed
        in float32, pass W links in the ring, the last one to their owner; otherwise W - 1.
        """
        keys, gradient = (ranks - 1) * m * 2 * width * element, m * width * FLOAT
        if "ring" in method:
            return Sent(keys, keys + ranks * gradient)
        return Sent(keys, (ranks - 1) * gradient)


def gpu_bytes(method: str, ranks: int, n: int, width: int) -> float:
    """Peak memory with n queries and n keys in bf16 on every GPU, inputs and their gradients included, by counting the
    tensors that "triton" holds at once in the backward pass."""
    matrix = n * width
    inputs = matrix * 6 * HALF
    if "ring" in method:  # two shards of student and teacher; three sums for keys and one term; two for queries
        return inputs + matrix * (2 * 2 * HALF + 4 * FLOAT + 2 * FLOAT) + WORKSPACE
    keys = ranks * matrix * 2 * HALF
    if "dense" in method:
        return inputs + keys + n * n * ranks * DENSE_BYTES_PER_PAIR
    return inputs + keys + ranks * matrix * 2 * FLOAT + matrix * 2 * FLOAT + WORKSPACE  # one sum for all keys, one term


def model() -> Iterator[str]:
    """The table of what sharded keys cost on GPUs."""
    yield (
        "| GPUs, slowest link | keys | sent a step, GB | transfer, ms | products, ms | memory, GB | most rows a GPU |\n"
        "|---|---|---|---|---|---|---|"
    )
    for ranks, (link, rate) in LINKS.items():
        products = _product_seconds(ranks, MODEL_ROWS)
        for method, label in (
            ("ring", "ring"),
            ("all_gather", "gathered"),
            ("dense", "gathered, dense similarities"),
        ):
            sent = sum(Sent.of(method, ranks, MODEL_ROWS, MODEL_WIDTH, HALF))
            most = _most_rows(method, ranks)
            seconds = _product_seconds(ranks, most)
            yield (
                f"| {ranks}, {link} | {label} | {sent / 1e9:.1f} | {sent / rate * 1e3:.0f} | {products * 1e3:.0f} | "
                f"{gpu_bytes(method, ranks, MODEL_ROWS, MODEL_WIDTH) / 1e9:.1f} | "
                f"{_rounded(most)} ({seconds:,.{0 if seconds >= 10 else 2}f} s) |"
            )
    for ranks, (link, rate) in LINKS.items():
        rows = _hidden_from(rate)
        yield f"\n{ranks} GPUs, {link}: the ring's transfers hide behind its products from {rows:.0f} queries a GPU."


def _product_seconds(ranks: int, n: int) -> float:
    return PRODUCTS * 2 * n * n * ranks * MODEL_WIDTH / MATRIX_RATE


def _hidden_from(rate: float) -> float:
    """Queries of a GPU from which a step of the ring computes as long as it transfers: forward 2 products for 2
    matrices in bf16, backward 4 products for those and one matrix in float32."""
    forward = 2 * HALF * MATRIX_RATE / (2 * 2 * rate)
    backward = (2 * HALF + FLOAT) * MATRIX_RATE / (4 * 2 * rate)
    return max(forward, backward)


def _most_rows(method: str, ranks: int) -> int:
    """Rows of the largest batch whose loss fits a GPU."""
    low, high = 1, 2**30
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gpu_bytes(method, ranks, middle, MODEL_WIDTH) <= GPU_BYTES else (low, middle)
    return low


def _rounded(rows: int) -> str:
    """To two digits."""
    unit = 10 ** max(len(str(rows)) - 2, 0)
    return f"{rows // unit * unit:,}"


def serve(rank: int, ranks: int, store: str, name: str, rows: int, width: int, pipe: Connection) -> None:
    """One rank: a small call, then the measured one, when the parent says so."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    problem = Problem.of(rows, rows, width, torch.float32, "cpu", teacher=True, seed=rank)
    METHODS[name](Problem.of(8, 8, width, torch.float32, "cpu", teacher=True, seed=rank)).backward()
    pipe.send("ready")
    pipe.recv()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before = _peak_kibibytes()
    loss = METHODS[name](problem)
    loss.backward()
    loss = loss.detach()
    assert problem.query.grad is not None and problem.key.grad is not None
    peak = (_peak_kibibytes() - before) / 1024
    of_query, of_key = (float(x.square().sum()) for x in (problem.query.grad, problem.key.grad))
    pipe.send({"peak": peak, "loss": float(loss), "of_query": of_query, "of_key": of_key})
    pipe.recv()
    dist.destroy_process_group()


def _peak_kibibytes() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def measure(name: str, ranks: int, rows: int, width: int) -> dict[str, Any]:
    """One method on fresh processes."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("forkserver")  # which imports torch once
    context.set_forkserver_preload(["torch", "cila_kernels"])
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(ranks)]
        processes = [
            context.Process(target=serve, args=(rank, ranks, f"{folder}/store", name, rows, width, theirs))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for pipe, _ in pipes:
            pipe.recv()
        before = int(LOOPBACK.read_text())
        for pipe, _ in pipes:
            pipe.send("go")
        found = [pipe.recv() for pipe, _ in pipes]
        sent = int(LOOPBACK.read_text()) - before
        for pipe, _ in pipes:
            pipe.send("end")
        for process in processes:
            process.join()
    return {
        "method": name,
        "ranks": ranks,
        "rows": rows,
        "width": width,
        "peak_mebibytes": max(one["peak"] for one in found),
        "sent_mebibytes": sent / ranks / 2**20,
        "formula_mebibytes": sum(Sent.of(name, ranks, rows, width, FLOAT)) / 2**20,
        "results": [sum(one[name] for one in found) / ranks for name in ("loss", "of_query", "of_key")],
    }


def idle_bytes(seconds: float) -> float:
    """What loopback sends in a second when nothing is measured."""
    before = int(LOOPBACK.read_text())
    time.sleep(seconds)
    return (int(LOOPBACK.read_text()) - before) / seconds


HEADER = (
    "| ranks | method | peak memory beyond the inputs, MiB | x ring | sent by a rank, MiB | formula, MiB |\n"
    "|---|---|---|---|---|---|"
)


def line(entry: dict[str, Any], ring: float) -> str:
    peak, sent, formula = (entry[f"{name}_mebibytes"] for name in ("peak", "sent", "formula"))
    return f"| {entry['ranks']} | {entry['method']} | {peak:.0f} | {peak / ring:.1f} | {sent:.4g} | {formula:.4g} |"


def conditions(seconds: float) -> dict[str, Any]:
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [platform.processor()]
    return {
        "processor": processor[0],
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "loopback when idle, bytes/s": idle_bytes(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="the model's table alone")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; writes nothing")
    options = parser.parse_args()
    if options.model:
        print(*model(), sep="\n")
        return 0
    report: dict[str, Any] = {"conditions": conditions(0.1 if options.smoke else 3.0), "table": []}
    rows, width, sizes = (64, 16, (2,)) if options.smoke else (ROWS, WIDTH, SIZES)
    title = ", ".join(f"{name} {value}" for name, value in report["conditions"].items())
    lines = [title, f"float32, {rows} queries and {rows} keys a rank, student and teacher of width {width}", "", HEADER]
    print(*lines, sep="\n", flush=True)
    for ranks in sizes:
        entries: list[dict[str, Any]] = []
        for name in METHODS:
            entries.append(measure(name, ranks, rows, width))
            lines.append(line(entries[-1], entries[0]["peak_mebibytes"]))
            print(lines[-1], flush=True)
        report["table"] += entries
        for entry in entries[1:]:
            for mine, other in zip(entry["results"], entries[0]["results"], strict=True):
                if not math.isclose(mine, other, rel_tol=1e-4):
                    print(f"sharded: {entry['method']} gives {mine}, the ring {other}", file=sys.stderr)
                    return 1
    if not options.smoke:
        RESULTS.mkdir(exist_ok=True)
        for suffix, text in (("json", json.dumps(report, indent=1)), ("md", "\n".join(lines))):
            (RESULTS / f"sharded-cpu.{suffix}").write_text(text + "\n")
    print("", *model(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
