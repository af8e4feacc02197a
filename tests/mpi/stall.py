"""One rank comes late, is interrupted, is killed or is stopped, and what the others then see.

A rank that has seen it writes a file into the folder given as argument: hydra loses output after a death, and tells
the survivors by SIGUSR1, which would end them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
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
from torch import nn

from fastdp import comm, hosts
from fastdp.clipping import spans_of
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


def late(shared_memory: bool) -> None:
    """Rank 2 calls too late; its own call fails as well. Another communicator still works afterwards. Rank 3, if there
    is one, is slow: nobody takes it for the late one."""
    rank = MPI.COMM_WORLD.rank
    c = comm.init(timeout=TIMEOUT, shared_memory=shared_memory, algorithm="auto" if shared_memory else "ring")
    if rank == 2:
        time.sleep(3 * TIMEOUT)
        with pytest.raises(CommError, match=r"all_reduce.* on rank 2 of \d: rank \d (gave up: .*rank 2|sent nothing)"):
            c.all_reduce(torch.ones(10))
    else:
        if rank == 3:
            time.sleep(0.8 * TIMEOUT)
        seconds = expect_failure(c, lambda: c.all_reduce(torch.ones(10)), r"all_reduce\(.*: rank 2 did not call it")
        assert seconds > 0.9 * TIMEOUT or rank == 3  # which the others tell
    assert comm.init(timeout=30).all_reduce(torch.ones(1)).item() == MPI.COMM_WORLD.size


def interrupted() -> None:
    """Ctrl-C ends a wait; the others learn of it at once."""
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
        expect_failure(c, c.barrier, "rank 0 gave up: .*interrupted by a signal")


def interrupted_while_it_moves() -> None:
    """Ctrl-C ends a transfer that never stalls: in the middle, or the communicator would be as good as new."""
    MPI.COMM_WORLD.Barrier()
    c = comm.init(timeout=TIMEOUT, segment_bytes=8, algorithm="ring")
    x = torch.zeros(4_000_000)  # 2.7 million messages
    c.barrier()
    if c.rank == 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            c.all_reduce(x)
        with pytest.raises(CommError, match=r"failed before: .*interrupted by a signal"):
            c.barrier()
    else:
        expect_failure(c, lambda: c.all_reduce(x), r"rank \d (sent nothing|took nothing|gave up)")


def cut_off(signal_number: int, collective: str) -> None:
    """Rank 1 is killed or stopped somewhere in a row of collectives. One that has ended is known by its process long
    before the timeout; one that has stopped, at the timeout, and the error says so. "messages": none is shared, and
    MPI may notice a death before the timeout. "hosts": rank 2 is on another host, and is told."""
    name, *how = collective.split()
    in_memory = "messages" not in how
    killed = signal_number == signal.SIGKILL
    if "hosts" in how:
        host = "another" if MPI.COMM_WORLD.rank == 2 else "one"
        hosts.name = lambda: (host, "", "")
    c = comm.init(timeout=10 * TIMEOUT if killed and in_memory else TIMEOUT, shared_memory=in_memory)
    count = 100 if "small" in how else 4_000_000
    x = c.empty(count) if "window" in how else torch.zeros(count)
    known = [word for word in how if word in ("ring", "tree", "mpi", "hierarchical")]
    call = functools.partial(getattr(c, name, None) or c.all_reduce, x, *known)
    if name == "reduce_noise_step":
        module = nn.Linear(1000, 2000)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9)
        sharded = c.shard(optimizer, spans_of(module, optimizer))
        key = torch.zeros(32, dtype=torch.uint8)
        call = functools.partial(c.reduce_noise_step, sharded, noise_std=1.0, batch_size=1, key=key, step=0)
    if name == "handle":
        call = functools.partial(ask, c, x, known)
    c.barrier()
    if c.rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal_number)).start()
        with contextlib.suppress(CommError):
            while True:
                call()
        os._exit(1)  # Open MPI lets a stopped process run on before it ends it: what that sees then does not count
    seconds = expect_failure(c, call, "rank 1" if in_memory else "all_reduce|reduce_scatter|all_gather|broadcast")
    if in_memory:
        assert seconds < 3 if killed else seconds > 0.5 * TIMEOUT, seconds
        reason = "rank 1 is gone: its process [0-9]+ has ended" if killed else "process [0-9]+ of rank 1 is stopped"
        assert len(re.findall(reason, seen[-1])) == 1, seen[-1]


def ask(c: comm.Communicator, x: torch.Tensor, algorithm: list[str]) -> None:
    handle = c.all_reduce(x, *algorithm, async_op=True)
    while not handle.test():
        time.sleep(0.001)


signal.signal(signal.SIGUSR1, signal.SIG_IGN)
_, folder, *case = sys.argv
try:
    if case == ["late"]:
        late(shared_memory=True)
        late(shared_memory=False)
        interrupted()
        interrupted_while_it_moves()
    else:
        cut_off(getattr(signal, case[0]), case[1])
except BaseException:
    Path(folder, f"rank {MPI.COMM_WORLD.rank} failed").write_text(traceback.format_exc())
    raise
Path(folder, f"rank {MPI.COMM_WORLD.rank}").write_text("\n".join(seen))
time.sleep(3 * TIMEOUT)  # the end of one rank ends the job
