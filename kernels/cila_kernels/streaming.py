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

On a CPU the time beyond the matrix products and exponentials goes into passes over block x M numbers. Hence: logits
to base 2, with the scale folded into the query block; logits at tau_2 as a multiple of those at tau_1; reused buffers;
and where the logits are small enough, the bound ||query|| max ||key|| instead of the row maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cila_kernels._problem import Problem
from cila_kernels._rows import RowLosses

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
_EXCLUDED = -1e30  # a finite logit whose exponential is 0: 0 x logit stays 0
_SAFE_LOGIT = 60.0  # base-2 logits no larger than this can be shifted by their bound without underflow in float32
_BLOCK_ELEMENTS = 2**22


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
        sweep = _Sweep(problem, ctx.needs_input_grad)
        statistics = _Statistics.join([sweep.forward(rows)[1] for rows in sweep])
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
            sweep = _Sweep(problem, ctx.needs_input_grad)
            upstream = _Upstream(sweep, contrastive, distillation)
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
        sweep = _Sweep(problem, ctx.needs_input_grad)
        upstream = _Upstream(sweep, contrastive_weight, None if problem.teacher_query is None else distill_weight)
        parts = []
        for rows in sweep:
            softmaxes, part = sweep.forward(rows)
            parts.append(part)
            if sweep.wants_embeddings:
                sweep.accumulate(rows, softmaxes, upstream)
        statistics = _Statistics.join(parts)
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


class _Statistics(NamedTuple):
    """What a row leaves behind, shape (rows,); x = s / tau_1 and t are base-2 logits of student and teacher.

    ``log_q``, ``log_q_distill``, ``log_p``: log2 of the sum of exponentials of x, x tau_1 / tau_2 and t. ``mean_q``,
    ``mean_q_distill``, ``mean_p``: mean of x under the three softmaxes; the first two only for temperature gradients.
    ``entropy``: of p, in bits.
    """

    log_q: Tensor
    mean_q: Tensor | None = None
    log_q_distill: Tensor | None = None
    mean_q_distill: Tensor | None = None
    log_p: Tensor | None = None
    mean_p: Tensor | None = None
    entropy: Tensor | None = None

    @staticmethod
    def join(parts: list[_Statistics]) -> _Statistics:
        columns = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        return _Statistics(*columns)  # type: ignore[arg-type]


class _Softmaxes(NamedTuple):
    """Exponentials (rows, M) and their sums (rows,), 1 where they are normalised; None where not needed."""

    q: Tensor | None
    q_sum: Tensor | float
    q_distill: Tensor | None = None
    q_distill_sum: Tensor | float = 1.0
    p: Tensor | None = None
    p_sum: Tensor | float = 1.0


class _Upstream:
    """Gradients of the result in each row's two losses, (N,) in the compute dtype, or None."""

    def __init__(self, sweep: _Sweep, contrastive: Tensor | None, distillation: Tensor | None) -> None:
        self.contrastive, self.distillation = contrastive, distillation
        if contrastive is not None:  # a row without positives has loss 0
            self.contrastive = torch.where(sweep.problem.positives.count > 0, contrastive, 0.0).to(sweep.dtype)
        if distillation is not None:
            self.distillation = distillation.to(sweep.dtype)


class _Sweep:
    """One pass over all row blocks: constants, reused buffers, and the gradients gathered so far."""

    def __init__(self, problem: Problem, wanted: tuple[bool, ...]) -> None:
        self.problem, self.dtype, self.wanted = problem, problem.compute_dtype, wanted
        self.n, m = problem.query.shape[0], problem.key.shape[0]
        self.size = min(max(_BLOCK_ELEMENTS // m, 16), 512, self.n)
        self.key = problem.key.to(self.dtype)
        self.temperature, self.student_temperature = problem.temperature.item(), problem.student_temperature.item()
        self.ratio = self.temperature / self.student_temperature
        self.key_norm = torch.linalg.vector_norm(self.key, dim=1).max()
        self.buffers = [self.key.new_empty(self.size, m) for _ in range(2)]
        if problem.teacher_key is not None:
            self.teacher_key = problem.teacher_key.to(self.dtype)
            self.teacher_key_norm = torch.linalg.vector_norm(self.teacher_key, dim=1).max()
            self.buffers.append(self.key.new_empty(self.size, m))
        self.scratch = self.key.new_empty(self.size, m) if len(self.buffers) > 2 or wanted[2] or wanted[3] else None
        self.wants_embeddings = wanted[0] or wanted[1]
        self.query_gradient = torch.empty_like(problem.query, dtype=self.dtype) if wanted[0] else None
        self.key_gradient = torch.zeros_like(self.key) if wanted[1] else None

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.n, self.size):
            yield slice(start, min(start + self.size, self.n))

    def forward(self, rows: slice) -> tuple[_Softmaxes, _Statistics]:
        """Exponentials of a block, in the buffers until the next block, and its statistics."""
        x, x_bound, t, t_bound = self._logits(rows, teacher=True)
        spare = self.buffers[1][: len(x)]
        p_sum: Tensor | float = 1.0
        log_p = mean_p = entropy = None
        if t is not None and t_bound is not None:
            shift = _shift(t, t_bound, t_bound)
            p = torch.sub(t, shift[:, None], out=spare).exp2_()
            p_sum = p.sum(dim=1)
            log_p = p_sum.log2() + shift
            entropy = log_p - self._row_dot(p, t) / p_sum
            mean_p = self._row_dot(p, x) / p_sum
            t, spare = p, t
        slopes = self.wanted[2] or self.wanted[3]
        raw = x.clone() if slopes else x
        shift = _shift(x, x_bound, x_bound * max(self.ratio, 1.0))
        q = torch.sub(x, shift[:, None], out=spare).exp2_()
        q_sum = q.sum(dim=1)
        mean_q = self._row_dot(q, raw) / q_sum if slopes else None
        statistics = _Statistics(q_sum.log2() + shift, mean_q)
        if t is None:
            return _Softmaxes(q, q_sum), statistics
        q_distill, q_distill_sum, mean_q_distill = q, q_sum, mean_q
        if self.ratio != 1.0:
            q_distill = torch.add(-self.ratio * shift[:, None], x, alpha=self.ratio, out=x).exp2_()
            q_distill_sum = q_distill.sum(dim=1)
            mean_q_distill = self._row_dot(q_distill, raw) / q_distill_sum if slopes else None
        log_q_distill = q_distill_sum.log2() + self.ratio * shift
        statistics = _Statistics(statistics.log_q, mean_q, log_q_distill, mean_q_distill, log_p, mean_p, entropy)
        return _Softmaxes(q, q_sum, q_distill, q_distill_sum, t, p_sum), statistics

    def _row_dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(rows,) products of rows, by way of a reused buffer: a fresh one would be paged in every time."""
        assert self.scratch is not None
        return torch.mul(a, b, out=self.scratch[: len(a)]).sum(dim=1)

    def recompute(self, rows: slice, statistics: _Statistics, upstream: _Upstream) -> _Softmaxes:
        """Normalised softmaxes of a block, as far as the upstream gradients need them."""
        x, _, t, _ = self._logits(rows, teacher=upstream.distillation is not None)
        q = None
        if upstream.contrastive is not None:
            q = torch.sub(x, statistics.log_q[rows, None], out=self.buffers[1][: len(x)]).exp2_()
        if t is None or statistics.log_q_distill is None or statistics.log_p is None:
            return _Softmaxes(q, 1.0)
        p = t.sub_(statistics.log_p[rows, None]).exp2_()
        q_distill = q
        if self.ratio != 1.0 or q is None:
            q_distill = torch.add(-statistics.log_q_distill[rows, None], x, alpha=self.ratio, out=x).exp2_()
        return _Softmaxes(q, 1.0, q_distill, 1.0, p, 1.0)

    def accumulate(self, rows: slice, softmaxes: _Softmaxes, upstream: _Upstream) -> None:
        """Forms G of a block, in place, and adds its share to the gradients of query and key."""
        total = None
        if upstream.contrastive is not None and softmaxes.q is not None:
            factor = upstream.contrastive[rows] / softmaxes.q_sum / self.temperature
            if softmaxes.q_distill is softmaxes.q and upstream.distillation is not None:
                factor = factor + upstream.distillation[rows] / softmaxes.q_distill_sum / self.student_temperature
            total = softmaxes.q.mul_(factor[:, None])
        if upstream.distillation is not None and softmaxes.q_distill is not None and softmaxes.p is not None:
            weight = upstream.distillation[rows] / self.student_temperature
            if softmaxes.q_distill is not total:
                factor = (weight / softmaxes.q_distill_sum)[:, None]
                distill = softmaxes.q_distill
                total = distill.mul_(factor) if total is None else total.addcmul_(distill, factor)
            total.addcmul_(softmaxes.p, (weight / softmaxes.p_sum)[:, None], value=-1.0)
        assert total is not None  # there is some upstream gradient
        if self.query_gradient is not None:
            torch.mm(total, self.key, out=self.query_gradient[rows])
        if self.key_gradient is not None:
            self.key_gradient.addmm_(total.T, self.problem.query[rows].to(self.dtype))

    def losses(self, statistics: _Statistics, positive: Tensor) -> RowLosses:
        """The four losses of every row, nats."""
        has_positive = self.problem.positives.count > 0
        contrastive = torch.where(has_positive, statistics.log_q * _LN_2 - positive / self.temperature, 0.0)
        if statistics.log_p is None or self.problem.teacher_query is None:
            return RowLosses(contrastive, None, None, None)
        assert statistics.log_q_distill is not None and statistics.mean_p is not None and statistics.entropy is not None
        teacher_positive = self.problem.positives.mean_similarity(
            self.problem.teacher_query, self.teacher_key, self.dtype
        )
        teacher_contrastive = statistics.log_p * _LN_2 - teacher_positive / self.problem.teacher_temperature.to(
            self.dtype
        )
        return RowLosses(
            contrastive,
            (statistics.log_q_distill - self.ratio * statistics.mean_p) * _LN_2,
            statistics.entropy * _LN_2,
            torch.where(has_positive, teacher_contrastive, 0.0),
        )

    def gradients(
        self, statistics: _Statistics, positive: Tensor, upstream: _Upstream
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Of query, key, temperature, student_temperature and s_pos, in the compute dtype; None where not wanted."""
        temperature = student_temperature = of_positive = None
        unit = self.temperature * _LN_2  # x times this is s
        if self.wanted[2]:
            temperature = self.key.new_zeros(())
            if upstream.contrastive is not None and statistics.mean_q is not None:
                spread = statistics.mean_q * unit - positive
                temperature = -torch.dot(upstream.contrastive, spread) / self.temperature**2
        if self.wanted[3]:
            student_temperature = self.key.new_zeros(())
            mean_q, mean_p = statistics.mean_q_distill, statistics.mean_p
            if upstream.distillation is not None and mean_q is not None and mean_p is not None:
                spread = (mean_q - mean_p) * unit
                student_temperature = -torch.dot(upstream.distillation, spread) / self.student_temperature**2
        if self.wanted[4]:
            of_positive = torch.zeros_like(positive)
            if upstream.contrastive is not None:
                of_positive = upstream.contrastive / -self.temperature
        return self.query_gradient, self.key_gradient, temperature, student_temperature, of_positive

    def _logits(self, rows: slice, *, teacher: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Base-2 logits of student (at tau_1) and teacher in two buffers, each with a bound per row."""
        query = self.problem.query[rows].to(self.dtype) * (_LOG2_E / self.temperature)
        x = torch.mm(query, self.key.T, out=self.buffers[0][: len(query)])
        bound = torch.linalg.vector_norm(query, dim=1) * self.key_norm
        t = t_bound = None
        if teacher and self.problem.teacher_query is not None:
            scale = _LOG2_E / self.problem.teacher_temperature.to(self.dtype)
            teacher_query = self.problem.teacher_query[rows].to(self.dtype) * scale
            t = torch.mm(teacher_query, self.teacher_key.T, out=self.buffers[2][: len(query)])
            t_bound = torch.linalg.vector_norm(teacher_query, dim=1) * self.teacher_key_norm
        if self.problem.exclusion is not None:
            row, key = self.problem.exclusion.pairs(rows)
            for logits in (x, t):
                if logits is not None:
                    logits[row, key] = _EXCLUDED
        return x, bound, t, t_bound


def _shift(logits: Tensor, bound: Tensor, largest: Tensor) -> Tensor:
    """What to subtract from each row, (rows,): its bound or, where exponentials could then underflow, its maximum."""
    return bound if largest.max() <= _SAFE_LOGIT else logits.amax(dim=1)
