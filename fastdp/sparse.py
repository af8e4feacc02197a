"""Sums over ranks of tables of which each has touched few rows (Zhao & Canny 2013, "Butterfly mixing", and their sparse
all-reduce): rows travel with their indices, and the table never does unless that is less."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdp.errors import require

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastdp.clipping import Span
    from fastdp.comm import Communicator

DTYPES = (torch.float32, torch.float64)
HEAD = 8  # bytes: how many rows come


class SparseSum:
    """Of one communicator, with the memory in which rows travel: fresh pages would take as long as the sum."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._packet = self._arrived = torch.empty(0, dtype=torch.uint8)

    def __call__(self, indices: Tensor, values: Tensor, table: int) -> tuple[Tensor, Tensor]:
        comm = self._comm
        check(indices, values, table)
        width = values.shape[1]
        row = 8 + width * values.itemsize
        if comm.size == 1:
            return _add_up([(indices.data_ptr(), len(indices), values.data_ptr())], table, values)
        comm.meet("sparse_all_reduce", table, values.dtype, width)
        arrived = comm.gather(self._packed(indices, values), -1, self._room)
        lists, address, end = [], arrived.data_ptr(), arrived.data_ptr() + arrived.numel()
        while address < end:
            count = ctypes.c_int64.from_address(address).value
            lists.append((address + HEAD, count, address + HEAD + 8 * count))
            address += HEAD + count * row
        if sum(count for _, count, _ in lists) > 2 * table:  # more than the dense sum moves
            return self._dense(indices, values, table)
        return _add_up(lists, table, values)

    def _packed(self, indices: Tensor, values: Tensor) -> Tensor:
        """How many rows, their indices, and their values."""
        begin, end = HEAD + indices.nbytes, HEAD + indices.nbytes + values.nbytes
        if self._packet.numel() < end:
            self._packet = torch.empty(end, dtype=torch.uint8)
        packet = self._packet[:end]
        packet[:HEAD].view(torch.int64)[0] = len(indices)
        packet[HEAD:begin].view(torch.int64).copy_(indices)
        if values.numel():
            ctypes.memmove(packet.data_ptr() + begin, values.data_ptr(), values.nbytes)
        return packet

    def _room(self, nbytes: int) -> Tensor:
        if self._arrived.numel() < nbytes:
            self._arrived = torch.empty(nbytes, dtype=torch.uint8)
        return self._arrived[:nbytes]

    def _dense(self, indices: Tensor, values: Tensor, table: int) -> tuple[Tensor, Tensor]:
        """By an all-reduce of the table, and of a mark for each row that is touched."""
        dense = torch.zeros(table, values.shape[1], dtype=values.dtype)
        dense.index_add_(0, indices, values.detach())
        marks = torch.zeros(table, dtype=torch.int64)
        marks[indices] = 1
        self._comm.all_reduce(dense)
        touched = self._comm.all_reduce(marks).nonzero().view(-1)
        return touched, dense[touched]


def _add_up(lists: list[tuple[int, int, int]], table: int, like: Tensor) -> tuple[Tensor, Tensor]:
    from fastdp import _mpi

    rows, width = _mpi.RowSum(lists, table), like.shape[1]
    indices = torch.empty(rows.count, dtype=torch.int64)
    sums = torch.empty(rows.count, width, dtype=like.dtype)
    rows.write(width, like.dtype == torch.float64, indices.data_ptr(), sums.data_ptr())
    return indices, sums


def sum_flat(comm: Communicator, flat: Tensor, tables: Mapping[Span, Tensor]) -> None:
    """`comm.all_reduce(flat)`, but of the tables in it only the rows that some rank has touched: all others are 0. All
    ranks name the same tables."""
    begin = 0
    for span, rows in tables.items():
        if span.offset > begin:
            comm.all_reduce(flat[begin : span.offset])
        begin = span.offset + span.numel
        view = flat[span.offset : begin].view(span.shape)
        touched, sums = comm.sparse_all_reduce(rows, view[rows], len(view))
        view[touched] = sums
    if begin < flat.numel():
        comm.all_reduce(flat[begin:])


def check(indices: Tensor, values: Tensor, table: int) -> None:
    for name, x, dtypes in (("indices", indices, (torch.int64,)), ("values", values, DTYPES)):
        require(isinstance(x, Tensor), name, type(x).__name__, "a torch.Tensor")
        require(x.dtype in dtypes, f"{name}.dtype", x.dtype, " or ".join(map(str, dtypes)))
        require(x.is_cpu, f"{name}.device", str(x.device), "cpu")
        require(x.is_contiguous(), f"{name}.stride()", x.stride(), "that of a contiguous tensor")
    require(isinstance(table, int) and table >= 0, "numel", table, "an int >= 0: the rows of the table")
    require(indices.dim() == 1, "indices.shape", list(indices.shape), "[K]")
    fits = values.dim() == 2 and values.shape[0] == indices.shape[0]
    require(fits, "values.shape", list(values.shape), f"[{indices.shape[0]}, width]")
    if len(indices):
        for place in (int(indices.argmin()), int(indices.argmax())):
            index = int(indices[place])
            require(0 <= index < table, f"indices[{place}]", index, f"a row in [0, {table})")
