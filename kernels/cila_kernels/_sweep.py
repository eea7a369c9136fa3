"""What a block of rows and all keys of a problem go through: logits, softmaxes, what a row leaves behind, gradients.

On a CPU the time beyond the matrix products and exponentials goes into passes over block x M numbers. Hence: logits
to base 2, with the scale folded into the query block; logits at tau_2 as a multiple of those at tau_1; reused buffers;
and where the logits are small enough, the bound ||query|| max ||key|| instead of the row maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cila_kernels._candidates import Problem
from cila_kernels._rows import RowLosses

_LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
_EXCLUDED = -1e30  # a finite logit whose exponential is 0: 0 x logit stays 0
_SAFE_LOGIT = 60.0  # base-2 logits no larger than this can be shifted by their bound without underflow in float32
_BLOCK_ELEMENTS = 2**22


class BlockStatistics(NamedTuple):
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
    def join(parts: list[BlockStatistics]) -> BlockStatistics:
        columns = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        return BlockStatistics(*columns)  # type: ignore[arg-type]


class Softmaxes(NamedTuple):
    """Exponentials (rows, M) and their sums (rows,), 1 where they are normalised; None where not needed."""

    q: Tensor | None
    q_sum: Tensor | float
    q_distill: Tensor | None = None
    q_distill_sum: Tensor | float = 1.0
    p: Tensor | None = None
    p_sum: Tensor | float = 1.0


class Upstream:
    """Gradients of the result in each row's two losses, (N,) in the compute dtype, or None."""

    def __init__(self, sweep: Sweep, contrastive: Tensor | None, distillation: Tensor | None) -> None:
        self.contrastive, self.distillation = contrastive, distillation
        if contrastive is not None:  # a row without positives has loss 0
            self.contrastive = torch.where(sweep.problem.positives.count > 0, contrastive, 0.0).to(sweep.dtype)
        if distillation is not None:
            self.distillation = distillation.to(sweep.dtype)


class Sweep:
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

    def forward(self, rows: slice) -> tuple[Softmaxes, BlockStatistics]:
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
        statistics = BlockStatistics(q_sum.log2() + shift, mean_q)
        if t is None:
            return Softmaxes(q, q_sum), statistics
        q_distill, q_distill_sum, mean_q_distill = q, q_sum, mean_q
        if self.ratio != 1.0:
            q_distill = torch.add(-self.ratio * shift[:, None], x, alpha=self.ratio, out=x).exp2_()
            q_distill_sum = q_distill.sum(dim=1)
            mean_q_distill = self._row_dot(q_distill, raw) / q_distill_sum if slopes else None
        log_q_distill = q_distill_sum.log2() + self.ratio * shift
        statistics = BlockStatistics(statistics.log_q, mean_q, log_q_distill, mean_q_distill, log_p, mean_p, entropy)
        return Softmaxes(q, q_sum, q_distill, q_distill_sum, t, p_sum), statistics

    def _row_dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(rows,) products of rows, by way of a reused buffer: a fresh one would be paged in every time."""
        assert self.scratch is not None
        return torch.mul(a, b, out=self.scratch[: len(a)]).sum(dim=1)

    def recompute(self, rows: slice, statistics: BlockStatistics, upstream: Upstream) -> Softmaxes:
        """Normalised softmaxes of a block, as far as the upstream gradients need them."""
        x, _, t, _ = self._logits(rows, teacher=upstream.distillation is not None)
        q = None
        if upstream.contrastive is not None:
            q = torch.sub(x, statistics.log_q[rows, None], out=self.buffers[1][: len(x)]).exp2_()
        if t is None or statistics.log_q_distill is None or statistics.log_p is None:
            return Softmaxes(q, 1.0)
        p = t.sub_(statistics.log_p[rows, None]).exp2_()
        q_distill = q
        if self.ratio != 1.0 or q is None:
            q_distill = torch.add(-statistics.log_q_distill[rows, None], x, alpha=self.ratio, out=x).exp2_()
        return Softmaxes(q, 1.0, q_distill, 1.0, p, 1.0)

    def accumulate(self, rows: slice, softmaxes: Softmaxes, upstream: Upstream) -> None:
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

    def losses(self, statistics: BlockStatistics, positive: Tensor) -> RowLosses:
        """The four losses of every row, nats."""
        has_positive = self.problem.positives.count > 0
        contrastive = torch.where(has_positive, statistics.log_q * LN_2 - positive / self.temperature, 0.0)
        if statistics.log_p is None or self.problem.teacher_query is None:
            return RowLosses(contrastive, None, None, None)
        assert statistics.log_q_distill is not None and statistics.mean_p is not None and statistics.entropy is not None
        teacher_positive = self.problem.positives.mean_similarity(
            self.problem.teacher_query, self.teacher_key, self.dtype
        )
        teacher_contrastive = statistics.log_p * LN_2 - teacher_positive / self.problem.teacher_temperature.to(
            self.dtype
        )
        return RowLosses(
            contrastive,
            (statistics.log_q_distill - self.ratio * statistics.mean_p) * LN_2,
            statistics.entropy * LN_2,
            torch.where(has_positive, teacher_contrastive, 0.0),
        )

    def gradients(
        self, statistics: BlockStatistics, positive: Tensor, upstream: Upstream
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Of query, key, temperature, student_temperature and s_pos, in the compute dtype; None where not wanted."""
        temperature = student_temperature = of_positive = None
        unit = self.temperature * LN_2  # x times this is s
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
