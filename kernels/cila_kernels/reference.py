"""The losses as their equations read, in float64, with plain autograd and all N x M similarities: the oracle of the
other implementations.
"""

from __future__ import annotations

import torch

from cila_kernels._problem import Problem
from cila_kernels._rows import RowLosses


def row_losses(problem: Problem) -> RowLosses:
    """Per-row losses in nats; float64, whatever the input."""
    rows = slice(None)
    excluded = problem.excluded(rows)
    weight = problem.positive_weight(rows, torch.float64)  # (N, M): 1 / number of positives on the positives

    def log_softmax(query: torch.Tensor, key: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        logits = (query.double() @ key.double().T) / temperature.double()
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        log_p = torch.log_softmax(logits, dim=1)
        return (
            log_p if excluded is None else log_p.masked_fill(excluded, 0.0)
        )  # no weight falls on them: 0 x 0, not 0 x inf

    # contrastive_i = - mean over positives j of log softmax(s_i / temperature)_j
    log_q = log_softmax(problem.query, problem.key, problem.temperature)
    contrastive = -(weight * log_q).sum(dim=1)
    if problem.teacher_query is None or problem.teacher_key is None:
        return RowLosses(contrastive, None, None, None)

    # distillation_i = - sum_j p_ij log q_ij,  entropy_i = - sum_j p_ij log p_ij
    with torch.no_grad():
        log_p = log_softmax(problem.teacher_query, problem.teacher_key, problem.teacher_temperature)
        p = log_p.exp() if excluded is None else log_p.exp().masked_fill(excluded, 0.0)
        entropy = -(p * log_p).sum(dim=1)
        teacher_contrastive = -(weight * log_p).sum(dim=1)
    log_q = log_softmax(problem.query, problem.key, problem.student_temperature)
    distillation = -(p * log_q).sum(dim=1)
    return RowLosses(contrastive, distillation, entropy, teacher_contrastive)


def reduced_loss(
    problem: Problem, contrastive_weight: torch.Tensor, distill_weight: torch.Tensor
) -> tuple[torch.Tensor, RowLosses]:
    """(sum_i contrastive_weight_i contrastive_i + distill_weight_i distillation_i, detached per-row losses)."""
    rows = row_losses(problem)
    loss = (contrastive_weight * rows.contrastive).sum()
    if rows.distillation is not None:
        loss = loss + (distill_weight * rows.distillation).sum()
    return loss, rows.detach()
