"""Row blocks on any device: O(block x M) memory forward and backward, closed-form gradients.

With s = query . key, y the positive weights (rows sum to 1, or 0), q(tau) = softmax(s / tau) and p the teacher's
softmax:

    contrastive  c = logsumexp(s / tau_1) - sum_j y_j s_j / tau_1       dc/ds = (q(tau_1) - y) / tau_1, or 0 if y = 0
    distillation d = logsumexp(s / tau_2) - sum_j p_j s_j / tau_2       dd/ds = (q(tau_2) - p) / tau_2

so with upstream gradients gc, gd and G_1 = gc dc/ds, G_2 = gd dd/ds:

    d query = (G_1 + G_2) key,   d key = (G_1 + G_2)^T query,   d tau_1 = -sum(G_1 * s) / tau_1,   d tau_2 = -sum(G_2
    * s) / tau_2.

Every row is complete within its block, so a block needs nothing from the others. Per-row outputs have unknown
upstream gradients: their backward recomputes each block. A reduced loss knows its weights beforehand: its gradients
are formed in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cila_kernels._problem import Problem
from cila_kernels._rows import RowLosses

_EXCLUDED = -1e30  # a finite logit whose exponential is 0: 0 x logit stays 0
_BLOCK_ELEMENTS = 2**22


def row_losses(problem: Problem) -> RowLosses:
    """Per-row losses in the compute dtype, differentiable in query, key and the student's temperatures."""
    return RowLosses(
        *_RowLosses.apply(problem.query, problem.key, problem.temperature, problem.student_temperature, problem)
    )


def reduced_loss(problem: Problem, contrastive_weight: Tensor, distill_weight: Tensor) -> tuple[Tensor, RowLosses]:
    """(sum_i contrastive_weight_i contrastive_i + distill_weight_i distillation_i, detached per-row losses),
    gradients formed in the forward pass.

    Both weights are float64 of shape (N,) and get no gradient.
    """
    arguments = (problem.query, problem.key, problem.temperature, problem.student_temperature)
    loss, *rows = _ReducedLoss.apply(*arguments, problem, contrastive_weight, distill_weight)
    return loss, RowLosses(*rows)


class _Gradients:
    """Accumulates the gradients that are wanted of (query, key, temperature, student_temperature)."""

    def __init__(self, problem: Problem, wanted: tuple[bool, ...]) -> None:
        self.problem, self.wanted, self.dtype = problem, wanted, problem.compute_dtype
        self.query = torch.empty_like(problem.query) if wanted[0] else None
        self.key = torch.zeros_like(problem.key, dtype=self.dtype) if wanted[1] else None
        self.temperatures = torch.zeros(2, dtype=torch.float64, device=problem.query.device)

    def add(self, block: _Block, contrastive: Tensor | None, distillation: Tensor | None) -> None:
        """Adds one block's share for upstream gradients of shape (rows,); overwrites the block's probabilities."""
        problem, total = self.problem, None
        if contrastive is not None:
            temperature = problem.temperature.to(self.dtype)
            contrastive = torch.where(problem.positive_count[block.rows] > 0, contrastive, 0.0)  # else the loss is 0
            total = block.q.sub_(block.y).mul_((contrastive.to(self.dtype) / temperature)[:, None])
            if self.wanted[2]:
                self.temperatures[0] -= (total * block.s).sum(dtype=torch.float64) / temperature
        if distillation is not None and block.q_distill is not None and block.p is not None:
            temperature = problem.student_temperature.to(self.dtype)
            part = block.q_distill.sub_(block.p).mul_((distillation.to(self.dtype) / temperature)[:, None])
            if self.wanted[3]:
                self.temperatures[1] -= (part * block.s).sum(dtype=torch.float64) / temperature
            total = part if total is None else total.add_(part)
        if total is None:
            total = torch.zeros_like(block.s)
        if self.query is not None:
            self.query[block.rows] = total @ block.key
        if self.key is not None:
            self.key.addmm_(total.T, block.query)

    def result(self) -> tuple[Tensor | None, ...]:
        """Gradients in the dtypes of their inputs, None where not wanted."""
        problem = self.problem
        inputs = (problem.query, problem.key, problem.temperature, problem.student_temperature)
        values = (self.query, self.key, self.temperatures[0], self.temperatures[1])
        return tuple(
            None if not wanted or value is None else value.to(tensor.dtype)
            for wanted, value, tensor in zip(self.wanted, values, inputs, strict=True)
        )


class _Block(NamedTuple):
    """One block of rows in the compute dtype: (rows, M) similarities, positive weights and probabilities, and (rows,)
    losses.
    """

    rows: slice
    query: Tensor
    key: Tensor
    s: Tensor
    y: Tensor
    q: Tensor
    q_distill: Tensor | None
    p: Tensor | None
    losses: RowLosses


def _blocks(problem: Problem) -> Iterator[_Block]:
    dtype, n, m = problem.compute_dtype, problem.query.shape[0], problem.key.shape[0]
    key = problem.key.to(dtype)
    teacher_key = None if problem.teacher_key is None else problem.teacher_key.to(dtype)
    size = min(max(_BLOCK_ELEMENTS // m, 16), 512)
    for start in range(0, n, size):
        yield _block(problem, slice(start, min(start + size, n)), key, teacher_key)


def _block(problem: Problem, rows: slice, key: Tensor, teacher_key: Tensor | None) -> _Block:
    dtype = key.dtype
    excluded = problem.excluded(rows)

    def similarities(query: Tensor, key: Tensor) -> Tensor:
        s = query @ key.T
        return s if excluded is None else s.masked_fill_(excluded, _EXCLUDED)

    query = problem.query[rows].to(dtype)
    s = similarities(query, key)
    y = problem.positive_weight(rows, dtype)
    q, contrastive, _ = _softmax(s, problem.temperature, y)
    if problem.teacher_query is None or teacher_key is None:
        return _Block(rows, query, key, s, y, q, None, None, RowLosses(contrastive, None, None, None))
    teacher_s = similarities(problem.teacher_query[rows].to(dtype), teacher_key)
    p, teacher_contrastive, entropy = _softmax(teacher_s, problem.teacher_temperature, y)
    q_distill, distillation, _ = _softmax(s, problem.student_temperature, p)
    return _Block(
        rows, query, key, s, y, q, q_distill, p, RowLosses(contrastive, distillation, entropy, teacher_contrastive)
    )


def _softmax(s: Tensor, temperature: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax q of s / temperature (rows, M), its cross entropy -sum_j weight_j log q_j and its entropy (rows,).

    Sums are over logits shifted by their largest, so that a confident softmax loses no digits.
    """
    logits = s / temperature.to(s.dtype)
    logits -= logits.amax(dim=1, keepdim=True)
    q = logits.exp()
    total = q.sum(dim=1)
    log_total = total.log()
    cross_entropy = log_total * weight.sum(dim=1) - torch.linalg.vecdot(weight, logits)
    entropy = log_total - torch.linalg.vecdot(q, logits) / total
    return q.div_(total[:, None]), cross_entropy, entropy


class _RowLosses(torch.autograd.Function):
    """Forward keeps the inputs only; backward recomputes each block."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, temperature: Tensor, student_temperature: Tensor, problem: Problem
    ) -> Any:
        ctx.save_for_backward(query, key, temperature, student_temperature)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        losses = _collect([block.losses for block in _blocks(problem)])
        ctx.mark_non_differentiable(*(loss for loss in losses[2:] if loss is not None))
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, contrastive: Tensor | None, distillation: Tensor | None, *_: Any) -> Any:
        query, key, temperature, student_temperature = ctx.saved_tensors
        problem = replace(
            ctx.problem, query=query, key=key, temperature=temperature, student_temperature=student_temperature
        )
        gradients = _Gradients(problem, ctx.needs_input_grad[:4])
        for block in _blocks(problem):
            gradients.add(
                block,
                None if contrastive is None else contrastive[block.rows],
                None if distillation is None else distillation[block.rows],
            )
        return *gradients.result(), None


class _ReducedLoss(torch.autograd.Function):
    """Forward forms the gradients for an upstream gradient of 1; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        temperature: Tensor,
        student_temperature: Tensor,
        problem: Problem,
        contrastive_weight: Tensor,
        distill_weight: Tensor,
    ) -> Any:
        gradients = _Gradients(problem, ctx.needs_input_grad[:4])
        losses = []
        for block in _blocks(problem):
            losses.append(block.losses)
            if any(gradients.wanted):
                gradients.add(block, contrastive_weight[block.rows], distill_weight[block.rows])
        rows = _collect(losses)
        loss = torch.dot(contrastive_weight.to(rows.contrastive.dtype), rows.contrastive)
        if rows.distillation is not None:
            loss = loss + torch.dot(distill_weight.to(loss.dtype), rows.distillation)
        ctx.save_for_backward(*gradients.result())
        ctx.mark_non_differentiable(*(row for row in rows if row is not None))
        return loss, *rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        scaled = (
            None if gradient is None else gradient * upstream.to(gradient.dtype) for gradient in ctx.saved_tensors
        )
        return *scaled, None, None, None


def _collect(blocks: list[RowLosses]) -> RowLosses:
    """Concatenates the (rows,) losses of all blocks to (N,)."""
    columns = [None if column[0] is None else torch.cat(column) for column in zip(*blocks, strict=True)]
    return RowLosses(*columns)  # type: ignore[arg-type]
