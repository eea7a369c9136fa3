"""Forward + backward, with pytest-benchmark: ``pytest kernels/benchmarks``. No time is asserted.

CPU sizes without a GPU, GPU sizes with one. The limit on a CPU is 4 bare matrix products plus 3 N M exponentials,
measured in the same run; pytest-benchmark prints every time as a multiple of the fastest in its group. ``extra_info``
of the JSON (``--benchmark-json``) holds the peak memory beyond the inputs in MiB, from a fresh process.
"""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from methods import INFO_NCE_ONLY, Method, Problem, compiled_naive, naive, reduced, rows

CUDA = torch.cuda.is_available()
SIZES = (
    [(32768, 32768, 128), (32768, 32768, 768), (256, 1048576, 128)] if CUDA else [(2048, 2048, 128), (8192, 8192, 128)]
)
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
WITH_TEACHER: dict[str, Method] = {
    "naive": naive,
    "torch.compile of naive": compiled_naive,
    "streaming, per row": rows("streaming"),
    "streaming, reduced": reduced("streaming"),
    **({"triton, per row": rows("triton"), "triton, reduced": reduced("triton")} if CUDA else {}),
}
PEAK = """
import json, pathlib, re, sys
sys.path.insert(0, sys.argv[1])
import test_speed as suite
method = (suite.WITH_TEACHER | suite.INFO_NCE_ONLY)[sys.argv[2]]
n, m, width, teacher = json.loads(sys.argv[3])
suite.run(method, 32, 32, width, teacher)()
call = suite.run(method, n, m, width, teacher)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
kibibytes = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = kibibytes()
call()
print((kibibytes() - before) / 1024)
"""


def run(method: Method, n: int, m: int, width: int, teacher: bool) -> Callable[[], None]:
    problem = Problem.of(n, m, width, DTYPE, DEVICE, teacher=teacher)

    def call() -> None:
        problem.query.grad = problem.key.grad = None
        method(problem).backward()
        if CUDA:
            torch.cuda.synchronize()

    return call


def peak_mebibytes(name: str, n: int, m: int, width: int, teacher: bool) -> float:
    if CUDA:
        call = run((WITH_TEACHER | INFO_NCE_ONLY)[name], n, m, width, teacher)
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    arguments = [__file__.rsplit("/", 1)[0], name, json.dumps([n, m, width, teacher])]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK, *arguments], capture_output=True, check=True)
    return float(done.stdout)


def measure(benchmark: BenchmarkFixture, name: str, method: Method, size: tuple[int, int, int], teacher: bool) -> None:
    benchmark.group = f"N = {size[0]}, M = {size[1]}, D = {size[2]}, {'student and teacher' if teacher else 'InfoNCE'}"
    call = run(method, *size, teacher)
    try:
        call()
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{name} is not available: {error}")
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["peak_mebibytes"] = peak_mebibytes(name, *size, teacher)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_student_and_teacher(benchmark: BenchmarkFixture, name: str, size: tuple[int, int, int]) -> None:
    measure(benchmark, name, WITH_TEACHER[name], size, teacher=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [*WITH_TEACHER, *INFO_NCE_ONLY])
def test_info_nce(benchmark: BenchmarkFixture, name: str, size: tuple[int, int, int]) -> None:
    measure(benchmark, name, (WITH_TEACHER | INFO_NCE_ONLY)[name], size, teacher=False)


@pytest.mark.skipif(CUDA, reason="the GPU's floor is computed from its measured rates, by gpu_report.py")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_limit(benchmark: BenchmarkFixture, size: tuple[int, int, int]) -> None:
    """4 bare products and 3 N M exponentials, by row blocks into one buffer."""
    n, m, width = size
    benchmark.group = f"N = {n}, M = {m}, D = {width}, student and teacher"
    query, key = torch.randn(n, width), torch.randn(m, width)
    buffer, exponents = torch.empty(512, m), torch.rand(512, m)

    def limit() -> None:
        for start in range(0, n, 512):
            for _ in range(4):
                torch.mm(query[start : start + 512], key.T, out=buffer)
            for _ in range(3):
                torch.exp2(exponents, out=buffer)

    benchmark.pedantic(limit, rounds=5, warmup_rounds=1)
