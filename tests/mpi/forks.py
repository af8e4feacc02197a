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
under_way = c.all_reduce(torch.ones(5000), "ring", async_op=True)
under_way.test()  # messages of it may be on their way


def child() -> None:
    with pytest.raises(CommError, match=f"failed before: this process was forked from rank {c.rank}, which goes on"):
        c.all_reduce(x)
    with pytest.raises(CommError, match="forked from rank"):
        c.barrier()
    with pytest.raises(CommError, match="forked from rank"):
        under_way.wait()
    # As a child of os.fork does that ends by sys.exit. (Under mpi4py none can: MPI_Finalize would run in it.)
    atexit._run_exitfuncs()


c.barrier()
if c.rank == 0:
    forked = multiprocessing.get_context("fork").Process(target=child)
    forked.start()
    forked.join()
    assert forked.exitcode == 0
    time.sleep(0.3)  # the others wait long enough to look who is there
assert under_way.wait()[0] == c.size
assert c.all_reduce(torch.ones(5000))[0] == c.all_reduce(x.fill_(1.0))[0] == c.size
print(f"done: rank {c.rank}", flush=True)
