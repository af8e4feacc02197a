"""Sums over ranks of what lies on their GPUs: by way of the CPU's memory and fastdp's own all-reduce, or by NCCL.

No GPU has run this yet: tests put a stand-in in the place of its copies, and gloo in NCCL's.
"""

from __future__ import annotations

import datetime
import platform
import weakref
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastdp.comm import Communicator
from fastdp.errors import CommError

# 1 MiB is copied in 50 us at 20 GB/s, ten times what the copy and the wait for it cost; and a sum stays in a cache.
SEGMENT_BYTES = 1 << 20
PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU of the process


class Copies(Protocol):
    """Copies between a GPU and the CPU, each way in the order in which they are asked for, beside what else runs."""

    def lock(self, host: Tensor) -> None:
        """Memory of the CPU that they go to and come from, for as long as it is there."""

    def begin(self) -> None:
        """Those that follow come after all that has been asked of the GPU, copies up included."""

    def down(self, source: Tensor, host: Tensor) -> Any:
        """To the CPU; `wait` takes what this returns."""

    def wait(self, copied: Any) -> None:
        """Until that copy is done."""

    def up(self, host: Tensor, to: Tensor) -> None:
        """To the GPU. `host` is left alone until the copies that follow the next begin()."""

    def end(self) -> None:
        """What is asked of the GPU from now on comes after them."""


class GpuCopies:
    """Each way on a stream of its own, so that the two directions of the bus are used at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def lock(self, host: Tensor) -> None:
        if host.numel() == 0:
            return
        address, runtime = host.data_ptr(), torch.cuda.cudart()
        with torch.cuda.device(self._device):
            error = runtime.cudaHostRegister(address, host.nbytes, PORTABLE)
        if int(error):
            raise CommError(f"{host.nbytes} bytes of memory cannot be locked for copies from the GPU: {error}")
        weakref.finalize(host, runtime.cudaHostUnregister, address)  # or other memory could not be locked there

    def begin(self) -> None:
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        self._down.wait_stream(self._up)

    def down(self, source: Tensor, host: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._down):
            host.copy_(source, non_blocking=True)
            copied: torch.cuda.Event = self._down.record_event()
        return copied

    def wait(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()

    def up(self, host: Tensor, to: Tensor) -> None:
        with torch.cuda.stream(self._up):
            to.copy_(host, non_blocking=True)

    def end(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._up)


class Staged:
    """By way of memory that the host's ranks share, in segments: while one is summed, the next comes down and the last
    goes up. The sum is that of `comm.all_reduce` on each segment."""

    def __init__(self, comm: Communicator, flat: Tensor, copies: Copies) -> None:
        self._comm, self._copies = comm, copies
        with comm.whole("memory for sums of GPUs"):
            self._host = comm.empty(flat.numel(), flat.dtype)
            copies.lock(self._host)

    def all_reduce(self, flat: Tensor) -> None:
        copies, numel = self._copies, SEGMENT_BYTES // flat.itemsize
        copies.begin()
        segments = list(zip(flat.split(numel), self._host.split(numel), strict=True))
        copied = [copies.down(part, host) for part, host in segments]
        for (part, host), copy in zip(segments, copied, strict=True):
            copies.wait(copy)
            self._comm.all_reduce(host)
            copies.up(host, part)
        copies.end()


class Nccl:
    """By torch.distributed, in a group of its own if there is one already. All ranks make it."""

    def __init__(self, comm: Communicator, backend: str = "nccl") -> None:
        timeout = datetime.timedelta(seconds=comm.timeout)
        if dist.is_initialized():
            if (dist.get_rank(), dist.get_world_size()) != (comm.rank, comm.size):
                found = f"rank {dist.get_rank()} of {dist.get_world_size()}"
                raise CommError(f"torch.distributed: this is {found}, not rank {comm.rank} of {comm.size} as in comm")
            self._group = dist.new_group(backend=backend, timeout=timeout)
            return
        place = "127.0.0.1" if comm.hosts == 1 else platform.node()
        with comm.whole("nccl"):
            first = dist.TCPStore(place, 0, comm.size, True, timeout, False) if comm.rank == 0 else None  # type: ignore[attr-defined]
            place, port = comm.bcast_object((place, first.port) if first else None)
            store = first or dist.TCPStore(place, port, comm.size, False, timeout)  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=comm.rank, world_size=comm.size, timeout=timeout)
        self._group = dist.group.WORLD

    def all_reduce(self, flat: Tensor) -> None:
        dist.all_reduce(flat, group=self._group)


def of(comm: Communicator, flat: Tensor) -> Staged | Nccl:
    """As the communicator was made to: algorithm="nccl", or any of its own. All ranks call it."""
    return Nccl(comm) if comm.by_nccl else Staged(comm, flat, GpuCopies(flat.device))
