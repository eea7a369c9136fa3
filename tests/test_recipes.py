"""The recipes against the formulas as their papers' code writes them, dense."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cila_kernels import clip_distill_loss, co2l_loss, nt_xent_loss
from tests.test_kernels import unit


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_nt_xent(generator: torch.Generator) -> None:
    """SimCLR: cross entropy of 2n rows over 2n - 1 similarities, the own one masked out."""
    view_1, view_2 = (unit(generator, 9, 5).requires_grad_() for _ in range(2))
    z = torch.cat([view_1, view_2])
    logits = (z @ z.T / 0.2).masked_fill(torch.eye(18, dtype=torch.bool), -torch.inf)
    expected = functional.cross_entropy(logits, (torch.arange(18) + 9) % 18)
    ours = nt_xent_loss(view_1, view_2, temperature=0.2)
    assert torch.allclose(ours, expected, rtol=1e-12)
    for a, b in zip(*(torch.autograd.grad(loss, (view_1, view_2)) for loss in (ours, expected)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-14)


def dense_co2l(z: Tensor, past: Tensor, label: Tensor, current: Tensor, scale: float, weight: float) -> Tensor:
    """As in Co2L's code: SupCon with masks, and the soft cross entropy of rows without their diagonal."""
    n = len(z)
    other = ~torch.eye(n, dtype=torch.bool)
    logits = z @ z.T / 0.5
    log_probability = logits - logits.exp().masked_fill(~other, 0.0).sum(1, keepdim=True).log()
    positive = (label[:, None] == label[None, :]) & other
    sup_con = -(positive * log_probability).sum(1) / positive.sum(1)

    def rows(embedding: Tensor, temperature: float) -> Tensor:
        return (embedding @ embedding.T / temperature)[other].view(n, n - 1)

    ird = -(rows(past, 0.01).softmax(1) * rows(z, 0.2).log_softmax(1)).sum(1)
    return scale * sup_con[current].mean() + weight * ird.mean()


@pytest.mark.parametrize("scale", [1.0, 0.5 / 0.07])
def test_co2l(generator: torch.Generator, scale: float) -> None:
    z, past = unit(generator, 12, 6).requires_grad_(), unit(generator, 12, 4)
    label = torch.tensor([0, 0, 1, 1, 2, 2]).repeat(2)
    current = torch.tensor([True, False, True, True, False, True]).repeat(2)
    expected = dense_co2l(z, past, label, current, scale, 0.7)
    ours = co2l_loss(z, label, past, is_current=current, distill_weight=0.7, contrastive_scale=scale)
    assert torch.allclose(ours.loss, expected, rtol=1e-10)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (ours.loss, expected)]
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-12)


def test_co2l_of_the_first_task_is_sup_con(generator: torch.Generator) -> None:
    z, label = unit(generator, 12, 6), torch.arange(6).repeat(2) // 2
    first = co2l_loss(z, label)
    assert first.distillation is None
    assert torch.equal(first.loss, co2l_loss(z, label, distill_weight=3.0).loss)


def test_clip_with_a_teacher(generator: torch.Generator) -> None:
    """open_clip's ClipLoss and DistillClipLoss, with a learnable logit scale."""
    image, text = (unit(generator, 7, 5).requires_grad_() for _ in range(2))
    teacher_image, teacher_text = (unit(generator, 7, 3) for _ in range(2))
    log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    logits, past = log_scale.exp() * image @ text.T, teacher_image @ teacher_text.T / 0.05
    diagonal = torch.arange(7)
    clip = (functional.cross_entropy(logits, diagonal) + functional.cross_entropy(logits.T, diagonal)) / 2
    distill = -sum((p.softmax(1) * s.log_softmax(1)).sum(1).mean() for p, s in ((past, logits), (past.T, logits.T))) / 2
    expected = clip + 0.3 * distill
    ours = clip_distill_loss(
        image,
        text,
        teacher_image,
        teacher_text,
        temperature=(-log_scale).exp(),
        teacher_temperature=0.05,
        distill_weight=0.3,
    )
    assert torch.allclose(ours, expected, rtol=1e-12)
    inputs = (image, text, log_scale)
    for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in (ours, expected)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


def test_recipes_refuse_unequal_pairs(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"view_1 and view_2 .* got \(4, 3\) and \(5, 3\)"):
        nt_xent_loss(unit(generator, 4, 3), unit(generator, 5, 3), temperature=0.5)
    with pytest.raises(ValueError, match=r"image and text .* one shape"):
        clip_distill_loss(unit(generator, 4, 3), unit(generator, 4, 2), temperature=0.5)
