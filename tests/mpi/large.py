"""More than 2^31 bytes: beyond what an int counts. Filled and checked by blocks, to keep memory low."""

from __future__ import annotations

import torch
from together import data, expected

from fastdp import comm

COUNT = (1 << 29) + 12345
BLOCK = 1 << 24

c = comm.init(timeout=60)
x = torch.empty(COUNT, dtype=torch.float32)
blocks = [(begin, min(BLOCK, COUNT - begin)) for begin in range(0, COUNT, BLOCK)]
mine, want = data(c.rank, BLOCK, torch.float32), expected(c.size, BLOCK, torch.float32)
for algorithm in ("ring", "tree", "mpi"):
    for number, (begin, count) in enumerate(blocks):
        torch.add(mine[:count], number, out=x[begin : begin + count])
    c.all_reduce(x, algorithm=algorithm)
    for number, (begin, count) in enumerate(blocks):
        assert torch.equal(x[begin : begin + count], want[:count] + c.size * number), (algorithm, begin)
if c.rank == 0:
    x[-1] = 42.0
c.broadcast(x)
assert x[-1] == 42.0
if c.rank == 0:
    print("done: large", flush=True)
