"""What every row keeps of the keys it has seen, and how it is merged with what it keeps of others.

All numbers are float64, in nats and similarities, and one a row: their cost and rounding are nothing beside those of
the keys. With w = exp(log_sum - log_sum of both) of two sets of keys, the weights of their softmaxes in the joint one,

    log_sum = log(exp(log_sum_1) + exp(log_sum_2))        mean = w_1 mean_1 + w_2 mean_2
    entropy = sum_i w_i (entropy_i + log_sum - log_sum_i)    (the chain rule: which set, then which key in it)

A set whose keys a row excludes all has log_sum -inf or about -1e30, weight 0, and no say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cila_kernels._problem import Inputs
from cila_kernels._rows import RowLosses


class Teacher(NamedTuple):
    """With s = query . key, shape (N,): logsumexp(s / tau_2) and the mean of s under that softmax (or None); logsumexp
    of the teacher's logits, mean of s under its softmax p, entropy of p, and sum of its similarities to the positives.
    """

    log_sum_student: Tensor
    mean_student: Tensor | None
    log_sum: Tensor
    cross: Tensor
    entropy: Tensor
    positive_sum: Tensor


class Statistics(NamedTuple):
    """logsumexp(s / tau_1), the mean of s under that softmax (or None: needed for temperature gradients), the sum of s
    over the positives, shape (N,); ``teacher``: None without one."""

    log_sum: Tensor
    mean: Tensor | None
    positive_sum: Tensor
    teacher: Teacher | None

    def merge(self, other: Statistics) -> Statistics:
        """Of both sets of keys."""
        log_sum, weights = _joint(self.log_sum, other.log_sum)
        teacher = None
        if self.teacher is not None and other.teacher is not None:
            teacher = _merge_teachers(self.teacher, other.teacher)
        return Statistics(
            log_sum, _mean(weights, self.mean, other.mean), self.positive_sum + other.positive_sum, teacher
        )

    def losses(self, inputs: Inputs, count: Tensor) -> RowLosses:
        """In the compute dtype; ``count`` (N,): positives of each row."""
        dtype, has_positive, divisor = inputs.compute_dtype, count > 0, count.clamp(min=1)
        contrastive = self.log_sum - self.positive_sum / divisor / inputs.temperature
        contrastive = torch.where(has_positive, contrastive, 0.0).to(dtype)
        teacher = self.teacher
        if teacher is None:
            return RowLosses(contrastive, None, None, None)
        of_teacher = teacher.log_sum - teacher.positive_sum / divisor / inputs.teacher_temperature
        return RowLosses(
            contrastive,
            (teacher.log_sum_student - teacher.cross / inputs.student_temperature).to(dtype),
            teacher.entropy.to(dtype),
            torch.where(has_positive, of_teacher, 0.0).to(dtype),
        )

    def temperature_gradient(self, inputs: Inputs, count: Tensor, upstream: Tensor | None) -> Tensor:
        """d loss / d temperature, 0-d, from the gradients in the contrastive losses (N,)."""
        if upstream is None or self.mean is None:
            return self.log_sum.new_zeros(())
        spread = torch.where(count > 0, self.mean - self.positive_sum / count.clamp(min=1), 0.0)
        return -torch.dot(upstream.double(), spread) / inputs.temperature.double() ** 2

    def student_temperature_gradient(self, inputs: Inputs, upstream: Tensor | None) -> Tensor:
        """d loss / d student_temperature, 0-d, from the gradients in the distillation losses (N,)."""
        if upstream is None or self.teacher is None or self.teacher.mean_student is None:
            return self.log_sum.new_zeros(())
        spread = self.teacher.mean_student - self.teacher.cross
        return -torch.dot(upstream.double(), spread) / inputs.student_temperature.double() ** 2


def _merge_teachers(one: Teacher, two: Teacher) -> Teacher:
    log_sum_student, of_student = _joint(one.log_sum_student, two.log_sum_student)
    log_sum, weights = _joint(one.log_sum, two.log_sum)
    entropies = (side.entropy + (log_sum - side.log_sum) for side in (one, two))
    return Teacher(
        log_sum_student,
        _mean(of_student, one.mean_student, two.mean_student),
        log_sum,
        _weighted(weights, one.cross, two.cross),
        _weighted(weights, *entropies),
        one.positive_sum + two.positive_sum,
    )


def _joint(one: Tensor, two: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """log(exp(one) + exp(two)), and the weight of each."""
    whole = torch.logaddexp(one, two)
    return whole, (torch.exp(one - whole), torch.exp(two - whole))


def _mean(weights: tuple[Tensor, Tensor], one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return None if one is None or two is None else _weighted(weights, one, two)


def _weighted(weights: tuple[Tensor, Tensor], one: Tensor, two: Tensor) -> Tensor:
    """w_1 one + w_2 two; a side of weight 0 may be anything, NaN too."""
    return sum(
        (torch.where(weight > 0, weight * side, 0.0) for weight, side in zip(weights, (one, two), strict=True)),
        torch.zeros_like(one),
    )
