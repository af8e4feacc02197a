"""Tensors that lie in several pieces, as those of memory-mapped files do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdp import _kernels


class Stacked:
    """Rows that lie in several tensors, read like one tensor [n, ...] of them."""

    def __init__(self, parts: list[Tensor]) -> None:
        """parts: [n_i, ...] on the CPU, rows packed, of one dtype and of one shape but for n_i; views are kept."""
        self.parts = parts
        self.dtype = parts[0].dtype
        for part in parts:
            same = part.dtype == self.dtype and part.shape[1:] == parts[0].shape[1:]
            assert same and part.is_contiguous() and part.is_cpu, (part.shape, part.dtype, part.stride())
        starts = [0, *itertools.accumulate(len(part) for part in parts)]
        self.shape = torch.Size((starts[-1], *parts[0].shape[1:]))
        row_bytes = self.shape[1:].numel() * self.dtype.itemsize
        self._stack = _kernels.Stack([part.data_ptr() for part in parts], starts, row_bytes)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: Tensor) -> Tensor:
        """The rows of these ids, int64 [b], in their order; time and memory for b rows.

        Raises IndexError for an id that is not in [0, n).
        """
        ids = ids.to(torch.int64).contiguous()
        rows = torch.empty(len(ids), *self.shape[1:], dtype=self.dtype)
        if not self._stack.gather(ids.data_ptr(), len(ids), rows.data_ptr(), torch.get_num_threads()):
            raise IndexError(f"ids of rows must be in [0, {len(self)})")
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
