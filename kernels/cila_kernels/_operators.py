"""Two operators on the GPU that torch.compile sees as one node each, with their gradients.

``row_statistics`` sweeps the keys once and returns, for every row, what a softmax leaves behind.
``embedding_gradients`` recomputes the similarities tile by tile. The gradient of any loss of those statistics in
s = query . key is

    G = u_1 q(tau_1) / tau_1 + u_2 q(tau_2) / tau_2 + u_3 p

with u the upstream gradients of logsumexp(s / tau_1), logsumexp(s / tau_2) and sum_j p_j s_j.

Gradients are deterministic: partial sums over splits are written side by side and added in a fixed order. For narrow
embeddings one kernel forms d query and one d key, with G in registers. For wide ones the recomputation and the sums do
not fit in registers together: G is written for as many rows as fit a fixed workspace, and two library products follow.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from cila_kernels._triton_kernels import gradient_kernel, similarity_gradient_kernel, statistics_kernel
from cila_kernels._tuning import arithmetic_of, fits_registers, launch

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
_WORKSPACE_BYTES = 2**28
_SPLIT_MULTIPLE = 1024  # rows or keys of the smallest split: a multiple of every block
_HALF_RANGE = 2.0**13  # G of float16 input is scaled up to this
_SMALLEST_FACTOR = 2.0**-100  # what is scaled; smaller ones are 0 in float16 anyway


@torch.library.custom_op("cila_kernels::row_statistics", mutates_args=())
def row_statistics(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor | None,
    teacher_key: Tensor | None,
    query_id: Tensor | None,
    key_id: Tensor | None,
    query_group: Tensor,
    key_group: Tensor,
    positive_count: Tensor,
    positive: Tensor,
    temperature: Tensor,
    student_temperature: Tensor,
    teacher_temperature: Tensor,
    shared: bool,
    slopes: bool,
    allow_tf32: bool,
) -> Tensor:
    """(8, N) float32, nats and similarities: logsumexp(s / tau_1), logsumexp(s / tau_2), mean of s under the teacher's
    softmax p, logsumexp of the teacher's logits, entropy of p, means of s under the student's softmaxes (``slopes``),
    and ``positive`` (N,), the mean of s over the positives, which only gains its gradient here: it belongs in G.

    Contiguous inputs; groups as of :meth:`Positives.numbers`, ``positive_count`` (N,) their numbers; ``shared``: both
    student temperatures are one; without a teacher all but 0, 5 and 7 are 0.
    """
    n, m = query.shape[0], key.shape[0]
    splits, size = _split(n, m, query.device)
    parts = query.new_empty(9, splits, n, dtype=torch.float32)
    scale = _scale(temperature, student_temperature, teacher_temperature)
    launch(
        statistics_kernel,
        lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), splits),
        (query, key, teacher_query, teacher_key, query_id, key_id, scale, parts, n, m, size),
        (query, key),
        teacher_query,
        {"IDS": query_id is not None, "SHARED": shared, "SLOPES": slopes},
        allow_tf32,
    )
    top, total, total_x, distill, distill_x, top_t, total_t, cross, entropy = parts
    weight, log_total = _merge(top, total)
    to_similarity = 1.0 / scale[0]
    out = query.new_zeros(8, n, dtype=torch.float32)
    out[0] = log_total * _LN_2
    out[7] = positive
    if slopes:
        out[5] = (weight * total_x).sum(0) * to_similarity
    if teacher_query is None:
        return out
    if shared:
        out[1], out[6] = out[0], out[5]
    else:
        weight, log_total = _merge(scale[1] * top, distill)
        out[1] = log_total * _LN_2
        if slopes:
            out[6] = (weight * distill_x).sum(0) * to_similarity
    weight, log_total = _merge(top_t, total_t)
    out[2] = (weight * cross).sum(0) * to_similarity
    out[3] = log_total * _LN_2
    out[4] = (log_total - (weight * entropy).sum(0)) * _LN_2
    return out


@row_statistics.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(8, query.shape[0], dtype=torch.float32)


@torch.library.custom_op("cila_kernels::embedding_gradients", mutates_args=())
def embedding_gradients(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor | None,
    teacher_key: Tensor | None,
    query_id: Tensor | None,
    key_id: Tensor | None,
    query_group: Tensor,
    key_group: Tensor,
    positive_count: Tensor,
    temperature: Tensor,
    student_temperature: Tensor,
    teacher_temperature: Tensor,
    shared: bool,
    statistics: Tensor,
    upstream: Tensor,
    of_query: bool,
    of_key: bool,
    rounded: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients in query (N, D) and key (M, D), ``rounded`` to their dtype or in float32, from ``upstream`` (8, N) of
    the statistics (of which 0, 1 and 3 are used: those of these keys, or of more); what is not asked for is empty."""
    scale = _scale(temperature, student_temperature, teacher_temperature)
    terms = _row_terms(statistics, upstream, positive_count, temperature, student_temperature, shared)
    inverse = None
    if query.dtype == torch.float16:
        exponent = torch.log2(terms[3:].abs().sum(0).amax().clamp(min=_SMALLEST_FACTOR)).ceil()
        terms[3:] *= _HALF_RANGE * torch.exp2(-exponent)
        inverse = torch.exp2(exponent) / _HALF_RANGE
    flags = {"IDS": query_id is not None, "SHARED": shared}
    gradients: list[Tensor | None] = [None, None]
    if fits_registers(query.shape[1], arithmetic_of(query.dtype, allow_tf32=allow_tf32)):
        for i, wanted in enumerate((of_query, of_key)):
            if wanted:
                pairs = [(query, key), (teacher_query, teacher_key), (query_id, key_id), (query_group, key_group)]
                sides = [side for pair in pairs for side in (pair[i], pair[1 - i])]
                gradients[i] = _one_gradient((*sides, scale, terms), {**flags, "OF_KEYS": i == 1}, allow_tf32)
    else:
        gradients = _two_gradients(
            (query, key, teacher_query, teacher_key, query_id, key_id, query_group, key_group, scale, terms),
            flags,
            (of_query, of_key),
            allow_tf32,
        )
    dtype = query.dtype if rounded else torch.float32
    d_query, d_key = (
        query.new_empty(0) if g is None else (g if inverse is None else g.mul_(inverse)).to(dtype) for g in gradients
    )
    return d_query, d_key


@embedding_gradients.register_fake
def _(query: Tensor, key: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    of_query, of_key, rounded, _ = arguments[-4:]
    dtype = query.dtype if rounded else torch.float32
    return (
        torch.empty_like(query, dtype=dtype) if of_query else query.new_empty(0),
        torch.empty_like(key, dtype=dtype) if of_key else query.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shared, ctx.slopes, ctx.allow_tf32 = inputs
    ctx.save_for_backward(*tensors, output)


@once_differentiable
def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    *inputs, _, temperature, student_temperature, teacher_temperature, statistics = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    d_query = d_key = d_temperature = d_student = None
    with torch.autocast(upstream.device.type, enabled=False):
        if wanted[0] or wanted[1]:
            d_query, d_key = torch.ops.cila_kernels.embedding_gradients(
                *inputs,
                temperature,
                student_temperature,
                teacher_temperature,
                ctx.shared,
                statistics,
                upstream,
                wanted[0],
                wanted[1],
                True,
                ctx.allow_tf32,
            )
        if wanted[10]:
            d_temperature = (-_dot(upstream[0], statistics[5]) / temperature**2).to(temperature.dtype)
        if wanted[11]:
            d_student = (-_dot(upstream[1], statistics[6]) / student_temperature**2).to(student_temperature.dtype)
    return (
        d_query if wanted[0] else None,
        d_key if wanted[1] else None,
        *(None,) * 8,
        d_temperature,
        d_student,
        *(None,) * 4,
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """In float64: one number from N terms of either sign."""
    return torch.dot(a.double(), b.double())


row_statistics.register_autograd(_backward, setup_context=_save)


def _one_gradient(tensors: tuple[Any, ...], flags: dict[str, bool], allow_tf32: bool) -> Tensor:
    """Of the first matrix (A, D), summed over the second, in float32."""
    a, b, teacher_a = tensors[:3]
    splits, size = _split(a.shape[0], b.shape[0], a.device)
    out = a.new_empty(splits, *a.shape, dtype=torch.float32)
    launch(
        gradient_kernel,
        lambda meta: (triton.cdiv(a.shape[0], meta["BLOCK_A"]), splits),
        (*tensors, out, a.shape[0], b.shape[0], size),
        (a, b),
        teacher_a,
        flags,
        allow_tf32,
    )
    return out[0] if splits == 1 else out.sum(0)


def _two_gradients(
    tensors: tuple[Any, ...], flags: dict[str, bool], wanted: tuple[bool, bool], allow_tf32: bool
) -> list[Tensor | None]:
    """Of query and key, in float32, by way of G of as many rows as fit the workspace."""
    query, key, teacher_query = tensors[:3]
    n, m = query.shape[0], key.shape[0]
    size = min(n, max(_WORKSPACE_BYTES // (m * query.element_size()), 1))
    size = size // 128 * 128 or size
    workspace = query.new_empty(size, m)
    d_query = torch.empty_like(query, dtype=torch.float32) if wanted[0] else None
    d_key = torch.zeros_like(key, dtype=torch.float32) if wanted[1] else None
    for first in range(0, n, size):
        last = min(first + size, n)
        launch(
            similarity_gradient_kernel,
            partial(_tiles, last - first, m),
            (*tensors, workspace, n, m, first, last),
            (query, key),
            teacher_query,
            flags,
            allow_tf32,
        )
        g = workspace[: last - first]
        with _float32_products(allow_tf32) if query.dtype == torch.float32 else contextlib.nullcontext():
            if d_query is not None:
                d_query[first:last] = _product(g, key)
            if d_key is not None:
                d_key += _product(g.T, query[first:last])
    return [d_query, d_key]


def _tiles(rows: int, columns: int, meta: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(columns, meta["BLOCK_M"]), triton.cdiv(rows, meta["BLOCK_N"])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


@contextlib.contextmanager
def _float32_products(allow_tf32: bool) -> Iterator[None]:
    """Library products of float32 matrices in TF32 or not, whatever the user set elsewhere."""
    backend = torch.backends.cuda.matmul
    value: str | bool = "tf32" if allow_tf32 else "ieee"
    name = "fp32_precision"
    if not hasattr(backend, name):  # before PyTorch 2.9
        name, value = "allow_tf32", allow_tf32
    before = getattr(backend, name)
    setattr(backend, name, value)
    try:
        yield
    finally:
        setattr(backend, name, before)


def _scale(temperature: Tensor, student_temperature: Tensor, teacher_temperature: Tensor) -> Tensor:
    """(3,) float32: log2(e) / temperature, temperature / student_temperature, log2(e) / teacher_temperature."""
    tau_1, tau_2, tau_t = temperature.double(), student_temperature.double(), teacher_temperature.double()
    return torch.stack([_LOG2_E / tau_1, tau_1 / tau_2, _LOG2_E / tau_t]).float()


def _row_terms(
    statistics: Tensor,
    upstream: Tensor,
    positive_count: Tensor,
    temperature: Tensor,
    student_temperature: Tensor,
    shared: bool,
) -> Tensor:
    """(7, N) float32: log2 of the three softmax sums, the factors of the softmaxes in G, and that of a positive."""
    contrastive, distill = upstream[0] / temperature, upstream[1] / student_temperature
    if shared:
        contrastive = contrastive + distill
    log_sums = [statistics[row] * _LOG2_E for row in (0, 1, 3)]
    return torch.stack(
        [*log_sums, contrastive, distill, upstream[2], upstream[7] / positive_count.clamp(min=1)]
    ).float()


def _merge(top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """From the largest logit and the sum of exponentials above it, (splits, N): weights that make partial sums means of
    the whole, (splits, N), and log2 of the sum of all exponentials, (N,)."""
    largest = top.amax(0)
    weight = torch.exp2(top - largest)
    whole = (weight * total).sum(0)
    return weight / whole, largest + torch.log2(whole)


def _split(own: int, other: int, device: torch.device) -> tuple[int, int]:
    """(splits, rows in each): enough programs of 128 rows to fill the device twice."""
    wanted = min(2 * _processors(device) * 128 // own, triton.cdiv(other, _SPLIT_MULTIPLE))
    size = triton.cdiv(triton.cdiv(other, max(wanted, 1)), _SPLIT_MULTIPLE) * _SPLIT_MULTIPLE
    return triton.cdiv(other, size), size


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
