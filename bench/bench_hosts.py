"""All-reduce of float32 across emulated hosts (hosts.py) on wires of 1 Gbit/s: ours against the MPI library's own.

`python bench/bench_hosts.py 4 2` prints the table of 4 hosts with 2 ranks each. Run by pytest: one launch of mpirun for
all sizes, each iteration on fresh data, algorithms interleaved, every sum checked. What pytest-benchmark times is the
launch; medians in microseconds are in extra_info and on screen.
Bound: what each host must send and receive is 2(H-1)/H of the bytes, however many ranks it has: `wire` is the fraction
of the wire's rate at which that went. Frames and headers take 4 % of it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import hosts
import pytest

ALGORITHMS = ("auto", "hierarchical", "ring", "tree", "mpi")  # of fastdp.comm
PEER = "MPI_Allreduce"
BYTES = (64 << 10, 1 << 20, 16 << 20)
RATE, RATE_BYTES = "1gbit", 1e9 / 8
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 100, 1.5  # per size


def measure() -> dict[str, dict[str, float]]:
    """On every rank, under mpirun: median microseconds by bytes and algorithm."""
    import torch
    from mpi4py import MPI

    from fastdp import comm

    torch.set_num_threads(1)
    c, world = comm.init(timeout=30), MPI.COMM_WORLD
    medians = {}
    for nbytes in BYTES:
        total = torch.zeros(nbytes // 4)
        for rank in range(c.size):  # whole numbers: every order of summation is exact
            addend = torch.randint(-1000, 1000, total.shape, generator=torch.Generator().manual_seed(rank)).float()
            total += addend
            if rank == c.rank:
                fresh = addend
        x = torch.empty_like(fresh)
        calls: dict[str, Callable[[], object]] = {PEER: partial(world.Allreduce, MPI.IN_PLACE, x.numpy())}
        calls |= {name: partial(c.all_reduce, x, algorithm=name) for name in ALGORITHMS}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        order = random.Random(nbytes)  # the same on all ranks; nobody always follows the same one
        end = time.perf_counter() + SECONDS
        for round_ in range(1 + MAX_ROUNDS):  # the first one warms up
            if round_ > MIN_ROUNDS and world.bcast(time.perf_counter() > end):
                break
            for name in order.sample(list(calls), len(calls)):
                x.copy_(fresh)
                world.Barrier()
                begin = time.perf_counter()
                calls[name]()
                elapsed = time.perf_counter() - begin
                assert torch.equal(x, total), (nbytes, name)
                if round_:
                    seconds[name].append(elapsed)
        medians[str(nbytes)] = {name: statistics.median(values) * 1e6 for name, values in seconds.items()}
    # A collective is as slow as its slowest rank.
    everyone = c.allgather_object(medians)
    return {size: {name: max(rank[size][name] for rank in everyone) for name in row} for size, row in medians.items()}


def launch(count: int, each: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, __file__, "measure"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with hosts.emulate(count, RATE) as emulated:
        done = emulated.mpirun(count * each, command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    medians: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return medians


def show(medians: dict[str, dict[str, float]], count: int) -> dict[str, dict[str, float]]:
    """One row per size and algorithm; ratio: the speed of the peer is 1."""
    rows = {}
    for size, row in medians.items():
        for name, microseconds in row.items():
            wire = int(size) * 2 * (count - 1) / count / (microseconds * 1e-6) / RATE_BYTES
            ratio = row[PEER] / microseconds
            rows[f"{size} B {name}"] = {"us": round(microseconds), "wire": round(wire, 2), "ratio": round(ratio, 2)}
            print(f"{size:>9} B  {name:<13} {microseconds:>10.0f} us  wire {wire:5.2f}  speed {ratio:5.2f} of {PEER}'s")
    return rows


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("each", [1, 2])
def bench_hosts(benchmark: Any, count: int, each: int) -> None:
    if reason := hosts.why_not(RATE):
        pytest.skip(f"no hosts here: {reason}")
    medians = benchmark.pedantic(launch, args=(count, each), rounds=1, iterations=1)
    benchmark.extra_info.update({"hosts": count, "ranks per host": each, "rate": RATE, **show(medians, count)})


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        from fastdp import comm

        table = measure()
        if comm.init().rank == 0:
            print(json.dumps(table), flush=True)
    elif len(sys.argv) != 3 or not all(word.isdigit() for word in sys.argv[1:]):
        sys.exit(__doc__)
    else:
        hosts_, each_ = map(int, sys.argv[1:])
        show(launch(hosts_, each_), hosts_)
