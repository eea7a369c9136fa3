"""The per-row result that every implementation returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowLosses(NamedTuple):
    """Losses of each query, shape (N,), in nats. The last three are None without a teacher.

    contrastive: -mean over the row's positives of log softmax(similarity / temperature); 0 for a row without
    positives ("ignore").
    distillation: cross entropy -sum_j p_j log q_j of the teacher's softmax p (teacher_temperature) and the student's
    q (student_temperature).
    teacher_entropy: -sum_j p_j log p_j; distillation - teacher_entropy is the drift KL(p || q). No gradient.
    teacher_contrastive: the contrastive loss of p, at teacher_temperature. No gradient.
    """

    contrastive: Tensor
    distillation: Tensor | None
    teacher_entropy: Tensor | None
    teacher_contrastive: Tensor | None

    def detach(self) -> RowLosses:
        return RowLosses(self.contrastive.detach(), *(None if row is None else row.detach() for row in self[1:]))
