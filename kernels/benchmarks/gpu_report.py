"""Correctness, speed and memory of the fused kernels on one GPU, in one call of under 8 minutes.

    python kernels/benchmarks/gpu_report.py           # writes kernels/benchmarks/results/<GPU>.json and .md
    python kernels/benchmarks/gpu_report.py --smoke   # the same path in miniature on a CPU, interpreted; writes nothing

Where the project is not installed, PYTHONPATH=kernels in front. First every dtype is compared with float64; a wrong
result makes the exit status 1. Then the card's matrix, exponential and copy rates are measured, and every method at
every size: median and 20/80 % quantiles with the L2 cache flushed (triton.testing.do_bench), peak memory beyond the
inputs, and the ratio to the floor at those rates. The most telling sizes come first; what time does not suffice for is
written "not measured".
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import torch
import triton
from methods import INFO_NCE_ONLY, Method, Problem, Rates, compiled_naive, naive, operations, reduced, rows
from torch import Tensor

from cila_kernels import info_nce_distill

DEVICE = "cpu" if SMOKE else "cuda"
DTYPE = torch.bfloat16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESULTS = Path(__file__).parent / "results"
START = time.monotonic()
SECONDS = 430.0  # after this nothing new is measured
SIZES = (
    [(48, 64, 16)]
    if SMOKE
    else [
        *((32768, 32768, width) for width in (128, 768, 256, 512, 1024)),
        *((256, 1048576, width) for width in (128, 768)),
        *((65536, 65536, width) for width in (128, 768)),
        *((n, n, width) for n in (16384, 4096) for width in (128, 768)),
        *((n, n, width) for n in (65536, 16384, 4096) for width in (256, 512, 1024)),
        *((256, 1048576, width) for width in (256, 512, 1024)),
    ]
)
METHODS: dict[str, tuple[Method, bool]] = {  # name -> (method, with a teacher)
    "triton": (rows("triton"), True),
    "streaming, reduced": (reduced("streaming"), True),
    "naive": (naive, True),
    "torch.compile of naive": (compiled_naive, True),
    "triton, InfoNCE": (rows("triton"), False),
    "naive, InfoNCE": (naive, False),
    **{f"{name}, InfoNCE": (method, False) for name, method in INFO_NCE_ONLY.items()},
}
COMPILED_WIDTHS = (128, 768)  # torch.compile of other sizes would take the report's time


def correctness() -> list[dict[str, Any]]:
    """Losses and gradients of "triton" against float64, beside "streaming" in the same dtype: a list of errors."""
    cases = [
        (dtype, size)
        for dtype in DTYPES
        for size in ([(48, 64, 16)] if SMOKE else [(1000, 1500, 100), (257, 700, 768)])
    ]
    if not SMOKE:
        cases += [(torch.bfloat16, (1000, 1500, 128)), (torch.bfloat16, (64, 65536, 64))]
    found = []
    for dtype, size in cases:
        entry: dict[str, Any] = {"dtype": str(dtype), "size": list(size)}
        found.append(entry)
        try:
            entry |= _compare(Problem.of(*size, dtype, DEVICE, teacher=True))
        except Exception as error:  # the other cases, and the table, are still worth having
            entry |= {"correct": False, "failed": _described(error)}
    return found


def _compare(problem: Problem) -> dict[str, Any]:
    exact = _losses_and_gradients(problem, "reference")
    ours, again = (_losses_and_gradients(problem, "triton") for _ in range(2))
    plain = _losses_and_gradients(problem, "streaming")
    errors = [_error(mine, reference) for mine, reference in zip(ours, exact, strict=True)]
    allowed = [
        2.0 * _error(other, reference) + 64.0 * torch.finfo(torch.float32).eps
        for other, reference in zip(plain, exact, strict=True)
    ]
    repeats = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    right = all(error <= limit for error, limit in zip(errors, allowed, strict=True))
    return {"errors": errors, "allowed": allowed, "repeats": repeats, "correct": right and repeats}


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def _losses_and_gradients(problem: Problem, impl: Any) -> list[Tensor]:
    temperature = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    query, key = (x.detach().clone().requires_grad_() for x in (problem.query, problem.key))
    result = info_nce_distill(
        query,
        key,
        problem.teacher_query,
        problem.teacher_key,
        positive=problem.positive,
        temperature=temperature,
        student_temperature=0.2,
        teacher_temperature=0.1,
        impl=impl,
    )
    assert result.distillation is not None and result.teacher_entropy is not None
    weight = torch.linspace(0.5, 1.5, len(query), device=DEVICE, dtype=result.contrastive.dtype)
    loss = (weight * (result.contrastive + result.distillation)).mean()
    gradients = torch.autograd.grad(loss, (query, key, temperature))
    return [x.detach().double() for x in (*result[:3], *gradients) if x is not None]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max().clamp(min=1e-12))


def seconds(call: Callable[[], Any]) -> list[float]:
    """Median, 20 % and 80 % quantile."""
    if SMOKE:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return [statistics.median(times), min(times), max(times)]
    return [t / 1e3 for t in triton.testing.do_bench(call, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])]


def measured_rates() -> dict[str, float]:
    """bf16 products in operations/s, exponentials in numbers/s of a kernel that does little else, copies in bytes/s."""
    n = 64 if SMOKE else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    x = torch.rand(n * n, device=DEVICE)
    out = torch.empty_like(x)
    sweep = torch.exp2 if SMOKE else torch.compile(lambda x: sum(torch.exp2(x * i) for i in range(1, 33)))
    each = 1 if SMOKE else 32
    return {
        "product": 2 * n**3 / seconds(lambda: a @ b)[0],
        "exponential": each * x.numel() / seconds(lambda: sweep(x))[0],
        "copy": 2 * x.numel() * x.element_size() / seconds(lambda: out.copy_(x))[0],
    }


def measure(method: Method, problem: Problem) -> dict[str, Any]:
    """Seconds of the forward pass, the backward pass and both, and peak memory beyond the inputs."""
    inputs = (problem.query, problem.key)

    def both() -> None:
        torch.autograd.grad(method(problem), inputs)

    both()  # compiles and tunes
    peak = None
    if not SMOKE:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {
        "forward": seconds(lambda: method(problem)),
        "backward": _backward_seconds(method(problem), inputs),
        "both": seconds(both),
        "peak_mebibytes": peak,
    }


def _backward_seconds(loss: Tensor, inputs: tuple[Tensor, Tensor]) -> list[float] | None:
    """None for a method whose graph can be used only once."""
    try:
        return seconds(lambda: torch.autograd.grad(loss, inputs, retain_graph=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def table(rates: Rates) -> Iterator[dict[str, Any]]:
    """One entry per size and method; what fails is an entry too."""
    for n, m, width in SIZES:
        for name, (method, teacher) in METHODS.items():
            entry: dict[str, Any] = {"size": [n, m, width], "method": name, "teacher": teacher}
            if method is compiled_naive and (SMOKE or width not in COMPILED_WIDTHS):
                entry["skipped"] = "not measured"
            elif time.monotonic() - START > SECONDS:
                entry["skipped"] = "not measured: out of time"
            else:
                entry |= _entry(method, n, m, width, teacher, rates)
            yield entry
            if not SMOKE:
                torch.cuda.empty_cache()


def _entry(method: Method, n: int, m: int, width: int, teacher: bool, rates: Rates) -> dict[str, Any]:
    try:
        entry = measure(method, Problem.of(n, m, width, DTYPE, DEVICE, teacher=teacher))
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except ImportError as error:
        return {"skipped": f"not installed: {error}"}
    except Exception as error:  # a method that fails is a line of the table, not the report's end
        return {"skipped": f"failed: {_described(error)}"}
    for mode in ("forward", "backward", "both"):
        if entry[mode] is not None:
            entry[f"{mode}_of_floor"] = entry[mode][0] / rates.floor(n, m, width, mode, teacher=teacher)
            entry[f"{mode}_tflops"] = operations(n, m, width, mode, teacher=teacher) / entry[mode][0] / 1e12
    return entry


HEADER = (
    "| N x M, D | method | forward, ms | backward, ms | both, ms (20-80 %) | both / floor | TFLOP/s | peak, MiB |\n"
    "|---|---|---|---|---|---|---|---|"
)


def _line(entry: dict[str, Any]) -> str:
    n, m, width = entry["size"]
    start = f"| {n} x {m}, {width} | {entry['method']} |"
    if "both" not in entry:
        return f"{start} {entry['skipped']} | | | | | |"
    forward, backward = (f"{entry[mode][0] * 1e3:.3g}" if entry[mode] else "" for mode in ("forward", "backward"))
    middle, low, high = (f"{value * 1e3:.3g}" for value in entry["both"])
    peak = "" if entry["peak_mebibytes"] is None else f"{entry['peak_mebibytes']:.0f}"
    return (
        f"{start} {forward} | {backward} | {middle} ({low}-{high}) | {entry['both_of_floor']:.2f} | "
        f"{entry['both_tflops']:.0f} | {peak} |"
    )


def conditions() -> dict[str, Any]:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "device": "CPU" if SMOKE else torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.strip(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def save(report: dict[str, Any], folder: Path) -> None:
    """Both files, complete after every entry: a run that is cut short leaves what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = report["conditions"]["device"].lower().replace(" ", "-")
    title = ", ".join(f"{name} {value}" for name, value in report["conditions"].items())
    lines = [title, "", HEADER, *(_line(entry) for entry in report["table"])]
    for suffix, text in (("json", json.dumps(report, indent=1)), ("md", "\n".join(lines))):
        fresh = folder / f"{stem}.{suffix}.tmp"
        fresh.write_text(text + "\n")
        fresh.replace(folder / f"{stem}.{suffix}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, interpreted on a CPU")
    parser.add_argument("--out", type=Path, default=None if SMOKE else RESULTS, help="folder of the results")
    options = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        print("gpu_report: no CUDA device is visible to PyTorch; --smoke runs without one", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"conditions": conditions(), "correctness": correctness(), "table": []}
    wrong = [case for case in report["correctness"] if not case["correct"]]
    print(f"correctness: {len(report['correctness'])} cases, {len(wrong)} wrong", *wrong, sep="\n", flush=True)
    report["rates"] = measured_rates()
    print(", ".join(f"{name} {rate:.3g}/s" for name, rate in report["rates"].items()), HEADER, sep="\n", flush=True)
    for entry in table(Rates(report["rates"]["product"], report["rates"]["exponential"])):
        report["table"].append(entry)
        print(_line(entry), flush=True)
        if options.out is not None:
            save(report, options.out)
    broken = [e for e in report["table"] if e["method"].startswith("triton") and "failed" in e.get("skipped", "")]
    return 1 if wrong or broken else 0


if __name__ == "__main__":
    sys.exit(main())
