"""Rank 1's program ends by an exception of its own: the others are told at once, not at the timeout."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from fastdp import comm
from fastdp.errors import CommError

c = comm.init(timeout=60)
for _ in range(1000):
    c.all_reduce(torch.ones(10))
if c.rank == 1:
    raise ValueError("of rank 1 alone")
begin = time.perf_counter()
with pytest.raises(CommError, match=r"on rank \d of 3: (rank \d gave up: .*)?rank 1 has left: its program ends$"):
    c.all_reduce(torch.ones(10))
assert time.perf_counter() - begin < 10  # of 60
Path(sys.argv[1], f"rank {c.rank}").touch()
