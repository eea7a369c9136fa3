"""What the benchmarks compare: one function per way to compute the losses, and the floor below which none can be.

A method takes a :class:`Problem` and returns the scalar contrastive.mean() + distillation.mean(), or without a teacher
contrastive.mean(), ready for ``backward``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cila_kernels import info_nce_distill, info_nce_distill_loss

TEMPERATURES = {"temperature": 0.5, "student_temperature": 0.2, "teacher_temperature": 0.1}


class Problem(NamedTuple):
    """Random unit vectors; row i's positive is key i."""

    query: Tensor
    key: Tensor
    teacher_query: Tensor | None
    teacher_key: Tensor | None
    positive: Tensor

    @staticmethod
    def of(n: int, m: int, width: int, dtype: torch.dtype, device: str, *, teacher: bool, seed: int = 0) -> Problem:
        generator = torch.Generator(device).manual_seed(seed)

        def unit(rows: int) -> Tensor:
            normal = torch.randn(rows, width, generator=generator, device=device)
            return functional.normalize(normal, dim=1).to(dtype)

        query, key = unit(n).requires_grad_(), unit(m).requires_grad_()
        positive = torch.arange(n, device=device) % m
        if teacher:
            return Problem(query, key, unit(n), unit(m), positive)
        return Problem(query, key, None, None, positive)


Method = Callable[[Problem], Tensor]


def naive(problem: Problem) -> Tensor:
    """The lines that the call replaces, with all N x M similarities."""
    similarity = problem.query @ problem.key.T
    loss = functional.cross_entropy(similarity / TEMPERATURES["temperature"], problem.positive)
    if problem.teacher_query is not None and problem.teacher_key is not None:
        p = (problem.teacher_query @ problem.teacher_key.T / TEMPERATURES["teacher_temperature"]).softmax(1)
        log_q = (similarity / TEMPERATURES["student_temperature"]).log_softmax(1)
        loss = loss - (p * log_q).sum(1).mean()
    return loss


@cache
def _compiled_naive(shapes: tuple[torch.Size | None, ...]) -> Method:
    torch._dynamo.reset()
    return torch.compile(naive, dynamic=False)


def compiled_naive(problem: Problem) -> Tensor:
    """Compiled for each size anew: one graph for all sizes would be slower."""
    return _compiled_naive(tuple(None if x is None else x.shape for x in problem))(problem)


def rows(impl: Any) -> Method:
    """Per-row losses, reduced by the caller."""

    def method(problem: Problem) -> Tensor:
        result = info_nce_distill(*_inputs(problem), **_options(problem), impl=impl)
        loss = result.contrastive.mean()
        return loss if result.distillation is None else loss + result.distillation.mean()

    return method


def reduced(impl: Any) -> Method:
    """The reduced call."""

    def method(problem: Problem) -> Tensor:
        return info_nce_distill_loss(*_inputs(problem), **_options(problem), impl=impl).loss

    return method


def linear_cross_entropy(problem: Problem) -> Tensor:
    """PyTorch's own chunked linear cross entropy: InfoNCE alone."""
    from torch.nn import LinearCrossEntropyOptions

    query = problem.query / TEMPERATURES["temperature"]
    return functional.linear_cross_entropy(query, problem.key, problem.positive, options=LinearCrossEntropyOptions())


def cut_cross_entropy(problem: Problem) -> Tensor:
    """apple/ml-cross-entropy without its gradient filter, which drops what flat softmaxes need: InfoNCE alone."""
    from cut_cross_entropy import linear_cross_entropy as cce  # type: ignore[import-not-found]

    return cce(problem.query / TEMPERATURES["temperature"], problem.key, problem.positive, filter_eps=None)


def liger(problem: Problem) -> Tensor:
    """Liger-Kernel's chunked linear cross entropy: InfoNCE alone."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    return LigerFusedLinearCrossEntropyLoss()(
        problem.key, problem.query / TEMPERATURES["temperature"], problem.positive
    )


def inf_cl(problem: Problem) -> Tensor:
    """Inf-CL's fused InfoNCE."""
    from inf_cl import cal_flash_loss  # type: ignore[import-not-found]

    return cal_flash_loss(
        problem.query, problem.key, problem.positive, scale=torch.tensor(1.0 / TEMPERATURES["temperature"])
    )


INFO_NCE_ONLY: dict[str, Method] = {
    "F.linear_cross_entropy": linear_cross_entropy,
    "cut-cross-entropy": cut_cross_entropy,
    "Liger": liger,
    "Inf-CL": inf_cl,
}


class Rates(NamedTuple):
    """Measured in the same run as what is compared with them: products in operations/s, exponentials in numbers/s."""

    product: float
    exponential: float

    def floor(self, n: int, m: int, width: int, mode: str, *, teacher: bool) -> float:
        """Seconds that no design which keeps nothing of N x M can undercut, with perfect overlap of both units: forward
        2 products and 3 exponentials per pair (1 and 1 without a teacher); backward recomputes them and has 2 products
        more."""
        products, exponentials = (2, 3) if teacher else (1, 1)
        pairs = n * m
        forward = max(2 * pairs * width * products / self.product, pairs * exponentials / self.exponential)
        backward = max(2 * pairs * width * (products + 2) / self.product, pairs * exponentials / self.exponential)
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def operations(n: int, m: int, width: int, mode: str, *, teacher: bool) -> int:
    """Of the products that :meth:`Rates.floor` counts."""
    forward = 2 * n * m * width * (2 if teacher else 1)
    return {"forward": forward, "backward": forward + 4 * n * m * width, "both": 2 * forward + 4 * n * m * width}[mode]


def _inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return problem.query, problem.key, problem.teacher_query, problem.teacher_key


def _options(problem: Problem) -> dict[str, Any]:
    return {"positive": problem.positive, **TEMPERATURES}
