"""The loss: against a triple loop, gradcheck, plain PyTorch's own error, and every refusal.

Shapes: N = 1 and M = 1 are the degenerate ends; 7 x 11 is odd and oblong; 600 x 37 needs two row blocks (512 + 88);
the teacher's width differs from the student's in three of five.
"""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cila_kernels import info_nce_distill, info_nce_distill_loss
from cila_kernels._problem import _warned

SHAPES = [(1, 1, 3, 2), (1, 9, 4, 4), (7, 11, 5, 3), (5, 1, 2, 6), (600, 37, 8, 8)]
TEMPERATURES: dict[str, Any] = {"temperature": 0.5, "student_temperature": 0.2, "teacher_temperature": 0.1}
IMPLEMENTATIONS = ["reference", "streaming"]
IN_FLOAT32 = ["streaming", "triton"]


def unit(generator: torch.Generator, rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def problem(
    shape: tuple[int, int, int, int], positives: str, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[Tensor], dict]:
    """(query, key, teacher_query, teacher_key) and options, with index or label positives, with or without ids."""
    n, m, d, d_teacher = shape
    generator = torch.Generator().manual_seed(seed)
    tensors = [unit(generator, rows, width, dtype) for width in (d, d_teacher) for rows in (n, m)]
    options: dict[str, Any] = dict(TEMPERATURES)
    if positives == "index":
        options["positive"] = torch.randint(0, m, (n,), generator=generator)
    else:
        options["query_label"] = torch.randint(0, 3, (n,), generator=generator)
        options["key_label"] = torch.randint(0, 3, (m,), generator=generator)
        options["on_missing_positive"] = "ignore"
    if positives == "label+id" and m > 1:
        options["query_id"] = torch.arange(n)
        options["key_id"] = torch.arange(m)
    return tensors, options


def check(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Losses to a few units of float32; gradients in the embeddings to two roundings of their dtype."""
    for i, (mine, exact) in enumerate(zip(found, expected, strict=True)):
        embedding = i in (4, 5)
        epsilon = torch.finfo(dtype if embedding else torch.float32).eps
        scale = exact.abs().max() if embedding else 1.0 + exact.abs().max()
        assert (mine - exact).abs().max() <= 16 * torch.finfo(torch.float32).eps * (
            1.0 + scale
        ) + 2 * epsilon * scale, i


def triple_loop(tensors: list[Tensor], options: dict[str, Any]) -> dict[str, list[float]]:
    """The equations, one scalar at a time."""
    query, key, teacher_query, teacher_key = (tensor.double().tolist() for tensor in tensors)

    def softmax(i: int, rows: list, columns: list, temperature: float, candidates: list[int]) -> dict[int, float]:
        logits = {j: sum(a * b for a, b in zip(rows[i], columns[j], strict=True)) / temperature for j in candidates}
        top = max(logits.values())
        total = sum(math.exp(value - top) for value in logits.values())
        return {j: math.exp(value - top) / total for j, value in logits.items()}

    result: dict[str, list[float]] = {
        name: [] for name in ("contrastive", "distillation", "teacher_entropy", "teacher_contrastive")
    }
    for i in range(len(query)):
        ids = options.get("query_id") is not None
        candidates = [j for j in range(len(key)) if not (ids and options["query_id"][i] == options["key_id"][j])]
        if "positive" in options:
            positives = [int(options["positive"][i])]
        else:
            positives = [j for j in candidates if options["query_label"][i] == options["key_label"][j]]
        q = softmax(i, query, key, options["temperature"], candidates)
        p = softmax(i, teacher_query, teacher_key, options["teacher_temperature"], candidates)
        q_distill = softmax(i, query, key, options["student_temperature"], candidates)
        count = max(len(positives), 1)
        result["contrastive"].append(sum(-math.log(q[j]) for j in positives) / count)
        result["teacher_contrastive"].append(sum(-math.log(p[j]) for j in positives) / count)
        result["distillation"].append(sum(-p[j] * math.log(q_distill[j]) for j in candidates))
        result["teacher_entropy"].append(sum(-p[j] * math.log(p[j]) for j in candidates if p[j] > 0))
    return result


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("positives", ["index", "label", "label+id"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_triple_loop(impl: Any, positives: str, shape: tuple[int, int, int, int]) -> None:
    if shape[0] > 100 and positives == "label":
        shape = (530, *shape[1:])  # the loop is slow
    tensors, options = problem(shape, positives)
    rows = info_nce_distill(*tensors, **options, impl=impl)
    expected = triple_loop(tensors, options)
    for name, values in expected.items():
        assert getattr(rows, name).tolist() == pytest.approx(values, rel=1e-10, abs=1e-12), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("positives", ["index", "label+id"])
def test_gradcheck(impl: Any, positives: str) -> None:
    """Query, key and both student temperatures, with any upstream gradient on both losses."""
    (query, key, *teacher), options = problem((5, 7, 3, 2), positives)
    del options["temperature"], options["student_temperature"]
    temperatures = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, 0.3)]

    def losses(query: Tensor, key: Tensor, temperature: Tensor, student_temperature: Tensor) -> tuple[Tensor, ...]:
        given = {"temperature": temperature, "student_temperature": student_temperature, **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gradcheck leaves the sphere
            return tuple(info_nce_distill(query, key, *teacher, **given, impl=impl)[:2])

    def loss(*arguments: Tensor) -> Tensor:
        given = dict(zip(("temperature", "student_temperature"), arguments[2:], strict=True)) | options
        weights = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
        mask = torch.tensor([True, False, True, True, False])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return info_nce_distill_loss(
                *arguments[:2], *teacher, **given, distill_weight=weights, anchor_mask=mask, impl=impl
            ).loss

    inputs = [query.requires_grad_(), key.requires_grad_(), *temperatures]
    assert torch.autograd.gradcheck(losses, inputs)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("positives", ["index", "label+id"])
def test_reduced_call_is_the_reduction_of_the_rows(impl: Any, positives: str) -> None:
    tensors, options = problem((9, 13, 6, 4), positives)
    weights, mask = torch.rand(9, dtype=torch.float64), torch.arange(9) % 3 != 1
    gradients = []
    for reduced in (False, True):
        query, key = (tensor.clone().requires_grad_() for tensor in tensors[:2])
        if reduced:
            result = info_nce_distill_loss(
                query, key, *tensors[2:], **options, distill_weight=weights, anchor_mask=mask, impl=impl
            )
            loss = result.loss
            assert not any(row.requires_grad for row in result[1:])
        else:
            rows = info_nce_distill(query, key, *tensors[2:], **options, impl=impl)
            loss = rows.contrastive[mask].mean() + (weights * rows.distillation).mean()
        gradients.append((loss.detach(), *torch.autograd.grad(3.0 * loss, (query, key))))
    for separate, together in zip(*gradients, strict=True):
        assert torch.allclose(separate, together, rtol=1e-10, atol=1e-14)


def naive(tensors: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in the dtype of its inputs: the lines that the call replaces."""
    query, key, teacher_query, teacher_key = tensors
    log_q = (query @ key.T / options["temperature"]).log_softmax(1)
    contrastive = -log_q[torch.arange(len(query)), options["positive"]]
    p = (teacher_query @ teacher_key.T / options["teacher_temperature"]).softmax(1)
    distillation = -(p * (query @ key.T / options["student_temperature"]).log_softmax(1)).sum(1)
    return contrastive, distillation


@pytest.mark.parametrize("impl", IN_FLOAT32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 11, 5, 3), (130, 257, 64, 32), (70, 90, 300, 20)], ids=str)
def test_error_is_no_worse_than_plain_pytorch(impl: Any, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """Losses and gradients against float64, beside those of plain PyTorch in the same dtype."""
    tensors, options = problem(shape, "index", dtype=dtype)
    results = []
    for kind in ("exact", "naive", "ours"):
        query, key = (
            tensor.clone().to(torch.float64 if kind == "exact" else dtype).requires_grad_() for tensor in tensors[:2]
        )
        teacher = [tensor.to(query.dtype) for tensor in tensors[2:]]
        if kind == "ours":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # half-precision norms
                contrastive, distillation = info_nce_distill(query, key, *teacher, **options, impl=impl)[:2]
            assert contrastive.dtype == torch.float32
        else:
            contrastive, distillation = naive([query, key, *teacher], options)
        gradients = torch.autograd.grad((contrastive.double() + distillation.double()).mean(), (query, key))
        results.append([value.detach().double() for value in (contrastive, distillation, *gradients)])
    exact, plain, ours = results
    for reference, other, mine in zip(exact, plain, ours, strict=True):
        epsilon = torch.finfo(
            dtype if mine.ndim == 2 else torch.float32
        ).eps  # gradients are returned in the inputs' dtype
        allowed = (other - reference).abs().max() + 4 * epsilon * reference.abs().max()
        assert (mine - reference).abs().max() <= allowed


@pytest.mark.filterwarnings("ignore:.* is not unit-norm")
@pytest.mark.parametrize("positives", ["index", "label"])
@pytest.mark.parametrize("width", [32, 160])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IN_FLOAT32)
def test_gradients_near_the_optimum_keep_their_digits(
    impl: Any, dtype: torch.dtype, width: int, positives: str
) -> None:
    """Every key is nearly its query and has nearly all of the softmax: 1 - q_pos must be taken before rounding."""
    generator = torch.Generator().manual_seed(0)
    query = unit(generator, 64, width)
    key = functional.normalize(query + 0.2 * unit(generator, 64, width), dim=1).to(dtype)
    query, numbers = query.to(dtype), torch.arange(64)
    options = {"positive": numbers} if positives == "index" else {"query_label": numbers, "key_label": numbers}
    gradients = []
    for kind in ("reference", impl):
        inputs = [(x.double() if kind == "reference" else x).clone().requires_grad_() for x in (query, key)]
        loss = info_nce_distill(*inputs, **options, temperature=0.1, impl=kind).contrastive.sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for exact, ours in zip(*gradients, strict=True):
        assert (ours.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.filterwarnings("ignore:query and key are one tensor")
@pytest.mark.parametrize("impl", IN_FLOAT32)
def test_confident_softmaxes_lose_no_digits(impl: Any) -> None:
    """At temperature 0.01 logits reach 100, whose exponential float32 cannot hold; losses near 0 stay accurate."""
    tensors, options = problem((64, 64, 16, 16), "index", dtype=torch.float32)
    tensors = [tensors[0], tensors[0], tensors[2], tensors[2]]  # every query is among the keys
    options |= {"temperature": 0.01, "student_temperature": 0.01, "teacher_temperature": 0.01}
    exact = info_nce_distill(*tensors, **options, impl="reference")
    ours = info_nce_distill(*tensors, **options, impl=impl)
    for mine, reference in zip(ours, exact, strict=True):
        assert torch.allclose(mine.double(), reference, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_teacher(impl: Any) -> None:
    (query, key, *_), options = problem((7, 11, 5, 3), "index")
    rows = info_nce_distill(query, key, positive=options["positive"], temperature=0.5, impl=impl)
    expected = functional.cross_entropy(query @ key.T / 0.5, options["positive"], reduction="none")
    assert torch.allclose(rows.contrastive, expected, rtol=1e-12)
    assert rows[1:] == (None, None, None)
    result = info_nce_distill_loss(
        query.requires_grad_(), key, positive=options["positive"], temperature=0.5, impl=impl
    )
    assert torch.allclose(result.loss, expected.mean(), rtol=1e-12)
    result.loss.backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_invariances(impl: Any) -> None:
    """Permuting keys changes nothing; at one temperature distillation - entropy is > 0, and 0 for equal models."""
    tensors, options = problem((9, 14, 6, 6), "index")
    permutation = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    moved = [tensors[0], tensors[1][permutation], tensors[2], tensors[3][permutation]]
    where = torch.argsort(permutation)[options["positive"]]
    base = info_nce_distill(*tensors, **options, impl=impl)
    for a, b in zip(base, info_nce_distill(*moved, **(options | {"positive": where}), impl=impl), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    one = {"positive": options["positive"], "temperature": 0.3, "impl": impl}
    drift = (rows := info_nce_distill(*tensors, **one)).distillation - rows.teacher_entropy
    assert (drift > 0).all()
    same = info_nce_distill(*tensors[:2], *tensors[:2], **one)
    assert torch.allclose(same.distillation, same.teacher_entropy, rtol=1e-12)
    assert torch.allclose(same.contrastive, same.teacher_contrastive, rtol=1e-12)


@pytest.mark.parametrize("impl", IN_FLOAT32)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loss_scaling_survives_half_precision(impl: Any, dtype: torch.dtype) -> None:
    """Gradients are multiplied by the upstream gradient, up to 65536 in mixed precision, before they are rounded."""
    tensors, options = problem((64, 96, 16, 8), "index", dtype=dtype)
    found = []
    for kind in ("reference", impl):
        query, key = (tensor.clone().requires_grad_() for tensor in tensors[:2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = info_nce_distill_loss(query, key, *tensors[2:], **options, impl=kind).loss
        found.append(torch.autograd.grad(65536.0 * loss, (query, key)))
    for exact, mine in zip(*found, strict=True):
        assert mine.isfinite().all()
        assert (mine.double() - exact.double()).abs().max() <= 2 * torch.finfo(dtype).eps * exact.double().abs().max()


@pytest.mark.parametrize("impl", IN_FLOAT32)
@pytest.mark.parametrize("reduced", [False, True])
def test_autocast_does_not_lower_the_precision(impl: Any, reduced: bool) -> None:
    tensors, options = problem((40, 50, 16, 8), "label+id", dtype=torch.float32)
    results = []
    for enabled in (False, True):
        query, key = (tensor.clone().requires_grad_() for tensor in tensors[:2])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            call = info_nce_distill_loss if reduced else info_nce_distill
            result = call(query, key, *tensors[2:], **options, impl=impl)
            loss = result.loss if reduced else (result.contrastive + result.distillation).mean()
            results.append((loss, *torch.autograd.grad(loss, (query, key))))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("impl", IN_FLOAT32)
def test_graph_can_be_used_twice_and_queue_keys_get_no_gradient(impl: Any) -> None:
    tensors, options = problem((7, 11, 5, 3), "index", dtype=torch.float32)
    query = tensors[0].clone().requires_grad_()
    loss = info_nce_distill(query, *tensors[1:], **options, impl=impl).contrastive.sum()
    first = torch.autograd.grad(loss, query, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, query)[0])
    assert tensors[1].grad is None


@pytest.mark.parametrize("impl", IN_FLOAT32)
def test_non_contiguous_inputs(impl: Any) -> None:
    tensors, options = problem((8, 12, 6, 4), "index", dtype=torch.float32)
    strided = [torch.cat([tensor, tensor], 1).T.contiguous().T[:, : tensor.shape[1]] for tensor in tensors]
    assert not strided[0].is_contiguous()
    results = (info_nce_distill(*given, **options, impl=impl) for given in (tensors, strided))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("reduced", [False, True])
def test_streaming_never_stores_all_similarities(reduced: bool) -> None:
    n, m = 2048, 4096
    tensors, options = problem((n, m, 8, 8), "label+id", dtype=torch.float32)
    query, key = (tensor.requires_grad_() for tensor in tensors[:2])
    with LargestTensor() as largest:
        if reduced:
            info_nce_distill_loss(query, key, *tensors[2:], **options, impl="streaming").loss.backward()
        else:
            rows = info_nce_distill(query, key, *tensors[2:], **options, impl="streaming")
            (rows.contrastive + rows.distillation).sum().backward()
    assert 0 < largest.elements <= 512 * m < n * m


def call(**change: Any) -> Any:
    """The call on a small valid problem with some arguments replaced."""
    (query, key, teacher_query, teacher_key), options = problem((4, 6, 3, 2), "index", dtype=torch.float32)
    arguments = {
        "query": query,
        "key": key,
        "teacher_query": teacher_query,
        "teacher_key": teacher_key,
        **options,
    } | change
    return info_nce_distill(**arguments)


LABELS = {"positive": None, "query_label": torch.tensor([0, 1, 2, 3]), "key_label": torch.tensor([0, 1, 1, 0, 1, 4])}
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"query": [[1.0]]}, TypeError, "query must be a tensor, got list"),
    "vector": ({"query": torch.ones(3)}, ValueError, "query must be a non-empty matrix .* got shape \\(3,\\)"),
    "no candidates": ({"key": torch.ones(0, 3)}, ValueError, "key must be a non-empty matrix"),
    "integers": ({"query": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "query must be float16.* got torch.int64"),
    "mixed dtypes": (
        {"key": unit(torch.Generator(), 6, 3)},
        TypeError,
        "one dtype, got torch.float32 and torch.float64",
    ),
    "width": ({"key": unit(torch.Generator(), 6, 5, torch.float32)}, ValueError, "one width, got 3 and 5"),
    "device": ({"key": torch.ones(6, 3, device="meta")}, ValueError, "one device, got query on cpu and key on meta"),
    "half a teacher": ({"teacher_key": None}, ValueError, "teacher_query and teacher_key go together"),
    "teacher rows": (
        {"teacher_query": unit(torch.Generator(), 5, 2, torch.float32)},
        ValueError,
        "same 4 queries and 6 keys, got 5 and 6",
    ),
    "teacher with gradient": (
        {"teacher_query": unit(torch.Generator(), 4, 2, torch.float32).requires_grad_()},
        ValueError,
        "the teacher is frozen",
    ),
    "NaN": ({"query": torch.full((4, 3), math.nan)}, ValueError, "query is not finite in rows 0, 1, 2, 3"),
    "one infinite row": (
        {"key": torch.eye(6)[:, :3].index_fill(0, torch.tensor([2]), math.inf)},
        ValueError,
        "key is not finite in row 2:",
    ),
    "not unit-norm": ({"query": 2 * torch.eye(4)[:, :3], "strict": True}, ValueError, "query is not unit-norm"),
    "no positives": ({"positive": None}, ValueError, "give the positives either as key indices"),
    "two kinds": ({"query_label": torch.zeros(4).long(), "key_label": torch.zeros(6).long()}, ValueError, "either as"),
    "half the labels": (
        {"positive": None, "query_label": torch.zeros(4).long()},
        ValueError,
        "query_label and key_label go together",
    ),
    "float positives": ({"positive": torch.zeros(4)}, TypeError, "positive must have a dtype of .* got torch.float32"),
    "positive shape": (
        {"positive": torch.zeros(5).long()},
        ValueError,
        "positive must have shape \\(4,\\), got \\(5,\\)",
    ),
    "positive too large": ({"positive": torch.tensor([0, 6, 1, 9])}, ValueError, "0..5, but is not for rows 1, 3"),
    "positive negative": ({"positive": torch.tensor([0, -1, 1, 2])}, ValueError, "is not for row 1"),
    "positive is itself": (
        {"positive": torch.tensor([0, 2, 3, 4]), "query_id": torch.arange(4), "key_id": torch.arange(6)},
        ValueError,
        "row's own id, which excludes it, for row 0",
    ),
    "everything excluded": (
        {"query_id": torch.tensor([7, 1, 2, 3]), "key_id": torch.full((6,), 7)},
        ValueError,
        "every key carries the id of row 0",
    ),
    "no positive for some": (LABELS, ValueError, "no key but itself has the label of rows 2, 3"),
    "unknown policy": ({"on_missing_positive": "skip"}, ValueError, "'error' or 'ignore', got 'skip'"),
    "temperature without an inverse": ({"temperature": 1e-40}, ValueError, "at least 1e-30, got 1e-40"),
    "temperature zero": ({"temperature": 0.0}, ValueError, "temperature must be finite and at least 1e-30, got 0.0"),
    "temperature NaN": ({"student_temperature": math.nan}, ValueError, "student_temperature must be .* got nan"),
    "temperature text": ({"teacher_temperature": "low"}, TypeError, "teacher_temperature must be a float .* got 'low'"),
    "temperature vector": (
        {"temperature": torch.ones(2)},
        ValueError,
        "0-d float tensor, got torch.float32 of shape \\(2,\\)",
    ),
    "learnt teacher": (
        {"teacher_temperature": torch.tensor(0.1, requires_grad=True)},
        ValueError,
        "teacher_temperature requires grad",
    ),
    "unknown implementation": ({"impl": "fast"}, ValueError, "got 'fast'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_refuses(name: str) -> None:
    change, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call(**change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchor_mask": torch.zeros(4)}, TypeError, "anchor_mask must have a dtype of bool"),
        ({"anchor_mask": [True] * 4}, TypeError, "anchor_mask must be a bool tensor, got list"),
        ({"anchor_mask": torch.zeros(4, dtype=torch.bool)}, ValueError, "anchor_mask selects no row"),
        ({"distill_weight": -1.0}, ValueError, "distill_weight must be finite and >= 0, got -1.0"),
        ({"distill_weight": torch.ones(3)}, ValueError, "distill_weight must have shape \\(4,\\)"),
        ({"distill_weight": torch.ones(4, requires_grad=True)}, ValueError, "distill_weight requires grad"),
        ({"distill_weight": torch.tensor(1.0, requires_grad=True)}, ValueError, "distill_weight requires grad"),
        ({"distill_weight": "high"}, TypeError, "distill_weight must be a float or a tensor, got 'high'"),
    ],
)
def test_reduced_call_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors, options = problem((4, 6, 3, 2), "index", dtype=torch.float32)
    with pytest.raises(error, match=message):
        info_nce_distill_loss(*tensors, **options, **change)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_without_positive(impl: Any) -> None:
    """ "ignore" makes their contrastive loss 0 with no gradient; anchors alone need positives."""
    rows = call(**LABELS, on_missing_positive="ignore", impl=impl)
    assert rows.contrastive[2:].tolist() == [0.0, 0.0]
    assert (rows.contrastive[:2] > 0).all()
    assert (rows.distillation > 0).all()
    tensors, options = problem((4, 6, 3, 2), "index", dtype=torch.float32)
    tensors[0].requires_grad_()
    mask = torch.tensor([True, True, False, False])
    for change in ({"anchor_mask": mask}, {"on_missing_positive": "ignore"}):
        result = info_nce_distill_loss(*tensors, **(options | LABELS | change), distill_weight=0.0, impl=impl)
        (gradient,) = torch.autograd.grad(result.loss, tensors[0])
        assert gradient[2:].abs().max() == 0.0
        assert gradient[:2].abs().min() > 0.0


def test_not_unit_norm_warns_once() -> None:
    _warned.clear()
    with pytest.warns(UserWarning, match=r"query is not unit-norm \(norms 2 to 2\): normalise it") as caught:
        call(query=2 * torch.eye(4, 3) + torch.tensor([0, 0, 0, 1.0])[:, None] * torch.tensor([2.0, 0, 0]))
    assert caught[0].filename == __file__  # it points to the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(query=3 * torch.eye(4, 3) + torch.tensor([0, 0, 0, 1.0])[:, None])


def test_rows_that_are_their_own_candidates_are_warned_of_once() -> None:
    z = unit(torch.Generator().manual_seed(0), 6, 3)
    ids, labels = torch.arange(6), torch.arange(6) // 2
    given = {"query_label": labels, "key_label": labels, "temperature": 0.5}
    _warned.clear()
    with pytest.warns(UserWarning, match="every row is a candidate of itself") as caught:
        info_nce_distill(z, z, **given)
    assert caught[0].filename == __file__
    info_nce_distill(z, z, **given)  # warnings are errors here
    _warned.clear()
    info_nce_distill(z, z, query_id=ids, key_id=ids, **given)
    info_nce_distill(z, z.clone(), **given)
