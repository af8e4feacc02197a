"""Sums over ranks of tables of which each has touched few rows (Zhao & Canny 2013, "Butterfly mixing", and their sparse
all-reduce): rows travel with their indices, and the table never does unless that is less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdp.errors import ArgumentError, require

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastdp.clipping import Span
    from fastdp.comm import Communicator

DTYPES = (torch.float32, torch.float64)


def add_up(indices: Tensor, values: Tensor, table: int, only_if_needed: bool = False) -> tuple[Tensor, Tensor]:
    """Each index once, ascending, and the sums of its rows, in their order. only_if_needed: as they are, if none comes
    twice."""
    from fastdp import _mpi

    rows = _mpi.RowSum(indices.data_ptr(), indices.numel(), table)
    if rows.bad >= 0:
        raise ArgumentError(f"indices[{rows.bad}]", int(indices[rows.bad]), f"a row in [0, {table})")
    if only_if_needed and rows.count == indices.numel():
        return indices, values
    width = values.shape[1]
    unique = torch.empty(rows.count, dtype=torch.int64)
    sums = torch.empty(rows.count, width, dtype=values.dtype)
    wide = values.dtype == torch.float64
    rows.write(values.data_ptr(), width, wide, unique.data_ptr(), sums.data_ptr())
    return unique, sums


class SparseSum:
    """Of one communicator, with the memory in which rows arrive: fresh pages would take as long as the sum."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._arrived: dict[torch.dtype, Tensor] = {}

    def __call__(self, indices: Tensor, values: Tensor, table: int) -> tuple[Tensor, Tensor]:
        comm = self._comm
        check(indices, values, table)
        if comm.size == 1:
            return add_up(indices, values, table)
        indices, values = add_up(indices, values, table, only_if_needed=True)
        width = values.shape[1]
        comm.meet("sparse_all_reduce", table, values.dtype, width)
        everywhere = comm.all_gather(indices)
        rows = everywhere.numel()
        if rows > 2 * table:  # more than the dense sum moves
            return self._dense(indices, values, everywhere, table)
        if values.dtype not in self._arrived or self._arrived[values.dtype].numel() < rows * width:
            self._arrived[values.dtype] = torch.empty(rows * width, dtype=values.dtype)
        arrived = self._arrived[values.dtype][: rows * width]
        return add_up(everywhere, comm.all_gather(values, out=arrived).view(rows, width), table)

    def _dense(self, indices: Tensor, values: Tensor, everywhere: Tensor, table: int) -> tuple[Tensor, Tensor]:
        dense = torch.zeros(table, values.shape[1], dtype=values.dtype)
        dense[indices] = values
        self._comm.all_reduce(dense)
        touched = torch.unique(everywhere)
        return touched, dense[touched]


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
