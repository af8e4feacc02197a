"""How a command of several ranks ends: together, with each problem printed once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from fastdp.comm import Communicator, init
from fastdp.errors import ArgumentError, CommError, PrivacyError
from fastdp.launch import launched_ranks

FAILED = 1
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
    agree(comm, problem)
    return made[0]


def agree(comm: Communicator, problem: str | None) -> None:
    """Leave with exit status 2, on all ranks, if any of them has a problem."""
    problems = dict.fromkeys(p for p in comm.allgather_object(problem) if p is not None)
    if problems:
        if comm.rank == 0:
            for line in problems:
                complain(line)
        sys.exit(USAGE_ERROR)


def end_all_ranks(comm: Communicator, error: Exception) -> int:
    """Print the error once, end the job and return the exit status: one line for what fastdp raises on purpose."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not leave the others waiting
    if comm.rank != 0:
        time.sleep(3.0)  # where all ranks fail alike, rank 0 speaks; the others are ended before they wake
    if isinstance(error, (PrivacyError, CommError)):
        complain(" ".join(str(error).split()))
    else:
        tell(f"rank {comm.rank} of {comm.size}:\n{traceback.format_exc()}")
    if comm.size > 1:
        comm.abort(FAILED)
    return FAILED


def interrupted(comm: Communicator, where: str) -> int:
    """Say so once and end the job: peers may be in a collective that this rank left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if comm.rank != 0:
        time.sleep(1.0)  # Ctrl-C reaches all ranks, and rank 0 speaks
    tell(f"fastdp.train: interrupted {where}\n")
    if comm.size > 1:
        comm.abort(INTERRUPTED)
    return INTERRUPTED


class StopOnSignal:
    """While it is entered, the first SIGINT or SIGTERM calls `ask`, and a second one raises KeyboardInterrupt."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._first)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _first(self, number: int, frame: object) -> None:
        for each in self._before:
            signal.signal(each, signal.default_int_handler)
        self._ask()


def complain(line: str) -> None:
    tell(f"fastdp.train: error: {line}\n")


def tell(text: str) -> None:
    """To stderr, if anybody is there to read it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def usage_error(error: Exception) -> int:
    """For errors before there is a communicator: the other ranks may have no error, and must hear of this one."""
    line = " ".join(str(error).split())
    if launched_ranks() > 1 and not isinstance(error, CommError):
        agree(init(), line)
    ranks = (os.environ.get(v) for v in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"))
    if next((r for r in ranks if r is not None), "0") == "0":
        complain(line)
    return USAGE_ERROR
