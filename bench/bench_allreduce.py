"""All-reduce of float32 on 2 ranks: ours against the MPI library's own, through fastdp and called directly.

Run by pytest: one launch of mpirun for all sizes, each iteration on fresh data, algorithms interleaved. What
pytest-benchmark times is the launch; medians in microseconds and bus bandwidths are in extra_info and on screen.
At both thread levels: with MULTIPLE, the default of mpi4py, MPICH disables its fast shared-memory collectives; FUNNELED
is MPICH at its best.
Bound: each rank must move 2(P-1)/P of the bytes in and out: busbw = bytes / seconds * 2(P-1)/P, as in nccl-tests.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BYTES = (64, 4 << 10, 64 << 10, 1 << 20, 14 << 20, 64 << 20)
RANKS = 2


def measure(thread_level: str) -> dict[str, dict[str, float]]:
    """On every rank, under mpirun: median microseconds by bytes and algorithm."""
    import mpi4py
    import torch

    mpi4py.rc.thread_level = thread_level
    from mpi4py import MPI

    from fastdp import comm

    torch.set_num_threads(1)
    c, world = comm.init(timeout=30), MPI.COMM_WORLD
    medians = {}
    for nbytes in BYTES:
        inputs = [torch.randn(nbytes // 4, generator=torch.Generator().manual_seed(r)) for r in range(RANKS)]
        fresh, total = inputs[c.rank], inputs[0] + inputs[1]
        x = torch.empty_like(fresh)
        view = x.numpy()
        calls = {
            "ring": lambda x=x: c.all_reduce(x, algorithm="ring"),
            "tree": lambda x=x: c.all_reduce(x, algorithm="tree"),
            "mpi": lambda x=x: c.all_reduce(x, algorithm="mpi"),
            "MPI_Allreduce": lambda view=view: world.Allreduce(MPI.IN_PLACE, view),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        # The first round warms up; about a tenth of a second per size and algorithm.
        for round_ in range(1 + max(7, min(300, (64 << 20) // nbytes))):
            names = list(calls)
            first = round_ % len(names)  # nobody always follows the same one
            for name in names[first:] + names[:first]:
                x.copy_(fresh)
                world.Barrier()
                begin = time.perf_counter()
                calls[name]()
                elapsed = time.perf_counter() - begin
                if round_:
                    seconds[name].append(elapsed)
                else:
                    assert torch.equal(x, total), (nbytes, name)  # two addends: exact in any order
        medians[str(nbytes)] = {name: statistics.median(values) * 1e6 for name, values in seconds.items()}
    # A collective is as slow as its slowest rank.
    everyone = c.allgather_object(medians)
    return {size: {name: max(rank[size][name] for rank in everyone) for name in row} for size, row in medians.items()}


def launch(mpirun: str, thread_level: str) -> dict[str, dict[str, float]]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = [mpirun, "-n", str(RANKS), sys.executable, __file__, thread_level]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    medians: dict[str, dict[str, float]] = json.loads(result.stdout.splitlines()[-1])
    return medians


@pytest.mark.parametrize("thread_level", ["multiple", "funneled"])
def bench_allreduce(benchmark: Any, thread_level: str) -> None:
    beside_python = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("no mpirun, neither beside python nor on PATH")
    medians = benchmark.pedantic(launch, args=(mpirun, thread_level), rounds=1, iterations=1)
    benchmark.extra_info["ranks"] = RANKS
    for nbytes, row in medians.items():
        for name, microseconds in row.items():
            busbw = int(nbytes) / microseconds * 1e-3 * 2 * (RANKS - 1) / RANKS
            benchmark.extra_info[f"{nbytes} B {name}"] = {
                "us": round(microseconds, 2),
                "busbw_GBps": round(busbw, 2),
            }
            print(f"{nbytes:>9} B  {name:<13} {microseconds:>10.1f} us  busbw {busbw:6.2f} GB/s")


if __name__ == "__main__":
    from fastdp import comm

    table = measure(sys.argv[1])
    if comm.init().rank == 0:
        print(json.dumps(table), flush=True)
