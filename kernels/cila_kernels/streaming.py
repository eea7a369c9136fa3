"""Row blocks on any device: O(block x M) memory forward and backward, closed-form gradients.

With s = query . key, s_pos the mean similarity to the row's positives, q(tau) = softmax(s / tau), and p the teacher's
softmax:

    contrastive   c = logsumexp(s / tau_1) - s_pos / tau_1              dc/ds = q(tau_1) / tau_1, dc/ds_pos = -1 / tau_1
    distillation  d = logsumexp(s / tau_2) - sum_j p_j s_j / tau_2      dd/ds = (q(tau_2) - p) / tau_2

so with upstream gradients gc and gd, and G = gc q(tau_1) / tau_1 + gd (q(tau_2) - p) / tau_2,

    d query = G key        d tau_1 = -sum_i gc_i (E_q1[s] - s_pos)_i / tau_1^2
    d key   = G^T query    d tau_2 = -sum_i gd_i (E_q2[s] - E_p[s])_i / tau_2^2

beside what flows through s_pos, which costs O((N + M) D) and is left to autograd.

Every row is complete within its block, so a block needs nothing from the others. Per-row outputs have unknown upstream
gradients: the forward pass keeps three numbers a row, and the backward pass recomputes each block. A reduced loss knows
its weights beforehand: its gradients are formed in the forward pass, with 4 matrix products instead of 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cila_kernels._candidates import Problem
from cila_kernels._rows import RowLosses
from cila_kernels._statistics import Statistics, Teacher
from cila_kernels._sweep import LN_2, BlockStatistics, Sweep, Upstream


@torch.compiler.disable
def row_losses(problem: Problem) -> RowLosses:
    """Per-row losses in the compute dtype, differentiable in query, key and the student's temperatures."""
    with torch.autocast(problem.query.device.type, enabled=False):
        return RowLosses(*_Rows.apply(*_differentiable(problem), problem))


@torch.compiler.disable
def reduced_loss(problem: Problem, contrastive_weight: Tensor, distill_weight: Tensor) -> tuple[Tensor, RowLosses]:
    """(sum_i contrastive_weight_i contrastive_i + distill_weight_i distillation_i, detached per-row losses).

    Both weights are float64 of shape (N,) and get no gradient.
    """
    with torch.autocast(problem.query.device.type, enabled=False):
        loss, *rows = _Reduced.apply(*_differentiable(problem), problem, contrastive_weight, distill_weight)
        return loss, RowLosses(*rows)


def shard_statistics(problem: Problem, *, slopes: bool) -> Statistics:
    """Of every row and the problem's keys, which are some of all; with ``slopes`` the means that temperature gradients
    need."""
    sweep = Sweep(problem, (False, False, slopes, slopes, False))
    found = BlockStatistics.join([sweep.forward(rows)[1] for rows in sweep])
    log_q, mean_q, log_q_distill, mean_q_distill, log_p, mean_p, entropy = (
        None if column is None else column.double() for column in found
    )
    unit = sweep.temperature * LN_2  # x times this is s
    assert log_q is not None
    teacher = None
    if problem.teacher_query is not None and problem.teacher_key is not None:
        assert log_q_distill is not None and log_p is not None and mean_p is not None and entropy is not None
        teacher = Teacher(
            log_q_distill * LN_2,
            None if mean_q_distill is None else mean_q_distill * unit,
            log_p * LN_2,
            mean_p * unit,
            entropy * LN_2,
            problem.positives.similarity_sum(problem.teacher_query, problem.teacher_key, sweep.dtype).double(),
        )
    positive_sum = problem.positives.similarity_sum(problem.query, sweep.key, sweep.dtype).double()
    return Statistics(log_q * LN_2, None if mean_q is None else mean_q * unit, positive_sum, teacher)


def shard_gradients(
    problem: Problem,
    statistics: Statistics,
    contrastive: Tensor | None,
    distillation: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """In query and key, in the compute dtype, by way of the problem's keys, which are some of all; None where not
    wanted.

    ``statistics`` and ``problem.positives.count`` are those of all keys; ``contrastive`` and ``distillation`` (N,) are
    the gradients in the losses, or None, not both.
    """
    sweep = Sweep(problem, (*wanted, False, False, False))
    upstream = Upstream(sweep, contrastive, distillation)
    teacher = statistics.teacher
    logs = [statistics.log_sum, *((None, None) if teacher is None else (teacher.log_sum_student, teacher.log_sum))]
    log_q, log_q_distill, log_p = (None if log is None else (log / LN_2).to(sweep.dtype) for log in logs)
    assert log_q is not None
    found = BlockStatistics(log_q, log_q_distill=log_q_distill, log_p=log_p)
    for rows in sweep:
        sweep.accumulate(rows, sweep.recompute(rows, found, upstream), upstream)
    if upstream.contrastive is not None:
        with torch.enable_grad():
            pair = [
                side.detach().to(sweep.dtype).requires_grad_(flag)
                for side, flag in zip((problem.query, problem.key), wanted, strict=True)
            ]
            positive = problem.positives.mean_similarity(pair[0], pair[1], sweep.dtype)
        inputs = [side for side in pair if side.requires_grad]
        for total, gradient in zip(
            [g for g in (sweep.query_gradient, sweep.key_gradient) if g is not None],
            torch.autograd.grad(positive, inputs, upstream.contrastive / -sweep.temperature),
            strict=True,
        ):
            total += gradient
    return sweep.query_gradient, sweep.key_gradient


def _differentiable(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What gradients flow to: query, key, the student's temperatures and s_pos. The embeddings are in the compute
    dtype: near the optimum the gradient by way of s_pos cancels most of the rest, before either is rounded."""
    query, key = problem.query.to(problem.compute_dtype), problem.key.to(problem.compute_dtype)
    positive = problem.positives.mean_similarity(query, key, problem.compute_dtype)
    return query, key, problem.temperature, problem.student_temperature, positive


class _Rows(torch.autograd.Function):
    """Per-row losses; the backward pass recomputes each block."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *inputs, positive, problem = arguments
        sweep = Sweep(problem, ctx.needs_input_grad)
        statistics = BlockStatistics.join([sweep.forward(rows)[1] for rows in sweep])
        losses = sweep.losses(statistics, positive)
        ctx.problem, ctx.statistics = problem, statistics
        ctx.save_for_backward(*inputs, positive)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(row for row in losses[2:] if row is not None))
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, contrastive: Tensor | None, distillation: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if contrastive is None and distillation is None:
            return (None,) * 6
        *inputs, positive = ctx.saved_tensors  # raises if one was changed in place
        problem, statistics = ctx.problem, ctx.statistics
        with torch.autocast(problem.query.device.type, enabled=False):
            sweep = Sweep(problem, ctx.needs_input_grad)
            upstream = Upstream(sweep, contrastive, distillation)
            if sweep.wants_embeddings:
                for rows in sweep:
                    sweep.accumulate(rows, sweep.recompute(rows, statistics, upstream), upstream)
            gradients = sweep.gradients(statistics, positive, upstream)
        return *(g if g is None else g.to(x.dtype) for g, x in zip(gradients, (*inputs, positive), strict=True)), None


class _Reduced(torch.autograd.Function):
    """The weighted sum of all losses; the forward pass forms its gradients, the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *inputs, positive, problem, contrastive_weight, distill_weight = arguments
        sweep = Sweep(problem, ctx.needs_input_grad)
        upstream = Upstream(sweep, contrastive_weight, None if problem.teacher_query is None else distill_weight)
        parts = []
        for rows in sweep:
            softmaxes, part = sweep.forward(rows)
            parts.append(part)
            if sweep.wants_embeddings:
                sweep.accumulate(rows, softmaxes, upstream)
        statistics = BlockStatistics.join(parts)
        losses = sweep.losses(statistics, positive)
        weights = (upstream.contrastive, upstream.distillation)
        terms = [
            torch.dot(w, row) for w, row in zip(weights, losses[:2], strict=True) if w is not None and row is not None
        ]
        loss = torch.stack(terms).sum()
        ctx.dtypes = [tensor.dtype for tensor in (*inputs, positive)]
        ctx.save_for_backward(*sweep.gradients(statistics, positive, upstream))
        ctx.mark_non_differentiable(*(row for row in losses if row is not None))
        return loss, *losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        scaled = (  # before rounding: a loss scale of 65536 is more than float16 holds
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None
