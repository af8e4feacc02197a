"""Ranks that call different things: CommError on every rank, at once, and the communicator is unusable."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from mpi4py import MPI
from together import data

from fastdp import comm
from fastdp.errors import CommError

Call = Callable[[comm.Communicator], object]
F32 = torch.float32
# name, what ranks 0 and 2 call, what rank 1 calls, and what all must be told about rank 1
CASES: list[tuple[str, Call, Call, str]] = [
    ("count", lambda c: c.all_reduce(data(0, 10, F32)), lambda c: c.all_reduce(data(0, 11, F32)), "count=11"),
    ("empty", lambda c: c.all_reduce(data(0, 10, F32)), lambda c: c.all_reduce(data(0, 0, F32)), "count=0"),
    (
        "dtype, same bytes",
        lambda c: c.all_reduce(torch.zeros(10, dtype=torch.int64)),
        lambda c: c.all_reduce(torch.zeros(10, dtype=torch.float64)),
        "dtype=float64",
    ),
    (
        "operation",
        lambda c: c.all_reduce(torch.zeros(1)),
        lambda c: c.broadcast(torch.zeros(1)),
        "broadcast(",
    ),
    ("barrier", lambda c: c.barrier(), lambda c: c.all_reduce(torch.zeros(1)), "all_reduce("),
    (
        "algorithm",
        lambda c: c.all_reduce(torch.zeros(9), algorithm="ring"),
        lambda c: c.all_reduce(torch.zeros(9), algorithm="mpi"),
        "algorithm=mpi",
    ),
    ("root", lambda c: c.broadcast(torch.zeros(9), 0), lambda c: c.broadcast(torch.zeros(9), 1), "root=1"),
    (
        "tree and ring",
        lambda c: c.all_reduce(torch.zeros(9), algorithm="ring"),
        lambda c: c.all_reduce(torch.zeros(9), algorithm="tree"),
        "algorithm=tree",
    ),
    (
        "half an all_reduce",
        lambda c: c.all_reduce(torch.zeros(9)),
        lambda c: c.reduce_scatter(torch.zeros(9)),
        "reduce_scatter(count=9,",
    ),
    (
        "reduce_scatter's dtype",
        lambda c: c.reduce_scatter(torch.zeros(10, dtype=torch.int64)),
        lambda c: c.reduce_scatter(torch.zeros(10, dtype=torch.float64)),
        "dtype=float64",
    ),
    (
        "reduce_scatter's count",
        lambda c: c.reduce_scatter(torch.zeros(9)),
        lambda c: c.reduce_scatter(torch.zeros(10)),
        "count=10",
    ),
    (
        "all_gather's dtype",
        lambda c: c.all_gather(torch.zeros(3)),
        lambda c: c.all_gather(torch.zeros(3, dtype=torch.int32)),
        "dtype=int32",
    ),
    (
        "all_gather and broadcast",
        lambda c: c.all_gather(torch.zeros(3)),
        lambda c: c.broadcast(torch.zeros(3)),
        "broadcast(count=3",
    ),
    (
        "all_gather's out",
        lambda c: c.all_gather(torch.zeros(3), out=torch.zeros(9)),
        lambda c: c.all_gather(torch.zeros(3), out=torch.zeros(10)),
        "out=10",
    ),
    (
        "all_gather's part",
        lambda c: c.all_gather(torch.zeros(3), out=torch.zeros(9)),
        lambda c: c.all_gather(torch.zeros(4)),
        "count=4",
    ),
    (
        "large",
        lambda c: c.all_reduce(torch.zeros(10**6)),
        lambda c: c.all_reduce(torch.zeros(10)),
        "count=10,",
    ),
]


def main() -> None:
    rank = MPI.COMM_WORLD.rank
    for name, call, other, told in CASES:
        c = comm.init(timeout=30)
        begin = time.perf_counter()
        with pytest.raises(CommError) as caught:
            (other if rank == 1 else call)(c)
        assert time.perf_counter() - begin < 3, name
        text = str(caught.value)
        assert "ranks 0, 2 called" in text and "rank 1 called" in text, text
        assert told in text.split("rank 1 called")[1], text
        assert "\n" not in text
        for again in (call, lambda c: c.barrier()):
            begin = time.perf_counter()
            with pytest.raises(CommError, match=r"failed before: .*rank 1 called"):
                again(c)
            assert time.perf_counter() - begin < 0.1, name

    # Different parts are no mismatch, but an out that fits on no rank is: told once for all.
    with pytest.raises(CommError, match=r"parts have 6 elements.*ranks 0, 1, 2 called all_gather\(count=2, .*out=5"):
        comm.init(timeout=30).all_gather(torch.zeros(2), out=torch.zeros(5))

    with pytest.raises(CommError, match="segment_bytes=16"):
        comm.init(timeout=30, segment_bytes=16 if rank == 1 else 32)
    comm.init(timeout=30).barrier()  # MPI itself is as sound as before
    print(f"done: rank {rank}", flush=True)


main()
