"""What one batch is trained on: contrastive loss and distillation, or the cross entropies of the replay baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cila_kernels import info_nce_distill_loss
from experiments.config import RunConfig
from experiments.methods import Method
from experiments.moco import KeyQueue
from experiments.world import ALONE, World


class Loss(NamedTuple):
    """``loss`` (0-d, differentiable) and its terms per row, detached, in nats."""

    loss: Tensor
    terms: dict[str, Tensor]


def contrastive_loss(
    config: RunConfig,
    method: Method,
    embedding: Tensor,
    label: Tensor,
    task: Tensor,
    teacher: Tensor | None = None,
    *,
    current_task: int,
    weights: Sequence[float] = (),
    queue: KeyQueue | None = None,
    world: World = ALONE,
) -> Loss:
    """contrastive_scale x contrastive loss + sum over rows of lambda x distillation / rows.

    ``embedding`` (2n, D): first the one view of every image, then the other; ``label`` and ``task`` (2n,): of the rows,
    tasks from 1; ``teacher`` (2n, D'): the previous model's embeddings. ``weights``: lambda for the rows of each of the
    tasks 1..t. Candidates are all other rows and the queue, those of all ranks. Anchors of the contrastive loss are the
    rows of the current task t (asymmetric SupCon, Cha et al. 2021); all rows are distilled.
    """
    rows, first_id = len(embedding), world.rank * 2**40  # ids are different on every rank
    row_id = first_id + torch.arange(rows, device=embedding.device)
    if config.positives == "view" and world.group is not None:  # by label, as only the group knows a key's place
        label = row_id[: rows // 2].repeat(2)
    key, key_label, key_id, teacher_key = embedding, label, row_id, teacher
    if queue is not None and queue.key is not None and queue.label is not None:
        key, key_id = torch.cat([key, queue.key]), first_id + torch.arange(rows + len(queue.key), device=key.device)
        key_label = torch.cat([label, queue.label if config.positives == "class" else -1 - queue.label])
        if teacher is not None and queue.teacher_key is not None:
            teacher_key = torch.cat([teacher, queue.teacher_key])
    positives: dict[str, Tensor] = {"query_label": label, "key_label": key_label}
    if config.positives == "view" and world.group is None:
        positives = {"positive": row_id.roll(rows // 2)}
    contrastive = method.contrastive or teacher is None
    anchors = (task == current_task) & contrastive
    distill_weight: Tensor | float = 0.0
    if teacher is not None:
        distill_weight = torch.tensor([0.0, *weights], device=embedding.device)[task] / config.contrastive_scale
    options: dict[str, Any] = {"query_id": row_id, "key_id": key_id, **positives}
    result = info_nce_distill_loss(
        embedding,
        key,
        teacher,
        teacher_key,
        temperature=config.temperature,
        student_temperature=config.student_temperature,
        teacher_temperature=config.teacher_temperature,
        distill_weight=distill_weight,
        anchor_mask=anchors,
        on_missing_positive="ignore",  # a batch of buffered images only has no anchor
        group=world.group,
        **options,
    )
    terms = {}
    if contrastive:
        terms["contrastive"] = result.contrastive[anchors]
    if result.distillation is not None:
        terms["distillation"] = result.distillation
    return Loss(config.contrastive_scale * result.loss, terms)


def replay_loss(
    config: RunConfig,
    method: Method,
    logits: Tensor,
    label: Tensor,
    replayed: Tensor | None = None,
    replayed_label: Tensor | None = None,
    target: Tensor | None = None,
) -> Loss:
    """Experience replay: cross entropy of current and buffered images together. DER++ (Buzzega et al. 2020, equation
    6): cross entropy of current images + alpha x squared distance of buffered logits + beta x cross entropy of
    buffered images.

    ``logits`` (n, classes) and ``replayed`` (m, classes) of augmented views; ``target`` (m, classes): logits as
    buffered. DER++ draws two batches from the buffer, one for each term: the two halves of ``replayed``.
    """
    own = functional.cross_entropy(logits, label, reduction="none")
    if replayed is None or replayed_label is None:
        return Loss(own.mean(), {"cross_entropy": own.detach()})
    if not method.logits or target is None:
        rows = torch.cat([own, functional.cross_entropy(replayed, replayed_label, reduction="none")])
        return Loss(rows.mean(), {"cross_entropy": rows.detach()})
    half = len(replayed) // 2
    distance = functional.mse_loss(replayed[:half], target[:half])
    again = functional.cross_entropy(replayed[half:], replayed_label[half:])
    loss = own.mean() + config.der_alpha * distance + config.der_beta * again
    return Loss(loss, {"cross_entropy": own.detach()})
