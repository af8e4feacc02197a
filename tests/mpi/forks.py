"""A process forked from a rank is none: it may not call collectives, and its end is nothing to the other ranks."""

from __future__ import annotations

import atexit
import multiprocessing
import time

import pytest
import torch

from fastdp import comm
from fastdp.errors import CommError

c = comm.init(timeout=20)
x = c.empty(1000)


def child() -> None:
    with pytest.raises(CommError, match=f"failed before: this process was forked from rank {c.rank}, which goes on"):
        c.all_reduce(x)
    with pytest.raises(CommError, match="forked from rank"):
        c.barrier()
    atexit._run_exitfuncs()  # a fork that ends by sys.exit runs them


c.barrier()
if c.rank == 0:
    forked = multiprocessing.get_context("fork").Process(target=child)
    forked.start()
    forked.join()
    assert forked.exitcode == 0
    time.sleep(0.3)  # the others wait long enough to look who is there
assert c.all_reduce(torch.ones(5000))[0] == c.all_reduce(x.fill_(1.0))[0] == c.size
print(f"done: rank {c.rank}", flush=True)
