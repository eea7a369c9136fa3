"""impl="triton": the losses, composed of what the fused GPU kernels return; with TRITON_INTERPRET=1 in the environment
the kernels are interpreted on a CPU.

The operators of :mod:`_operators` sweep the keys; the positives and the rest are plain PyTorch on (N,) numbers, whose
autograd knows how gradients flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cila_kernels._candidates import Problem
from cila_kernels._operators import embedding_gradients, row_statistics
from cila_kernels._problem import Inputs
from cila_kernels._rows import RowLosses
from cila_kernels._statistics import Statistics, Teacher
from cila_kernels._tuning import INTERPRETED


def unavailable(inputs: Inputs) -> str | None:
    """Why this cannot be computed here, with the remedy; None if it can."""
    if inputs.compute_dtype == torch.float64:
        return "computes in float32, got float64 embeddings: use impl='streaming'"
    if inputs.query.device.type != "cuda" and not INTERPRETED:
        return f"needs CUDA tensors, got {inputs.query.device}: use impl='streaming', or TRITON_INTERPRET=1 for a test"
    return None


def row_losses(problem: Problem) -> RowLosses:
    """Per-row losses in float32, differentiable in query, key and the student's temperatures."""
    with torch.autocast(problem.query.device.type, enabled=False):
        with torch.no_grad():  # row_statistics differentiates it
            positive = problem.positives.mean_similarity(problem.query, problem.key, torch.float32)
        slopes = problem.temperature.requires_grad or problem.student_temperature.requires_grad
        statistics = row_statistics(
            *_matrices(problem), problem.positives.count, positive, *_temperatures(problem), slopes, problem.allow_tf32
        )
        log_sum, log_sum_distill, cross, log_sum_teacher, entropy, _, _, positive = statistics
        has_positive = problem.positives.count > 0
        contrastive = torch.where(has_positive, log_sum - positive / problem.temperature, 0.0)
        if problem.teacher_query is None or problem.teacher_key is None:
            return RowLosses(contrastive, None, None, None)
        with torch.no_grad():
            teacher_positive = problem.positives.mean_similarity(
                problem.teacher_query, problem.teacher_key, torch.float32
            )
            teacher_contrastive = log_sum_teacher - teacher_positive / problem.teacher_temperature
        return RowLosses(
            contrastive,
            log_sum_distill - cross / problem.student_temperature,
            entropy.detach(),
            torch.where(has_positive, teacher_contrastive, 0.0).detach(),
        )


def shard_statistics(problem: Problem, *, slopes: bool) -> Statistics:
    """As :func:`streaming.shard_statistics`."""
    positives = problem.positives
    positive = positives.similarity_sum(problem.query, problem.key, torch.float32)
    log_sum, log_sum_student, cross, log_sum_teacher, entropy, mean, mean_student, positive = row_statistics(
        *_matrices(problem), positives.count, positive, *_temperatures(problem), slopes, problem.allow_tf32
    ).double()
    teacher = None
    if problem.teacher_query is not None and problem.teacher_key is not None:
        teacher = Teacher(
            log_sum_student,
            mean_student if slopes else None,
            log_sum_teacher,
            cross,
            entropy,
            positives.similarity_sum(problem.teacher_query, problem.teacher_key, torch.float32).double(),
        )
    return Statistics(log_sum, mean if slopes else None, positive, teacher)


def shard_gradients(
    problem: Problem,
    statistics: Statistics,
    contrastive: Tensor | None,
    distillation: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`streaming.shard_gradients`."""
    log_sum = statistics.log_sum
    rows, upstream = log_sum.new_zeros(8, len(log_sum)), log_sum.new_zeros(8, len(log_sum))
    rows[0] = log_sum
    if contrastive is not None:
        upstream[0] = torch.where(problem.positives.count > 0, contrastive, 0.0)
        upstream[7] = -upstream[0] / problem.temperature
    if statistics.teacher is not None:
        rows[1], rows[3] = statistics.teacher.log_sum_student, statistics.teacher.log_sum
        if distillation is not None:
            upstream[1] = distillation
            upstream[2] = -upstream[1] / problem.student_temperature
    d_query, d_key = embedding_gradients(
        *_matrices(problem),
        problem.positives.count,
        *_temperatures(problem),
        rows,
        upstream,
        *wanted,
        False,
        problem.allow_tf32,
    )
    return d_query if wanted[0] else None, d_key if wanted[1] else None


def _matrices(problem: Problem) -> tuple[Any, ...]:
    """Embeddings, ids and groups, as the operators take them."""
    return (
        problem.query.contiguous(),
        problem.key.contiguous(),
        _teacher(problem.teacher_query),
        _teacher(problem.teacher_key),
        *((None, None) if problem.exclusion is None else problem.exclusion.numbers()),
        *problem.positives.numbers(),
    )


def _temperatures(problem: Problem) -> tuple[Tensor, Tensor, Tensor, bool]:
    """And whether both student temperatures are one."""
    return (
        problem.temperature,
        problem.student_temperature,
        problem.teacher_temperature,
        problem.student_temperature is problem.temperature,
    )


def _teacher(embedding: Tensor | None) -> Tensor | None:
    """Contiguous, and no wider than float32."""
    if embedding is None:
        return None
    return (embedding.float() if embedding.dtype == torch.float64 else embedding).contiguous()


def reduced_loss(problem: Problem, contrastive_weight: Tensor, distill_weight: Tensor) -> tuple[Tensor, RowLosses]:
    """(sum_i contrastive_weight_i contrastive_i + distill_weight_i distillation_i, detached per-row losses)."""
    rows = row_losses(problem)
    loss = torch.dot(contrastive_weight.float(), rows.contrastive)
    if rows.distillation is not None:
        loss = loss + torch.dot(distill_weight.float(), rows.distillation)
    return loss, rows.detach()
