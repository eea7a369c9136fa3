"""The losses as their equations read, in float64, with plain autograd and all N x M similarities: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from cila_kernels._candidates import Problem
from cila_kernels._rows import RowLosses


def row_losses(problem: Problem) -> RowLosses:
    """Per-row losses in nats; float64, whatever the input."""
    with torch.autocast(problem.query.device.type, enabled=False):
        excluded = None if problem.exclusion is None else problem.exclusion.mask()
        weight = _positive_weight(problem, excluded)

        # contrastive_i = - mean over positives j of log softmax(s_i / temperature)_j
        log_q = _log_softmax(problem.query, problem.key, problem.temperature, excluded)
        contrastive = -(weight * log_q).sum(dim=1)
        if problem.teacher_query is None or problem.teacher_key is None:
            return RowLosses(contrastive, None, None, None)

        # distillation_i = - sum_j p_ij log q_ij,  entropy_i = - sum_j p_ij log p_ij
        with torch.no_grad():
            log_p = _log_softmax(problem.teacher_query, problem.teacher_key, problem.teacher_temperature, excluded)
            p = log_p.exp() if excluded is None else log_p.exp().masked_fill(excluded, 0.0)
            entropy = -(p * log_p).sum(dim=1)
            teacher_contrastive = -(weight * log_p).sum(dim=1)
        log_q = _log_softmax(problem.query, problem.key, problem.student_temperature, excluded)
        distillation = -(p * log_q).sum(dim=1)
        return RowLosses(contrastive, distillation, entropy, teacher_contrastive)


def reduced_loss(problem: Problem, contrastive_weight: Tensor, distill_weight: Tensor) -> tuple[Tensor, RowLosses]:
    """(sum_i contrastive_weight_i contrastive_i + distill_weight_i distillation_i, detached per-row losses)."""
    rows = row_losses(problem)
    loss = (contrastive_weight * rows.contrastive).sum()
    if rows.distillation is not None:
        loss = loss + (distill_weight * rows.distillation).sum()
    return loss, rows.detach()


def _log_softmax(query: Tensor, key: Tensor, temperature: Tensor, excluded: Tensor | None) -> Tensor:
    """(N, M); 0 at excluded candidates, on which no weight falls: 0 x 0 instead of 0 x inf."""
    logits = (query.double() @ key.double().T) / temperature.double()
    if excluded is None:
        return torch.log_softmax(logits, dim=1)
    return torch.log_softmax(logits.masked_fill(excluded, -torch.inf), dim=1).masked_fill(excluded, 0.0)


def _positive_weight(problem: Problem, excluded: Tensor | None) -> Tensor:
    """(N, M) float64: 1 / number of positives on the positives of each row."""
    positives, n, m = problem.positives, problem.query.shape[0], problem.key.shape[0]
    if positives.index is not None:
        weight = torch.zeros(n, m, dtype=torch.float64, device=problem.query.device)
        return weight.scatter_(1, positives.index[:, None], 1.0)
    label = positives.groups[0]
    mask = label.query[:, None] == label.key[None, :]
    if excluded is not None:
        mask &= ~excluded
    return mask.double() / positives.count[:, None].clamp(min=1)
