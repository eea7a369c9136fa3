"""What each row finds among its keys: the positives, and the keys it may not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cila_kernels._exclusion import Exclusion
from cila_kernels._positives import Group, Positives
from cila_kernels._problem import Inputs, found, rows_of


@dataclass(frozen=True)
class Problem(Inputs):
    """Inputs, with the positives and exclusions of every row among its keys."""

    positives: Positives
    exclusion: Exclusion | None


def prepare(inputs: Inputs) -> Problem:
    """The problem over all keys there are; ValueError if a row has no candidate, or a positive that is none."""
    problem = among(inputs)
    Found.among(problem).check(inputs)
    return problem


def among(inputs: Inputs) -> Problem:
    """The problem over the keys of ``inputs``, which may be some of all; an index outside them is no positive here."""
    exclusion = None
    if inputs.query_id is not None and inputs.key_id is not None:
        exclusion = Exclusion.of(inputs.query_id, inputs.key_id)
    return Problem(**vars(inputs), positives=_positives(inputs, exclusion), exclusion=exclusion)


def _positives(inputs: Inputs, exclusion: Exclusion | None) -> Positives:
    m = inputs.key.shape[0]
    if inputs.positive is not None:
        inside = (inputs.positive >= 0) & (inputs.positive < m)
        return Positives(torch.where(inside, inputs.positive, -1), (), inside.long(), m)
    assert inputs.query_label is not None and inputs.key_label is not None
    labels = inputs.query_label, inputs.key_label
    groups = [Group.of(1, labels)]
    if exclusion is not None:
        groups.append(Group.of(-1, labels, (exclusion.query_id, exclusion.key_id)))
    count = torch.stack([group.sign * group.sizes() for group in groups]).sum(0)
    return Positives(None, tuple(groups), count, m)


class Found(NamedTuple):
    """For each row (N,) the number of positives, that of excluded keys, and whether its positive by index is one of
    them, among ``keys`` keys."""

    positives: Tensor
    excluded: Tensor
    contradicts: Tensor
    keys: int

    @staticmethod
    def among(problem: Problem) -> Found:
        positives, exclusion = problem.positives, problem.exclusion
        none = torch.zeros_like(positives.count)
        contradicts = none.bool()
        if exclusion is not None and positives.index is not None:
            own = exclusion.query_id == exclusion.key_id[positives.index.clamp(min=0)]
            contradicts = own & (positives.index >= 0)
        return Found(positives.count, none if exclusion is None else exclusion.count, contradicts, positives.keys)

    def plus(self, other: Found) -> Found:
        """Among both sets of keys."""
        return Found(
            self.positives + other.positives,
            self.excluded + other.excluded,
            self.contradicts | other.contradicts,
            self.keys + other.keys,
        )

    def check(self, inputs: Inputs) -> None:
        """ValueError names the rows without a candidate, or with a positive that is none."""
        empty = self.excluded == self.keys
        if found(empty):
            raise ValueError(
                f"every key carries the id of {rows_of(empty)}: the candidate set is empty; add keys or drop the rows"
            )
        if inputs.positive is not None:
            outside = (inputs.positive < 0) | (inputs.positive >= self.keys)
            if found(outside):
                raise ValueError(
                    f"positive must be a key index in 0..{self.keys - 1}, but is not for {rows_of(outside)}"
                )
            if found(self.contradicts):
                raise ValueError(
                    f"the positive key carries the row's own id, which excludes it, for {rows_of(self.contradicts)}"
                )
            return
        missing = self.positives == 0
        if inputs.needs_positive is not None:
            missing &= inputs.needs_positive
        if inputs.on_missing_positive == "error" and found(missing):
            raise ValueError(
                f"no key but itself has the label of {rows_of(missing)}: add positives, "
                "or pass on_missing_positive='ignore' to count their contrastive loss as 0"
            )
