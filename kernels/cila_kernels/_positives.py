"""Positives without an N x M mask: sums over groups of keys.

The positives of a row are the keys with its label but not its own id. Their sum is the sum over the keys of its label
minus the sum over those of its label and id, so the mean similarity to all positives is one dot product per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Queries (N,) and keys (M,) with equal values have equal numbers below N + M; ``sign``: adds positives, or takes
    them."""

    query: Tensor
    key: Tensor
    sign: int

    @staticmethod
    def of(sign: int, *columns: tuple[Tensor, Tensor]) -> Group:
        """Rows and keys that agree in every column of (query (N,), key (M,)) integers are one group."""
        n, m = (side.shape[0] for side in columns[0])
        joint = torch.zeros(n + m, dtype=torch.int64, device=columns[0][0].device)
        for column in columns:
            joint = _numbers(joint * (n + m) + _numbers(torch.cat(column)))
        return Group(joint[:n], joint[n:], sign)

    def sizes(self) -> Tensor:
        """For each row (N,) the number of keys in its group."""
        zeros = self.key.new_zeros(self.query.shape[0] + self.key.shape[0])
        return zeros.index_add(0, self.key, torch.ones_like(self.key))[self.query]

    def sums(self, key: Tensor) -> Tensor:
        """For each row (N, D) the sum of the keys in its group; differentiable."""
        zeros = key.new_zeros(self.query.shape[0] + self.key.shape[0], key.shape[1])
        return zeros.index_put((self.key,), key, accumulate=True)[self.query]


def _numbers(values: Tensor) -> Tensor:
    """Equal numbers below the length for equal values; no shape depends on them, so that this can be compiled."""
    return torch.searchsorted(torch.sort(values).values, values)


@dataclass(frozen=True)
class Positives:
    """Positives of every row among ``keys`` keys: one by ``index`` (N,), -1 where it is none of these keys, or all of
    ``groups``. ``count`` (N,) is the number by which sums over a row's positives become means."""

    index: Tensor | None
    groups: tuple[Group, ...]
    count: Tensor
    keys: int

    def mean_similarity(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) mean over the row's positives of query . key in ``dtype``, 0 for a row without any; differentiable,
        O((N + M) D)."""
        return self.similarity_sum(query, key, dtype) / self.count.clamp(min=1)

    def similarity_sum(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        """The same, not divided by the count."""
        query = query.to(dtype)
        if self.index is not None:
            similarity = torch.linalg.vecdot(query, key[self.index.clamp(min=0)].to(dtype))
            return torch.where(self.index >= 0, similarity, 0.0)
        key = key.to(dtype)
        total = sum((group.sign * group.sums(key) for group in self.groups), torch.zeros_like(query))
        return torch.linalg.vecdot(query, total)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """int32 (N,) and (M,): equal where the key, unless it is excluded, is a positive of the query."""
        if self.index is not None:
            keys = torch.arange(self.keys, dtype=torch.int32, device=self.index.device)
            return self.index.int(), keys
        label = self.groups[0]
        return label.query.int(), label.key.int()
