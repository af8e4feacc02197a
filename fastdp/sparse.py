"""Sums over ranks of tables of which each has touched few rows (Zhao & Canny 2013, "Butterfly mixing", and their sparse
all-reduce): rows travel with their indices, and the table never does unless that is less."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdp.errors import ArgumentError, require
from fastdp.native import dtype_code

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastdp import _mpi
    from fastdp.clipping import Span
    from fastdp.comm import Communicator

DTYPES = {torch.float32: 0, torch.float64: 1}
ROWS = {torch.int64: 0}
MAX_ROWS = 1 << 36  # leaves 27 bits of a word for which of all ranks' rows it is
MAX_WIDTH = 1 << 32
HEAD = 8  # bytes: how many rows come
Rows = tuple[int, int, int]  # the address of their indices, how many they are, the address of their values


class SparseSum:
    """Of one communicator, with the memory in which rows travel: fresh pages would take as long as the sum."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._packet = self._arrived = torch.empty(0, dtype=torch.uint8)

    def __call__(
        self, native: _mpi.Communicator | None, indices: Tensor, values: Tensor, table: int
    ) -> tuple[Tensor, Tensor]:
        comm = self._comm
        check(indices, values, table)
        rows = (indices.data_ptr(), len(indices), values.data_ptr())
        if native is None:
            return _add_up([rows], table, values)
        with comm.whole("sparse_all_reduce"):
            comm.meet("sparse_all_reduce", table, values.dtype, values.shape[1])
            lists = self._in_memory(native, rows, values) or self._gathered(indices, values)
            if sum(count for _, count, _ in lists) > 2 * table:  # more than the dense sum moves
                return self._dense(indices, values, table)
            return _add_up(lists, table, values)

    def _in_memory(self, native: _mpi.Communicator, rows: Rows, values: Tensor) -> list[Rows]:
        """Everybody's, where they lie in memory that all ranks share; none if some do not fit there."""
        if not self._comm.meets_in_memory:
            return []
        row_bytes = values.shape[1] * values.itemsize
        native.leave_rows(rows, row_bytes)
        self._comm.meet("sparse_all_reduce_rows")
        return native.rows_left(row_bytes)

    def _gathered(self, indices: Tensor, values: Tensor) -> list[Rows]:
        arrived = self._comm.gather(self._packed(indices, values), -1, self._room)
        lists, address, end = [], arrived.data_ptr(), arrived.data_ptr() + arrived.numel()
        while address < end:
            count = ctypes.c_int64.from_address(address).value
            lists.append((address + HEAD, count, address + HEAD + 8 * count))
            address += HEAD + count * (8 + values.shape[1] * values.itemsize)
        return lists

    def _packed(self, indices: Tensor, values: Tensor) -> Tensor:
        """How many rows, their indices, and their values."""
        end = HEAD + indices.nbytes + values.nbytes
        if self._packet.numel() < end:
            self._packet = torch.empty(end, dtype=torch.uint8)
        address = self._packet.data_ptr()
        ctypes.c_int64.from_address(address).value = len(indices)
        for part in (indices, values):  # not by torch: its code is cold here, and takes as long as the sum
            if part.numel():
                ctypes.memmove(address + HEAD, part.data_ptr(), part.nbytes)
            address += part.nbytes
        return self._packet[:end]

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


def _add_up(lists: list[Rows], table: int, like: Tensor) -> tuple[Tensor, Tensor]:
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
    dtype_code(values, DTYPES, "values")
    within = type(table) is int and 0 <= table <= MAX_ROWS
    require(within, "numel", table, f"an int in [0, {MAX_ROWS}]: the rows of the table")
    check_rows("indices", indices, table)
    fits = values.dim() == 2 and values.shape[0] == indices.shape[0]
    fits = fits and values.shape[1] <= MAX_WIDTH
    require(fits, "values.shape", list(values.shape), f"[{indices.shape[0]}, width], width at most {MAX_WIDTH}")


def check_rows(name: str, rows: Tensor, table: int) -> None:
    """Indices of a table of so many rows."""
    from fastdp import _mpi

    dtype_code(rows, ROWS, name)
    require(rows.dim() == 1, f"{name}.shape", list(rows.shape), "[K]")
    place = _mpi.row_outside(rows.data_ptr(), len(rows), table)
    if place < len(rows):
        raise ArgumentError(f"{name}[{place}]", int(rows[place]), f"a row in [0, {table})")
