"""Collectives that have been started: seen to their end, their memory kept until then, or for good after a failure."""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastdp import _mpi

# torch.autograd.graph.increment_version without its wrapper, which costs as much as the sum of a small tensor.
increment_version = torch._C._increment_version

# What late peers may still read or write after a failure: kept until the process ends, on purpose.
kept_for_late_peers: list[object] = []

in_use: weakref.WeakSet[UnderWay] = weakref.WeakSet()


class UnderWay:
    """Of one communicator."""

    def __init__(self, native: _mpi.Communicator) -> None:
        self._native = native
        self._memory: dict[int, tuple[object, ...]] = {}
        in_use.add(self)

    def run(
        self, start: Callable[..., int], arguments: tuple[Any, ...], into: Any, x: Any = None, async_op: bool = False
    ) -> Any:
        """Start a collective that writes to `into` and reads x, and see it to its end unless it is wanted later."""
        handle = Handle(self, start(*arguments), into)
        # A tensor may be given other memory while it is under way: what is kept has the old one.
        self._memory[handle.sequence] = (into.detach(), x.detach(), into) if async_op else (into, x)
        return handle if async_op else handle.wait()

    def ask(self, sequence: int, how: Callable[[int], bool | None]) -> bool:
        if sequence not in self._memory:
            return True
        try:
            if how(sequence) is False:
                return False
        except BaseException:
            self.keep_after_failure(self._memory)
            raise
        # All up to this one have ended: autograd must not use what it saved of what they wrote to.
        for number in [n for n in self._memory if n <= sequence]:
            into = self._memory.pop(number)[0]  # of an async_op detached, which has the same version
            if isinstance(into, torch.Tensor):
                increment_version((into,))
        return True

    def __del__(self) -> None:
        if not self._memory:
            return
        if not self._native.failure:
            self._native.fail("the communicator was dropped with collectives under way")
        if self._native.pending:  # MPI may still write there
            kept_for_late_peers.append(self._memory)

    def test(self, sequence: int) -> bool:
        return self.ask(sequence, self._native.test)

    def wait(self, sequence: int) -> None:
        self.ask(sequence, self._native.wait)

    def leave(self) -> None:
        self._native.leave()

    def forked(self) -> None:
        self._native.forked()

    def keep_after_failure(self, memory: object) -> None:
        if self._native.failure and self._native.pending and self not in kept_for_late_peers:
            kept_for_late_peers.extend((self, memory))


class Handle:
    """A collective that was started. Collectives run in the order in which they were started, the same on all ranks,
    and only while a rank asks about one of them: `test` and `wait` move all before it, too."""

    def __init__(self, under_way: UnderWay | None, sequence: int, result: Any) -> None:
        self._under_way, self.sequence, self._result = under_way, sequence, result

    def test(self) -> bool:
        """Whether it has ended; moves what can be moved, and does not wait. Raises CommError as `wait`."""
        return self._under_way is None or self._under_way.test(self.sequence)

    def wait(self) -> Any:
        """Where the result is, once it is there. Raises CommError when nothing has moved for the timeout."""
        if self._under_way is not None:
            self._under_way.wait(self.sequence)
        return self._result


@atexit.register
def _end_unfinished() -> None:
    """MPI_Finalize waits for peers, who may not come after a collective that never ended: end the job.

    Whoever waits for this rank is told that it ends, most of all by an exception that only it has seen.
    The second of sleep is for peers that entered that collective a little later: they too shall report it.
    """
    for under_way in in_use:
        under_way.leave()
    if not kept_for_late_peers:
        return
    from mpi4py import MPI

    if not MPI.Is_finalized():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(1.0)
        MPI.COMM_WORLD.Abort(1)


def _in_a_forked_process() -> None:
    """A child is no rank: what it does, and its end, are nothing to the others."""
    for under_way in in_use:
        under_way.forked()
    in_use.clear()
    kept_for_late_peers.clear()


os.register_at_fork(after_in_child=_in_a_forked_process)
