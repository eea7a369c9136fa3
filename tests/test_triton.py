"""The fused kernels, interpreted on the CPU, against the float64 reference; and compiled, without a GPU.

Shapes (N, M, D, D'): one row and one key; fewer than a block; more than a block of both, no multiple of any; a student
too wide for registers, whose width is no multiple of a piece; a teacher wider than the student; widths of one block.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from cila_kernels import _operators, _tuning, fused, info_nce_distill, info_nce_distill_loss, streaming  # noqa: E402
from cila_kernels._triton_kernels import gradient_kernel  # noqa: E402
from cila_kernels.loss import _module  # noqa: E402
from tests.test_kernels import check, problem  # noqa: E402

SHAPES = [(1, 1, 3, 2), (7, 11, 5, 3), (130, 257, 64, 32), (70, 90, 300, 20), (40, 150, 20, 160), (64, 128, 128, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(impl: Any, tensors: list[Tensor], options: dict[str, Any], **change: Any) -> list[Tensor]:
    """All four losses and the gradients in query, key and both student temperatures, float64."""
    query, key = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    options = options | change
    temperature, student_temperature = (
        torch.tensor(options.pop(name), dtype=torch.float64, requires_grad=True)
        for name in ("temperature", "student_temperature")
    )
    rows = info_nce_distill(
        query, key, *tensors[2:], temperature=temperature, student_temperature=student_temperature, impl=impl, **options
    )
    weight = torch.linspace(-1.0, 2.0, len(query), dtype=rows.contrastive.dtype)
    loss = rows.contrastive @ weight + rows.distillation @ weight.flip(0)
    gradients = torch.autograd.grad(loss, (query, key, temperature, student_temperature))
    return [value.detach().double() for value in (*rows, *gradients)]


@pytest.mark.filterwarnings("ignore:.* is not unit-norm")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positives", ["index", "label", "label+id"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(shape: tuple[int, int, int, int], positives: str, dtype: torch.dtype) -> None:
    tensors, options = problem(shape, positives, dtype=dtype)
    check(run("triton", tensors, options), run("reference", tensors, options), dtype)


@pytest.mark.parametrize("width", [16, 160])
@pytest.mark.parametrize("n", [1, 3])
def test_split_over_keys_merges_to_the_same(n: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and many keys: partial sums of 4 splits; the last split holds keys that a row's id excludes entirely."""
    m = 3 * 1024 + 5
    tensors, options = problem((n, m, width, 8), "index", dtype=torch.float32)
    options["positive"] = torch.zeros(n, dtype=torch.int64)
    options["query_id"] = torch.full((n,), 7)
    options["key_id"] = torch.where(torch.arange(m) >= 3 * 1024, 7, torch.arange(m) + 100)
    monkeypatch.setattr(_operators, "_processors", lambda device: 132)
    assert _operators._split(n, m, tensors[0].device) == (4, 1024)
    check(run("triton", tensors, options), run("reference", tensors, options), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_workspace_of_few_rows_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide student with a workspace of 23 rows at a time: 70 rows in 4 chunks, the last of 1."""
    tensors, options = problem((70, 90, 200, 20), "label+id", dtype=torch.float32)
    tensors = [tensor.to(dtype) for tensor in tensors]
    whole = run("triton", tensors, options)
    monkeypatch.setattr(_operators, "_WORKSPACE_BYTES", 23 * 90 * tensors[0].element_size())
    chunked = run("triton", tensors, options)
    for i, (one, many) in enumerate(zip(whole, chunked, strict=True)):
        epsilon = torch.finfo(dtype if i in (4, 5) else torch.float32).eps
        assert (one - many).abs().max() <= 4 * epsilon * one.abs().max()


def test_one_temperature_shares_its_softmax() -> None:
    tensors, options = problem((70, 90, 24, 20), "label+id", dtype=torch.float32)
    del options["student_temperature"]
    found = []
    for impl in ("triton", "reference"):
        query, key = (tensor.clone().requires_grad_() for tensor in tensors[:2])
        temperature = torch.tensor(0.4, requires_grad=True)
        rows = info_nce_distill(query, key, *tensors[2:], **(options | {"temperature": temperature}), impl=impl)
        loss = rows.contrastive.mean() + 2.0 * rows.distillation.mean()
        found.append([*rows, *torch.autograd.grad(loss, (query, key, temperature))])
    for mine, exact in zip(*found, strict=True):
        assert torch.allclose(mine.double(), exact.double(), rtol=2e-5, atol=2e-6)


def test_without_teacher() -> None:
    (query, key, *_), options = problem((70, 90, 24, 20), "index", dtype=torch.float32)
    query.requires_grad_()
    rows = info_nce_distill(query, key, positive=options["positive"], temperature=0.1, impl="triton")
    assert rows[1:] == (None, None, None)
    expected = torch.nn.functional.cross_entropy(query @ key.T / 0.1, options["positive"], reduction="none")
    assert torch.allclose(rows.contrastive, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(rows_.mean(), query)[0] for rows_ in (rows.contrastive, expected))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_queue_keys_cost_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = problem((40, 50, 24, 20), "index", dtype=torch.float32)
    launched = []
    monkeypatch.setattr(
        _operators, "launch", lambda kernel, *rest: (launched.append((kernel, rest[4])), _tuning.launch(kernel, *rest))
    )
    query = tensors[0].requires_grad_()
    info_nce_distill(query, *tensors[1:], **options, impl="triton").contrastive.sum().backward()
    assert [flags["OF_KEYS"] for kernel, flags in launched if kernel is gradient_kernel] == [False]


def test_runs_are_bitwise_equal() -> None:
    tensors, options = problem((130, 257, 64, 32), "label+id", dtype=torch.float32)
    for one, two in zip(run("triton", tensors, options), run("triton", tensors, options), strict=True):
        assert torch.equal(one, two)


def test_operators_keep_their_contract() -> None:
    """Schema, fake shapes and autograd registration, as PyTorch itself checks them."""
    tensors, _ = problem((9, 13, 6, 4), "index", dtype=torch.float32)
    query, key = (tensor.requires_grad_() for tensor in tensors[:2])
    temperatures = [
        torch.tensor(value, dtype=torch.float64, requires_grad=i < 2) for i, value in enumerate((0.5, 0.2, 0.1))
    ]
    groups = torch.arange(9, dtype=torch.int32), torch.arange(13, dtype=torch.int32)
    positive = (query.detach() * key.detach()[:9]).sum(1)
    arguments = (
        *(query, key, *tensors[2:], None, None, *groups, torch.ones(9, dtype=torch.int64), positive),
        *(*temperatures, False, True, False),
    )
    torch.library.opcheck(_operators.row_statistics, arguments)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of a tensor that dynamo looks at on a graph break
@pytest.mark.parametrize("positives", ["index", "label+id"])
@pytest.mark.parametrize("impl", ["triton", "streaming"])
def test_callers_can_be_compiled(impl: Any, positives: str) -> None:
    """Without a graph break for "triton"; "streaming" breaks the graph and gives the same."""
    tensors, options = problem((40, 50, 16, 8), positives, dtype=torch.float32)
    query, key = (tensor.requires_grad_() for tensor in tensors[:2])

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return info_nce_distill_loss(2.0 * query / 2.0, key, *tensors[2:], **options, impl=impl).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=impl == "triton", backend="aot_eager")
    ours, plain = (torch.autograd.grad(function(query, key), (query, key)) for function in (compiled, loss))
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.* is not unit-norm")
@pytest.mark.parametrize("width", [16, 160])
def test_tiny_float16_gradients_do_not_underflow(width: int) -> None:
    """G of single pairs is below 3e-8, which float16 rounds to 0; their sum over 2,048 keys is 500 times that."""
    generator = torch.Generator().manual_seed(0)
    key = torch.nn.functional.normalize(1.0 + 0.5 * torch.randn(2048, width, generator=generator), dim=1).half()
    query = torch.nn.functional.normalize(torch.randn(64, width, generator=generator), dim=1).half()
    gradients = []
    for impl in ("reference", "triton"):
        dtype = torch.float64 if impl == "reference" else torch.float16
        q, k = query.to(dtype).requires_grad_(), key.to(dtype)
        loss = info_nce_distill_loss(q, k, positive=torch.arange(64), temperature=0.5, impl=impl).loss
        gradients.append(torch.autograd.grad(2.0**-11 * loss, q)[0].double())
    exact, ours = gradients
    assert (ours - exact).abs().max() <= 3 * 2.0**-24  # roundings of the result, itself float16 below its normal range
    assert exact.abs().max() > 30 * 2.0**-24


@pytest.mark.filterwarnings("ignore:.* is not unit-norm")
@pytest.mark.parametrize("width", [64, 160])
def test_backward_inside_autocast_keeps_float32(width: int) -> None:
    tensors, options = problem((40, 50, width, 20), "index", dtype=torch.float32)
    gradients = []
    for enabled in (False, True):
        query = tensors[0].clone().requires_grad_()
        loss = info_nce_distill(query, *tensors[1:], **options, impl="triton").contrastive.sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients += torch.autograd.grad(loss, query)
    assert torch.equal(*gradients)


def test_float32_products_of_a_wide_student_leave_the_users_setting() -> None:
    tensors, options = problem((40, 50, 160, 20), "index", dtype=torch.float32)
    query = tensors[0].requires_grad_()
    loss = info_nce_distill(query, *tensors[1:], **options, impl="triton").contrastive.sum()
    backend = torch.backends.cuda.matmul
    before, backend.fp32_precision = backend.fp32_precision, "tf32"
    try:
        loss.backward()
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_second_derivatives_are_refused() -> None:
    tensors, options = problem((7, 11, 5, 3), "index", dtype=torch.float32)
    query = tensors[0].requires_grad_()
    loss = info_nce_distill(query, *tensors[1:], **options, impl="triton").contrastive.sum()
    (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:.* is not unit-norm")
def test_zero_upstream_gradients_give_zero() -> None:
    tensors, options = problem((7, 11, 5, 3), "index", dtype=torch.float16)
    query = tensors[0].requires_grad_()
    (0.0 * info_nce_distill(query, *tensors[1:], **options, impl="triton").contrastive.sum()).backward()
    assert query.grad is not None
    assert query.grad.abs().max() == 0.0


def test_float64_teacher_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = problem((7, 11, 5, 3), "index", dtype=torch.float32)
    wider = [*tensors[:2], *(tensor.double() for tensor in tensors[2:])]
    dtypes = set()
    monkeypatch.setattr(
        _operators, "launch", lambda kernel, *rest: (dtypes.add(rest[3].dtype), _tuning.launch(kernel, *rest))
    )
    for a, b in zip(*(info_nce_distill(*t, **options, impl="triton") for t in (tensors, wider)), strict=True):
        assert torch.equal(a, b)
    assert dtypes == {torch.float32}


def test_ids_that_no_key_carries_exclude_nothing() -> None:
    tensors, options = problem((7, 11, 5, 3), "index", dtype=torch.float32)
    plain = info_nce_distill(*tensors, **options, impl="triton")
    options |= {"query_id": 2 * torch.arange(7) + 1, "key_id": 2 * torch.arange(11)}
    for a, b in zip(info_nce_distill(*tensors, **options, impl="triton"), plain, strict=True):
        assert torch.equal(a, b)


def test_one_learnable_temperature_and_frozen_teacher_terms() -> None:
    tensors, options = problem((40, 50, 16, 8), "index", dtype=torch.float32)
    gradients = []
    for impl in ("triton", "reference"):
        student = torch.tensor(0.2, requires_grad=True)
        rows = info_nce_distill(*tensors, **(options | {"student_temperature": student}), impl=impl)
        assert not rows.teacher_entropy.requires_grad
        assert not rows.teacher_contrastive.requires_grad
        gradients += torch.autograd.grad(rows.distillation.sum(), student)
    assert gradients[0].item() == pytest.approx(gradients[1].item(), rel=1e-5)


def test_auto_is_streaming_on_a_cpu() -> None:
    tensors, options = problem((9, 13, 6, 4), "index", dtype=torch.float32)
    for auto, direct in zip(
        *(info_nce_distill(*tensors, **options, impl=impl) for impl in ("auto", "streaming")), strict=True
    ):
        assert torch.equal(auto, direct)


def test_auto_leaves_float64_on_a_gpu_to_streaming() -> None:
    cuda = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    for dtype, module in ((torch.float64, streaming), (torch.float32, fused)):
        assert _module("auto", SimpleNamespace(query=cuda, compute_dtype=dtype)) is module


def test_tuner_times_every_configuration_and_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autotuner's wiring, with a made-up stopwatch: the second configuration wins and is used again untimed."""
    tensors, options = problem((40, 50, 24, 20), "index", dtype=torch.float16)
    expected = info_nce_distill(*tensors, **options, impl="triton")
    timed = []

    def stopwatch(call: Any, quantiles: Any = None, **_: Any) -> list[float]:
        call()
        timed.append(call)
        return [1.0 / len(timed)] * 3

    autotune = triton.autotune
    monkeypatch.setattr(triton, "autotune", lambda **given: autotune(**given, do_bench=stopwatch))
    monkeypatch.setattr(_tuning, "TUNED", True)
    _tuning._tuned.cache_clear()
    for _ in range(2):
        for mine, other in zip(info_nce_distill(*tensors, **options, impl="triton"), expected, strict=True):
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)
    assert len(timed) == 2
    _tuning._tuned.cache_clear()


def test_refuses_what_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = problem((9, 13, 6, 4), "index")
    with pytest.raises(RuntimeError, match="got float64 embeddings: use impl='streaming'"):
        info_nce_distill(*tensors, **options, impl="triton")
    monkeypatch.setattr(fused, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu: use impl='streaming'"):
        info_nce_distill(*(tensor.float() for tensor in tensors), **options, impl="triton")


def test_gpu_report_runs_in_miniature(tmp_path: Path) -> None:
    """Its whole path on the CPU: correctness, rates and a line for every method."""
    script = Path(__file__).parents[1] / "kernels" / "benchmarks" / "gpu_report.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, "--smoke", "--out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "correctness: 3 cases, 0 wrong" in done.stdout
    for method in ("triton", "naive", "triton, InfoNCE", "F.linear_cross_entropy, InfoNCE"):
        assert f"| {method} | " in done.stdout
    assert "failed" not in done.stdout
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert all(case["correct"] for case in report["correctness"])
    assert len(report["table"]) == done.stdout.count("| 48 x 64, 16 |")


COMPILE = """
import sys
sys.path.insert(0, "kernels/benchmarks")
import resources
capability = int(sys.argv[1])
work = [job for job in resources.jobs(("half", "tf32"), defaults_only=True) if job.capability == capability]
rows = [resources.compile_job(job) for job in work]
assert len(rows) >= 18, len(rows)
faults = [f"{row}: {', '.join(row.faults())}" for row in rows if row.faults()]
assert not faults, faults
"""
VARIANTS = """
import sys
sys.path.insert(0, "kernels/benchmarks")
import resources
from resources import Job
none = {"TEACHER": False, "D_TEACHER": 0, "IDS": False}
absent = dict.fromkeys(("teacher_query", "teacher_key", "query_id", "key_id"), None)
absent_ab = dict.fromkeys(("teacher_a", "teacher_b", "a_id", "b_id"), None)
for arithmetic in ("half",) if sys.argv[1] == "80" else ("half", "ieee"):
    for kernel, of_keys, width, gone, sizes in (
        ("statistics_kernel", False, 64, absent, ("N", "M")),
        ("similarity_gradient_kernel", False, 256, absent, ("N", "M")),
        ("gradient_kernel", False, 64, absent_ab, ("A", "B")),
        ("gradient_kernel", True, 64, absent_ab, ("A", "B")),
    ):
        job = Job(kernel, of_keys, width, arithmetic, int(sys.argv[1]), 0, kernel == "statistics_kernel")
        for changes in (
            {**none, **gone, "SHARED": True},
            {"IDS": False, "EVEN": True, **{name: None for name in gone if name.endswith("id")}},
            {"SHARED": True, "D": width - 27, "D_TEACHER": 700},
            {"SHARED": True, "EVEN": True, "D_TEACHER": 16},
            *({name: 1} for name in sizes),
        ):
            resources.compile_job(job, **changes)
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("program", [COMPILE, VARIANTS], ids=["default configurations", "variants"])
def test_kernels_compile_without_a_gpu(program: str, capability: int) -> None:
    """Default configurations, D of 64 to 1024: tensor-core instructions, no spills, shared memory that fits. Variants:
    no teacher, no ids, one temperature, odd and unequal widths, one row or key."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(capability)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
