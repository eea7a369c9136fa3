"""One rank among those of a process group: what all must agree on, and transfers that end in an error, not in a hang.

Ranks are counted within the group. Every rank must enter the same agreements and transfers in the same order.
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Addressed = Sequence[tuple[int, Tensor]]  # ranks and contiguous tensors

_MESSAGE_BYTES = 4096
_ERRORS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}  # others are RuntimeError


class UnreachableError(RuntimeError):
    """A rank did not answer: no agreement is possible any more."""


@dataclass
class Facts:
    """What a rank puts into an agreement: ``same`` must be equal on all ranks, ``own`` need not be. ``everyone``: what
    each rank put into ``own``, once agreed."""

    same: dict[str, str] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)
    everyone: list[dict[str, int]] = field(default_factory=list)


class Ranks:
    """``timeout``: seconds to wait for other ranks, or None for the process group's own."""

    def __init__(self, group: dist.ProcessGroup, timeout: float | None) -> None:
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                f"group must be a torch.distributed.ProcessGroup, got {group!r}: "
                "pass torch.distributed.group.WORLD for all ranks"
            )
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is no member of group: call on its members only")
        self._backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
        self._given = timeout
        valid = isinstance(timeout, numbers.Real) and math.isfinite(timeout) and timeout > 0.0
        self._seconds = timeout if valid else None  # a wrong one is reported by check, on every rank

    def check(self, device: torch.device) -> None:
        """ValueError for a wrong time-out, or tensors on a device between which the group does not transfer."""
        if self._given != self._seconds:
            raise ValueError(f"timeout must be a positive number of seconds or None, got {self._given!r}")
        backend = self._backends.get(device.type)
        if backend is None or (backend == "gloo" and device.type != "cpu"):
            raise ValueError(
                f"the group's backend {', '.join(sorted(set(self._backends.values())))} sends no {device.type} tensors "
                "from rank to rank: use nccl for CUDA tensors, gloo for CPU tensors"
            )

    @contextlib.contextmanager
    def agreement(self) -> Iterator[Facts]:
        """The body's error on any rank is raised on every rank, and so is a difference in ``same``; both name ranks.

        TypeError and ValueError stay what they are, other errors are RuntimeErrors elsewhere.
        """
        facts, failure = Facts(), None
        try:
            yield facts
        except UnreachableError:
            raise
        except Exception as error:
            failure = error
        messages = self._gather(_message(facts, failure))
        errors = [message.get("error") for message in messages]
        if any(error is not None for error in errors):
            kinds = {message["kind"] for message in messages if "kind" in message}
            kind = _ERRORS.get(kinds.pop(), RuntimeError) if len(kinds) == 1 else RuntimeError
            raise kind("; ".join(f"{who}: {text}" for text, who in _by_value(errors) if text is not None)) from failure
        different = []
        for name in dict.fromkeys(name for message in messages for name in message["same"]):
            values = _by_value([message["same"].get(name) for message in messages])
            if len(values) > 1:
                found = ", ".join(f"{value} on {who}" for value, who in values)
                different.append(f"{name} must be the same on every rank, got {found}")
        if different:
            raise ValueError("; ".join(different))
        facts.everyone = [message["own"] for message in messages]

    def ring(
        self,
        own: list[Tensor],
        rows: list[int],
        work: Callable[[int, list[Tensor]], Tensor | None],
        sum_dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """Shows the shards of all ranks to ``work(owner, shard)``, the own first, then those of the ranks before.

        A shard is a list of tensors of ``rows[owner]`` rows; the next one travels while ``work`` runs. With
        ``sum_dtype`` what ``work`` returns, of the shape of the shard's first tensor in that dtype or None, travels
        with the shard and is added up on the way, in the order owner, owner + 1, ...; returns the sum for ``own``.

        An error of ``work`` is raised at the end: until then this rank passes on what others wait for.
        """
        left, right = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        shard, total, failure = own, None, None
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            last = step == self.size - 1
            following = [] if last else [t.new_empty(rows[(owner - 1) % self.size], *t.shape[1:]) for t in own]
            passed = None  # what the ranks before have added up for this shard
            if total is not None:
                passed = total.new_empty(rows[owner], *total.shape[1:])
            wait = self.transfer(
                [(right, t) for t in ([] if last else shard)] + _addressed(right, total),
                [(left, t) for t in following] + _addressed(left, passed),
            )
            addend = None
            if failure is None:
                try:
                    addend = work(owner, shard)
                except Exception as error:
                    failure = error
            wait()
            if sum_dtype is not None:
                if addend is None:
                    total = torch.zeros_like(shard[0], dtype=sum_dtype) if passed is None else passed
                else:
                    total = addend if passed is None else addend.add_(passed)
            shard = following
        if total is not None and self.size > 1:
            arrived = torch.empty_like(own[0], dtype=sum_dtype)
            self.transfer([(right, total)], [(left, arrived)])()
            total = arrived
        if failure is not None:
            raise failure
        return total

    def gather(self, own: Tensor, rows: list[int]) -> Tensor:
        """The tensors of all ranks one after the other; that of a rank has ``rows[rank]`` rows."""
        size = max(rows)
        padded = own.contiguous()
        if len(own) < size:
            padded = torch.cat([own, own.new_zeros(size - len(own), *own.shape[1:])])
        everyone = own.new_empty(self.size, *padded.shape)
        parts = list(everyone.unbind())
        self._all_gather(parts, padded)
        if min(rows) == size:
            return everyone.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    def sum_at_owners(self, parts: Tensor, rows: list[int], dtype: torch.dtype) -> Tensor:
        """Every rank has a part of the sum for every rank; the sum for this one, in the order of :meth:`ring`."""
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        by_owner = parts.contiguous().split(rows)
        total = by_owner[self.rank].to(dtype, copy=True)
        arrived = [torch.empty_like(by_owner[self.rank]) for _ in others]
        self.transfer([(peer, by_owner[peer]) for peer in others], list(zip(others, arrived, strict=True)))()
        for part in arrived:
            total += part
        return total

    def transfer(self, sends: Addressed, receives: Addressed) -> Callable[[], None]:
        """Starts to send tensors to ranks, and to receive others; the result waits until all have arrived."""
        operations = [dist.P2POp(dist.isend, t, group=self.group, group_peer=peer) for peer, t in sends]
        operations += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=peer) for peer, t in receives]
        if not operations:
            return lambda: None
        reasons = [f"nothing was taken by rank {peer}" for peer, _ in sends]
        reasons += [f"nothing came from rank {peer}" for peer, _ in receives]
        peers = sorted({peer for peer, _ in (*sends, *receives)})
        lost = f"no connection to rank {' or rank '.join(map(str, peers))}"
        works = self._start(partial(dist.batch_isend_irecv, operations), lost)
        if len(works) < len(reasons):  # NCCL's are one
            reasons = [" or ".join(dict.fromkeys(reasons))]
        return lambda: self._wait(works, reasons)

    def _gather(self, message: bytes) -> list[Any]:
        """The messages of all ranks."""
        device = "cpu" if "cpu" in self._backends else next(iter(self._backends))
        own = torch.tensor(list(message.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8, device=device)
        received = [torch.empty_like(own) for _ in range(self.size)]
        self._all_gather(received, own)
        lengths = torch.stack(received).count_nonzero(dim=1).tolist()
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(received, lengths, strict=True)]

    def _all_gather(self, everyone: list[Tensor], own: Tensor) -> None:
        reason = "not every rank answered"
        call = partial(dist.all_gather, everyone, own, group=self.group, async_op=True)
        self._wait(self._start(call, reason), [reason])

    def _start(self, call: Callable[[], Any], reason: str) -> list[Any]:
        """The work that ``call`` starts, or UnreachableError with ``reason``."""
        try:
            started = call()
        except RuntimeError as error:
            raise self._unreachable(reason, error) from error
        return started if isinstance(started, list) else [started]

    def _wait(self, works: list[Any], reasons: list[str]) -> None:
        """Until all works are done, or UnreachableError with the reason of the first that is not."""
        end = None if self._seconds is None else time.monotonic() + self._seconds
        for work, reason in zip(works, reasons, strict=True):
            try:
                if end is None:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=max(end - time.monotonic(), 1e-3)))
            except RuntimeError as error:
                raise self._unreachable(reason, error) from error

    def _unreachable(self, reason: str, error: RuntimeError) -> UnreachableError:
        cause = (str(error).splitlines() or [""])[0]
        return UnreachableError(
            f"rank {self.rank} of {self.size}: {reason} ({cause}): a rank has failed, is slower than the time-out, "
            "or has made another call; start again with a new process group"
        )


def _message(facts: Facts, failure: Exception | None) -> bytes:
    if failure is None:
        return json.dumps({"same": facts.same, "own": facts.own}).encode()
    kind, text = type(failure).__name__, str(failure)
    if kind not in (*_ERRORS, "RuntimeError"):
        text = f"{kind}: {text}"
    while len(message := json.dumps({"kind": kind, "error": text}).encode()) > _MESSAGE_BYTES:
        text = text[: len(text) // 2]
    return message


def _addressed(peer: int, tensor: Tensor | None) -> list[tuple[int, Tensor]]:
    return [] if tensor is None else [(peer, tensor)]


def _by_value(values: Sequence[Any]) -> list[tuple[Any, str]]:
    """Each different value, with the ranks that have it, for a message."""
    ranks: dict[Any, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return [(value, f"rank{'s' if len(who) > 1 else ''} {', '.join(who)}") for value, who in ranks.items()]
