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
from collections.abc import Callable
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
RESULTS = Path(__file__).parent / "results"
SECONDS = 440.0  # for the table; correctness and rates come before
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
    """Losses and gradients of "triton" against float64, beside plain PyTorch in the same dtype: a list of errors."""
    found = []
    shapes = [(48, 64, 16)] if SMOKE else [(1000, 1500, 128), (1000, 1500, 100), (257, 700, 768), (64, 65536, 64)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, m, width in shapes:
            problem = Problem.of(n, m, width, dtype, DEVICE, teacher=True)
            exact = _losses_and_gradients(problem, "reference")
            ours = _losses_and_gradients(problem, "triton")
            again = _losses_and_gradients(problem, "triton")
            plain = _losses_and_gradients(problem, "streaming")
            errors = [_error(mine, reference) for mine, reference in zip(ours, exact, strict=True)]
            allowed = [
                2.0 * _error(other, reference) + 16.0 * torch.finfo(torch.float32).eps
                for other, reference in zip(plain, exact, strict=True)
            ]
            found.append(
                {
                    "dtype": str(dtype),
                    "size": [n, m, width],
                    "errors": errors,
                    "allowed": allowed,
                    "repeats": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
                    "correct": all(error <= limit for error, limit in zip(errors, allowed, strict=True)),
                }
            )
    return found


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


def table(rates: Rates) -> list[dict[str, Any]]:
    end = time.monotonic() + SECONDS
    found = []
    for n, m, width in SIZES:
        for name, (method, teacher) in METHODS.items():
            entry: dict[str, Any] = {"size": [n, m, width], "method": name, "teacher": teacher}
            found.append(entry)
            if method is compiled_naive and (SMOKE or width not in COMPILED_WIDTHS):
                entry["skipped"] = "not measured"
                continue
            if time.monotonic() > end:
                entry["skipped"] = "not measured: out of time"
                continue
            try:
                entry |= measure(method, Problem.of(n, m, width, DTYPE, DEVICE, teacher=teacher))
            except torch.OutOfMemoryError:
                entry["skipped"] = "out of memory"
            except ImportError as error:
                entry["skipped"] = f"not installed: {error.name}"
            except Exception as error:  # a peer that fails is a line of the table, not the report's end
                if name.startswith("triton"):
                    raise
                entry["skipped"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
            if "both" in entry:
                for mode in ("forward", "backward", "both"):
                    if entry[mode] is None:
                        continue
                    entry[f"{mode}_of_floor"] = entry[mode][0] / rates.floor(n, m, width, mode, teacher=teacher)
                    entry[f"{mode}_tflops"] = operations(n, m, width, mode, teacher=teacher) / entry[mode][0] / 1e12
            print(_line(entry), flush=True)
            if not SMOKE:
                torch.cuda.empty_cache()
    return found


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
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": platform.processor() if SMOKE else torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, interpreted on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        print("gpu_report: no CUDA device is visible to PyTorch; --smoke runs without one", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"conditions": conditions(), "correctness": correctness()}
    wrong = [case for case in report["correctness"] if not (case["correct"] and case["repeats"])]
    print(f"correctness: {len(report['correctness'])} cases, {len(wrong)} wrong", *wrong, sep="\n", flush=True)
    rates = measured_rates()
    report["rates"] = rates
    print(", ".join(f"{name} {rate:.3g}/s" for name, rate in rates.items()), HEADER, sep="\n", flush=True)
    report["table"] = table(Rates(rates["product"], rates["exponential"]))
    if not SMOKE:
        stem = report["conditions"]["device"].lower().replace(" ", "-")
        options.out.mkdir(parents=True, exist_ok=True)
        title = ", ".join(f"{name} {value}" for name, value in report["conditions"].items())
        lines = [title, "", HEADER, *(_line(entry) for entry in report["table"])]
        for suffix, text in (("json", json.dumps(report, indent=1)), ("md", "\n".join(lines))):
            fresh = options.out / f"{stem}.{suffix}.tmp"
            fresh.write_text(text + "\n")
            fresh.replace(options.out / f"{stem}.{suffix}")
        print(f"written to {options.out}/{stem}.json and .md")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
