"""Which ranks are on which host, and whether they have cores enough."""

from __future__ import annotations

import dataclasses
import os
import platform
from typing import TYPE_CHECKING

from fastdp.errors import CommError

if TYPE_CHECKING:
    from fastdp.comm import Communicator


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank is. host: of each rank, the number of its host. crowded: its host's ranks outnumber their cores."""

    host: list[int]
    local_rank: int
    local_size: int
    crowded: bool


ALONE = Place([0], 0, 1, False)


def find(comm: Communicator, shared_memory: bool) -> Place:
    """All ranks call it. Raises CommError on all of them where they differ in what they want."""
    names, cores, wishes = zip(*comm.allgather_object((name(), _cores(), shared_memory)), strict=True)
    if len(set(wishes)) > 1:
        with_memory, without = ([rank for rank, wish in enumerate(wishes) if wish is on] for on in (True, False))
        raise CommError(f"ranks disagree: shared_memory=True on ranks {with_memory}, False on {without}")
    known = list(dict.fromkeys(names))
    host = [known.index(each) for each in names]
    here = host[comm.rank]
    # The union: a launcher may have bound each rank to cores of its own.
    local_cores = set().union(*(c for c, at in zip(cores, host, strict=True) if at == here))
    local_size = host.count(here)
    return Place(host, host[: comm.rank].count(here), local_size, len(local_cores) < local_size)


def name() -> tuple[str, str, str]:
    """Names the machine. Containers with names or processes of their own count as hosts: they may share no memory."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        boot_id = processes = ""
    return platform.node(), boot_id, processes


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
