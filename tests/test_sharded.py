"""Keys sharded over real processes, over gloo: against one device in float64, and every way to fail.

Ranks have unequal numbers of queries and of keys (tests/ranks.py). Shapes: 23 queries, 31 keys; a wide student of 140
does not fit the registers of the fused kernels. The processes of one group size serve all tests.
"""

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cila_kernels import info_nce_distill
from tests import ranks
from tests.ranks import Failure, Group, losses, merged
from tests.test_kernels import check, problem, unit

SHAPE = (23, 31, 12, 7)
HAS_TRITON = importlib.util.find_spec("triton") is not None
MODES = [
    ("streaming", "ring"),
    ("streaming", "all_gather"),
    ("reference", "ring"),
    *([("triton", "ring"), ("triton", "all_gather")] if HAS_TRITON else []),
]
CASES = {  # name -> positives, dtype
    "indices": ("index", torch.float32),
    "labels": ("label", torch.float32),
    "ids": ("label+id", torch.float32),
    "one temperature": ("label+id", torch.float32),
    "no teacher": ("label+id", torch.float32),
    "queue": ("index", torch.float32),
    "rows without positive": ("label+id", torch.float32),
    "shards without candidate": ("label+id", torch.float32),
    "wide": ("label+id", torch.float32),
    "bfloat16": ("index", torch.bfloat16),
    "wide float16": ("label+id", torch.float16),
    "float64": ("label+id", torch.float64),
}
FOR_TRITON = {
    2: [name for name in CASES if name != "float64"],
    4: ["ids", "bfloat16"],
}  # interpreted, it is slow
_groups: dict[int, Group] = {}


@pytest.fixture(scope="module", autouse=True)
def _end_processes() -> Iterator[None]:
    yield
    for group in _groups.values():
        group.close()
    _groups.clear()


def on(size: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """What each rank returns, which is no failure."""
    if size not in _groups:
        _groups[size] = Group(size)
    results = _groups[size].run(function, *arguments, **options)
    assert not any(isinstance(result, Failure) for result in results), results
    return results


def small() -> tuple[list[Tensor], dict[str, Any]]:
    return problem((7, 9, 4, 3), "label+id", dtype=torch.float32)


def failures(size: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Failure]:
    """What each rank raises."""
    on(size, losses, *small())  # which also proves that the failure before left the ranks in step
    results = _groups[size].run(function, *arguments, **options)
    assert all(isinstance(result, Failure) for result in results), results
    return results


def case(name: str) -> tuple[list[Any], dict[str, Any], tuple[tuple[int, str], ...]]:
    """(tensors, options, frozen) of a problem."""
    positives, dtype = CASES[name]
    tensors, options = problem((*SHAPE[:2], 140, 20) if "wide" in name else SHAPE, positives, dtype=dtype)
    if name == "one temperature":
        del options["student_temperature"]
    elif name == "no teacher":
        tensors[2:] = None, None
        del options["student_temperature"], options["teacher_temperature"]
    elif name == "rows without positive":
        options["query_label"][::5] = 9
    elif name == "shards without candidate":  # all keys of the first ranks
        options["query_id"][[0, 7, 22]] = options["key_id"][: SHAPE[1] // 2] = 99
    return tensors, options, tuple((rank, "key") for rank in range(4)) if name == "queue" else ()


def compare(found: list[Tensor | None], expected: list[Tensor | None], dtype: torch.dtype) -> None:
    assert [x is None for x in found] == [x is None for x in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    if dtype == torch.float64:
        for mine, exact in pairs:
            assert (mine - exact).abs().max() <= 1e-12 * (1.0 + exact.abs().max())
    else:
        zero = torch.zeros(1, dtype=torch.float64)  # where there is none, so that gradients stand where check looks
        check(*([zero if x is None else x for x in side] for side in (found, expected)), dtype)


@pytest.mark.parametrize(
    ("size", "impl", "exchange", "name"),
    [
        (size, *mode, name)
        for size in (2, 4)
        for mode in MODES
        for name in (FOR_TRITON[size] if mode[0] == "triton" else CASES)
    ],
)
def test_equals_one_device(size: int, impl: str, exchange: str, name: str) -> None:
    tensors, options, frozen = case(name)
    dtype = CASES[name][1]
    expected = losses(0, 1, tensors, options | {"impl": "reference"}, frozen=frozen, alone=True)
    found = on(size, losses, tensors, options | {"impl": impl, "exchange": exchange}, frozen=frozen)
    compare(merged(found), expected, dtype)


@pytest.mark.parametrize(("impl", "exchange"), MODES)
@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_ranks(size: int, impl: str, exchange: str) -> None:
    for name in ("indices", "ids"):
        tensors, options, _ = case(name)
        expected = losses(0, 1, tensors, options | {"impl": "reference"}, alone=True)
        compare(
            merged(on(size, losses, tensors, options | {"impl": impl, "exchange": exchange})), expected, torch.float32
        )


@pytest.mark.parametrize(("impl", "exchange"), MODES)
@pytest.mark.parametrize("size", [2, 4])
def test_reduced_loss_is_the_average_over_ranks(size: int, impl: str, exchange: str) -> None:
    """Means over the anchors and rows of all ranks; the last rank has no anchor, and anchors need positives."""
    tensors, options = problem(SHAPE, "label+id", dtype=torch.float32)
    mask = torch.arange(SHAPE[0]) % 3 == 1
    mask[-3:] = False
    options["query_label"][~mask] = 9
    options |= {"anchor_mask": mask, "distill_weight": torch.rand(SHAPE[0]), "on_missing_positive": "error"}
    expected = losses(0, 1, tensors, options | {"impl": "reference"}, reduced=True, alone=True)
    found = on(size, losses, tensors, options | {"impl": impl, "exchange": exchange}, reduced=True)
    compare(merged(found, reduced=True)[1:], expected[1:], torch.float32)
    assert merged(found, reduced=True)[0].item() == pytest.approx(expected[0].item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.* is not unit-norm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("impl", "exchange"), [mode for mode in MODES if mode[0] != "reference"])
def test_gradients_near_the_optimum_keep_their_digits(impl: str, exchange: str, dtype: torch.dtype) -> None:
    """Every key is nearly its query; key i and query i are often on different ranks."""
    generator = torch.Generator().manual_seed(0)
    query = unit(generator, 64, 32)
    key = functional.normalize(query + 0.2 * unit(generator, 64, 32), dim=1).to(dtype)
    numbers = torch.arange(64)
    options = {"query_label": numbers, "key_label": numbers, "temperature": 0.1}
    tensors = [query.to(dtype), key, None, None]
    expected = losses(0, 1, tensors, options | {"impl": "reference"}, alone=True)
    found = merged(on(2, losses, tensors, options | {"impl": impl, "exchange": exchange}))
    for mine, exact in zip(found[4:6], expected[4:6], strict=True):
        assert (mine - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_confident_softmaxes_lose_no_digits() -> None:
    """At temperature 0.01 sums of exponentials differ by e^200 between shards."""
    tensors, options = problem(SHAPE, "labels", dtype=torch.float32)
    tensors = [tensors[1], tensors[1], tensors[3], tensors[3]]  # every query is among the keys
    options |= {"temperature": 0.01, "student_temperature": 0.01, "teacher_temperature": 0.01}
    options |= {"query_label": torch.arange(31) // 2, "key_label": torch.arange(31) // 2}
    expected = losses(0, 1, tensors, options | {"impl": "reference"}, alone=True)
    for mine, exact in zip(merged(on(4, losses, tensors, options))[:4], expected[:4], strict=True):
        assert torch.allclose(mine, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_queries_or_temperatures_without_gradient_on_some_ranks(exchange: str) -> None:
    """Rank 1 needs no gradient of its own, but the others need its keys, and its rows' part of theirs."""
    tensors, options = problem(SHAPE, "label+id")
    frozen = ((1, "query"), (1, "temperature"), (1, "student_temperature"))
    all_gradients, found = (
        on(4, losses, tensors, options | {"exchange": exchange}, frozen=some) for some in ((), frozen)
    )
    assert [found[1][i] is None for i in (4, 5, 6, 7)] == [True, False, True, True]
    for rank in range(4):
        for mine, exact in zip(found[rank], all_gradients[rank], strict=True):
            assert mine is None or torch.allclose(mine, exact, rtol=1e-12, atol=1e-14)


def test_a_rank_whose_loss_has_no_gradient_passes_on_that_of_others() -> None:
    tensors, options = problem(SHAPE, "label+id")
    undefined, zero = (on(4, ranks.ignore, tensors, options, undefined=flag) for flag in (True, False))
    for mine, other in zip(undefined, zero, strict=True):
        assert torch.equal(mine, other)
        assert mine.abs().max() > 0.0


def test_moco_queues() -> None:
    """Each rank's queue holds negatives of all ranks: against the dense cross entropy over all of them."""
    generator = torch.Generator().manual_seed(0)
    query, key, queues = ([unit(generator, rows, 6) for _ in range(3)] for rows in (5, 5, 11))
    everyone = torch.cat([x for pair in zip(key, queues, strict=True) for x in pair])
    for rank, (loss, gradient) in enumerate(on(3, ranks.moco, query, key, queues)):
        q = query[rank].clone().requires_grad_()
        expected = functional.cross_entropy(q @ everyone.T / 0.07, 16 * rank + torch.arange(5))
        assert torch.allclose(loss, expected, rtol=1e-12)
        assert torch.allclose(gradient, torch.autograd.grad(expected, q)[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "backend",
    [
        "gloo",
        pytest.param("nccl", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
    ],
)
def test_backends(backend: str) -> None:
    for impl, exchange in [mode for mode in MODES if backend == "nccl" or mode[0] != "triton"]:
        tensors, options, _ = case("ids")
        expected = losses(0, 1, tensors, options | {"impl": "reference"}, alone=True)
        options |= {"impl": impl, "exchange": exchange}
        compare(merged(on(2, losses, tensors, options, backend=backend)), expected, torch.float32)


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_gradients_accumulate(exchange: str) -> None:
    tensors, options = problem(SHAPE, "index")
    query, key = (t.clone().requires_grad_() for t in tensors[:2])
    given = [query, key, *tensors[2:]]
    one = ranks.call(0, 1, given, options, group=None, query=query, key=key, reduced=True).loss
    two = ranks.call(0, 1, given, options, group=None, query=query, key=key).distillation.sum()
    found = on(2, ranks.accumulate, tensors, options | {"exchange": exchange})
    expected = torch.autograd.grad(2 * one + 2 * two, (query, key))  # 2 ranks: the reduced loss is twice a share
    for column, exact in zip(zip(*found, strict=True), expected, strict=True):
        assert torch.allclose(torch.cat(column), exact, rtol=1e-10, atol=1e-13)


def test_runs_are_bitwise_equal() -> None:
    tensors, options = problem(SHAPE, "label+id", dtype=torch.float32)
    for exchange in ("ring", "all_gather"):
        assert on(4, ranks.repeat, tensors, options | {"exchange": exchange}) == [True] * 4


def test_averaged_gradients_are_those_of_one_device() -> None:
    """DistributedDataParallel, with a learnt temperature, over the mean of all rows."""
    tensors, options = problem(SHAPE, "label+id")
    model = ranks.Model()
    query, key, temperature = model(*tensors[:2])
    given = {"query": query, "key": key, "temperature": temperature, "reduced": True}
    ranks.call(0, 1, tensors, options, group=None, **given).loss.backward()
    for found in on(2, ranks.average, tensors, options):
        for mine, parameter in zip(found, model.parameters(), strict=True):
            assert torch.allclose(mine, parameter.grad, rtol=1e-10, atol=1e-13)


def test_recipes() -> None:
    """Samples of different ranks are different, whatever their numbers on their ranks."""
    generator = torch.Generator().manual_seed(0)
    z = [unit(generator, 14, 6) for _ in range(4)]
    arguments = z, torch.arange(14) // 3, torch.arange(14) % 4 > 0
    expected = ranks.recipes(0, 1, *arguments, alone=True)
    found = on(3, ranks.recipes, *arguments)
    for column, exact in zip(zip(*found, strict=True), expected, strict=True):
        mine = (torch.cat(column) if exact.ndim else torch.stack(column).sum(0)) / 3
        assert torch.allclose(mine, exact, rtol=1e-10, atol=1e-13)


def test_ranks_are_counted_in_their_group() -> None:
    tensors, options = problem(SHAPE, "index")
    expected = losses(0, 1, tensors, options, alone=True)
    found = on(4, ranks.subgroup, tensors, options)
    for column, exact in zip(zip(*found[1:], strict=True), expected[:4], strict=True):
        assert torch.allclose(torch.cat(column), exact, rtol=1e-12)


@pytest.mark.parametrize("key_grad", [False, True])
def test_ring_holds_one_shard_sends_the_next_meanwhile_and_a_queue_sends_no_gradient(key_grad: bool) -> None:
    n, width = 16, 64
    tensors, options = problem((n, 1200, width, 5), "label+id", dtype=torch.float32)
    keys = [len(part) for part in torch.arange(1200).split([120, 240, 360, 480])]
    shard = [m * (4 * width + 4 * 5 + 2 * 8) for m in keys]  # student, teacher, label and id
    gradient = [m * 4 * width for m in keys]
    for rank, seen in enumerate(on(4, ranks.watch, tensors, options, key_grad=key_grad)):
        others = [i for i in range(4) if i != (rank + 1) % 4]  # the right neighbour's shard is not passed to it
        assert seen["forward"] == sum(shard[i] for i in others)
        assert seen["backward"] == sum(shard[i] for i in others) + key_grad * sum(gradient)
        assert seen["order"] == " ".join(["start work wait"] * 4)
        assert seen["largest"] <= (max(keys) + n) * width < 1200 * width


REDUCED = {"reduced": True}
NO_LABELS = {"query_label": None, "key_label": None}
DIFFERENT: dict[str, tuple[dict[int, dict[str, Any]], str]] = {  # what ranks 0 to 2 pass, what all are told
    "width": (
        {1: {"query": torch.eye(2, 3), "key": torch.eye(3)}},
        "width of query and key .* got 4 on ranks 0, 2, 3 on rank 1",
    ),
    "dtype": (
        {1: {"query": torch.eye(2, 4).double(), "key": torch.eye(3, 4).double()}},
        "dtype of query and key .* got torch.float32 on ranks 0, 2, torch.float64 on rank 1",
    ),
    "teacher": (
        {1: {"teacher_query": None, "teacher_key": None}},
        "width of the teacher .* got 3 on ranks 0, 2, None on rank 1",
    ),
    "temperature": (
        {1: {"temperature": 0.3}, 2: {"temperature": 0.3}},
        "^temperature must be the same on every rank, got 0.5 on rank 0, 0.3 on ranks 1, 2$",
    ),
    "positives": (
        {1: {"query_label": None, "key_label": None, "positive": torch.tensor([0, 1])}},
        "kind of positives .* got labels on ranks 0, 2, indices on rank 1",
    ),
    "ids": ({1: {"query_id": None, "key_id": None}}, "use of ids .* got True on ranks 0, 2, False on rank 1"),
    "policy": ({2: {"on_missing_positive": "error"}}, "on_missing_positive .* error on rank 2"),
    "exchange": ({1: {"exchange": "all_gather"}}, "exchange .* got ring on ranks 0, 2, all_gather on rank 1"),
    "implementation": ({1: {"impl": "reference"}}, "impl .* got streaming on ranks 0, 2, reference on rank 1"),
    "TF32": ({0: {"allow_tf32": True}}, "allow_tf32 .* got True on rank 0, False on ranks 1, 2"),
    "queue": ({1: {"key_grad": True}}, "requires_grad of key .* got False on ranks 0, 2, True on rank 1"),
    "grad mode": ({1: {"grad_mode": False}}, "grad mode .* got True on ranks 0, 2, False on rank 1"),
    "call": ({1: REDUCED}, "call .* got info_nce_distill on ranks 0, 2, info_nce_distill_loss on rank 1"),
    "weight": (
        {0: REDUCED, 1: REDUCED | {"distill_weight": 2.0}, 2: REDUCED},
        "distill_weight .* got 1.0 on ranks 0, 2, 2.0 on rank 1",
    ),
}
ERRORS: dict[str, tuple[dict[int, dict[str, Any]], str, str]] = {  # what they pass; type and text of all errors
    "NaN": ({1: {"query": torch.full((2, 4), torch.nan)}}, "ValueError", "^rank 1: query is not finite in rows 0, 1: "),
    "no tensor": ({2: {"query": [[1.0]]}}, "TypeError", "^rank 2: query must be a tensor, got list$"),
    "temperature": (
        {0: {"temperature": -1}, 2: {"temperature": -1}},
        "ValueError",
        "^ranks 0, 2: temperature must be finite .* got -1.0$",
    ),
    "two kinds": (
        {0: {"key": 1}, 1: {"temperature": 0.0}},
        "RuntimeError",
        "^rank 0: key must be a tensor, got int; rank 1: temperature must be finite",
    ),
    "a long text": (
        {1: {"exchange": "\x00\n" * 4000}},
        "ValueError",
        "^rank 1: exchange must be 'ring' or 'all_gather', got '.x00.n",
    ),
    "time-out": ({1: {"timeout": 0.0}}, "ValueError", "^rank 1: timeout must be a positive number .* got 0.0$"),
    "unknown exchange": ({1: {"exchange": "star"}}, "ValueError", "^rank 1: exchange must be .* got 'star'$"),
}
AMONG_ALL: dict[str, tuple[dict[int, dict[str, Any]], str]] = {  # all keys are looked through for these
    "no positive": ({1: {"query_label": torch.tensor([0, 50])}}, "rank 1: no key but itself has the label of row 1: "),
    "no candidate": (
        {
            0: {"key_id": torch.full((1,), 99)},
            1: {"key_id": torch.full((3,), 99), "query_id": torch.tensor([99, 0])},
            2: {"key_id": torch.full((5,), 99)},
        },
        "rank 1: every key carries the id of row 0: ",
    ),
    "index": (
        {2: NO_LABELS | {"positive": torch.tensor([9])}}
        | {rank: NO_LABELS | {"positive": torch.full((4 - 2 * rank,), 8)} for rank in range(2)},
        "rank 2: positive must be a key index in 0..8, but is not for row 0",
    ),
    "own key": (  # rank 1's second query has the id of the last key, which is on rank 2
        {rank: NO_LABELS | {"positive": torch.full((rows,), 7)} for rank, rows in enumerate((4, 2, 1))}
        | {1: NO_LABELS | {"positive": torch.full((2,), 8), "query_id": torch.tensor([0, 8])}},
        "rank 1: the positive key carries the row's own id, which excludes it, for row 1",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_differences_are_named_on_every_rank(name: str) -> None:
    changes, message = DIFFERENT[name]
    for failure in failures(3, ranks.call_with, *small(), changes):
        assert failure.kind == "ValueError"
        assert re.search(message, failure.text), failure.text


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_rank_is_raised_on_every_rank(name: str) -> None:
    changes, kind, message = ERRORS[name]
    for failure in failures(3, ranks.call_with, *small(), changes):
        assert failure.kind == kind
        assert re.search(message, failure.text), failure.text


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
@pytest.mark.parametrize("name", AMONG_ALL)
def test_rows_without_candidate_or_positive_among_all_keys(name: str, exchange: str) -> None:
    changes, message = AMONG_ALL[name]
    tensors, options = small()
    options |= {"query_label": torch.zeros(7).long(), "key_label": torch.zeros(9).long()}
    options |= {"on_missing_positive": "error", "exchange": exchange}
    on(3, ranks.call_with, tensors, options, {})
    for failure in failures(3, ranks.call_with, tensors, options, changes):
        assert (failure.kind, failure.text[: len(message)]) == ("ValueError", message)


def test_no_anchor_on_any_rank() -> None:
    tensors, options = small()
    options |= {"anchor_mask": torch.zeros(7, dtype=torch.bool), "on_missing_positive": "error"}
    changes = dict.fromkeys(range(3), REDUCED)
    for failure in failures(3, ranks.call_with, tensors, options, changes):
        assert failure.text.startswith("anchor_mask selects no row")
    on(3, ranks.call_with, tensors, options | {"on_missing_positive": "ignore"}, changes)


@pytest.mark.parametrize("how", ["forward", "backward", "in place"])
def test_a_failure_inside_the_ring_is_raised_on_every_rank(how: str) -> None:
    """Rank 1 goes on to pass what the others wait for."""
    message = "modified by an inplace operation" if how == "in place" else "OutOfMemoryError: out of memory in the ring"
    for failure in failures(3, ranks.break_down, *small(), how):
        assert failure.kind == "RuntimeError"
        assert failure.text.startswith("rank 1: ")
        assert message in failure.text


@pytest.mark.parametrize("how", ["dies", "silent"])
def test_a_rank_that_does_not_answer_is_an_error_within_the_time_out(how: str) -> None:
    group = Group(3)
    begin = time.monotonic()
    results = group.run(ranks.break_down, *small(), how)
    seconds = time.monotonic() - begin
    group.close()
    assert results[1] is None
    for rank in (0, 2):
        assert results[rank].kind == "UnreachableError"
        assert results[rank].text.startswith(f"rank {rank} of 3: no")
    if how == "dies":
        assert re.match("rank 2 of 3: (nothing came from|no connection to rank 0 or) rank 1 ", results[2].text)
    assert seconds < 3.0 + 15.0  # the time-out, and the start of the processes


def test_no_group() -> None:
    tensors, options = small()
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup, got 'all'"):
        info_nce_distill(*tensors, **options, group="all")


def test_benchmark_runs_in_miniature() -> None:
    """All ways to shard the keys give one loss and the same gradients, or the exit status is 1."""
    script = Path(__file__).parents[1] / "kernels" / "benchmarks" / "sharded.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, "--smoke"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for method in ('exchange="ring"', "gather with gradients, then dense"):
        assert f"| 2 | {method} | " in done.stdout
    table = re.findall(r"^\| (?:8|64), .*$", done.stdout, re.MULTILINE)
    assert len(table) == 6
    documented = (script.parents[1] / "README.md").read_text()
    assert all(line in documented for line in table), "\n".join(table)
