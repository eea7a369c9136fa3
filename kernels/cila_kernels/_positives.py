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
    """Queries and keys with equal values have equal numbers in 0..size-1; ``sign``: adds positives, or takes them."""

    query: Tensor
    key: Tensor
    size: int
    sign: int

    @staticmethod
    def of(sign: int, *columns: tuple[Tensor, Tensor]) -> Group:
        """Rows and keys that agree in every column of (query (N,), key (M,)) integers are one group."""
        m = columns[0][1].shape[0]
        joint: Tensor | None = None
        for query, key in columns:
            _, number = torch.unique(torch.cat([key, query]), return_inverse=True)
            if joint is not None:
                _, number = torch.unique(joint * (number.max() + 1) + number, return_inverse=True)
            joint = number
        assert joint is not None
        return Group(joint[m:], joint[:m], int(joint.max()) + 1, sign)

    def sizes(self) -> Tensor:
        """For each row (N,) the number of keys in its group."""
        return torch.bincount(self.key, minlength=self.size)[self.query]

    def sums(self, key: Tensor) -> Tensor:
        """For each row (N, D) the sum of the keys in its group; differentiable."""
        zeros = key.new_zeros(self.size, key.shape[1])
        return zeros.index_put((self.key,), key, accumulate=True)[self.query]


@dataclass(frozen=True)
class Positives:
    """Positives of every row: one key by ``index`` (N,), or all keys of ``groups``. ``count`` (N,) is their number."""

    index: Tensor | None
    groups: tuple[Group, ...]
    count: Tensor

    def mean_similarity(self, query: Tensor, key: Tensor) -> Tensor:
        """(N,) mean over the row's positives of query . key, 0 for a row without any; differentiable, O((N + M) D)."""
        if self.index is not None:
            return torch.linalg.vecdot(query, key[self.index])
        total = sum((group.sign * group.sums(key) for group in self.groups), torch.zeros_like(query))
        return torch.linalg.vecdot(query, total) / self.count.clamp(min=1)
