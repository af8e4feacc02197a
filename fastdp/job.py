"""How a command of several ranks ends: together, with each problem printed once."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from fastdp.comm import Communicator
from fastdp.errors import ArgumentError

USAGE_ERROR = 2
INTERRUPTED = 130  # as shells have it: 128 + SIGINT

T = TypeVar("T")


def together(comm: Communicator, make: Callable[[], T]) -> T:
    """make() on every rank. If it raises ArgumentError on any, all leave with exit status 2 and it is printed once."""
    made: list[T] = []
    problem = None
    try:
        made.append(make())
    except ArgumentError as error:
        problem = str(error)
    problems = dict.fromkeys(p for p in comm.allgather_object(problem) if p is not None)
    if problems:
        if comm.rank == 0:
            for line in problems:
                complain(line)
        sys.exit(USAGE_ERROR)
    return made[0]


def end_all_ranks(comm: Communicator) -> None:
    """Print the exception once and end the job; returns only where this is the only rank."""
    if comm.size == 1:
        return
    if comm.rank != 0:
        time.sleep(3.0)  # where all ranks fail alike, rank 0 speaks; the others are ended before they wake
    print(f"rank {comm.rank} of {comm.size}:\n{traceback.format_exc()}", end="", file=sys.stderr)
    comm.abort(1)


def interrupted(comm: Communicator, where: str) -> int:
    """Say so once and end the job: peers may be in a collective that this rank left."""
    if comm.rank != 0:
        time.sleep(1.0)  # Ctrl-C reaches all ranks, and rank 0 speaks
    print(f"fastdp.train: interrupted {where}", file=sys.stderr)
    if comm.size > 1:
        comm.abort(INTERRUPTED)
    return INTERRUPTED


def complain(line: str) -> None:
    print(f"fastdp.train: error: {line}", file=sys.stderr)


def usage_error(error: Exception) -> int:
    """For errors before MPI is there to agree on them: rank 0, by the launcher's word, prints them."""
    ranks = (os.environ.get(v) for v in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"))
    if next((r for r in ranks if r is not None), "0") == "0":
        complain(" ".join(str(error).split()))
    return USAGE_ERROR
