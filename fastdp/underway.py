"""Collectives that have been started, and what becomes of them when the process forks or ends."""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdp import _mpi

# What MPI may still write to after a failed `init`: kept until the process ends, on purpose.
kept_for_late_peers: list[object] = []

in_use: weakref.WeakSet[_mpi.Communicator] = weakref.WeakSet()


class Handle:
    """A collective that was started. Collectives run in the order in which they were started, the same on all ranks,
    and only while a rank asks about one of them: `test` and `wait` move all before it, too. To the others, a rank that
    does not ask "did not call it". Handles of two communicators: in the same order on all ranks."""

    def __init__(self, native: _mpi.Communicator | None, sequence: int, result: Any) -> None:
        self._native, self.sequence, self._result = native, sequence, result

    def test(self) -> bool:
        """Whether it has ended; moves what can be moved, and does not wait. Raises CommError as `wait`."""
        return self._native is None or self._native.test(self.sequence)

    def wait(self) -> Any:
        """Where the result is, once it is there. Raises CommError when nothing has moved for the timeout."""
        if self._native is not None:
            self._native.wait(self.sequence)
        return self._result


@atexit.register
def _end_unfinished() -> None:
    """MPI_Finalize waits for peers, who may not come after a collective that never ended: end the job.

    Whoever waits for this rank is told that it ends, most of all by an exception that only it has seen.
    The second of sleep is for peers that entered that collective a little later: they too shall report it.
    """
    extension = sys.modules.get("fastdp._mpi")
    if extension is None or _forked:
        return
    for native in in_use:
        native.leave()
    unfinished = any(native.failure and native.pending for native in in_use)
    if not (unfinished or extension.unfinished() or kept_for_late_peers):
        return
    from mpi4py import MPI

    if not MPI.Is_finalized():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(1.0)
        MPI.COMM_WORLD.Abort(1)


_forked = False


def _in_a_forked_process() -> None:
    """A child is no rank: what it does, and its end, are nothing to the others."""
    global _forked
    _forked = True
    for native in in_use:
        native.forked()


os.register_at_fork(after_in_child=_in_a_forked_process)
