"""Memory that the ranks of a host share: who shares it with whom, and tensors in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from fastdp.errors import CommError

if TYPE_CHECKING:
    from fastdp import _mpi
    from fastdp.comm import Communicator

PAGE = 4096


class Refused(CommError):
    """There is not enough memory: all ranks raise this, and the communicator is as good as before."""


def allocate(comm: Communicator, total: int, begin: int, count: int) -> _mpi.SharedMemory:
    """`total` bytes, zeros, for the ranks of this host, of which this rank takes `count` from `begin` on from its NUMA
    node. All ranks call it. Raises CommError on all of them where one cannot: then nothing is left of it."""
    from fastdp import _mpi

    memory, offer, error = None, None, ""
    if comm.local_rank == 0:
        try:
            # The system would not refuse more than there is: it would kill processes until it has it.
            if total > (available := _available_bytes()):
                raise CommError(f"shared memory: {total} bytes for this host's ranks: {available} are available")
            memory = _mpi.SharedMemory.create(total)
            offer = (os.getpid(), memory.file)
        except CommError as refused:
            error = str(refused)
    leader = comm.host.index(comm.host[comm.rank])
    leaders_offer, leaders_error = comm.allgather_object((offer, error))[leader]
    if leaders_offer is not None:
        owner, file = leaders_offer
        try:
            if memory is None:
                memory = _mpi.SharedMemory.open(owner, file, total)
            memory.reserve(begin, count)
            memory.map()
        except CommError as refused:
            error = str(refused)
    for rank, failure in enumerate(comm.allgather_object(error or leaders_error)):
        if failure:
            raise Refused(f"rank {rank}: {failure}")
    assert memory is not None
    memory.touch()
    memory.close_file()
    return memory


def _available_bytes() -> int:
    """Of memory, without swapping; by proc(5), where that is there."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def join(comm: Communicator, native: _mpi.Communicator) -> None:
    """From now on the ranks of this host meet in memory that they share. All ranks call it; CommError as `allocate`."""
    from fastdp import _mpi

    total = _mpi.team_bytes(comm.local_size)
    memory = allocate(comm, total, 0, total if comm.local_rank == 0 else 0)
    processes = comm.allgather_object(_mpi.process(os.getpid()))
    here = [process for process, host in zip(processes, comm.host, strict=True) if host == comm.host[comm.rank]]
    comm.barrier()  # the last by messages alone: who leaves it may write to the memory, which all have mapped
    native.join(comm.host, memory, here)


class Segment:
    """Memory of which each rank of the host has a part, where the others can reach it."""

    def __init__(self, comm: Communicator, native: _mpi.Communicator, number: int, part_bytes: int) -> None:
        self.part_bytes = -(-max(1, part_bytes) // PAGE) * PAGE
        mine = comm.local_rank * self.part_bytes
        self._memory = allocate(comm, comm.local_size * self.part_bytes, mine, self.part_bytes)
        self._mine = mine
        native.add_segment(self._memory, number, self.part_bytes, comm.local_rank)

    def part(self, local_rank: int) -> int:
        """The address of that rank's part."""
        return self._memory.address + local_rank * self.part_bytes

    def tensor(self, numel: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """In this rank's part, `offset` bytes from its beginning. Its storage is no larger than itself: saving it, or a
        view of it, saves nothing else."""
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=self._mine + offset)


def common(comm: Communicator, count: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros that all ranks of a host share: what one writes, all see. All ranks call it."""
    total = max(1, count) * dtype.itemsize
    part = -(-total // comm.local_size // PAGE) * PAGE
    begin, end = (min(total, at * part) for at in (comm.local_rank, comm.local_rank + 1))
    return torch.frombuffer(allocate(comm, total, begin, end - begin), dtype=dtype, count=max(1, count))


def alone(flat: torch.Tensor, offset: int, numel: int) -> torch.Tensor:
    """A part of a 1-d tensor, with a storage that is no larger: saving it saves nothing else."""
    if numel == 0:
        return torch.empty(0, dtype=flat.dtype)
    return torch.frombuffer(flat.numpy(), dtype=flat.dtype, count=numel, offset=offset * flat.itemsize)
