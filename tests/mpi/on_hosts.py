"""Run by bench/hosts.py: `on_hosts.py RANKS_PER_HOST`. The hosts share nothing, and sums over them are right."""

from __future__ import annotations

import os
import platform
import sys
import time

import torch
from mpi4py import MPI
from together import data, expected, rough

from fastdp import comm

SEGMENT_BYTES = 4096
ALGORITHMS = ("auto", "hierarchical", "ring", "tree", "mpi")
COUNTS = (0, 1, 10, 1000, 10007, 30_011)

c, each = comm.init(timeout=30, segment_bytes=SEGMENT_BYTES), int(sys.argv[1])
host = c.rank // each
assert platform.node() == f"host{host}"
assert (c.local_rank, c.local_size) == (c.rank % each, each), (c.rank, c.local_rank, c.local_size)

with open(f"/dev/shm/of rank {c.rank}", "x"):
    c.barrier()
seen = {name for name in os.listdir("/dev/shm") if name.startswith("of rank ")}
assert seen == {f"of rank {rank}" for rank in range(host * each, (host + 1) * each)}, seen

for algorithm in ALGORITHMS:
    for count in COUNTS:
        for dtype in (torch.float32, torch.float64, torch.int64):
            x = c.all_reduce(data(c.rank, count, dtype), algorithm=algorithm)
            assert torch.equal(x, expected(c.size, count, dtype)), (c, algorithm, count, dtype)
    if algorithm != "mpi":  # which promises nothing about sums that round
        x = c.all_reduce(rough(c.rank, 10007, torch.float32), algorithm=algorithm)
        assert len(set(c.allgather_object(x.numpy().tobytes()))) == 1, (c, algorithm)

# From the first host to the last one: how long a message is under way, and its answer of one byte.
message = bytearray(1 << 20)
begin = time.perf_counter()
if c.rank == 0:
    MPI.COMM_WORLD.Send(message, c.size - 1)
    MPI.COMM_WORLD.Recv(bytearray(1), c.size - 1)
    print(f"{len(message) / (time.perf_counter() - begin):.0f} bytes per second", flush=True)
if c.rank == c.size - 1:
    MPI.COMM_WORLD.Recv(message, 0)
    MPI.COMM_WORLD.Send(bytearray(1), 0)
c.barrier()
print(f"done: rank {c.rank} on {platform.node()}", flush=True)
