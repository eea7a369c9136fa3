"""impl="triton": the losses, composed of what the fused GPU kernels return; with TRITON_INTERPRET=1 in the environment
the kernels are interpreted on a CPU.

The operators of :mod:`_operators` sweep the keys; the positives and the rest are plain PyTorch on (N,) numbers, whose
autograd knows how gradients flow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cila_kernels._operators import row_statistics
from cila_kernels._problem import Problem
from cila_kernels._rows import RowLosses
from cila_kernels._tuning import INTERPRETED


def unavailable(problem: Problem) -> str | None:
    """Why this problem cannot be solved here, with the remedy; None if it can."""
    if problem.compute_dtype == torch.float64:
        return "computes in float32, got float64 embeddings: use impl='streaming'"
    if problem.query.device.type != "cuda" and not INTERPRETED:
        return f"needs CUDA tensors, got {problem.query.device}: use impl='streaming', or TRITON_INTERPRET=1 for a test"
    return None


def row_losses(problem: Problem) -> RowLosses:
    """Per-row losses in float32, differentiable in query, key and the student's temperatures."""
    with torch.autocast(problem.query.device.type, enabled=False):
        query, key = problem.query, problem.key
        with torch.no_grad():  # row_statistics differentiates it
            positive = problem.positives.mean_similarity(query, key, torch.float32)
        statistics = row_statistics(
            query.contiguous(),
            key.contiguous(),
            _teacher(problem.teacher_query),
            _teacher(problem.teacher_key),
            *((None, None) if problem.exclusion is None else problem.exclusion.numbers()),
            *problem.positives.numbers(),
            problem.positives.count,
            positive,
            problem.temperature,
            problem.student_temperature,
            problem.teacher_temperature,
            problem.student_temperature is problem.temperature,
            problem.temperature.requires_grad or problem.student_temperature.requires_grad,
            problem.allow_tf32,
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
