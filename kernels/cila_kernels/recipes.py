"""Losses that people train with, each a short function of the one call.

With ``group`` the embeddings are those of this rank, and those of all ranks are the candidates; what is returned is
this rank's share, as :func:`info_nce_distill_loss` describes it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cila_kernels import sharded
from cila_kernels.loss import ReducedLoss, info_nce_distill_loss

_RANK_BITS = 40  # a rank's samples are numbered from rank x 2^40


def nt_xent_loss(
    view_1: Tensor,
    view_2: Tensor,
    *,
    temperature: float | Tensor,
    group: ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """SimCLR's NT-Xent: InfoNCE of every view over all 2n - 1 others, its positive being the image's other view.

    ``view_1``, ``view_2`` (n, D): unit-norm embeddings of the same images. ``options``: those of
    :func:`info_nce_distill_loss`. Returns the mean, nats. Source: Chen et al. 2020, equation 1.
    """
    with sharded.together(group, timeout=options.get("timeout")):
        n = _check_same(view_1, view_2, "view_1", "view_2")
    z = torch.cat([view_1, view_2])
    ids = _numbers(2 * n, z.device, group)
    if group is None:
        options["positive"] = ids.roll(n)
    else:  # an index would count the keys of other ranks
        options["query_label"] = options["key_label"] = ids[:n].repeat(2)
    result = info_nce_distill_loss(z, z, query_id=ids, key_id=ids, temperature=temperature, group=group, **options)
    return result.loss


def co2l_loss(
    embedding: Tensor,
    label: Tensor,
    teacher_embedding: Tensor | None = None,
    *,
    is_current: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    student_temperature: float | Tensor = 0.2,
    teacher_temperature: float | Tensor = 0.01,
    distill_weight: float | Tensor = 1.0,
    contrastive_scale: float = 1.0,
    group: ProcessGroup | None = None,
    **options: Any,
) -> ReducedLoss:
    """Co2L: asymmetric SupCon plus instance-wise relation distillation (IRD) of every view from the previous model.

    ``embedding`` (2n, D): both views of the batch, buffer included, unit-norm; ``label`` (2n,); ``teacher_embedding``
    (2n, D'): the previous model's, or None for the first task; ``is_current`` (2n,) bool: views of the current task,
    the anchors of SupCon (default: all). ``contrastive_scale``: Co2L's code multiplies SupCon by temperature / 0.07;
    the default 1 is the paper's loss. ``options``: those of :func:`info_nce_distill_loss`.

    Returns contrastive_scale x SupCon + distill_weight x IRD as ``.loss``, and the unscaled terms per row, nats.
    Source: Cha et al. 2021; the default temperatures are those of its code for CIFAR-10.
    """
    ids = _numbers(embedding.shape[0], embedding.device, group)
    result = info_nce_distill_loss(
        embedding,
        embedding,
        teacher_embedding,
        teacher_embedding,
        query_label=label,
        key_label=label,
        query_id=ids,
        key_id=ids,
        temperature=temperature,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        distill_weight=distill_weight / contrastive_scale,
        anchor_mask=is_current,
        group=group,
        **options,
    )
    return result._replace(loss=contrastive_scale * result.loss)


def clip_distill_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    *,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None = None,
    distill_weight: float = 1.0,
    group: ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """CLIP's symmetric loss plus distillation from a frozen teacher, both from image to text and back, averaged.

    ``image``, ``text`` (n, D): unit-norm embeddings of the same pairs; ``teacher_image``, ``teacher_text`` (n, D'): the
    teacher's, or None. ``temperature`` is 1 / logit_scale and may be learnable; the student is distilled at it too.
    ``options``: those of :func:`info_nce_distill_loss`. Nats. Sources: Radford et al. 2021; the distillation term is
    that of open_clip's DistillClipLoss.
    """
    with sharded.together(group, timeout=options.get("timeout")):
        n = _check_same(image, text, "image", "text")
    pairs = _numbers(n, image.device, group)
    if group is None:
        options["positive"] = pairs
    else:
        options["query_label"] = options["key_label"] = pairs
    directions = ((image, text, teacher_image, teacher_text), (text, image, teacher_text, teacher_image))
    losses = [
        info_nce_distill_loss(
            *embeddings,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            distill_weight=distill_weight,
            group=group,
            **options,
        ).loss
        for embeddings in directions
    ]
    return (losses[0] + losses[1]) / 2.0


def _numbers(n: int, device: torch.device, group: ProcessGroup | None) -> Tensor:
    """0 to n - 1, or as many numbers that no other rank of ``group`` has, int64 (n,)."""
    first = 0 if group is None else dist.get_rank(group) << _RANK_BITS
    return torch.arange(first, first + n, device=device)


def _check_same(first: Tensor, second: Tensor, first_name: str, second_name: str) -> int:
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} embed the same samples and must have one shape, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return first.shape[0]
