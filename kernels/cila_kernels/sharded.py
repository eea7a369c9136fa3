"""Keys sharded over the ranks of a process group: every query's losses over all of them.

Every rank has its own queries and its own shard of the keys. What a row keeps of a shard merges exactly with what it
keeps of the others (:mod:`_statistics`). With exchange="ring" the shards travel from rank to rank; a rank holds its
own, the one it works on, and the one that arrives meanwhile. In the backward pass they travel again, with the gradients
of their keys, which are added up on the way and end at their owner. With exchange="all_gather" every rank holds all
keys and computes as one device does; so does impl="reference" always.

Gradients. Let L_r be what rank r calls ``backward`` on. The gradient of a key is that of sum_r L_r: it comes from the
rows of all ranks. A query is in no other rank's rows, so the same holds for it. The gradient of a temperature is that
of the rank's own L_r. Averaged over W ranks, as DistributedDataParallel does, the gradients of an encoder's parameters
and of the temperatures are therefore those of sum_r L_r / W.

All ranks must make the same calls in the same order, the backward passes too, and run each of these or none: in the
ring a rank that skips one, or another that has no use for its loss, keeps the others waiting. Whether keys require grad
must be the same on all ranks; whether queries and temperatures do need not.

Sums over ranks have a fixed order, that of the ring, so that runs repeat bit by bit; another number of ranks, or rows
and keys on other ranks, change the rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from cila_kernels import reference, streaming
from cila_kernels._candidates import Found, Problem, among, prepare
from cila_kernels._problem import Inputs
from cila_kernels._ranks import Facts, Ranks
from cila_kernels._rows import RowLosses
from cila_kernels._statistics import Statistics

Exchange = Literal["ring", "all_gather"]
_OF_KEYS = ("key", "teacher_key", "key_label", "key_id")  # what a shard consists of


def together(
    group: ProcessGroup | None, exchange: Exchange = "ring", timeout: float | None = None
) -> AbstractContextManager[Call | None]:
    """A body that every rank of ``group`` runs: its error on one rank is raised on all, and so is a difference in what
    :meth:`Call.agree` says. None without a group."""
    return nullcontext() if group is None else _together(group, exchange, timeout)


@contextmanager
def _together(group: ProcessGroup, exchange: Exchange, timeout: float | None) -> Iterator[Call]:
    ranks = Ranks(group, timeout)
    with ranks.agreement() as facts:
        yield Call(ranks, exchange, facts)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call on all ranks."""

    ranks: Ranks
    exchange: Exchange
    facts: Facts

    @torch.compiler.disable
    def agree(self, inputs: Inputs, module: ModuleType, anchors: Tensor | None = None, **options: Any) -> None:
        """Says what must be the same on every rank, and how many rows and ``anchors`` (N,) this one has."""
        if self.exchange not in ("ring", "all_gather"):
            raise ValueError(f"exchange must be 'ring' or 'all_gather', got {self.exchange!r}")
        self.ranks.check(inputs.query.device)
        teacher = inputs.teacher_query
        differentiable = torch.is_grad_enabled()
        same = {
            "impl": module.__name__.rpartition(".")[2],
            "exchange": self.exchange,
            "device": inputs.query.device.type,
            "dtype of query and key": inputs.query.dtype,
            "width of query and key": inputs.query.shape[1],
            "dtype of the teacher": None if teacher is None else teacher.dtype,
            "width of the teacher": None if teacher is None else teacher.shape[1],
            "kind of positives": "labels" if inputs.positive is None else "indices",
            "use of ids": inputs.query_id is not None,
            "temperature": inputs.temperature.item(),
            "student_temperature": inputs.student_temperature.item(),
            "teacher_temperature": inputs.teacher_temperature.item(),
            "on_missing_positive": inputs.on_missing_positive,
            "allow_tf32": inputs.allow_tf32,
            "grad mode": differentiable,
            "requires_grad of key": differentiable and inputs.key.requires_grad,
            **options,
        }
        self.facts.same.update((name, str(value)) for name, value in same.items())
        self.facts.own.update(
            queries=inputs.query.shape[0],
            keys=inputs.key.shape[0],
            anchors=inputs.query.shape[0] if anchors is None else int(anchors.sum()),
            embedding_gradients=int(differentiable and (inputs.query.requires_grad or inputs.key.requires_grad)),
        )

    def total(self, name: str) -> int:
        """Over ranks, of "queries", "keys" or "anchors"."""
        return sum(own[name] for own in self.facts.everyone)

    @property
    def rows(self) -> list[int]:
        """Keys of each rank."""
        return [own["keys"] for own in self.facts.everyone]

    @torch.compiler.disable
    def row_losses(self, inputs: Inputs, module: ModuleType) -> RowLosses:
        """Per-row losses of this rank's queries over all keys, as ``module`` returns them on one device."""
        with torch.autocast(inputs.query.device.type, enabled=False):
            if self._gathers(module):
                with self.ranks.agreement():
                    return module.row_losses(self._gathered(inputs, module))
            of_some = torch.is_grad_enabled() and self.total("embedding_gradients") > 0
            joins = torch.zeros((), requires_grad=of_some)  # every rank takes part in the backward pass of any
            tensors = (inputs.query, inputs.key, inputs.temperature, inputs.student_temperature, joins)
            return RowLosses(*_Ring.apply(*tensors, self, inputs, module))

    @torch.compiler.disable
    def reduced_loss(
        self, inputs: Inputs, module: ModuleType, contrastive_weight: Tensor, distill_weight: Tensor
    ) -> tuple[Tensor, RowLosses]:
        """(sum_i contrastive_weight_i contrastive_i + distill_weight_i distillation_i, detached per-row losses) of this
        rank's queries."""
        if self._gathers(module):
            with self.ranks.agreement():
                return module.reduced_loss(self._gathered(inputs, module), contrastive_weight, distill_weight)
        rows = self.row_losses(inputs, module)
        with torch.autocast(inputs.query.device.type, enabled=False):
            loss = torch.dot(contrastive_weight.to(rows.contrastive.dtype), rows.contrastive)
            if rows.distillation is not None:
                loss = loss + torch.dot(distill_weight.to(loss.dtype), rows.distillation)
        return loss, rows.detach()

    def _gathers(self, module: ModuleType) -> bool:
        return self.exchange == "all_gather" or module is reference

    def _gathered(self, inputs: Inputs, module: ModuleType) -> Problem:
        """The problem of this rank's queries over all keys."""
        others: dict[str, Any] = {
            name: self.ranks.gather(tensor, self.rows)
            for name in _OF_KEYS[1:]
            if (tensor := getattr(inputs, name)) is not None
        }
        # of a dtype that the implementation takes and, if it can be, no rank's part of a gradient is rounded to
        dtype = {reference: torch.float64, streaming: inputs.compute_dtype}.get(module, inputs.key.dtype)
        key = _Gather.apply(inputs.key, self.ranks, self.rows, dtype)
        return prepare(dataclasses.replace(inputs, key=key, **others))

    def shard(self, inputs: Inputs) -> list[Tensor]:
        """What travels of this rank's keys."""
        present = (getattr(inputs, name) for name in _OF_KEYS)
        return [tensor.detach().contiguous() for tensor in present if tensor is not None]

    def among(self, inputs: Inputs, owner: int, shard: list[Tensor]) -> Problem:
        """The problem of this rank's queries over the keys of ``owner``."""
        names = [name for name in _OF_KEYS if getattr(inputs, name) is not None]
        change: dict[str, Any] = dict(zip(names, shard, strict=True))
        if inputs.positive is not None:
            change["positive"] = inputs.positive - sum(self.rows[:owner])
        return among(dataclasses.replace(inputs, **change))


class _Gather(torch.autograd.Function):
    """The keys of all ranks (M, D) in ``dtype``; the gradient of each goes to its owner, who adds up."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, ranks: Ranks, rows: list[int], dtype: torch.dtype) -> Tensor:
        ctx.ranks, ctx.rows, ctx.dtype = ranks, rows, key.dtype
        return ranks.gather(key, rows).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return ctx.ranks.sum_at_owners(gradient, ctx.rows, dtype).to(ctx.dtype), None, None, None


class _Ring(torch.autograd.Function):
    """Per-row losses; keys travel in the forward pass, and again in the backward pass with their gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *tensors, call, inputs, module = arguments
        slopes = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        seen: list[tuple[Statistics, Found]] = []  # of all shards so far

        def work(owner: int, shard: list[Tensor]) -> None:
            problem = call.among(inputs, owner, shard)
            statistics, found = module.shard_statistics(problem, slopes=slopes), Found.among(problem)
            if seen:
                before = seen.pop()
                statistics, found = before[0].merge(statistics), before[1].plus(found)
            seen.append((statistics, found))

        with call.ranks.agreement():
            call.ranks.ring(call.shard(inputs), call.rows, work)
            statistics, found = seen[0]
            found.check(inputs)
        losses = statistics.losses(inputs, found.positives)
        ctx.call, ctx.inputs, ctx.module, ctx.statistics, ctx.count = call, inputs, module, statistics, found.positives
        ctx.save_for_backward(*tensors[:4])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(row for row in losses[2:] if row is not None))
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, contrastive: Tensor | None, distillation: Tensor | None, *_: Any) -> tuple[Any, ...]:
        call, inputs, statistics, count = ctx.call, ctx.inputs, ctx.statistics, ctx.count
        wanted = ctx.needs_input_grad[:2]
        d_query = torch.zeros_like(inputs.query, dtype=inputs.compute_dtype) if wanted[0] else None
        d_key = d_temperature = d_student = None

        def work(owner: int, shard: list[Tensor]) -> Tensor | None:
            if not any(wanted) or (contrastive is None and distillation is None):
                return None
            _ = ctx.saved_tensors  # raises if one was changed in place
            problem = call.among(inputs, owner, shard)
            positives = dataclasses.replace(problem.positives, count=count)
            of_query, of_key = ctx.module.shard_gradients(
                dataclasses.replace(problem, positives=positives), statistics, contrastive, distillation, wanted
            )
            if d_query is not None:
                d_query.add_(of_query)
            return of_key

        with torch.autocast(inputs.query.device.type, enabled=False):
            if ctx.needs_input_grad[4]:
                with call.ranks.agreement():
                    d_key = call.ranks.ring(
                        call.shard(inputs), call.rows, work, inputs.compute_dtype if wanted[1] else None
                    )
            if ctx.needs_input_grad[2]:
                d_temperature = statistics.temperature_gradient(inputs, count, contrastive)
            if ctx.needs_input_grad[3]:
                d_student = statistics.student_temperature_gradient(inputs, distillation)
        tensors = (inputs.query, inputs.key, inputs.temperature, inputs.student_temperature)
        gradients = zip((d_query, d_key, d_temperature, d_student), tensors, strict=True)
        return *(None if g is None else g.to(x.dtype) for g, x in gradients), None, None, None, None
