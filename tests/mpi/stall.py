"""One rank comes late, is interrupted, is killed or is stopped, and what the others then see.

A rank that has seen it writes a file into the folder given as argument: hydra loses output after a death, and tells
the survivors by SIGUSR1, which would end them.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from fastdp import comm
from fastdp.errors import CommError

TIMEOUT = 1.0
seen: list[str] = []


def expect_failure(c: comm.Communicator, call: Callable[[], object], match: str) -> float:
    """Repeats the call until it fails; returns how long that took."""
    begin = time.perf_counter()
    with pytest.raises(CommError, match=match) as caught:
        while True:
            call()
            begin = time.perf_counter()
    seconds = time.perf_counter() - begin
    assert seconds < TIMEOUT + 2, seconds
    seen.append(str(caught.value))
    begin = time.perf_counter()
    with pytest.raises(CommError, match="failed before"):
        c.barrier()
    assert time.perf_counter() - begin < 0.1
    return seconds


def late() -> None:
    """Rank 2 calls too late; its own call fails as well. Another communicator still works afterwards."""
    rank = MPI.COMM_WORLD.rank
    c = comm.init(timeout=TIMEOUT)
    if rank == 2:
        time.sleep(3 * TIMEOUT)
        with pytest.raises(CommError, match=r"all_reduce.* on rank 2 of 3: rank \d sent nothing"):
            c.all_reduce(torch.ones(10))
    else:
        seconds = expect_failure(c, lambda: c.all_reduce(torch.ones(10)), r"all_reduce\(.*: rank 2 did not call it")
        assert seconds > 0.9 * TIMEOUT
    assert comm.init(timeout=30).all_reduce(torch.ones(1)).item() == 3


def interrupted() -> None:
    """Ctrl-C ends a wait; the others run into their timeout."""
    rank = MPI.COMM_WORLD.rank
    c = comm.init(timeout=30 if rank == 0 else TIMEOUT, segment_bytes=1024)
    c.barrier()
    if rank == 2:
        time.sleep(3 * TIMEOUT)
        return
    if rank == 0:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        begin = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            c.barrier()
        assert time.perf_counter() - begin < 1.5
        with pytest.raises(CommError, match=r"failed before: .*interrupted by a signal"):
            c.barrier()
    else:
        expect_failure(c, c.barrier, "rank 2 did not call it")


def interrupted_while_it_moves() -> None:
    """Ctrl-C ends a transfer that never stalls: in the middle, or the communicator would be as good as new."""
    MPI.COMM_WORLD.Barrier()
    c = comm.init(timeout=TIMEOUT, segment_bytes=8)
    x = torch.zeros(4_000_000)  # 2.7 million messages
    c.barrier()
    if c.rank == 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            c.all_reduce(x)
        with pytest.raises(CommError, match=r"failed before: .*interrupted by a signal"):
            c.barrier()
    else:
        expect_failure(c, lambda: c.all_reduce(x), r"rank \d (sent|took) nothing")


def cut_off(signal_number: int, collective: str) -> None:
    """Rank 1 stops in the middle of large collectives. MPI may notice a death before the timeout."""
    c = comm.init(timeout=TIMEOUT)
    x = torch.zeros(4_000_000)
    name, _, algorithm = collective.partition(" ")
    call = functools.partial(getattr(c, name), x, **({"algorithm": algorithm} if algorithm else {}))
    c.barrier()
    if c.rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal_number)).start()
    expect_failure(c, call, name)


signal.signal(signal.SIGUSR1, signal.SIG_IGN)
_, folder, *case = sys.argv
try:
    if case == ["late"]:
        late()
        interrupted()
        interrupted_while_it_moves()
    else:
        cut_off(getattr(signal, case[0]), case[1])
except BaseException:
    Path(folder, f"rank {MPI.COMM_WORLD.rank} failed").write_text(traceback.format_exc())
    raise
Path(folder, f"rank {MPI.COMM_WORLD.rank}").write_text("\n".join(seen))
time.sleep(3 * TIMEOUT)  # the end of one rank ends the job
