"""Keys that a row may not see, as pairs instead of an N x M mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exclusion:
    """Row i excludes the keys ``order[first[i] : first[i] + count[i]]``, those that carry its id."""

    query_id: Tensor
    key_id: Tensor
    order: Tensor
    first: Tensor
    count: Tensor

    @staticmethod
    def of(query_id: Tensor, key_id: Tensor) -> Exclusion:
        """From ids (N,) and (M,)."""
        ordered, order = torch.sort(key_id, stable=True)
        first = torch.searchsorted(ordered, query_id)
        return Exclusion(query_id, key_id, order, first, torch.searchsorted(ordered, query_id, right=True) - first)

    def pairs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(row within the block, key) of every excluded pair of a block of rows."""
        count = self.count[rows]
        row = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
        within = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        return row, self.order[self.first[rows][row] + within]

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Ids of queries (N,) and keys (M,) as int32: equal where the ids are, -1 for a query without such a key."""
        ordered = self.key_id[self.order]
        key_number = torch.searchsorted(ordered, self.key_id)
        return torch.where(self.count > 0, self.first, -1).int(), key_number.int()

    def mask(self) -> Tensor:
        """(N, M): true where the key carries the row's id."""
        return self.query_id[:, None] == self.key_id[None, :]
