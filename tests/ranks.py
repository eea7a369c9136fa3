"""Processes that form a process group over gloo, and what they run on request: the ranks of tests/test_sharded.py.

A group of each size is started once and runs many calls. Functions get (rank, size, *arguments) and return something
that can be pickled; an exception comes back as a :class:`Failure`.
"""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import cila_kernels
from cila_kernels import streaming
from cila_kernels._ranks import Ranks
from tests.test_kernels import LargestTensor

OF_QUERIES = ("positive", "query_label", "query_id", "anchor_mask", "distill_weight")
OF_KEYS = ("key_label", "key_id")
SECONDS = 60.0  # after this a test fails instead of hanging
_FORK = multiprocessing.get_context("forkserver")  # torch is imported once, before anything runs in it
_FORK.set_forkserver_preload(["torch", "torch.distributed", "cila_kernels", "tests.ranks", "tests.test_kernels"])


class Failure:
    """What a rank raised."""

    def __init__(self, error: Exception) -> None:
        self.kind, self.text, self.trace = type(error).__name__, str(error), traceback.format_exc()

    def __repr__(self) -> str:
        return self.trace


class Group:
    """``size`` ranks in processes of their own."""

    def __init__(self, size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        pipes = [_FORK.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            _FORK.Process(target=_serve, args=(rank, size, Path(self.folder.name) / "store", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """What ``function(rank, size, ...)`` returns on each rank, a :class:`Failure`, or None if it died."""
        for pipe in self.pipes:
            pipe.send((function, arguments, options))
        results: dict[Connection, Any] = {}
        while len(results) < len(self.pipes):
            ready = wait([pipe for pipe in self.pipes if pipe not in results], SECONDS)
            assert ready, f"no answer within {SECONDS} s from ranks {[p not in results for p in self.pipes]}"
            for pipe in ready:
                try:
                    results[pipe] = pipe.recv()
                except EOFError:
                    results[pipe] = None
        return [results[pipe] for pipe in self.pipes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self.folder.cleanup()


def _serve(rank: int, size: int, store: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    while True:
        try:
            function, arguments, options = pipe.recv()
        except EOFError:
            os._exit(0)  # without waiting for other ranks
        try:
            result = function(rank, size, *arguments, **options)
        except Exception as error:
            result = Failure(error)
        pipe.send(result)


OF_QUERIES = ("positive", "query_label", "query_id", "anchor_mask", "distill_weight")
OF_KEYS = ("key_label", "key_id")


def rows_of(rank: int, size: int, n: int, *, queries: bool) -> slice:
    """Which of n rows a rank has: 1 : 2 : ... : size of the keys, the other way round of the queries."""
    shares = [max(n * 2 * (i + 1) // (size * (size + 1)), 1) for i in range(size - 1)]
    shares.append(n - sum(shares))
    if queries:
        shares.reverse()
    return slice(sum(shares[:rank]), sum(shares[: rank + 1]))


def part(rank: int, size: int, tensors: list[Any], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What a rank gets of (query, key, teacher_query, teacher_key) and options."""
    queries = rows_of(rank, size, len(tensors[0]), queries=True)
    keys = rows_of(rank, size, len(tensors[1]), queries=False)
    own = dict(options)
    for names, rows in ((OF_QUERIES, queries), (OF_KEYS, keys)):
        own.update({name: own[name][rows] for name in names if isinstance(own.get(name), Tensor)})
    sides = (queries, keys, queries, keys)
    return [None if t is None else t[rows] for t, rows in zip(tensors, sides, strict=True)], own


def losses(
    rank: int,
    size: int,
    tensors: list[Any],
    options: dict[str, Any],
    *,
    reduced: bool = False,
    frozen: tuple[tuple[int, str], ...] = (),
    alone: bool = False,
    backend: str | None = None,
) -> list[Tensor | None]:
    """This rank's losses, and the gradients in its query and key and in the student's temperatures: of a sum over all
    rows with weights of either sign, or of the reduced loss.

    ``frozen``: (rank, name) of what requires no grad; ``alone``: without a group, which is what one device gives;
    ``backend``: in a group of this backend, on GPUs if it is nccl.
    """
    group, device = None if alone else dist.group.WORLD, "cpu"
    if backend is not None:
        group, device = dist.new_group(backend=backend), f"cuda:{rank}" if backend == "nccl" else "cpu"
    if device != "cpu":
        torch.cuda.set_device(rank)
    weight = torch.linspace(-1.0, 2.0, len(tensors[0]), dtype=torch.float64, device=device)
    weight = weight[rows_of(rank, size, len(weight), queries=True)]
    tensors, options = part(rank, size, tensors, options)
    query, key, *teacher = (t if t is None else t.to(device, copy=True) for t in tensors)
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    inputs = {"query": query, "key": key}
    for name in ("temperature", "student_temperature"):
        if name in options:
            inputs[name] = torch.tensor(options[name], dtype=torch.float64, device=device)
    for name, tensor in inputs.items():
        tensor.requires_grad_((rank, name) not in frozen)
    options |= inputs | {"group": group, "timeout": SECONDS / 2}
    function = cila_kernels.info_nce_distill_loss if reduced else cila_kernels.info_nce_distill
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is not unit-norm")
        result = function(options.pop("query"), options.pop("key"), *teacher, **options)
    if reduced:
        loss = result.loss
    else:
        loss = (result.contrastive * weight).sum()
        if result.distillation is not None:
            loss = loss + (result.distillation * (1.0 - weight)).sum()
    loss.backward()
    found = (*result, *(tensor.grad for tensor in inputs.values()))
    return [None if x is None else x.detach().double().cpu() for x in found]


def merged(results: list[list[Tensor | None]], *, reduced: bool = False) -> list[Tensor | None]:
    """Of all ranks, what one device gives: rows one after the other, sums of what is 0-d; reduced losses and their
    gradients are averaged over the ranks."""
    whole: list[Tensor | None] = []
    for i, column in enumerate(zip(*results, strict=True)):
        present = [x for x in column if x is not None]
        if present:
            value = torch.cat(present) if present[0].ndim else torch.stack(present).sum(0)
            whole.append(value / len(results) if reduced and (i == 0 or i > 4) else value)
        else:
            whole.append(None)
    return whole


def call(rank: int, size: int, tensors: list[Any], options: dict[str, Any], **change: Any) -> Any:
    """The rows' losses, on a rank's part, with some arguments replaced."""
    (query, key, *teacher), own = part(rank, size, tensors, options)
    given = {"query": query, "key": key, "teacher_query": teacher[0], "teacher_key": teacher[1], **own}
    given |= {"group": dist.group.WORLD, "timeout": SECONDS / 2} | change
    function = cila_kernels.info_nce_distill_loss if given.pop("reduced", False) else cila_kernels.info_nce_distill
    return function(**given)


def call_with(
    rank: int, size: int, tensors: list[Any], options: dict[str, Any], changes: dict[int, dict[str, Any]]
) -> list[float]:
    """:func:`call`, with other arguments on some ranks; "grad_mode" and "key_grad" are no arguments."""
    change = dict(changes.get(rank, {}))
    with torch.set_grad_enabled(change.pop("grad_mode", True)):
        if change.pop("key_grad", False):
            tensors = [t.clone().requires_grad_(i == 1) for i, t in enumerate(tensors)]
        return list(call(rank, size, tensors, options, **change).contrastive.tolist())


def accumulate(rank: int, size: int, tensors: list[Any], options: dict[str, Any]) -> list[Tensor]:
    """Gradients of two losses whose forward passes both precede the backward passes, the last of them run twice, and a
    call without gradients in between."""
    query, key = (t.clone().requires_grad_() for t in part(rank, size, tensors, {})[0][:2])
    given = {"query": query, "key": key}
    one = call(rank, size, tensors, options, **given, reduced=True).loss
    with torch.no_grad():
        between = call(rank, size, tensors, options, **given)
    two = call(rank, size, tensors, options, **given).distillation
    assert not between.contrastive.requires_grad
    assert torch.equal(between.distillation, two)
    two.sum().backward(retain_graph=True)
    two.sum().backward()
    one.backward()
    return [query.grad, key.grad]


class Ignore(torch.autograd.Function):
    """Passes a number on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def ignore(rank: int, size: int, tensors: list[Any], options: dict[str, Any], *, undefined: bool) -> Tensor:
    """Gradient in a rank's keys where rank 1's loss has none: undefined, or zero."""
    key = part(rank, size, tensors, {})[0][1].clone().requires_grad_()
    loss = call(rank, size, tensors, options, key=key).contrastive.sum()
    if rank == 1:
        loss = Ignore.apply(loss) if undefined else 0.0 * loss
    return torch.autograd.grad(loss, key)[0]


def moco(rank: int, size: int, query: list[Tensor], key: list[Tensor], queues: list[Tensor]) -> list[Tensor]:
    """The lines of kernels/README.md."""
    q, k, queue = query[rank].clone().requires_grad_(), key[rank], queues[rank]
    keys = torch.cat([k, queue])
    positive = rank * len(keys) + torch.arange(len(q))
    group = dist.group.WORLD
    loss = cila_kernels.info_nce_distill_loss(q, keys, positive=positive, temperature=0.07, group=group).loss
    return [loss.detach(), *torch.autograd.grad(loss, q)]


def repeat(rank: int, size: int, tensors: list[Any], options: dict[str, Any]) -> bool:
    """Whether two runs give the same bits."""
    one, two = (losses(rank, size, tensors, options) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def average(rank: int, size: int, tensors: list[Any], options: dict[str, Any]) -> list[Tensor]:
    """Gradients of an encoder's parameters and a learnt temperature under DistributedDataParallel."""
    model = Model()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    query, key, temperature = parallel(*part(rank, size, tensors, {})[0][:2])
    call(rank, size, tensors, options, query=query, key=key, temperature=temperature, reduced=True).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


class Model(torch.nn.Module):
    """An encoder of queries and keys, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(12, 10, dtype=torch.float64)
        self.log_temperature = torch.nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = (torch.nn.functional.normalize(self.encoder(x), dim=1) for x in (query, key))
        return query, key, self.log_temperature.exp()


def recipes(rank: int, size: int, z: list[Tensor], labels: Tensor, current: Tensor, *, alone: bool = False) -> Any:
    """The three recipes and their gradients in the two views of images, of which rank r has r + 1 in n."""
    rows = rows_of(rank, size, len(labels), queries=False)
    one, two, past_one, past_two = (t[rows].clone() for t in z)
    one.requires_grad_(), two.requires_grad_()
    given: dict[str, Any] = {} if alone else {"group": dist.group.WORLD}
    label, current = labels[rows].repeat(2), current[rows].repeat(2)
    found = []
    for loss in (
        cila_kernels.nt_xent_loss(one, two, temperature=0.2, **given),
        cila_kernels.co2l_loss(
            torch.cat([one, two]), label, torch.cat([past_one, past_two]), is_current=current, **given
        ).loss,
        cila_kernels.clip_distill_loss(one, two, past_one, past_two, temperature=0.1, **given),
    ):
        found += [loss.detach(), *torch.autograd.grad(loss, (one, two))]
    return found


def watch(rank: int, size: int, tensors: list[Any], options: dict[str, Any], *, key_grad: bool) -> dict[str, Any]:
    """What one call does: bytes sent from rank to rank in the forward pass and in both, the order of events in the
    forward pass, and the most elements of any tensor."""
    sent, events = 0, []
    start, visit = Ranks.transfer, streaming.shard_statistics

    def transfer(self: Ranks, sends: Any, receives: Any) -> Any:
        nonlocal sent
        sent += sum(tensor.nbytes for _, tensor in sends)
        events.append("start")
        wait = start(self, sends, receives)
        return lambda: (events.append("wait"), wait())

    def shard_statistics(*arguments: Any, **given: Any) -> Any:
        events.append("work")
        return visit(*arguments, **given)

    query, key = (t.clone() for t in part(rank, size, tensors, {})[0][:2])
    query.requires_grad_(), key.requires_grad_(key_grad)
    with (
        mock.patch.object(Ranks, "transfer", transfer),
        mock.patch.object(streaming, "shard_statistics", shard_statistics),
        LargestTensor() as largest,
    ):
        rows = call(rank, size, tensors, options, query=query, key=key)
        forward, order = sent, " ".join(events)
        rows.contrastive.sum().backward()
    return {"forward": forward, "backward": sent - forward, "order": order, "largest": largest.elements}


def break_down(rank: int, size: int, tensors: list[Any], options: dict[str, Any], how: str) -> None:
    """Rank 1 fails at the first shard, of the forward or of the backward pass, or dies there; or it changes its queries
    before the backward pass, or makes no call."""
    if how == "silent" and rank == 1:
        return
    name = "shard_gradients" if how == "backward" else "shard_statistics"
    visit = getattr(streaming, name)

    def fail(*arguments: Any, **given: Any) -> Any:
        if rank == 1 and how == "dies":
            os._exit(1)
        if rank == 1 and how in ("forward", "backward"):
            raise torch.OutOfMemoryError("out of memory in the ring")
        return visit(*arguments, **given)

    query = part(rank, size, tensors, {})[0][0].clone().requires_grad_()
    embedding = query * 1.0
    with mock.patch.object(streaming, name, fail):
        rows = call(
            rank, size, tensors, options, query=embedding, timeout=3.0 if how in ("dies", "silent") else SECONDS / 2
        )
        if how == "in place" and rank == 1:
            embedding.mul_(2.0)
        rows.contrastive.sum().backward()


def subgroup(rank: int, size: int, tensors: list[Any], options: dict[str, Any]) -> list[Tensor] | None:
    """Losses of the ranks 1 to the last, whose numbers in their group differ from those in the world."""
    group = dist.new_group(list(range(1, size)))
    if rank == 0:
        return None
    rows = call(rank - 1, size - 1, tensors, options, group=group)
    return [row.detach().double() for row in rows]
