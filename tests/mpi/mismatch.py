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
RANKS = MPI.COMM_WORLD.size
I32, I64, F32, F64 = torch.int32, torch.int64, torch.float32, torch.float64


def call(name: str, count: int = 9, dtype: torch.dtype = F32, **how: object) -> Call:
    return lambda c: getattr(c, name)(data(0, count, dtype), **how)


# what all ranks but 1 call, what rank 1 calls, and what all must be told about rank 1
CASES: list[tuple[Call, Call, str]] = [
    (call("all_reduce", 10), call("all_reduce", 11), "count=11"),
    (call("all_reduce", 10), call("all_reduce", 0), "count=0"),
    (call("all_reduce", 10**6), call("all_reduce", 10), "count=10,"),
    (call("all_reduce", 10, I64), call("all_reduce", 10, F64), "dtype=float64"),  # of as many bytes
    (call("all_reduce"), call("broadcast"), "broadcast("),
    (call("all_reduce"), call("reduce_scatter"), "reduce_scatter(count=9,"),  # the first half of it
    (lambda c: c.barrier(), call("all_reduce", 1), "all_reduce("),
    (call("all_reduce", algorithm="ring"), call("all_reduce", algorithm="mpi"), "algorithm=mpi"),
    (call("all_reduce", algorithm="ring"), call("all_reduce", algorithm="tree"), "algorithm=tree"),
    (call("broadcast", root=0), call("broadcast", root=1), "root=1"),
    (call("reduce_scatter", 10, I64), call("reduce_scatter", 10, F64), "dtype=float64"),
    (call("reduce_scatter", 9), call("reduce_scatter", 10), "count=10"),
    (call("all_gather", 3), call("all_gather", 3, I32), "dtype=int32"),
    (call("all_gather", 3), call("broadcast", 3), "broadcast(count=3"),
    (
        call("all_gather", 3, out=torch.zeros(3 * RANKS)),
        call("all_gather", 3, out=torch.zeros(3 * RANKS + 1)),
        f"out={3 * RANKS + 1}",
    ),
    (call("all_gather", 3, out=torch.zeros(3 * RANKS)), call("all_gather", 4), "count=4"),
]


def main() -> None:
    rank = MPI.COMM_WORLD.rank
    ways = (dict(shared_memory=True), dict(shared_memory=False, algorithm="ring"))
    for number, ((most, other, told), how) in enumerate((case, how) for how in ways for case in CASES):
        c = comm.init(timeout=30, **how)
        begin = time.perf_counter()
        with pytest.raises(CommError) as caught:
            (other if rank == 1 else most)(c)
        assert time.perf_counter() - begin < 3, number
        text = str(caught.value)
        assert (
            f"ranks {', '.join(str(r) for r in range(RANKS) if r != 1)} called" in text and "rank 1 called" in text
        ), text
        assert told in text.split("rank 1 called")[1], text
        assert "\n" not in text and "segment_bytes" not in text
        for again in (most, lambda c: c.barrier()):
            begin = time.perf_counter()
            with pytest.raises(CommError, match=r"failed before: .*rank 1 called"):
                again(c)
            assert time.perf_counter() - begin < 3, number

    # Different parts are no mismatch, but an out that fits on no rank is: told once for all.
    with pytest.raises(
        CommError, match=rf"parts have {2 * RANKS} elements.*ranks 0, 1, .*all_gather\(count=2, .*out=5"
    ):
        comm.init(timeout=30).all_gather(torch.zeros(2), out=torch.zeros(5))

    with pytest.raises(CommError, match="segment_bytes=16"):
        comm.init(timeout=30, segment_bytes=16 if rank == 1 else 32)
    comm.init(timeout=30).barrier()  # MPI itself is as sound as before
    print(f"done: rank {rank}", flush=True)


main()
