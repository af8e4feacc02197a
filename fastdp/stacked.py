"""Tensors that lie in several pieces, as those of memory-mapped files do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Stacked:
    """Rows that lie in several tensors, read like one tensor [n, ...] of them."""

    def __init__(self, parts: list[Tensor]) -> None:
        self.parts = parts
        sizes = torch.tensor([0, *(len(part) for part in parts)])
        self._starts = sizes.cumsum(0)
        self.shape = torch.Size((int(self._starts[-1]), *parts[0].shape[1:]))
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: Tensor) -> Tensor:
        """The rows of these ids, int64 [b], in their order; time and memory for b rows."""
        if len(self.parts) == 1 and (not len(ids) or ids.min() >= 0):
            return self.parts[0][ids]
        if bool((ids[1:] < ids[:-1]).any()):
            order = ids.argsort()
            rows = torch.empty(len(ids), *self.shape[1:], dtype=self.dtype)
            rows[order] = self[ids[order]]
            return rows
        cuts = torch.searchsorted(ids, self._starts)
        if cuts[0] != 0 or cuts[-1] != len(ids):
            raise IndexError(f"ids of rows must be in [0, {len(self)})")
        rows = torch.empty(len(ids), *self.shape[1:], dtype=self.dtype)
        for i in (cuts[1:] > cuts[:-1]).nonzero().flatten().tolist():
            a, b = int(cuts[i]), int(cuts[i + 1])
            torch.index_select(self.parts[i], 0, ids[a:b] - self._starts[i], out=rows[a:b])
        return rows

    def split(self, rows: int) -> Iterator[Tensor]:
        """All rows, at most so many at a time."""
        for part in self.parts:
            yield from part.split(rows)


class Records(Dataset[tuple[Tensor, ...]]):
    """A map-style data set of rows of several tensors or stacks, as TensorDataset is of tensors."""

    def __init__(self, *tensors: Tensor | Stacked) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        ids = torch.tensor([row])
        return tuple(x[ids][0] for x in self.tensors)
