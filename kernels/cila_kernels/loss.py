"""The two public calls: InfoNCE (or SupCon) and relation distillation over one candidate set."""

from __future__ import annotations

import numbers
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cila_kernels import reference, sharded, streaming
from cila_kernels._candidates import prepare
from cila_kernels._problem import Inputs, MissingPositive, check, check_row_vector, found
from cila_kernels._rows import RowLosses

Impl = Literal["auto", "reference", "streaming", "triton"]
_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ReducedLoss(NamedTuple):
    """``loss`` (0-d, differentiable) and the detached per-row terms of :class:`RowLosses`, shape (N,), in nats."""

    loss: Tensor
    contrastive: Tensor
    distillation: Tensor | None
    teacher_entropy: Tensor | None
    teacher_contrastive: Tensor | None


def info_nce_distill(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor | None = None,
    teacher_key: Tensor | None = None,
    *,
    positive: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    query_id: Tensor | None = None,
    key_id: Tensor | None = None,
    temperature: float | Tensor,
    student_temperature: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    on_missing_positive: MissingPositive = "error",
    strict: bool = False,
    allow_tf32: bool = False,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    exchange: sharded.Exchange = "ring",
    timeout: float | None = None,
) -> RowLosses:
    """Contrastive and distillation loss of every query over all keys, without storing the N x M similarities.

    It replaces::

        q = (query @ key.T / temperature).log_softmax(1)
        contrastive = -q[range(N), positive]  # with labels: minus the mean over all keys of the row's label
        p = (teacher_query @ teacher_key.T / teacher_temperature).softmax(1)
        distillation = -(p * (query @ key.T / student_temperature).log_softmax(1)).sum(1)

    Arguments:

    - query (N, D), key (M, D): unit-norm embeddings in float16, bfloat16, float32 or float64. Gradients flow to both;
      a key that does not require grad (a queue) costs none.
    - teacher_query (N, D'), teacher_key (M, D'): the frozen previous model's embeddings of the same samples, without
      gradient, of any width; or neither, for the contrastive loss alone.
    - positive (N,): index of each row's positive key (InfoNCE); or query_label (N,) and key_label (M,): every key with
      the row's label is a positive (SupCon, mean over positives outside the logarithm).
    - query_id (N,), key_id (M,): a key with the row's own id is left out of every softmax, the teacher's too, and is no
      positive.
    - temperature, student_temperature (default: temperature), teacher_temperature (default: student_temperature):
      floats or 0-d tensors; the first two are differentiable.
    - on_missing_positive: rows without a positive raise an error, or with "ignore" have contrastive loss 0.
    - strict: embeddings that are not unit-norm raise an error, instead of one warning.
    - allow_tf32: "triton" may round float32 factors to TF32; half precision is always summed in float32.
    - impl: "reference" (float64, all similarities: the oracle), "streaming" (any device, row blocks), "triton" (GPU),
      or "auto": "triton" for CUDA tensors where it is installed, else "streaming".
    - group: the torch.distributed process group of the ranks that all make this call, each with queries and keys of its
      own, in any number: the keys of all of them, those of rank 0 first, are every query's candidates, and ``positive``
      counts in that order. What gradients are then: :mod:`cila_kernels.sharded`.
    - exchange: with a group, "ring" (keys travel from rank to rank, and no rank holds all of them) or "all_gather"
      (every rank holds all keys; so does impl="reference" always).
    - timeout: with a group, seconds to wait for another rank; default: the group's own time-out.

    Returns per-row losses (N,) in nats, differentiable with any upstream gradient; half-precision input is computed
    and returned in float32.

    Raises ValueError or TypeError for wrong shapes, dtypes, devices, non-finite embeddings, temperatures <= 0, an
    empty candidate set, an index out of range or missing positives; RuntimeError if ``impl`` is not available. With a
    group every rank raises what one of them meets, and a ValueError where they differ in an argument that must be the
    same; both name the ranks. RuntimeError if a rank does not answer; the process group is lost then.

    Sources: InfoNCE (van den Oord et al. 2018), SupCon (Khosla et al. 2020, L_out), instance-wise relation
    distillation (Cha et al. 2021).
    """
    with sharded.together(group, exchange, timeout) as call:
        inputs = check(
            query,
            key,
            teacher_query,
            teacher_key,
            positive=positive,
            query_label=query_label,
            key_label=key_label,
            query_id=query_id,
            key_id=key_id,
            temperature=temperature,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            on_missing_positive=on_missing_positive,
            needs_positive=None,
            strict=strict,
            allow_tf32=allow_tf32,
        )
        module = _module(impl, inputs)
        if call is not None:
            call.agree(inputs, module, call="info_nce_distill")
    if call is None:
        return module.row_losses(prepare(inputs))
    return call.row_losses(inputs, module)


def info_nce_distill_loss(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor | None = None,
    teacher_key: Tensor | None = None,
    *,
    positive: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    query_id: Tensor | None = None,
    key_id: Tensor | None = None,
    temperature: float | Tensor,
    student_temperature: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    distill_weight: float | Tensor = 1.0,
    anchor_mask: Tensor | None = None,
    on_missing_positive: MissingPositive = "error",
    strict: bool = False,
    allow_tf32: bool = False,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    exchange: sharded.Exchange = "ring",
    timeout: float | None = None,
) -> ReducedLoss:
    """contrastive[anchor_mask].mean() + (distill_weight * distillation).mean(), and the per-row terms.

    The weights are known beforehand, so "streaming" forms the gradients in the forward pass and recomputes nothing:
    cheaper than reducing :func:`info_nce_distill`.

    Arguments beyond those of :func:`info_nce_distill`:

    - distill_weight: lambda, a finite float >= 0 or a tensor of one per row (N,), without gradient.
    - anchor_mask (N,) bool: the rows whose contrastive loss counts (asymmetric SupCon: rows of the current task);
      default all. Other rows need no positive, and are distilled all the same. A mask without any True gives
      contrastive loss 0 with on_missing_positive="ignore", and an error otherwise.

    With a ``group`` the means are over the anchors and the rows of all ranks. The loss returned is the number of ranks
    times this rank's share of them: the average over the ranks of the losses, and of the gradients as
    DistributedDataParallel forms it, is the loss of all rows on one device, and its gradient. With as many rows and
    anchors on every rank it is the mean over this rank's.

    Raises what :func:`info_nce_distill` raises, and the same for the two arguments above.
    """
    with sharded.together(group, exchange, timeout) as call:
        if isinstance(anchor_mask, Tensor) and isinstance(query, Tensor):
            anchor_mask = check_row_vector("anchor_mask", anchor_mask, query.shape[0], query.device, (torch.bool,))
        elif anchor_mask is not None:
            raise TypeError(f"anchor_mask must be a bool tensor, got {type(anchor_mask).__name__}")
        inputs = check(
            query,
            key,
            teacher_query,
            teacher_key,
            positive=positive,
            query_label=query_label,
            key_label=key_label,
            query_id=query_id,
            key_id=key_id,
            temperature=temperature,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            on_missing_positive=on_missing_positive,
            needs_positive=anchor_mask,
            strict=strict,
            allow_tf32=allow_tf32,
        )
        module = _module(impl, inputs)
        distill_rows = _distill_rows(query, distill_weight)
        anchors = distill_rows.new_ones(query.shape[0]) if anchor_mask is None else anchor_mask.double()
        if call is not None:
            per_row = isinstance(distill_weight, Tensor) and distill_weight.ndim > 0
            call.agree(
                inputs,
                module,
                anchors,
                call="info_nce_distill_loss",
                distill_weight="one per row" if per_row else float(distill_weight),
            )
    n_anchors, n, ranks = anchors.sum(), query.shape[0], 1
    if call is not None:
        n_anchors, n, ranks = n_anchors.new_tensor(call.total("anchors")), call.total("queries"), call.ranks.size
    if on_missing_positive == "error" and found(n_anchors == 0):
        raise ValueError(
            "anchor_mask selects no row: pass on_missing_positive='ignore' to count the contrastive loss as 0"
        )
    weights = ranks * anchors / n_anchors.clamp(min=1), ranks * distill_rows / n
    if call is None:
        loss, rows = module.reduced_loss(prepare(inputs), *weights)
    else:
        loss, rows = call.reduced_loss(inputs, module, *weights)
    return ReducedLoss(loss, *rows)


def _distill_rows(query: Tensor, weight: float | Tensor) -> Tensor:
    """lambda per row, float64 (N,)."""
    n = query.shape[0]
    if isinstance(weight, Tensor):
        if weight.requires_grad:
            raise ValueError("distill_weight requires grad, but gets none: detach it")
        vector = weight.expand(n) if weight.ndim == 0 else weight
        rows = check_row_vector("distill_weight", vector, n, query.device, _WEIGHT_DTYPES).double()
    elif isinstance(weight, numbers.Real):
        rows = torch.full((n,), float(weight), dtype=torch.float64, device=query.device)
    else:
        raise TypeError(f"distill_weight must be a float or a tensor, got {weight!r}")
    if found(~(torch.isfinite(rows) & (rows >= 0))):
        raise ValueError(f"distill_weight must be finite and >= 0, got {weight!r}")
    return rows


def _module(impl: str, inputs: Inputs) -> ModuleType:
    if impl not in ("auto", "reference", "streaming", "triton"):
        raise ValueError(f"impl must be 'auto', 'reference', 'streaming' or 'triton', got {impl!r}")
    if impl == "reference":
        return reference
    if impl == "streaming" or (impl == "auto" and inputs.query.device.type != "cuda"):
        return streaming
    try:
        from cila_kernels import fused
    except ModuleNotFoundError as error:
        if impl == "auto" and error.name == "triton":
            return streaming
        raise RuntimeError(
            "impl='triton' needs the package triton, which is not installed: use impl='streaming'"
        ) from error
    reason = fused.unavailable(inputs)
    if reason is None:
        return fused
    if impl == "auto":
        return streaming
    raise RuntimeError(f"impl='triton' {reason}")
