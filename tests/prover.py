"""Proves that a function is positive on a whole box, by branch and bound in ball arithmetic, and says by how much.

Knows nothing of ``cila_bound``. A margin that is zero somewhere cannot be proven this way (``UndecidedError``): factor
it first. A margin that is negative somewhere is refuted by a box on which it is negative throughout.
"""

import heapq
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flint import arb, ctx


@dataclass(frozen=True)
class Statement:
    """``margin`` > 0 on the box with these ``sides``; ``gradient`` is its derivative along each side."""

    name: str
    where: str
    sides: Sequence[tuple[float | arb, float | arb]]
    margin: Callable[..., arb]
    gradient: Callable[..., Sequence[arb]]


class Proof(NamedTuple):
    """The margin is at least ``margin`` everywhere (and less than twice that somewhere)."""

    margin: float
    boxes: int
    seconds: float


Side = tuple[arb, arb]  # exact ends: a ball's own ends are too coarse where the margin is small next to its terms


class RefutedError(Exception):
    """The margin is negative on all of ``box``."""

    def __init__(self, box: list[Side], margin: arb) -> None:
        super().__init__(f"margin {margin.str(5)} on {[(float(low), float(high)) for low, high in box]}")
        self.box = box


class UndecidedError(Exception):
    """No proof and no refutation within the limit: the margin is zero, or nearly so, somewhere."""


def prove(statement: Statement, *, limit: int = 20_000, bits: int = 128) -> Proof:
    """Best first. On a box, a side along which the margin is monotone is replaced by its worse end; then the margin is
    bounded by its mean value form; then the box is halved along the side that this form depends on most.
    """
    start, count, least = time.perf_counter(), itertools.count(1), arb("inf")
    with ctx.workprec(bits):
        heap: list[tuple[float, int, arb, list[Side], list[arb]]] = []
        todo = [[(arb(low), arb(high)) for low, high in statement.sides]]
        while len(heap) < limit:
            for sides in todo:
                box, gradient = worst_face(statement, sides)
                middle = [((low + high) / 2).mid() for low, high in box]
                value = statement.margin(*middle)
                spread = [slope * (hull(*side) - mid) for slope, side, mid in zip(gradient, box, middle, strict=True)]
                form = value + sum(spread, arb(0))
                if form < 0:
                    raise RefutedError(box, form)
                least = min(least, value.upper())
                heapq.heappush(heap, (float(form.lower()), next(count), form.lower(), box, gradient))
            _, _, bound, box, gradient = heapq.heappop(heap)
            if bound > 0 and least < 2 * bound:
                proven = min([bound, *(entry[2] for entry in heap)])
                return Proof(math.nextafter(float(proven), 0.0), next(count) - 1, time.perf_counter() - start)
            weights = [abs(slope).upper() * (high - low) for slope, (low, high) in zip(gradient, box, strict=True)]
            widest = max(range(len(box)), key=lambda i: float(weights[i]))
            if weights[widest] == 0:
                break
            todo = [[*box[:widest], half, *box[widest + 1 :]] for half in halves(box[widest])]
    raise UndecidedError(f"{statement.name}: the margin is at least {float(bound)} and at most {float(least)}")


def worst_face(statement: Statement, box: list[Side]) -> tuple[list[Side], list[arb]]:
    """The face on which the margin is smallest, as far as the signs of its derivatives tell, and these derivatives."""
    while True:
        gradient = list(statement.gradient(*(hull(*side) for side in box)))
        face = [
            (low, low) if slope >= 0 else (high, high) if slope <= 0 else (low, high)
            for slope, (low, high) in zip(gradient, box, strict=True)
        ]
        if all(old is new for sides in zip(box, face, strict=True) for old, new in zip(*sides, strict=True)):
            return box, gradient
        box = face


def hull(*points: arb) -> arb:
    """A ball that holds all points."""
    ball = arb(points[0])
    for point in points[1:]:
        ball = ball.union(arb(point))
    return ball


def halves(side: Side) -> list[Side]:
    low, high = side
    middle = ((low + high) / 2).mid()
    return [(low, middle), (middle, high)]


def monotone(function: Callable[[arb], arb], x: arb) -> arb:
    """The values of a monotone function on a ball."""
    return hull(function(x.lower()), function(x.upper()))


def sigmoid(x: arb) -> arb:
    return monotone(lambda end: 1 / (1 + (-end).exp()), x)


def softplus(x: arb) -> arb:
    """log(1 + exp(x))."""
    return monotone(lambda end: end.exp().log1p(), x)


def square(x: arb) -> arb:
    """Not negative, unlike x * x on a ball around zero."""
    return hull(x.abs_lower() ** 2, x.abs_upper() ** 2)
